"""One server as a process under a guard, with its output in a file.

However the program that started the server ends, no process of the server is left. The guard is this module, run as
``python -m lmcache_rag.serving.process PARENT GRACE COMMAND...`` between that program and the server. A signal is
passed on to the server; a second one, or GRACE seconds, kill it. The parent's death counts as SIGTERM. When the server
has ended, all processes that it started are ended too: orphans become the guard's children, since it is their
subreaper.

The guard's exit status is that of the server, 128 + n when signal n ended it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

POLL_S = 0.05
_SET_DEATH_SIGNAL, _SET_SUBREAPER = 1, 36  # linux/prctl.h
REST_S = 5.0  # for processes that outlive the server, between SIGTERM and SIGKILL


@dataclass
class Server:
    """A server that can be started again.

    Attributes:
        name: Its name in messages.
        command: What to run.
        healthy: Whether it answers now; must not raise, and return within a few seconds.
        log: File that its output is appended to.
        grace: How long it may take to end before it is killed, in seconds.
        environment: Variables on top of the inherited ones.
        inherited: Names of our variables that it inherits; None: all.
    """

    name: str
    command: Sequence[str]
    healthy: Callable[[], bool]
    log: Path
    grace: float
    environment: Mapping[str, str] = field(default_factory=dict)
    inherited: Mapping[str, str] | None = None
    _process: subprocess.Popen[bytes] | None = None
    _begin: int = 0  # offset in the log at which its present run begins

    def start(self) -> None:
        """Start it. Call this from the main thread: on Linux a server ends with the thread that started it."""
        inherited = os.environ if self.inherited is None else self.inherited
        guard = [sys.executable, "-m", "lmcache_rag.serving.process", str(os.getpid()), str(self.grace)]
        with self.log.open("ab") as out:
            self._begin = out.tell()
            self._process = subprocess.Popen(
                [*guard, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**inherited, "PYTHONUNBUFFERED": "1", **self.environment},
                start_new_session=True,
            )

    def ended(self) -> int | None:
        """Exit status, 128 + n when signal n ended it; None while it runs or was never started."""
        status = self._process.poll() if self._process else None
        return status if status is None or status >= 0 else 128 - status

    @property
    def runs(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self.ended() is None

    def send(self, number: int = signal.SIGTERM) -> None:
        """Send it a signal. At the second one its guard kills it and all its children."""
        if self._process is not None and self.runs:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it and all its children."""
        self.send(signal.SIGTERM)
        self.send(signal.SIGHUP)  # another signal: two of a kind may be delivered as one

    def wait(self) -> None:
        """Wait for its end; call send() or kill() first."""
        if self._process is not None:
            self._process.wait()

    def last_lines(self, count: int = 20) -> list[str]:
        """The last lines that its present run wrote."""
        try:
            with self.log.open("rb") as file:
                file.seek(self._begin)
                return [line.decode(errors="replace").rstrip() for line in deque(file, count)]
        except OSError:
            return []


# The guard


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
        if os.getppid() != guard:  # the guard died before the death signal was set
            os._exit(1)

    if os.getppid() != parent:
        return 128 + signal.SIGTERM
    # A new session: Ctrl-C on a terminal reaches the parent only, which decides what to do.
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
    """End processes that outlived the server: SIGTERM, and SIGKILL after so many seconds."""
    terminated: set[int] = set()
    deadline = time.monotonic() + patience
    while rest := _rest(group):
        for pid in rest:
            if time.monotonic() > deadline:
                _kill(pid, signal.SIGKILL)
            elif pid not in terminated:
                _kill(pid, signal.SIGTERM)
                terminated.add(pid)
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
    """Running descendants of this process, in any session."""
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
