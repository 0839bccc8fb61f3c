"""Processes of this machine, by /proc: the ones that a soak watches, and the one that it pauses."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROC = Path("/proc")
LISTENS = "0A"


def descendants(process: int) -> list[int]:
    """Its children, and theirs."""
    parents: dict[int, list[int]] = {}
    for folder in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(folder.name))
    found, at = [], [process]
    while at:
        children = parents.get(at.pop(), [])
        found += children
        at += children
    return sorted(found)


def engine_cores(watched: Iterable[int]) -> list[int]:
    """VLLM's EngineCore processes among these and what they started."""
    found = set()
    for process in watched:
        for each in (process, *descendants(process)):
            with contextlib.suppress(OSError):
                if b"EngineCore" in (PROC / str(each) / "cmdline").read_bytes():
                    found.add(each)
    return sorted(found)


def listener(port: int) -> int | None:
    """The process that listens at that port of this machine; of several the first that was started."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == LISTENS and int(words[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{words[9]}]")
    found = []
    for folder in PROC.glob("[0-9]*") if sockets else ():
        with contextlib.suppress(OSError):
            if any(_target(each) in sockets for each in (folder / "fd").iterdir()):
                found.append(int(folder.name))
    return min(found, default=None)


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


@contextmanager
def paused(process: int) -> Iterator[None]:
    """Stop a process and what it started; they go on in the end."""
    all_ = [process, *descendants(process)]
    try:
        for each in all_:
            _signal(each, signal.SIGSTOP)
        yield
    finally:
        for each in all_:
            _signal(each, signal.SIGCONT)


def _signal(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def pause_listener(port: int, seconds: float, *, wait_s: float = 60.0) -> bool:
    """Pause what listens at that port; False: nothing does, even after a while in which it may be started again."""
    end = time.monotonic() + wait_s
    while (process := listener(port)) is None:
        if time.monotonic() >= end:
            return False
        time.sleep(0.25)
    with paused(process):
        time.sleep(seconds)
    return True
