"""What KV depends on besides tokens: the model's weights, the LoRA adapter, and the layout of vLLM's KV cache."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib.metadata
import json
import logging
import os
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lmcache_rag import __version__
from lmcache_rag.protocol import shown

log = logging.getLogger("lmcache_rag")

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_HEAD, _PIECE = 65536, 1024
_PIECES, _LEAST = 1024, 32  # samples of all files together, and of each file at least
_READERS = 16  # a network disk answers each read after milliseconds
_MOST_HEADER = 64 << 20
_ADAPTERS = 1024
SHOWN = 16  # hex digits of a digest on /metrics
STORED = 2  # of the form of KV in second tiers: since 2 it ends with a digest
_VARIABLES = ("VLLM_KV_CACHE_LAYOUT", "VLLM_ATTENTION_BACKEND")  # vLLM's, which change the layout of KV


def identity(vllm_config: Any, chunk: int = 0) -> str:
    """A fingerprint of what KV depends on besides tokens and adapter. Never raises: a new one where that is unknown.

    Args:
        vllm_config: vLLM's configuration.
        chunk: Tokens of an LMCache chunk.
    """
    try:
        return _digest({**_model(vllm_config), **_form(vllm_config), "chunk": chunk, "stored": STORED})
    except Exception:
        log.warning("Cannot fingerprint the weights; KV of earlier runs is not reused", exc_info=True)
        return uuid.uuid4().hex


def facts(vllm_config: Any, chunk: int, secret: bytes, prefix_tokens: int = 0) -> dict[str, str]:
    """What servers have to have in common to share KV, as protocol.SERVER_FACTS: digests and versions. Never raises.

    Args:
        vllm_config: vLLM's configuration.
        chunk: Tokens of an LMCache chunk.
        secret: By which KV is stored. Its digest is keyed by it, and does not show it.
        prefix_tokens: First tokens that stand for a prefix that no request names.
    """
    found = {"chunk": str(chunk), "prefix_tokens": str(prefix_tokens or chunk)}
    found["secret"] = hmac.digest(secret, b"lmcache_rag: the same secret", "sha256").hex()[:SHOWN] if secret else "none"
    try:
        model = _model(vllm_config)
        weights = {name: model.pop(name) for name in ("weights", "revision", "random weights")}
        parts = {"weights": weights, "config": model, "layout": _form(vllm_config)}
        found |= {name: _digest(part)[:SHOWN] for name, part in parts.items()}
    except Exception:
        log.debug("The model's digests are not published", exc_info=True)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["lmcache"] = importlib.metadata.version("lmcache")
    return found | {"vllm": _version(), "lmcache_rag": __version__}


def _model(vllm_config: Any) -> dict[str, Any]:
    """Weights, revision, dtypes, quantisation, RoPE, and everything else in the model's configuration.

    Weights from the hub are identified by their commit, those in a folder or a file by a sample: reading all of them
    would take as long as loading them.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    config: Any = getattr(model, "hf_config", None)
    facts = config.to_dict() if config is not None else {}
    for name in ("_name_or_path", "transformers_version"):
        facts.pop(name, None)
    load_format = str(getattr(getattr(vllm_config, "load_config", None), "load_format", ""))
    return {
        "config": facts,
        "dtype": str(getattr(model, "dtype", "")),
        "quantization": str(getattr(model, "quantization", "")),
        "cache dtype": str(getattr(cache, "cache_dtype", "")),
        # vLLM 0.25 may calculate the scales of FP8 KV when it starts.
        "scales of this run": uuid.uuid4().hex if getattr(cache, "calculate_kv_scales", False) else "",
        "revision": str(getattr(config, "_commit_hash", None) or getattr(model, "revision", None) or ""),
        "weights": sample(Path(str(getattr(model, "model", "")))),
        "random weights": "dummy" in load_format.lower(),
    }


def _form(vllm_config: Any) -> dict[str, Any]:
    """The layout of KV in vLLM's cache, and how it is divided among workers.

    LMCache stores the bytes as they are and does not record their order, which depends on vLLM's version and attention
    backend: KV of equal size and another order would be loaded as if it were valid.
    """
    cache, parallel = vllm_config.cache_config, getattr(vllm_config, "parallel_config", None)
    attention = getattr(vllm_config, "attention_config", None)
    return {
        "vLLM": _version(),
        "device": str(getattr(getattr(vllm_config, "device_config", None), "device_type", "")),
        "block": getattr(cache, "block_size", None),
        "tp": getattr(parallel, "tensor_parallel_size", 1),
        "pp": getattr(parallel, "pipeline_parallel_size", 1),
        "dcp": getattr(parallel, "decode_context_parallel_size", 1),
        "pcp": getattr(parallel, "prefill_context_parallel_size", 1),
        "backend": str(getattr(attention, "backend", "")),
        "surroundings": [os.environ.get(name, "") for name in _VARIABLES],
    }


def _version() -> str:
    """Version of vLLM, with the suffix of its build: KV of a build for CPUs has another layout."""
    try:
        import vllm
    except ImportError:
        return ""
    return str(vllm.__version__)


def sample(place: Path) -> str:
    """A digest of the weights in a file, or in the files of a folder, by names, sizes and pieces; "" without a file.

    A piece is read of each tensor, as far as a file's header names tensors, and at places all over each file, chosen by
    its size, so that weights which differ in only a few layers get different digests. The reads are few and small.
    """
    if place.is_file():
        files = [place]
    elif place.is_dir():
        files = [one for one in sorted(place.iterdir()) if one.suffix in _WEIGHTS and one.is_file()]
    else:
        return ""
    digest = hashlib.sha256()
    most = max(_LEAST, _PIECES // max(1, len(files)))
    with ThreadPoolExecutor(_READERS) as readers:
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode("utf-8", "surrogateescape"))
            with file.open("rb") as opened:
                handle = opened.fileno()
                digest.update(os.pread(handle, _HEAD, 0))  # safetensors begins with names and shapes
                offsets = list(_offsets(size, _tensors(handle, file, size), most))
                for piece in readers.map(lambda at, handle=handle: os.pread(handle, _PIECE, at), offsets):
                    digest.update(piece)
    return digest.hexdigest()


def _offsets(size: int, tensors: Sequence[tuple[int, int]], most: int) -> Iterator[int]:
    """Where pieces are read: in each tensor, if these are not too many, and all over the file.

    Args:
        size: Bytes of the file.
        tensors: First byte of each tensor, and the byte after its last.
        most: Pieces at most.
    """
    even = max(most // 8, 1) if tensors else most
    step = -(-len(tensors) // max(1, most - even))
    parts = list(tensors[:: max(1, step)])
    parts += [(size * n // even, size * (n + 1) // even) for n in range(even)]
    for n, (begin, end) in enumerate(parts):
        drawn = int.from_bytes(hashlib.sha256(f"{size} {n}".encode()).digest()[:8], "big")
        yield begin + drawn % max(1, end - begin - _PIECE)


def _tensors(handle: int, file: Path, size: int) -> list[tuple[int, int]]:
    """Where the tensors of a safetensors file are; empty if the file has no valid header."""
    if file.suffix != ".safetensors":
        return []
    length = int.from_bytes(os.pread(handle, 8, 0), "little")
    if not 0 < length <= min(_MOST_HEADER, size):
        return []
    try:
        header = json.loads(os.pread(handle, length, 8))
        places = [one["data_offsets"] for name, one in header.items() if name != "__metadata__"]
        return sorted((8 + length + int(begin), 8 + length + int(end)) for begin, end in places)
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


class Adapters:
    """Identities of LoRA adapters, by name, path, number and weights. Used by one thread.

    An adapter's files are sampled when it is first seen. When they change while vLLM runs, it is not known which
    version vLLM has in memory, nor when that changes: KV of the adapter is then neither stored nor reused, until it is
    loaded anew or vLLM is started again.

    Args:
        by_path: Whether vLLM's own blocks are found by an adapter's name and path; else by its name alone.
    """

    def __init__(self, *, by_path: bool = True) -> None:
        self._same = slice(2 if by_path else 1)  # the part of a key that vLLM's blocks share
        # By name, path and number: the state of its files (None: they have changed), and its identity.
        self._known: OrderedDict[tuple[str, str, int], tuple[object, str]] = OrderedDict()

    def of(self, lora_request: Any) -> str:
        """The identity of a request's adapter; "" without one, a new one each time if it has changed. Never raises."""
        return self._look(_adapter_key(lora_request))[1] if lora_request is not None else ""

    def changed(self, lora_request: Any) -> bool:
        """Whether the weights that vLLM has of an adapter may be others than those that were identified first."""
        return lora_request is not None and self._look(_adapter_key(lora_request))[0] is None

    def on_loaded(self, lora_request: Any) -> None:
        """VLLM has loaded an adapter: it is identified now, and replaces one of another path with its number."""
        name, path, number = _adapter_key(lora_request)
        for key in self._known:
            if key[2] == number and key[:2] != (name, path):
                self._known[key] = None, uuid.uuid4().hex
        self._look((name, path, number))

    def _look(self, key: tuple[str, str, int]) -> tuple[object, str]:
        files = _adapter_files(key[1])
        state: object = _state(files)
        known = self._known.get(key)
        # vLLM's own blocks know no number: those of another adapter would be taken for this one's.
        same = self._same
        before = [others[0] for other, others in self._known.items() if other[same] == key[same]]
        if any(earlier != state for earlier in before):
            if None not in before:
                log.warning(
                    "The files of LoRA adapter %s have changed: its KV is neither stored nor reused. "
                    "Load it under another name, from another path.",
                    shown(key[0]),
                )
            known = None, uuid.uuid4().hex
        elif known is None:
            known = state, _digest({"adapter": key, "weights": self._weights(files)})
        self._known[key] = known
        self._known.move_to_end(key)
        if len(self._known) > _ADAPTERS:
            self._known.popitem(last=False)
        return known

    @staticmethod
    def _weights(files: Sequence[Path]) -> str:
        try:
            if found := [sample(file) for file in files]:
                return " ".join(found)
        except OSError:
            pass
        return uuid.uuid4().hex  # they cannot be read here, and so cannot be recognised again


def _adapter_key(lora_request: Any) -> tuple[str, str, int]:
    return str(lora_request.lora_name), str(lora_request.lora_path), int(lora_request.lora_int_id)


def _adapter_files(path: str) -> list[Path]:
    """An adapter's configuration and weights; from the hub's cache if the path is a name there."""
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(path, "adapter_config.json")
        except (HFValidationError, OSError, ValueError):
            return []
        if not isinstance(found, str):
            return []
        folder = Path(found).parent
    try:
        return [one for one in sorted(folder.iterdir()) if one.suffix in (*_WEIGHTS, ".json") and one.is_file()]
    except OSError:
        return []


def _state(files: Sequence[Path]) -> object:
    found = []
    for file in files:
        try:
            facts = file.stat()
        except OSError:
            continue
        found.append((file.name, facts.st_ino, facts.st_size, facts.st_mtime_ns))
    return tuple(found)


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
