"""A guard around one server: whatever happens to the program that started it, nothing of the server is left.

Runs as ``python -m lmcache_rag.serving.child PARENT GRACE COMMAND...`` between that program and the server. A signal
is passed on to the server; a second one, or GRACE seconds, kill it. The parent's death counts as SIGTERM. When the
server has ended, all that it started is ended too: orphans come to this process, since it is their subreaper.

Exit status: that of the server, 128 + n when signal n ended it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

POLL_S = 0.05
_SET_DEATH_SIGNAL, _SET_SUBREAPER = 1, 36  # linux/prctl.h
REST_S = 5.0  # for what the server leaves behind, between SIGTERM and SIGKILL


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status."""
    parent, grace, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    came: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: came.append(number))
    _prctl(_SET_SUBREAPER, 1)
    _prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
    guard = os.getpid()

    def with_the_guard() -> None:
        _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != guard:  # it died before that was set
            os._exit(1)

    if os.getppid() != parent:
        return 128 + signal.SIGTERM
    # Its own session: Ctrl-C on a terminal reaches the parent only, which decides what that means.
    server = subprocess.Popen(command, start_new_session=True, preexec_fn=with_the_guard)
    status, killed = _until_it_ends(server.pid, parent, grace, came)
    server.returncode = status
    _end_the_rest(server.pid, 0.0 if killed else REST_S)
    return status


def _until_it_ends(pid: int, parent: int, grace: float, came: list[int]) -> tuple[int, bool]:
    passed = 0
    killed = False
    deadline: float | None = None
    while (status := _reap().get(pid)) is None:
        if passed == 0 and not came and os.getppid() != parent:
            came.append(signal.SIGTERM)  # where there is no death signal
        if passed < len(came):
            _kill(pid, came[passed])
            passed += 1
            deadline = deadline or time.monotonic() + grace
        if passed > 1 or (deadline is not None and time.monotonic() > deadline):
            _kill(pid, signal.SIGKILL)
            killed = True
        time.sleep(POLL_S)
    return status, killed


def _end_the_rest(group: int, patience: float) -> None:
    """What the server left behind: asked to end, and killed after so many seconds."""
    asked: set[int] = set()
    deadline = time.monotonic() + patience
    while rest := _rest(group):
        for pid in rest:
            if time.monotonic() > deadline:
                _kill(pid, signal.SIGKILL)
            elif pid not in asked:
                _kill(pid, signal.SIGTERM)
                asked.add(pid)
        _reap()
        time.sleep(POLL_S)


def _reap() -> dict[int, int]:
    """Exit statuses of all children that have ended, adopted ones too."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            code = os.waitstatus_to_exitcode(status)
            ended[pid] = code if code >= 0 else 128 - code
    return ended


def _rest(group: int) -> list[int]:
    """What still runs of everything that came from this process, in whatever session."""
    if Path("/proc/self/stat").exists():
        return descendants(os.getpid())
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, 0)
        return [-group]  # for kill, the whole group
    return []


def descendants(pid: int) -> list[int]:
    """All running children of a process, and theirs, by /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                # pid (any name) state parent ...
                state, parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(folder.name))
    found: list[int] = []
    level = [pid]
    while level:
        level = [child for one in level for child in children.get(one, [])]
        found += level
    return found


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
