"""Supervises the servers: starts LMCache, then vLLM; restarts LMCache if it dies; stops all when vLLM ends."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lmcache_rag.errors import EngineError
from lmcache_rag.serving.process import Server

Report = Callable[[str], None]


@dataclass(frozen=True)
class Timeouts:
    """Time limits and intervals, in seconds.

    Attributes:
        lmcache_start: LMCache's start.
        vllm_start: vLLM's start: loading a model, compiling, capturing graphs.
        poll: Between two checks of the processes.
        health: Between two health checks of LMCache once it runs.
        hang: LMCache is killed and started again after this time without a healthy answer.
        first_pause: Before the first restart; doubled with each that follows.
        longest_pause: Between two restarts at most.
        grace: For a server between a signal and its kill.
    """

    lmcache_start: float = 180.0
    vllm_start: float = 3600.0
    poll: float = 0.2
    health: float = 5.0
    hang: float = 60.0
    first_pause: float = 1.0
    longest_pause: float = 60.0
    grace: float = 20.0


class VLLMEndError(Exception):
    """VLLM has ended, which ends the supervision."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@dataclass
class _Kept:
    """A server that is started again when it ends, or does not answer for too long.

    Attributes:
        server: The server.
        report: Called with each line for the user.
        timeouts: Time limits and intervals.
        meanwhile: What happens while it is away.
        back: What is so when it is back.
    """

    server: Server
    report: Report
    timeouts: Timeouts
    meanwhile: str
    back: str
    _pause: float = 0.0
    _again_at: float | None = None  # when it is to be started again
    _healthy_at: float = 0.0
    _up_since: float = 0.0
    _checked_at: float = 0.0
    _down: bool = False

    def start(self) -> None:
        """Start it, and wait until it is healthy.

        Raises:
            EngineError: It ended, or was not healthy in time.
        """
        name, log = self.server.name, self.server.log
        self.report(f"Starting {name}; its log: {log}")
        self.server.start()
        begin = time.monotonic()
        while not self.server.healthy():
            status = self.server.ended()
            if status is not None:
                show_end(self.server, status, self.report)
                raise EngineError(f"{name} did not start.", remedy=f"See its log: {log}")
            if time.monotonic() - begin > self.timeouts.lmcache_start:
                show_tail(self.server, self.report)
                raise EngineError(
                    f"{name} was not healthy after {self.timeouts.lmcache_start:g} s.", remedy=f"See its log: {log}"
                )
            time.sleep(self.timeouts.poll)
        self._healthy_at = self._up_since = time.monotonic()
        self.report(f"{name} is healthy after {self._healthy_at - begin:.1f} s.")

    def look(self) -> None:
        """Check it once."""
        now = time.monotonic()
        if self._again_at is not None:
            if now >= self._again_at:
                self._again_at, self._healthy_at = None, now
                self.server.start()
            return
        if (status := self.server.ended()) is not None:
            self._down = True
            self._pause = min(self._pause * 2 or self.timeouts.first_pause, self.timeouts.longest_pause)
            self._again_at = now + self._pause
            show_end(self.server, status, self.report, 5)
            self.report(f"{self.server.name} is started again in {self._pause:g} s. {self.meanwhile}")
        elif now - self._checked_at >= self.timeouts.health or self._down:
            self._check(now)

    def _check(self, now: float) -> None:
        self._checked_at = now
        if self.server.healthy():
            if self._down:
                self.report(f"{self.server.name} is healthy again{self.back}")
                self._up_since = now
            if now - self._up_since > self.timeouts.longest_pause:
                self._pause = 0.0  # it has recovered: the next failure counts as the first again
            self._down, self._healthy_at = False, now
        elif now - self._healthy_at > (self.timeouts.lmcache_start if self._down else self.timeouts.hang):
            self.report(f"{self.server.name} has not answered for {now - self._healthy_at:.0f} s: it is killed.")
            self.server.kill()
            self.server.wait()


@dataclass
class Supervisor:
    """Starts, monitors and ends the servers. Signals arrive as KeyboardInterrupt in the main thread.

    Attributes:
        lmcache: The LMCache server; None: vLLM runs alone.
        vllm: The vLLM server.
        report: Called with each line for the user.
        timeouts: Time limits and intervals.
        signal_of: Which signal a KeyboardInterrupt stands for; it is passed on to all servers.
        coordinator: LMCache's coordinator, where it runs beside them.
    """

    lmcache: Server | None
    vllm: Server
    report: Report
    timeouts: Timeouts = field(default_factory=Timeouts)
    signal_of: Callable[[BaseException], int] = lambda _: signal.SIGINT
    coordinator: Server | None = None

    def __post_init__(self) -> None:
        self._kept: list[_Kept] = []
        if self.lmcache is not None:
            meanwhile = "vLLM keeps running, and computes every prompt."
            back = ", its memory empty: KV is stored again with use, or loaded from --l2."
            self._kept.append(_Kept(self.lmcache, self.report, self.timeouts, meanwhile, back))
        if self.coordinator is not None:
            meanwhile = "Each server blends what it knows itself."
            self._kept.insert(0, _Kept(self.coordinator, self.report, self.timeouts, meanwhile, "."))

    def run(self, ready: Callable[[], None]) -> int:
        """Start all, call `ready`, and stay until vLLM ends; returns its exit status.

        Raises:
            EngineError: One of them did not start.
            KeyboardInterrupt: A signal came; all servers have ended.
        """
        number: int = signal.SIGTERM
        try:
            for kept in self._kept:
                kept.start()
            self._start_vllm()
            ready()
            while True:
                self._look()
                time.sleep(self.timeouts.poll)
        except VLLMEndError as end:
            show_end(self.vllm, end.status, self.report)
            return end.status
        except KeyboardInterrupt as stop:
            number = self.signal_of(stop)
            waits = f"running requests get up to {self.timeouts.grace:g} s; a second signal kills at once"
            self.report(f"Ending {', '.join(self._running())}: {waits}.")
            raise
        finally:
            self._stop(number)

    def _running(self) -> list[str]:
        """Names of the servers that run, in the order in which they are ended."""
        servers = [self.vllm, *(kept.server for kept in reversed(self._kept))]
        return [server.name for server in servers if server.runs] or ["serve"]

    def _start_vllm(self) -> None:
        self.report(f"Starting vLLM, which takes minutes with a large model; its log: {self.vllm.log}")
        self.vllm.start()
        begin = time.monotonic()
        while not self.vllm.healthy():
            self._look()
            if time.monotonic() - begin > self.timeouts.vllm_start:
                show_tail(self.vllm, self.report)
                raise EngineError(
                    f"vLLM was not healthy after {self.timeouts.vllm_start:g} s.",
                    remedy=f"See its log: {self.vllm.log}. Allow more time with --start-timeout.",
                )
            time.sleep(self.timeouts.poll)
        self.report(f"vLLM is healthy after {time.monotonic() - begin:.1f} s.")

    def _look(self) -> None:
        """Check all processes once."""
        if (status := self.vllm.ended()) is not None:
            raise VLLMEndError(status)
        for kept in self._kept:
            kept.look()

    def _stop(self, number: int) -> None:
        """End all: vLLM first, since it would report LMCache's end as an error. A signal meanwhile kills them."""
        servers = [self.vllm, *(kept.server for kept in reversed(self._kept))]
        for server in servers:
            with contextlib.suppress(KeyboardInterrupt):
                server.send(number)
                server.wait()
                continue
            self.report(f"{server.name} is killed.")
            for each in servers:
                each.kill()
        for server in servers:
            server.wait()


def show_end(server: Server, status: int, report: Report, lines: int = 20) -> None:
    """Report a server's end, and the last lines of its log."""
    show_tail(server, report, lines)
    how = f"signal {signal.Signals(status - 128).name}" if _is_signal(status) else f"status {status}"
    report(f"{server.name} ended with {how}.")


def show_tail(server: Server, report: Report, lines: int = 20) -> None:
    """Report the last lines of a server's log."""
    if last := server.last_lines(lines):
        report(f"The last lines of {server.log}:")
        for line in last:
            report(f"    {line}")


def _is_signal(status: int) -> bool:
    return status - 128 in {number.value for number in signal.Signals}


def check_ports(ports: dict[str, int]) -> None:
    """Fail now, rather than after minutes of loading, if ports, by their options, are in use.

    Raises:
        EngineError: Some are; it names them all.
    """
    used = {}
    for flag, port in ports.items():
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                used[flag] = port
    if not used:
        return
    numbers = " and ".join(map(str, used.values()))
    remedy = f"Name {'others' if len(used) > 1 else 'another'} with {', '.join(used)}."
    if len(used) == len(ports):
        remedy += " Another lmcache-rag serve may be running: lmcache-rag doctor shows its state."
    raise EngineError(
        f"Port{'s' * (len(used) > 1)} {numbers} {'are' if len(used) > 1 else 'is'} in use.", remedy=remedy
    )
