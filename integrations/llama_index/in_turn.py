"""Changes of a vector store one after the other, from threads and event loops at once."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
_PAUSE = 0.01  # seconds between two looks at the lock from an event loop
_PATIENCE = 60.0  # seconds that a thread waits for the lock
# Not asyncio's own threads: all of those may be waiting for the lock, in a user's asyncio.to_thread(store.add, ...).
_threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="lmcache-rag")


class InTurn:
    """A lock for `with` and `async with`. An event loop that waits for it goes on with its other tasks.

    A thread goes on without it after a while: whoever holds it may be waiting for just this thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mine = threading.local()

    def __enter__(self) -> None:
        self._mine.held = self._lock.acquire(timeout=_PATIENCE)

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine.held:
            self._lock.release()

    async def __aenter__(self) -> None:
        # Waiting in a thread would take the lock for nobody when this task is cancelled meanwhile.
        while not self._lock.acquire(blocking=False):  # noqa: ASYNC110 - threads hold it too
            await asyncio.sleep(_PAUSE)

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


async def in_thread(work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Await work in a thread. A cancelled task waits for the thread, which nothing can stop, and is cancelled then."""
    call = partial(contextvars.copy_context().run, work, *args, **kwargs)
    future = asyncio.get_running_loop().run_in_executor(_threads, call)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # seen: the cancellation is what is raised
        raise
