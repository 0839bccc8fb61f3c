"""How large a model's KV is, from its config.json or from plain numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from lmcache_rag.errors import ConfigError
from lmcache_rag.protocol import LMCACHE_CHUNK

BYTES: Final[Mapping[str, int]] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
_KINDS: Final[Mapping[str, str]] = {
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
}
ALIGN: Final = 4096  # L1MemoryManagerConfig.align_bytes of LMCache 0.5.6 (lmcache/v1/distributed/config.py)
_REMEDY: Final = "Give --layers, --kv-heads and --head-size, or a folder with a config.json."


@dataclass(frozen=True)
class Geometry:
    """What of a model decides the size of its KV, and roughly how fast it is computed.

    Attributes:
        name: The model's name.
        layers: Layers that keep keys and values of every token.
        values: Numbers that such a layer keeps for a token: twice KV heads times head size, or MLA's latent vector.
        parameters: Parameters that a token is multiplied with, without embeddings; 0: unknown.
        dtype: Of the KV: bf16, fp16, fp8 or fp32.
        notes: What the numbers leave out.
    """

    name: str
    layers: int
    values: int
    parameters: int = 0
    dtype: str = "bf16"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.layers < 1 or self.values < 1 or self.parameters < 0:
            raise ConfigError(f"{self.name}: layers, KV heads and head size must be above 0.", remedy=_REMEDY)
        if self.dtype not in BYTES:
            raise ConfigError(f"The KV's dtype {self.dtype!r} is not known.", remedy=f"One of {', '.join(BYTES)}.")

    @property
    def bytes_per_token(self) -> int:
        """KV of one token over all layers, in bytes."""
        return self.layers * self.values * BYTES[self.dtype]

    def with_dtype(self, dtype: str) -> Geometry:
        """The same with the KV in another dtype."""
        return replace(self, dtype=dtype)

    def object_bytes(self, chunk: int = LMCACHE_CHUNK, ranks: int = 1) -> int:
        """What LMCache takes in memory for one of its chunks of so many tokens, over all ranks, in bytes.

        Each rank's part is an object of its own, rounded up to ALIGN bytes (LMCache 0.5.6,
        ``AddressManager.compute_aligned_size`` in lmcache/v1/memory_management.py).
        """
        each = math.ceil(self.bytes_per_token * chunk / ranks)
        return ranks * -(-each // ALIGN) * ALIGN

    def chunk_bytes(self, tokens: int, chunk: int = LMCACHE_CHUNK, ranks: int = 1) -> int:
        """What LMCache keeps of a passage of so many tokens, in bytes: whole LMCache chunks only."""
        return objects(tokens, chunk) * self.object_bytes(chunk, ranks)


def objects(tokens: int, chunk: int = LMCACHE_CHUNK) -> int:
    """LMCache chunks in a passage of so many tokens.

    Only whole ones are stored: the prefix before a passage is padded to whole LMCache chunks, and the rest at its end
    is computed with each question (``TokenHasher.compute_chunk_hashes`` hashes whole chunks only).
    """
    return tokens // chunk


def from_numbers(
    layers: int, kv_heads: int, head_size: int, *, parameters: int = 0, dtype: str = "bf16", name: str = "model"
) -> Geometry:
    """A geometry from plain numbers.

    Args:
        layers: Layers with attention.
        kv_heads: KV heads of a layer.
        head_size: Numbers of a head.
        parameters: Active parameters; 0: unknown.
        dtype: Of the KV.
        name: The model's name.

    Raises:
        ConfigError: A number is not above 0, or the dtype is not known.
    """
    return Geometry(name, layers, 2 * kv_heads * head_size, parameters, dtype)


def from_config(config: Mapping[str, Any], *, name: str = "", dtype: str = "") -> Geometry:
    """A geometry from a model's config.json.

    Layers without keys and values (recurrent ones) are left out; windows count as full layers, as LMCache stores them.

    Args:
        config: The configuration.
        name: The model's name.
        dtype: Of the KV; "": the model's own.

    Raises:
        ConfigError: It names no layers or heads.
    """
    inner = config.get("text_config")
    facts = {**config, **inner} if isinstance(inner, Mapping) else config
    notes = []
    try:
        layers, hidden = int(facts["num_hidden_layers"]), int(facts["hidden_size"])
        heads = int(facts["num_attention_heads"])
        kinds = facts.get("layer_types")
        if isinstance(kinds, list) and len(kinds) == layers:
            kept = sum("attention" in str(kind) and "linear" not in str(kind) for kind in kinds)
            if kept < layers:
                notes.append(f"{layers - kept} of {layers} layers are recurrent: their state is not counted")
            layers = kept
        if facts.get("kv_lora_rank"):
            values = int(facts["kv_lora_rank"]) + int(facts.get("qk_rope_head_dim") or 0)
        else:
            size = int(facts.get("head_dim") or hidden // heads)
            values = 2 * int(facts.get("num_key_value_heads") or heads) * size
        kind = str(facts.get("dtype") or facts.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        found = Geometry(
            name or str(config.get("_name_or_path") or "model"),
            layers,
            values,
            _parameters(facts, hidden, heads),
            dtype or _KINDS.get(kind, "bf16"),
            tuple(notes),
        )
    except (LookupError, TypeError, ValueError) as problem:
        if isinstance(problem, ConfigError):
            raise
        raise ConfigError(
            f"The configuration of {name or 'the model'} does not say {problem}.", remedy=_REMEDY
        ) from None
    return found


def read_config(model: str, *, dtype: str = "") -> Geometry:
    """The geometry of a model by its name, its folder or its config.json; nothing is downloaded.

    Raises:
        ConfigError: There is no such file, or it cannot be read.
    """
    from lmcache_rag.weights import locate

    path = Path(model).expanduser()
    if not path.is_file():
        folder = path if (path / "config.json").is_file() else None
        if folder is None and (found := locate(model, "model")) is not None:
            folder = found.path
        if folder is None:
            folder = _cached(model)
        if folder is None:
            raise ConfigError(f"{model} is not on this machine.", remedy=_REMEDY)
        path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{path} cannot be read: {problem}", remedy=_REMEDY) from problem
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not a configuration.", remedy=_REMEDY)
    name = path.parent.name if path.name == "config.json" else path.stem
    return from_config(config, name=name if Path(model).expanduser().exists() else model, dtype=dtype)


def _cached(name: str) -> Path | None:
    """The folder in the Hugging Face cache that has this model's config.json, with weights or without."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _parameters(facts: Mapping[str, Any], hidden: int, heads: int) -> int:
    """Parameters of the layers that one token is multiplied with: attention, and its own experts or the whole MLP."""
    size = int(facts.get("head_dim") or hidden // heads)
    kv = int(facts.get("num_key_value_heads") or heads)
    attention = hidden * size * 2 * (heads + kv)
    experts = int(facts.get("num_experts_per_tok") or 0)
    wide = int(facts.get("intermediate_size") or 4 * hidden)
    wide = experts * int(facts.get("moe_intermediate_size") or wide) if experts else wide
    return int(facts["num_hidden_layers"]) * (attention + 3 * hidden * wide)
