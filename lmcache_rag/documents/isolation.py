"""Parse files in child processes, with limits of time and memory for each file."""

from __future__ import annotations

import atexit
import json
import math
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmcache_rag
from lmcache_rag.documents.formats import Format
from lmcache_rag.documents.types import Reading
from lmcache_rag.errors import ConfigError, DocumentError, OptionalDependencyError

_MOST_IDLE = 2
_START = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from lmcache_rag.documents.worker import main
main(int(sys.argv[2]))"""


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """Most time and memory that one file may take.

    Attributes:
        seconds: Of time; environment LMCACHE_RAG_DOCUMENT_SECONDS.
        memory_mb: Of memory of the process that parses, in MiB, from 256; environment LMCACHE_RAG_DOCUMENT_MB. Not
            enforced on Windows and macOS.
    """

    seconds: float = 120.0
    memory_mb: int = 2048

    @classmethod
    def of(cls, seconds: float | None = None, memory_mb: int | None = None) -> ReadLimits:
        """Limits by argument, environment, default.

        Raises:
            ConfigError: A limit is not valid.
        """
        found = {}
        for name, value, variable, least in (
            ("seconds", seconds, "LMCACHE_RAG_DOCUMENT_SECONDS", 0.0),
            ("memory_mb", memory_mb, "LMCACHE_RAG_DOCUMENT_MB", 256.0),
        ):
            text = value if value is not None else os.environ.get(variable) or None
            if text is None:
                continue
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            if not (least <= number < math.inf and number > 0):
                raise ConfigError(
                    f"The limit of {name} for a document is {text!r}.",
                    remedy=f"Use a number from {least:g}." if least else "Use a number above 0.",
                )
            found[name] = number
        return cls(found.get("seconds", cls().seconds), int(found.get("memory_mb", cls().memory_mb)))


def read_in_child(kind: Format, data: bytes, name: str, limits: ReadLimits) -> Reading:
    """Parse a file in a child process, which is kept for the next file.

    Raises:
        DocumentError: The file cannot be read, or takes more than the limits.
        OptionalDependencyError: A parser is not installed.
    """
    answer = _pool.ask({"reader": kind.reader, "name": name, "bytes": len(data)}, data, limits)
    if "text" in answer:
        places = tuple((int(start), dict(facts)) for start, facts in answer["places"])
        return Reading(str(answer["text"]), dict(answer["metadata"]), places, tuple(map(str, answer["warnings"])))
    if "refused" in answer:
        raise DocumentError(str(answer["refused"]), remedy=str(answer.get("remedy", "")))
    if "missing" in answer:
        raise OptionalDependencyError(str(answer["missing"]), str(answer.get("extra", "")))
    if "timed_out" in answer:
        raise DocumentError(
            f"{name} takes more than {limits.seconds:g} s to read.",
            remedy="Divide it, save it in another format, or raise LMCACHE_RAG_DOCUMENT_SECONDS.",
        )
    if "memory" in answer:
        raise DocumentError(
            f"{name} takes more than {limits.memory_mb:,} MiB of memory to read.",
            remedy="Divide it, save it in another format, or raise LMCACHE_RAG_DOCUMENT_MB.",
        )
    raise DocumentError(
        f"{name} makes its parser end ({answer.get('ended', 'without an answer')}): it is damaged, or takes more than "
        f"{limits.memory_mb:,} MiB of memory.",
        remedy="Save it again in its own program, or raise LMCACHE_RAG_DOCUMENT_MB.",
    )


class _Child:
    """One child process; serves one file at a time."""

    def __init__(self, memory_mb: int) -> None:
        self.memory_mb, self.pid = memory_mb, os.getpid()
        # -P and a path of our own: a folder of documents can hold a file that is named like a module.
        here = str(Path(lmcache_rag.__file__).parents[1])
        path = [str(Path(part).absolute()) for part in sys.path if part]
        command = [sys.executable, "-P", "-c", _START, json.dumps([*path, here]), str(memory_mb)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "MALLOC_ARENA_MAX": "2"},  # each would reserve some of the memory
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], data: bytes, seconds: float) -> dict[str, Any]:
        """Send a file and wait for the answer; "ended" without one, "timed_out" where it took too long."""
        timed_out = threading.Event()

        def stop() -> None:
            timed_out.set()
            self._process.kill()

        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None  # noqa: S101 - both are pipes
        assert stdout is not None  # noqa: S101
        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        line = b""
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.write(data)
            stdin.flush()
            line = stdout.readline()
        except (BrokenPipeError, OSError):
            pass
        finally:
            timer.cancel()
        if line.endswith(b"\n") and not timed_out.is_set():
            try:
                answer = json.loads(line)
            except ValueError:
                answer = None
            if isinstance(answer, dict):
                return answer
        if not timed_out.is_set():
            with suppress(subprocess.TimeoutExpired):  # its pipe ends a moment before it does
                self._process.wait(5)
        self.close()
        return {"timed_out": True} if timed_out.is_set() else {"ended": self._how()}

    def _how(self) -> str:
        code = self._process.returncode or 0
        if code >= 0:
            return f"status {code}"
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"

    def close(self) -> None:
        """End the process."""
        if self.pid != os.getpid():  # the parent's
            return
        process = self._process
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:
                continue


class _Pool:
    """Child processes that wait for a file."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Child] = []

    def ask(self, request: dict[str, Any], data: bytes, limits: ReadLimits) -> dict[str, Any]:
        child = self._take(limits.memory_mb)
        while True:
            try:
                fresh = child is None
                child = child or _Child(limits.memory_mb)
                answer = child.ask(request, data, limits.seconds)
            except BaseException:  # such as Ctrl-C: what the child would answer belongs to nobody
                if child is not None:
                    child.close()
                raise
            if answer.get("ended") == "status 0" and not fresh:  # it ended by itself just before
                child = None
                continue
            break
        if {"timed_out", "ended", "memory", "last"} & answer.keys():
            child.close()
        else:
            self._put(child)
        return answer

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for child in idle:
            child.close()

    def _take(self, memory_mb: int) -> _Child | None:
        with self._lock:
            for child in [child for child in self._idle if child.memory_mb == memory_mb or child.pid != os.getpid()]:
                self._idle.remove(child)
                if child.pid == os.getpid() and child.alive:
                    return child
                child.close()
        return None

    def _put(self, child: _Child) -> None:
        with self._lock:
            self._idle.append(child)
            extra = self._idle[:-_MOST_IDLE]
            del self._idle[:-_MOST_IDLE]
        for old in extra:
            old.close()


_pool = _Pool()
atexit.register(_pool.close)
