"""What may share KV: prompts of one tenant that begin with the same prefix, on one and the same model.

LMCache's key of a chunk holds the model's name, the tenant and all tokens before it. A blend looks chunks up by their
own tokens, though, whatever stood before them, and a name says little of the weights. So each request gets a namespace,
which goes into LMCache's key in the place of the tenant's salt.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmcache_rag.protocol import named_prefix

log = logging.getLogger("lmcache_rag")

_LENGTHS, _NAMES = 16, 1024  # that are remembered; each length is one hash for a prompt that does not say its own
_SAMPLE = 65536
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class Namespaces:
    """Gives each request its namespace.

    A client of ours names the length of its prefix. Of other clients' prompts it is not known: they belong to a prefix
    that was named before and that they begin with, the longest, or else to their first LMCache chunk, which holds the
    beginning of the system prompt. Used by one thread.

    Args:
        model: What tells the model from any other, see `identity`.
        chunk: Tokens of an LMCache chunk.
    """

    def __init__(self, model: str, chunk: int) -> None:
        self._model, self._chunk = model, chunk
        self._named: OrderedDict[int, OrderedDict[str, None]] = OrderedDict()  # by length

    def of(self, prompt: Sequence[int], tenant: str, params: Mapping[str, Any] | None) -> str:
        """The namespace of a request, 40 hex digits.

        Args:
            prompt: Its token ids.
            tenant: Its cache_salt.
            params: Its kv_transfer_params.
        """
        if given := named_prefix(params, len(prompt)):
            name = self._name(prompt[:given], tenant)
            _remember(self._named, given, _LENGTHS, OrderedDict)
            _remember(self._named[given], name, _NAMES, lambda: None)
            return name
        for length in sorted((length for length in self._named if length <= len(prompt)), reverse=True):
            if (name := self._name(prompt[:length], tenant)) in self._named[length]:
                return name
        return self._name(prompt[: self._chunk], tenant)

    def _name(self, prefix: Sequence[int], tenant: str) -> str:
        told = f"{self._model}\0{len(tenant)}\0{tenant}\0".encode("utf-8", "surrogatepass")
        return hashlib.sha256(told + _numbers(prefix).tobytes()).hexdigest()[:40]


def _remember(known: OrderedDict[Any, Any], key: Any, most: int, make: Callable[[], Any]) -> None:
    """Have a key among the known ones, as the latest; the one that was not used for longest may go."""
    if key not in known:
        known[key] = make()
    known.move_to_end(key)
    if len(known) > most:
        known.popitem(last=False)


def renumbered(token_ids: Sequence[int], namespace: str) -> list[int]:
    """The tokens by other numbers, of 32 bits, in each namespace others.

    LMCache has one index of chunks for everybody, by their tokens: so nobody's entry takes the place of anybody else's.
    """
    by = int.from_bytes(hashlib.sha256(namespace.encode("utf-8", "surrogatepass")).digest()[:4], "big")
    numbers: list[int] = (_numbers(token_ids) + np.uint32(by)).tolist()
    return numbers


def _numbers(token_ids: Sequence[int]) -> Any:
    # By way of 64 bits: LMCache puts hashes of pictures among the tokens, and what does not fit must not raise here.
    if isinstance(token_ids, array):
        return np.asarray(token_ids).astype(np.uint32)
    try:
        numbers = np.asarray(array("Q", token_ids))  # a third of the time that NumPy takes to read a list
    except OverflowError:
        numbers = np.asarray(token_ids, dtype=np.int64)
    return numbers.astype(np.uint32)


def identity(vllm_config: Any) -> str:
    """What KV depends on beside tokens; where it cannot be told, something that is nobody else's. Never raises."""
    try:
        return _identity(vllm_config)
    except Exception:
        log.warning("The model's weights cannot be told from others: no KV of an earlier start is used", exc_info=True)
        return uuid.uuid4().hex


def _identity(vllm_config: Any) -> str:
    """What KV depends on beside tokens: weights, revision, dtypes, quantisation, RoPE, and what else is configured.

    Weights of the hub are told by their commit, those in a folder by names, sizes and a sample of each file: to read
    them whole would take as long as to load them.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    config: Any = getattr(model, "hf_config", None)
    facts = config.to_dict() if config is not None else {}
    for name in ("_name_or_path", "transformers_version"):
        facts.pop(name, None)
    told = {
        "config": facts,
        "dtype": str(getattr(model, "dtype", "")),
        "quantization": str(getattr(model, "quantization", "")),
        "cache dtype": str(getattr(cache, "cache_dtype", "")),
        "revision": str(getattr(config, "_commit_hash", None) or getattr(model, "revision", None) or ""),
        "weights": _weights(Path(str(getattr(model, "model", "")))),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _weights(folder: Path) -> str:
    if not folder.is_dir():
        return ""
    told = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _WEIGHTS and file.is_file():
            size = file.stat().st_size
            told.update(f"{file.name}\0{size}\0".encode("utf-8", "surrogateescape"))
            with file.open("rb") as opened:
                told.update(opened.read(_SAMPLE))  # safetensors begins with names and shapes
                opened.seek(max(0, (size - _SAMPLE) // 2))
                told.update(opened.read(_SAMPLE))
    return told.hexdigest()
