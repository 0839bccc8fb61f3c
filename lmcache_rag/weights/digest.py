"""What tells two sets of weights, or two tokenizers, apart."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path

CONFIG_FILES = frozenset(
    {"config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"}
)
TOKENIZER_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "merges.txt",
        "special_tokens_map.json",
        "spiece.model",
        "tekken.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
