"""One server as a process behind a guard (see lmcache_rag.serving.child), its output in a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Server:
    """A server that can be started again.

    Attributes:
        name: For people.
        command: What to run.
        healthy: Whether it answers now; must not raise, and return within a few seconds.
        log: File that its output is appended to.
        grace: How long it may take to end before it is killed, in seconds.
        environment: Variables on top of the inherited ones.
        inherited: Variables of ours that it gets; None: all.
    """

    name: str
    command: Sequence[str]
    healthy: Callable[[], bool]
    log: Path
    grace: float
    environment: Mapping[str, str] = field(default_factory=dict)
    inherited: Mapping[str, str] | None = None
    _process: subprocess.Popen[bytes] | None = None
    _begin: int = 0  # where in the log its present run begins

    def start(self) -> None:
        """Start it. Call this from the main thread: on Linux a server ends with the thread that started it."""
        inherited = os.environ if self.inherited is None else self.inherited
        guard = [sys.executable, "-m", "lmcache_rag.serving.child", str(os.getpid()), str(self.grace)]
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
        """Ask it to end. Its guard kills it, and all its children, when asked twice."""
        if self._process is not None and self.runs:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it and all its children."""
        self.send(signal.SIGTERM)
        self.send(signal.SIGHUP)  # another one: two of a kind may arrive as one

    def wait(self) -> None:
        """Wait for its end, which must have been asked for."""
        if self._process is not None:
            self._process.wait()

    def last_lines(self, count: int = 20) -> list[str]:
        """The end of what its present run wrote."""
        try:
            with self.log.open("rb") as file:
                file.seek(self._begin)
                return [line.decode(errors="replace").rstrip() for line in deque(file, count)]
        except OSError:
            return []
