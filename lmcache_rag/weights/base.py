"""What a source is, and when a folder is whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["model", "embedder"]
Origin: TypeAlias = Literal["folder", "hub", "package"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "tekken.json")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model or an embedder was found.

    Attributes:
        path: Folder with config.json, *.safetensors and the tokenizer.
        origin: Which kind of source served.
        name: Hugging Face name, or the folder's own name without its path.
        message: One sentence for the user that says which source served, and why not an earlier one.
    """

    path: Path
    origin: Origin
    name: str
    message: str


class UnavailableError(Exception):
    """One source does not have it; the text says why. Never leaves this package: SourceError lists them all."""


def what_is_missing(folder: Path, kind: Kind) -> str:
    """What a folder lacks before it can be loaded, in words; "" when it is whole."""
    heads = ("config.json",) if kind == "model" else ("modules.json", "config.json")
    if not any((folder / head).is_file() for head in heads):
        return f"there is no {' or '.join(heads)}"
    depths = ("*",) if kind == "model" else ("*", "*/*")  # an embedder keeps some modules in folders of their own
    names = {file.name for depth in depths for file in folder.glob(depth) if file.is_file()}
    if not any(name.endswith(".safetensors") for name in names):
        unsafe = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
        return "there are no *.safetensors" + (", and pickled weights are never loaded" if unsafe else "")
    for index in folder.glob("*.safetensors.index.json"):
        absent = sorted(_shards(index) - names)
        if absent:
            return f"{absent[0]} is missing ({len(absent)} files in all)"
    if names.isdisjoint(TOKENIZER_FILES):
        return "there is no tokenizer (tokenizer.json)"
    return ""


def _shards(index: Path) -> set[str]:
    """The weight files that an index names."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        return {f"a readable {index.name}"}
