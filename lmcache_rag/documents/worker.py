"""The child process that parses files: with little memory, without network, without other programs.

The parent sends a request as a line of JSON and then the file's bytes; the answer is one line of JSON. Nothing of the
answer is code, so that a parser that a file has taken over can only lie about the text.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from lmcache_rag.documents.types import Reading
from lmcache_rag.errors import DocumentError, OptionalDependencyError

IDLE_SECONDS = 60
_FILES = 200  # after so many a new process takes over, so that memory that a library lost comes back
_READERS = "lmcache_rag.documents."
_FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.system",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.kill",
    "pty.spawn",
    "shutil.",
    "sqlite3.",
    "urllib.",
    "http.",
    "ftplib.",
)


class _Guard:
    """Refuses network, other programs and writing while a file is parsed. Cannot be taken off."""

    def __init__(self) -> None:
        self.on = False
        sys.addaudithook(self._look)

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            mode, flags = arguments[1], arguments[2]
            writes = isinstance(mode, str) and any(letter in mode for letter in "wax+")
            writes = writes or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) != 0)
            if not writes:
                return
        elif not event.startswith(_FORBIDDEN):
            return
        raise PermissionError(f"a parser may not do this: {event}")


def main(memory_mb: int) -> None:
    """Answer requests until the parent closes the pipe, or sends nothing for a minute."""
    _limit_memory(memory_mb)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    sys.dont_write_bytecode = True
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    guard = _Guard()
    for number in range(_FILES):
        with _idle():
            line = requests.readline()
        if not line:
            return
        request = json.loads(line)
        answer = _answer(request, requests, guard) | ({"last": True} if number + 1 == _FILES else {})
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        if answer.get("memory"):
            return
        del answer
        gc.collect()


@contextmanager
def _idle() -> Iterator[None]:
    """End this process if nothing comes for a while. Without a thread: each would reserve some of the memory."""
    if not hasattr(signal, "SIGALRM"):  # Windows
        yield
        return
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.alarm(IDLE_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def _limit_memory(megabytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: only the time is limited
        return
    size = megabytes * 2**20
    for limit, value in ((resource.RLIMIT_AS, size), (resource.RLIMIT_CORE, 0)):
        try:
            hard = resource.getrlimit(limit)[1]
            resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard),) * 2)
        except (ValueError, OSError):  # macOS knows no limit of the address space
            continue


def _answer(request: dict[str, Any], requests: BinaryIO, guard: _Guard) -> dict[str, Any]:
    try:
        data = requests.read(request["bytes"])
        module, _, function = request["reader"].partition(":")
        if not module.startswith(_READERS):
            raise ValueError(module)
        reader = getattr(importlib.import_module(module), function)
        guard.on = True
        try:
            reading: Reading = reader(data, request["name"])
        finally:
            guard.on = False
        return {
            "text": reading.text,
            "metadata": dict(reading.metadata),
            "places": [[start, dict(facts)] for start, facts in reading.places],
            "warnings": list(reading.warnings),
        }
    except OptionalDependencyError as error:
        return {"missing": error.package, "extra": error.extra}
    except DocumentError as error:
        return {"refused": error.message, "remedy": error.remedy}
    except MemoryError:
        return {"memory": True}
    except RecursionError:
        return {"refused": f"{request['name']} is nested too deeply.", "remedy": "Save it in another format."}
    except Exception as error:  # a parser's fault must not take the other documents along
        reason = " ".join(str(error).split())[:200]
        return {
            "refused": f"{request['name']} cannot be read ({type(error).__name__}: {reason}).",
            "remedy": "Save it again in its own program, or in another format.",
        }
