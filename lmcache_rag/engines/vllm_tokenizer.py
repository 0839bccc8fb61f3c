"""The tokenizer of a model that a server runs: its files only, no weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_rag.errors import EngineError, SourceError

if TYPE_CHECKING:
    from lmcache_rag.engines.vllm_served import ServedModel

log = logging.getLogger("lmcache_rag")

PATTERNS = ["*.json", "*.txt", "*.jinja", "*.tiktoken", "tokenizer.model", "spiece.model"]
WEIGHTS = ["*.index.json", "onnx/*", "openvino/*", "original/*"]


def tokenizer_of(served: ServedModel, given: Any = None) -> tuple[Any, str, int]:
    """(tokenizer, its digest, bytes of one token's KV) of a model that a server runs.

    Args:
        served: The model.
        given: A transformers tokenizer, or the folder or name to take it from; None: found by the model's names.

    Raises:
        SourceError: No source has it.
        EngineError: It cannot be read.
    """
    from lmcache_rag.weights import tokenizer_digest

    if given is not None and not isinstance(given, str | Path):
        facts = f"{given.backend_tokenizer.to_str()}{given.chat_template}"
        return given, hashlib.sha256(facts.encode()).hexdigest()[:32], 0
    path = find_tokenizer([str(given)] if given is not None else [served.local, served.root, served.name])
    return open_tokenizer(path), tokenizer_digest(path), kv_bytes_per_token(path)


def find_tokenizer(names: Sequence[str]) -> Path:
    """Folder with the tokenizer of a model: a folder, the Hugging Face cache, a package's copy, the hub, a package.

    Args:
        names: Folder or Hugging Face names of the model, the likeliest first.

    Raises:
        SourceError: None of them has one; says what was tried.
    """
    tried: list[str] = []
    names = [name for name in dict.fromkeys(names) if name]
    for name in names:
        for look in (_folder, _cached, _prepared, _downloaded, _packaged):
            if path := _attempt(name, look, tried):
                log.info("The tokenizer of %s is served by %s.", name, path)
                return path
    raise SourceError(
        f"No source has the tokenizer of {' or '.join(names)}. Tried: {'; '.join(tried)}.",
        remedy="Name the model as the Hugging Face hub does, or a folder with its tokenizer.json (--model).",
    )


def open_tokenizer(path: Path) -> Any:
    """The transformers tokenizer of a folder.

    Raises:
        EngineError: It cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as problem:
        raise EngineError(
            f"No tokenizer could be loaded from {path}: {problem}", remedy="Name a folder with a tokenizer.json."
        ) from problem


def kv_bytes_per_token(path: Path) -> int:
    """Keys and values of one token over all layers, by the model's configuration; 0 where there is none.

    An estimate: a server may keep its KV in fewer bits than the model's own.
    """
    import torch
    from transformers import AutoConfig

    from lmcache_rag.engines.hf_model import HFModel

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        dtype = getattr(torch, str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch."))
        unused: Callable[[], Any] = lambda: None  # noqa: E731 - never called: there are no weights
        return HFModel(config, None, dtype=dtype, device=torch.device("cpu"), load=unused).kv_bytes_per_token
    except (OSError, ValueError, AttributeError, TypeError):
        return 0


def _attempt(name: str, look: Callable[[str], Path | str], tried: list[str]) -> Path | None:
    found = look(name)
    if isinstance(found, Path) and (missing := _missing(found)):
        found = f"{found}: {missing}"
    if isinstance(found, Path):
        return found
    if found:
        tried.append(found)
    return None


def _missing(folder: Path) -> str:
    from lmcache_rag.weights.find import VOCABULARY_FILES

    return "" if any((folder / name).is_file() for name in VOCABULARY_FILES) else "there is no tokenizer.json"


def _folder(name: str) -> Path | str:
    path = Path(name).expanduser()
    return path.resolve() if path.is_dir() else f"{name}: no folder here"


def _is_hub_name(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "~", "/"))


def _cached(name: str) -> Path | str:
    return _snapshot(name, local=True) if _is_hub_name(name) else ""


def _prepared(name: str) -> Path | str:
    from lmcache_rag.weights import packages

    package = packages.package_for(name, "model")
    return package.target if package and packages.is_whole(package.target) else ""


def _downloaded(name: str) -> Path | str:
    from huggingface_hub import constants

    from lmcache_rag.weights.find import probe_error

    if not _is_hub_name(name):
        return ""
    if constants.is_offline_mode():
        return "Hugging Face hub: switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE"
    if reason := probe_error(constants.ENDPOINT, f"{name}/resolve/main/config.json"):
        return f"Hugging Face hub: {reason}"
    return _snapshot(name, local=False)


def _packaged(name: str) -> Path | str:
    """The default model comes as a package too; that one is made whole, weights included."""
    from lmcache_rag.weights import find_model, packages

    if packages.package_for(name, "model") is None:
        return ""
    try:
        return find_model(name).path
    except SourceError as problem:
        return problem.message


def _snapshot(name: str, *, local: bool) -> Path | str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    place = "Hugging Face cache" if local else "Hugging Face hub"
    try:
        path = snapshot_download(name, local_files_only=local, allow_patterns=PATTERNS, ignore_patterns=WEIGHTS)
    except LocalEntryNotFoundError:
        return f"{place}: not there"
    except Exception as problem:  # its errors come from several HTTP clients, by version; none may end the search
        return f"{place}: {(str(problem).strip().splitlines() or [type(problem).__name__])[0]}"
    return Path(path)
