"""Who computes on an engine at the same time: a time to a first token says nothing if something else ran then."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass


@dataclass(eq=False)
class Visit:
    """One request's time on an engine.

    Attributes:
        alone: Whether nothing else was computed there from its sending to its first token.
        measured: Whether it has its first token; what comes later changes nothing.
    """

    alone: bool = True
    measured: bool = False


class Traffic:
    """Requests and ingestion on one engine, of all sessions.

    Args:
        exclusive: Let requests in one after the other. For an engine that computes them so: the wait for others is no
            part of a time to a first token then.
        settle: Called in a thread before an exclusive request is let in: waits for what was left behind.
    """

    def __init__(self, *, exclusive: bool, settle: Callable[[], None] = lambda: None) -> None:
        self._gate = asyncio.Lock() if exclusive else None
        self._settle = settle
        self._lock = threading.Lock()
        self._active: set[Visit] = set()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[Visit]:
        """A request that is sent now."""
        async with self._gate or nullcontext():
            if self._gate is not None:
                await asyncio.to_thread(self._settle)
            with self.work() as visit:
                yield visit

    @contextmanager
    def work(self) -> Iterator[Visit]:
        """Something is computed; from any thread."""
        visit = Visit()
        with self._lock:
            visit.alone = not self._active
            for other in self._active:
                other.alone = other.alone and other.measured
            self._active.add(visit)
        try:
            yield visit
        finally:
            with self._lock:
                self._active.discard(visit)
