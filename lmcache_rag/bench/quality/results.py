"""The file of a run: a line for each answered question. Another run with the same settings continues it.

The first line holds the settings; a run with others does not continue the file. A line that was cut off, when the
process was killed, is dropped. A question that was not finished is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lmcache_rag.bench.quality.data import Sample
from lmcache_rag.errors import ConfigError


@dataclass(frozen=True)
class Record:
    """What one question gave: a line of the file.

    Attributes:
        sample_id: The question's name.
        cell: Its cell.
        task: Its task.
        question: Its text.
        gold: Right answers.
        prompt_tokens: Length of the prompt.
        arms: By arm, its answer as a plain dictionary: the fields of ArmAnswer but for the tokens, and `parsed`, the
            part of the text that counts.
        gated: Whether gate and recommendation depend on it, or it is only reported.
    """

    sample_id: str
    cell: str
    task: str
    question: str
    gold: tuple[str, ...]
    prompt_tokens: int
    arms: dict[str, dict[str, Any]]
    gated: bool = True

    @property
    def name(self) -> tuple[str, str]:
        """Unique in a file."""
        return self.cell, self.sample_id


class ResultFile:
    """The file of a run. Use it as a context manager.

    Args:
        path: The file.
        settings: What its results depend on.

    Raises:
        ConfigError: The file is of a run with other settings, or of something else.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._settings = json.loads(json.dumps(settings))  # tuples are lists there
        self.records: dict[tuple[str, str], Record] = {}
        good = 0
        if path.exists():
            good = self._read(path.read_bytes())
        self._out = path.open("r+b" if path.exists() else "wb")
        self._out.truncate(good)
        self._out.seek(good)
        if not good:
            self._write({"settings": self._settings})

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *problem: object) -> None:
        self._out.close()

    def add(self, record: Record) -> None:
        """Write a record, merged with an earlier one of the same question."""
        self._write(asdict(record))
        self._merge(record)

    def _merge(self, record: Record) -> None:
        earlier = self.records.get(record.name)
        self.records[record.name] = replace(record, arms=earlier.arms | record.arms) if earlier else record

    def _write(self, document: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")
        self._out.flush()
        os.fsync(self._out.fileno())

    def _read(self, content: bytes) -> int:
        """Take the whole lines; returns where they end."""
        end = content.rfind(b"\n") + 1
        lines = content[:end].splitlines()
        try:
            found = json.loads(lines[0])["settings"] if lines else None
            for line in lines[1:]:
                fields = json.loads(line)
                self._merge(Record(**(fields | {"gold": tuple(fields["gold"])})))
        except (ValueError, KeyError, TypeError) as problem:
            raise ConfigError(
                f"{self._path} holds no results of this command.", remedy="Name another file by --out."
            ) from problem
        if found is not None and found != self._settings:
            changed = sorted(key for key in {*found, *self._settings} if found.get(key) != self._settings.get(key))
            raise ConfigError(
                f"{self._path} is of a run with other settings ({', '.join(changed)}).",
                remedy="Name another file by --out, or remove this one.",
            )
        return end


def digest(samples: Sequence[Sample]) -> str:
    """Of all questions, so that a file of other questions is not continued."""
    text = json.dumps([asdict(sample) for sample in samples])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
