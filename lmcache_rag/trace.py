"""Retrieval traces: which chunks which question used, as JSONL. `lmcache-rag plan` and `warm --from-log` read them.

A line is one JSON object, and a line for each question::

    {"time": 1767225600.5, "tenant": "acme", "question": "What is a KV cache?", "chunks": ["9f86d0…", "60303a…"]}

============  =========  ==========================================================================================
key           needed     value
============  =========  ==========================================================================================
question      see below  Text of the question; `query` and `user_input` are read too, as by ``bench quality``.
chunks        see below  Names of the retrieved chunks, in the prompt's order: the SHA-256 of a chunk's text in hex,
                         which this package writes; the store's chunk id as a number; or any name of your own.
passages      no         Texts of the chunks, in the same order; without `chunks` they are named by their SHA-256.
tokens        no         Length of each chunk in tokens, in the same order.
time          no         Unix time in seconds.
tenant        no         The tenant; KV of two tenants is never shared.
============  =========  ==========================================================================================

A line needs `chunks` or `passages`, or at least a `question`: a file of questions only is a **question log**, and the
store retrieves their chunks (`lmcache-rag plan --store DIR --trace questions.jsonl`). A file that ends in .txt holds a
question in each line. Unknown keys are ignored. Lines are in the order in which the questions were asked.

A trace holds what users asked: it is made for its owner only (mode 0600). The setting `trace` has every answer append
to one (`TraceWriter.record`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lmcache_rag._utils import well_formed
from lmcache_rag.errors import ConfigError

log = logging.getLogger("lmcache_rag")

FORM = 'A line has the form {"question": "...", "chunks": ["...", "..."]}; see docs/economics.md.'
_QUESTION = ("question", "query", "user_input")


@dataclass(frozen=True, slots=True)
class Retrieval:
    """One question with the chunks that were retrieved for it.

    Attributes:
        question: Its text; "" if the trace does not have it.
        chunks: Names of the chunks, in the prompt's order; empty in a question log.
        passages: Their texts; empty if the trace does not have them.
        tokens: Their lengths in tokens; empty if the trace does not have them.
        time: Unix time in seconds, or None.
        tenant: The tenant, "" for none.
    """

    question: str = ""
    chunks: tuple[str, ...] = ()
    passages: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    time: float | None = None
    tenant: str = ""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Retrieval:
        """From a line's object.

        Raises:
            ValueError: It has another form; the message is a clause.
        """
        question = next((record[key] for key in _QUESTION if record.get(key) is not None), "")
        if not isinstance(question, str):
            raise ValueError("its question is no text")
        passages = _texts(record, "passages")
        names = record.get("chunks")
        if names is None:
            chunks = tuple(chunk_name(text) for text in passages)
        elif isinstance(names, list) and all(_is_name(name) for name in names):
            chunks = tuple(sys.intern(str(name)) for name in names)  # a long trace repeats them
        else:
            raise ValueError("its chunks are no list of names")
        if names is None and not passages and not question.strip():
            raise ValueError("it has neither chunks nor a question")
        tokens = record.get("tokens") or []
        if not isinstance(tokens, list) or not all(type(count) is int and count > 0 for count in tokens):
            raise ValueError("its tokens are no list of numbers above 0")
        for name, values in (("tokens", tokens), ("passages", passages)):
            if values and len(values) != len(chunks):
                raise ValueError(f"it has {len(values)} {name} for {len(chunks)} chunks")
        time, tenant = record.get("time"), record.get("tenant")
        if time is not None and (
            isinstance(time, bool) or not isinstance(time, int | float) or not math.isfinite(time)
        ):
            raise ValueError("its time is no number")
        if tenant is not None and not isinstance(tenant, str):
            raise ValueError("its tenant is no text")
        return cls(question, chunks, passages, tuple(tokens), None if time is None else float(time), tenant or "")

    def as_dict(self) -> dict[str, Any]:
        """For a line: without what is empty, except that one without a question has `chunks` in any case."""
        found: dict[str, Any] = {"time": self.time, "tenant": self.tenant, "question": self.question}
        found = {key: value for key, value in found.items() if value not in (None, "")}
        if self.chunks or not self.question:
            found["chunks"] = list(self.chunks)
        for key, values in (("tokens", self.tokens), ("passages", self.passages)):
            if values:
                found[key] = list(values)
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """The chunks' names, kept apart by tenant: equal names mean the same KV."""
        return tuple(f"{self.tenant}\0{name}" for name in self.chunks) if self.tenant else self.chunks


def chunk_name(text: str) -> str:
    """The name of a chunk by its text, as the store has it in `StoredChunk.text_hash`: SHA-256, 64 hex digits."""
    from lmcache_rag.store.types import text_hash

    return text_hash(well_formed(text))


def read_trace(path: str | os.PathLike[str]) -> Iterator[Retrieval]:
    """The retrievals of a trace, or of a question log, one after the other: a long file is never in memory as a whole.

    A last line that is cut off, since its writer was killed, is left out.

    Args:
        path: A JSONL file; one whose name ends in .txt holds a question in each line.

    Raises:
        ConfigError: The file cannot be read, is empty, or a line has another form; with the line's number.
    """
    path = Path(path)
    plain, count = path.suffix.lower() == ".txt", 0
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                if plain:
                    count += 1
                    yield Retrieval(line.strip())
                    continue
                try:
                    found = _parsed(line)
                except ValueError as problem:
                    if not line.endswith("\n") and isinstance(problem, json.JSONDecodeError) and count:
                        return
                    raise ConfigError(f"{path}, line {number}: {problem}.", remedy=FORM) from problem
                count += 1
                yield found
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path} cannot be read: {problem}.", remedy=FORM) from problem
    if not count:
        raise ConfigError(f"{path} holds no questions.", remedy=FORM)


def write_trace(path: str | os.PathLike[str], retrievals: Iterable[Retrieval]) -> int:
    """Write a whole trace, in place of one that is there; returns its number of lines.

    The file is complete or not there: it is written under another name, and renamed.

    Raises:
        ConfigError: The file cannot be written.
    """
    path, count = Path(path), 0
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            for retrieval in retrievals:
                file.write(_line(retrieval))
                count += 1
        partial.replace(path)
    except OSError as problem:
        raise ConfigError(f"{path} cannot be written: {problem}.", remedy="Name a file in another folder.") from problem
    finally:
        partial.unlink(missing_ok=True)
    return count


def opened(trace: TraceWriter | str | os.PathLike[str] | None) -> TraceWriter | None:
    """A writer, or one to this file; None for None.

    Raises:
        ConfigError: The file cannot be written.
    """
    return trace if trace is None or isinstance(trace, TraceWriter) else TraceWriter(trace)


class TraceWriter:
    """Appends retrievals to a trace, each as one whole line. Safe to use from several threads and processes.

    Args:
        path: The file; made, for its owner only, if it is not there.

    Raises:
        ConfigError: The file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path, self._lock, self._failed = Path(path), threading.Lock(), False
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            size = os.fstat(self._file).st_size
            cut_off = size and os.pread(self._file, 1, size - 1) != b"\n"
        except OSError as problem:
            raise ConfigError(f"{path} cannot be written: {problem}.", remedy="Name another file.") from problem
        if cut_off:  # by a writer that was killed
            self._write("\n")

    def write(self, retrieval: Retrieval) -> None:
        """Append one.

        Raises:
            ConfigError: The file cannot be written.
        """
        self._write(_line(retrieval))

    def record(self, question: str, texts: Sequence[str], tokens: Sequence[int] = (), *, tenant: str = "") -> None:
        """Append what was retrieved for a question that was answered now. Never raises: the answer is not affected.

        Args:
            question: Its text.
            texts: The chunks, in the prompt's order.
            tokens: Their lengths in tokens, above 0.
            tenant: The tenant.
        """
        if not texts:
            return
        names = tuple(chunk_name(text) for text in texts)
        try:
            self.write(Retrieval(question, names, tokens=tuple(tokens), time=round(time.time(), 3), tenant=tenant))
        except ConfigError as problem:
            log.log(logging.DEBUG if self._failed else logging.WARNING, "The trace misses questions: %s", problem)
            self._failed = True

    def _write(self, text: str) -> None:
        with self._lock:  # one system call each: lines of two processes do not mix
            try:
                os.write(self._file, text.encode())
            except OSError as problem:
                raise ConfigError(
                    f"{self._path} cannot be written: {problem}.", remedy="Name another file."
                ) from problem

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _line(retrieval: Retrieval) -> str:
    return well_formed(json.dumps(retrieval.as_dict(), ensure_ascii=False)) + "\n"


def _parsed(line: str) -> Retrieval:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("it is not an object")
    return Retrieval.of(record)


def _texts(record: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = record.get(key) or []
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise ValueError(f"its {key} are no list of texts")
    return tuple(found)


def _is_name(name: Any) -> bool:
    return (isinstance(name, str) and bool(name)) or type(name) is int
