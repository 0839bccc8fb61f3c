"""Self-checks that passed, by model and build, in the user's cache folder: later starts need not run them again.

Only what passed is remembered: a start that failed is checked again. A file that is lost or damaged costs a check.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from pathlib import Path
from typing import Any

from lmcache_rag.connector import compat_vllm
from lmcache_rag.connector.identity import identity
from lmcache_rag.weights.packages import cache_folder

log = logging.getLogger("lmcache_rag")

_FOLDER, _MOST = "self-check", 200
_PACKAGES = ("vllm", "torch", "triton", "lmcache-rag")
_CODE = ("blend", "connector")  # what an editable install changes without a new version


def name_of(vllm_config: Any) -> str:
    """A name for this model on this build; "", which is not remembered, where they cannot be known. Never raises."""
    try:
        return _name_of(vllm_config)
    except Exception:
        log.warning("The self-check is going to run at each start", exc_info=True)
        return ""


def is_known(name: str) -> bool:
    """Whether that check passed at an earlier start."""
    try:
        return bool(name) and _file(name).read_text(encoding="ascii") == name
    except (OSError, ValueError):
        return False


def remember(name: str) -> None:
    """Remember that it passed. Ranks of one machine write the same."""
    if not name:
        return
    file = _file(name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name, encoding="ascii")
        others = sorted(file.parent.iterdir(), key=lambda other: other.stat().st_mtime)
        for old in others[:-_MOST]:  # a model that cannot be identified has a new name at each start
            old.unlink()
    except OSError as problem:
        log.info("The self-check is going to run again at the next start: %s", problem)


def _name_of(vllm_config: Any) -> str:
    """Weights, versions, our own code, GPU, ranks and attention backend in one hash."""
    import torch

    layers = compat_vllm.attention_layers(vllm_config).values()
    facts = {
        "model": identity(vllm_config),
        "versions": {package: _version(package) for package in _PACKAGES},
        "cuda": str(torch.version.cuda),
        "code": _code(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "ranks": vllm_config.parallel_config.tensor_parallel_size,
        "eager": bool(vllm_config.model_config.enforce_eager),
        "block": vllm_config.cache_config.block_size,
        "backends": sorted({type(getattr(layer, "impl", None)).__name__ for layer in layers}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]


def _file(name: str) -> Path:
    return cache_folder() / _FOLDER / name


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _code() -> str:
    contents = hashlib.sha256()
    package = Path(__file__).parents[1]
    for folder in _CODE:
        for file in sorted((package / folder).rglob("*.py")):
            contents.update(file.read_bytes())
    return contents.hexdigest()
