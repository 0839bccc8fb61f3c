"""Lazy fill: passages that questions used and whose KV was missing are ingested in the background.

A server indexes the KV of ingested chunks only. A passage that was never ingested would be computed for every
question. So it is ingested after an answer, when it has been used often enough: on the second use, by default.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lmcache_rag._utils import one_of
from lmcache_rag.errors import LMCacheRAGError, StoreLockedError

if TYPE_CHECKING:
    from lmcache_rag.engines.base import Engine, PrecomputeResult

log = logging.getLogger("lmcache_rag")

LazyFillMode: TypeAlias = Literal["first", "second", "never"]

QUEUE = 256  # passages in the queue; if it is full, a passage is queued at a later use
REMEMBERED = 20_000  # passages whose uses are counted, the latest: about 4 MB
QUIET_S = 0.1  # an ingestion waits for a pause between questions of this length,
PATIENCE_S = 2.0  # but no longer than this
COOL_DOWN_S = 5.0  # after a failure nothing is queued for so long; it doubles with each failure in a row,
LONGEST_COOL_DOWN_S = 600.0  # up to this
CLOSE_S = 2.0  # how long a close waits for the ingestion in flight,
EXIT_S = 1.0  # and the end of the process; an engine that computes in it says how long in `exit_wait_s`
_MOST_DOUBLINGS = 6


def mode_of(name: str) -> LazyFillMode:
    """The mode of that name.

    Raises:
        ConfigError: There is none.
    """
    mode: LazyFillMode = one_of(LazyFillMode, "lazy_fill", name)
    return mode


@dataclass(frozen=True, slots=True)
class FillCounts:
    """Counts of a LazyFill so far.

    Attributes:
        ingested: Passages whose KV was computed.
        held: Passages whose KV the engine turned out to have.
        tokens: Their tokens, of both kinds.
        failed: Ingestions that failed.
        dropped: Passages that were not queued, since the queue was full.
    """

    ingested: int = 0
    held: int = 0
    tokens: int = 0
    failed: int = 0
    dropped: int = 0


@dataclass(slots=True)
class _Uses:
    """Uses of a passage without KV since it was last ingested, and how often it was ingested already."""

    seen: int = 0
    fills: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """Other background work of an engine, which cancel() stops too.

    Attributes:
        owner: For cancel().
        stop: Set when it should end.
        ended: Set by the work when it has ended.
    """

    owner: object
    stop: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class _Job:
    key: bytes
    ingest: Callable[[threading.Event], PrecomputeResult | None]
    owner: object
    stop: threading.Event = field(default_factory=threading.Event)


class LazyFill:
    """Ingests passages for one engine, one at a time, in a daemon thread that lives while there is work.

    Questions have priority: an ingestion waits for a pause between them (for PATIENCE_S at most), and after each the
    thread pauses for as long as it took. No failure affects an answer. Safe to use from several threads.

    Args:
        queue: Most passages that wait.
        remembered: Most passages whose uses are counted.
        quiet: Seconds without a question that an ingestion waits for.
        patience: Most seconds that it waits.
        cool_down: Seconds without new work after a failure.
    """

    def __init__(
        self,
        *,
        queue: int = QUEUE,
        remembered: int = REMEMBERED,
        quiet: float = QUIET_S,
        patience: float = PATIENCE_S,
        cool_down: float = COOL_DOWN_S,
    ) -> None:
        self._most_queued, self._most_remembered = queue, remembered
        self._quiet, self._patience, self._cool_down = quiet, patience, cool_down
        self._changed = threading.Condition()
        self._queue: deque[_Job] = deque()
        self._running: _Job | None = None
        self._thread: threading.Thread | None = None
        self._tasks: list[Task] = []
        self._uses: OrderedDict[bytes, _Uses] = OrderedDict()
        self._counts = FillCounts()
        self._last_question = float("-inf")  # when the last question began or ended
        self._failures = 0  # in a row
        self._not_before = float("-inf")

    # -- questions ------------------------------------------------------------------------------------------------

    def question(self) -> None:
        """A question begins: ingestion waits for a pause."""
        self._last_question = time.monotonic()

    def offer(
        self, key: str, ingest: Callable[[threading.Event], PrecomputeResult | None], *, uses: int, owner: object
    ) -> bool:
        """A question used a passage that has no KV. Queues its ingestion if it was used often enough.

        A passage whose KV was missing again after an ingestion must be used twice as often before the next one: if
        the server has no room for it, ingesting it at each use would only cost time.

        Args:
            key: Name of the passage's KV, in hex.
            ingest: Ingests it; gets an event that is set when it should end. Returns None if there was nothing to do.
            uses: At which use it is ingested.
            owner: For cancel().

        Returns:
            Whether it was queued now.
        """
        name = bytes.fromhex(key)
        with self._changed:
            self._last_question = time.monotonic()
            if any(job.key == name for job in (*self._queue, *([self._running] if self._running else []))):
                return False
            known = self._uses.setdefault(name, _Uses())
            self._uses.move_to_end(name)
            while len(self._uses) > self._most_remembered:
                self._uses.popitem(last=False)
            known.seen += 1
            if known.seen < uses << min(known.fills, _MOST_DOUBLINGS) or self._last_question < self._not_before:
                return False
            if len(self._queue) >= self._most_queued:
                self._counts = replace(self._counts, dropped=self._counts.dropped + 1)
                return False
            self._queue.append(_Job(name, ingest, owner))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="lmcache-rag-lazy-fill", daemon=True)
                self._thread.start()
            return True

    # -- results ----------------------------------------------------------------------------------------------------

    @property
    def counts(self) -> FillCounts:
        """Counts so far."""
        return self._counts

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until the queue is done; returns False on timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, timeout)

    def watch(self, task: Task) -> None:
        """Let cancel() stop this task too."""
        with self._changed:
            self._tasks = [known for known in self._tasks if not known.ended.is_set()]
            self._tasks.append(task)

    def cancel(self, owner: object = None, *, timeout: float = CLOSE_S) -> None:
        """Drop queued passages, and wait for the ingestion in flight and for tasks. New offers are still taken.

        Args:
            owner: Only its passages; None: all.
            timeout: Most seconds to wait. An ingestion that takes longer continues; its thread is a daemon.
        """
        with self._changed:
            self._queue = deque(job for job in self._queue if owner is not None and job.owner is not owner)
            job = self._running
            if job is not None and (owner is None or job.owner is owner):
                job.stop.set()
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._running is not job, timeout)
            tasks = [task for task in self._tasks if owner is None or task.owner is owner]
        for task in tasks:
            task.stop.set()
        end = time.monotonic() + timeout
        for task in tasks:
            task.ended.wait(max(0.0, end - time.monotonic()))

    # -- the thread -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        before, rest = self._counts, 0.0
        while (job := self._next()) is not None:
            job.stop.wait(rest)
            self.wait_for_pause(job.stop)
            begin = time.monotonic()
            if not job.stop.is_set():
                self._ingest(job)
            rest = time.monotonic() - begin
            with self._changed:
                self._running = None
                self._changed.notify_all()
            done = self._counts
            if not self._queue and (passages := done.ingested - before.ingested):
                log.info(
                    "Lazy fill ingested %d passage(s), %d tokens, that questions had used without KV.",
                    passages,
                    done.tokens - before.tokens,
                )
                before = done

    def _next(self) -> _Job | None:
        with self._changed:
            if self._queue:
                self._running = self._queue.popleft()
                return self._running
            self._thread = None
            self._changed.notify_all()
            return None

    def wait_for_pause(self, stop: threading.Event) -> None:
        """Wait for a pause between questions, as long as `patience` at most, or until `stop` is set."""
        end = time.monotonic() + self._patience
        while (now := time.monotonic()) < end and (left := self._last_question + self._quiet - now) > 0:
            if stop.wait(min(left, end - now)):
                return

    def _ingest(self, job: _Job) -> None:
        try:
            result = job.ingest(job.stop)
        except StoreLockedError:
            log.debug("Lazy fill: another process writes to the store; the passage is ingested at a later use.")
        except Exception as problem:  # no failure of the background may end a program
            if not job.stop.is_set():
                self._failed(problem)
        else:
            self._done(job, result)

    def _done(self, job: _Job, result: PrecomputeResult | None) -> None:
        with self._changed:
            self._failures = 0
            if (known := self._uses.get(job.key)) is not None:
                known.seen, known.fills = 0, known.fills + 1
            if result is not None:
                counts = self._counts
                self._counts = replace(
                    counts,
                    ingested=counts.ingested + result.computed,
                    held=counts.held + (not result.computed),
                    tokens=counts.tokens + result.tokens,
                )

    def _failed(self, problem: Exception) -> None:
        """Drop the queue and pause: the rest would most likely fail as well."""
        with self._changed:
            self._queue.clear()
            pause = min(self._cool_down * 2**self._failures, LONGEST_COOL_DOWN_S)
            self._not_before = time.monotonic() + pause
            self._failures = min(self._failures + 1, 30)
            self._counts = replace(self._counts, failed=self._counts.failed + 1)
            first = self._failures == 1
        what = str(problem) if isinstance(problem, LMCacheRAGError) else f"{type(problem).__name__}: {problem}"
        level = logging.WARNING if first else logging.DEBUG
        log.log(level, "Lazy fill could not ingest a passage and pauses for %.0f s: %s", pause, what)


# -- one for each engine ----------------------------------------------------------------------------------------------

_fills: weakref.WeakKeyDictionary[Any, LazyFill] = weakref.WeakKeyDictionary()
_guard = threading.Lock()
_hooked = False


def fill_of(engine: Engine) -> LazyFill:
    """The LazyFill of this engine. A forked process has its own."""
    global _hooked
    with _guard:
        if not _hooked:
            _hooked = True
            atexit.register(_at_exit)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=_after_fork)
        found = _fills.get(engine)
        if found is None:
            found = _fills[engine] = LazyFill()
        return found


def cancel(engine: Engine, owner: object = None, *, timeout: float = CLOSE_S) -> None:
    """Cancel the lazy fill of an engine, if it has one; see LazyFill.cancel."""
    with _guard:
        found = _fills.get(engine)
    if found is not None:
        found.cancel(owner, timeout=timeout)


def _at_exit() -> None:
    with _guard:
        fills = [(fill, float(getattr(engine, "exit_wait_s", EXIT_S))) for engine, fill in _fills.items()]
    for fill, seconds in fills:
        fill.cancel(timeout=seconds)


def _after_fork() -> None:
    """Start with an empty table: the parent's threads do not exist here, and locks they held stay locked."""
    global _fills, _guard
    _fills, _guard = weakref.WeakKeyDictionary(), threading.Lock()
