"""What a user gave to vLLM: on the command line, and in the file of vLLM's --config."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmcache_rag.errors import ConfigError

_SIZES = (("--tensor-parallel-size", "-tp"), ("--pipeline-parallel-size", "-pp"), ("--data-parallel-size", "-dp"))


class Given:
    """Options of vLLM by name. It takes --a-b, --a_b and --a-b=value; the command line wins over its file.

    Args:
        words: The command line behind the model.

    Raises:
        ConfigError: The file of --config cannot be read.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._line: dict[str, str] = {}
        for index, word in enumerate(words):
            if word.startswith("-"):
                name, found, value = word.partition("=")
                following = words[index + 1] if index + 1 < len(words) else ""
                self._line[_dashes(name)] = value if found else following
        # vLLM itself takes the file only where both are words of their own.
        at = words.index("--config") if "--config" in words else len(words)
        self._file = _read(words[at + 1]) if at + 1 < len(words) else {}

    def has(self, name: str) -> bool:
        """Whether it, or with a dot a part of it, was given."""
        return self.on_line(name) or _has(self._file, name)

    def on_line(self, name: str) -> bool:
        """The same of the command line alone."""
        return _has(self._line, name)

    def word(self, name: str) -> str:
        """What stands after it on the command line; "" where nothing does, or it is not there."""
        return self._line.get(name, "")

    def value(self, *names: str) -> str:
        """Of the first of these names that has one; "" where none has."""
        return next((known[name] for known in (self._line, self._file) for name in names if known.get(name)), "")

    def dotted(self, name: str) -> str:
        """An option that gives a part of this one, "" where there is none."""
        return next((known for known in (*self._line, *self._file) if known.startswith(f"{name}.")), "")

    def gpus(self) -> int:
        """How many vLLM takes: ranks of a replica, times replicas."""
        return math.prod(self._size(*names) for names in _SIZES)

    def ranks(self) -> int:
        """Tensor-parallel ranks."""
        return self._size(*_SIZES[0])

    def _size(self, *names: str) -> int:
        size = self.value(*names)
        return int(size) if size.isdigit() and int(size) else 1


def _has(known: Mapping[str, str], name: str) -> bool:
    return any(one == name or one.startswith(f"{name}.") for one in known)


def _dashes(name: str) -> str:
    """As vLLM does, up to the first dot."""
    head, dot, rest = name.partition(".")
    return head.replace("_", "-") + dot + rest


def _read(file: str) -> dict[str, str]:
    """The options of a YAML file, as vLLM makes words of them."""
    import yaml

    remedy = "vLLM takes a YAML file with one option a line, such as `max-model-len: 8192`."
    if not file.endswith((".yaml", ".yml")):
        raise ConfigError(f"--config {file} is no .yaml or .yml.", remedy=remedy)
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as problem:
        raise ConfigError(f"--config {file} cannot be read: {' '.join(str(problem).split())}.", remedy=remedy) from None
    if not isinstance(found, dict):
        raise ConfigError(f"--config {file} holds no options.", remedy=remedy)
    return {_dashes(f"--{name}"): _word(value) for name, value in found.items()}


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        return str(value[0]) if value else ""
    return "" if isinstance(value, bool) else str(value)
