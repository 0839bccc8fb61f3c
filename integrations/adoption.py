"""Adoption: texts that a vector store held before it was wrapped get registered, and their KV computed."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from lmcache_rag import lazy_fill
from lmcache_rag.errors import LMCacheRAGError
from lmcache_rag.kv_manager import KVTotals

from .kv_registry import KVRegistry

log = logging.getLogger("lmcache_rag")

PAGE = 16  # texts between two commits and two reports of progress
_LOG_S = 30.0  # between two log lines
_STOP_S = 2.0  # how long stop() waits

Page: TypeAlias = Mapping[str, tuple[str, str]]  # (text, group) by id


@dataclass(frozen=True, slots=True)
class AdoptProgress:
    """How far an adoption is.

    Attributes:
        done: Texts that have been looked at.
        total: How many the vector store holds; None: not known.
        kv: What was computed.
        unusable: Texts that cannot be registered: no valid Unicode.
    """

    done: int = 0
    total: int | None = None
    kv: KVTotals = field(default_factory=KVTotals)
    unusable: int = 0

    def __str__(self) -> str:
        total = "" if self.total is None else f" of {self.total}"
        size = f" ({self.kv.tokens} tokens, {self.kv.nbytes / 1e6:.0f} MB)" if self.kv.nbytes else ""
        return f"{self.done}{total} documents, KV of {self.kv.computed} computed{size}"


class Adoption:
    """One run over the texts of a vector store, in the caller's thread or in the background.

    Each page of texts is committed and computed before the next, and what is done already is skipped: a run that was
    stopped, or failed, is continued by another. Changes that the program makes meanwhile win.

    Args:
        register: Returns the registry; may connect to the engine.
        pages: Returns the texts, page by page.
        name: Name of the vector store, for log lines.
        count: Returns how many texts there are.
        held: Returns those of the ids that the vector store holds, or None if it cannot say.
        on_progress: Called after each page.
    """

    def __init__(
        self,
        register: Callable[[], KVRegistry],
        pages: Callable[[], Iterable[Page]],
        *,
        name: str,
        count: Callable[[], int | None] = lambda: None,
        held: Callable[[set[str]], set[str] | None] = lambda ids: None,
        on_progress: Callable[[AdoptProgress], None] | None = None,
    ) -> None:
        self._register, self._pages, self._name = register, pages, name
        self._count, self._held, self._on_progress = count, held, on_progress
        self._stop, self._ended = threading.Event(), threading.Event()
        self._background = False
        self._error: BaseException | None = None
        self._progress = AdoptProgress()

    # -- results --------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> AdoptProgress:
        """How far it is."""
        return self._progress

    @property
    def running(self) -> bool:
        """Whether it is still running in the background."""
        return self._background and not self._ended.is_set()

    @property
    def error(self) -> BaseException | None:
        """Why it ended early, if it failed."""
        return self._error

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended; returns False after `timeout` seconds."""
        return self._ended.wait(timeout)

    def result(self, timeout: float | None = None) -> KVTotals:
        """Wait until it has ended and return what was computed.

        Raises:
            TimeoutError: It has not ended after `timeout` seconds.
            LMCacheRAGError: It failed; adopt() continues it.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"The adoption of {self._name} is still running: {self._progress}.")
        if self._error is not None:
            raise self._error
        return self._progress.kv

    async def aresult(self) -> KVTotals:
        """Async version of result. Cancelling it stops the work after the text in flight."""
        try:
            return await asyncio.to_thread(self.result)
        finally:
            self.stop(0)

    def stop(self, timeout: float = _STOP_S) -> bool:
        """Stop after the text in flight; adopt() continues it. Returns whether it has ended in `timeout` seconds."""
        self._stop.set()
        return not self._background or self._ended.wait(timeout)

    # -- the run --------------------------------------------------------------------------------------------------

    def run(self) -> KVTotals:
        """Adopt now, in this thread.

        Raises:
            PrecomputeError: KV could not be computed; call adopt() again to continue.
        """
        try:
            self._adopt(self._register())
        finally:
            self._ended.set()
        return self._progress.kv

    def start(self) -> Adoption:
        """Adopt in a daemon thread, in pauses between questions where there are any. Failures are logged."""
        self._background = True
        threading.Thread(target=self._work, name="lmcache-rag-adopt", daemon=True).start()
        return self

    def _work(self) -> None:
        try:
            register = self._register()
            task = lazy_fill.Task(register.store, self._stop, self._ended)
            lazy_fill.fill_of(register.engine).watch(task)
            self._adopt(register)
            if self._stop.is_set():
                log.info("The adoption of %s was stopped: %s. adopt() continues it.", self._name, self._progress)
            elif self._progress.kv.computed or self._progress.kv.existed:
                log.info("%s is adopted: %s.", self._name, self._progress)
        except Exception as problem:  # no failure of the background may end a program
            self._error = problem
            if not self._stop.is_set():
                what = str(problem) if isinstance(problem, LMCacheRAGError) else f"{type(problem).__name__}: {problem}"
                log.warning(
                    "The documents that %s held before have no KV yet (%s): %s Call adopt() later to continue.",
                    self._name,
                    self._progress,
                    what,
                )
        finally:
            self._ended.set()

    def _adopt(self, register: KVRegistry) -> None:
        changes, adopted = register.watch_changes(), set[str]()
        self._progress = AdoptProgress(total=self._count())
        fill, logged = lazy_fill.fill_of(register.engine), time.monotonic()
        try:
            for page in self._pages():
                if self._background:
                    fill.wait_for_pause(self._stop)
                if self._stop.is_set():
                    return
                new, unusable = register.adopt(page, changes=changes)
                adopted |= new
                computed = register.compute(page, stop=self._stop)
                before = self._progress
                self._progress = AdoptProgress(
                    before.done + len(page), before.total, before.kv + computed, before.unusable + unusable
                )
                if self._on_progress:
                    self._on_progress(self._progress)
                if time.monotonic() - logged >= _LOG_S:
                    logged = time.monotonic()
                    log.info("Adopting %s: %s.", self._name, self._progress)
        finally:
            if changes.any and adopted:
                self._remove_deleted(register, adopted)

    def _remove_deleted(self, register: KVRegistry, adopted: set[str]) -> None:
        """Remove texts that were deleted after they had been listed, and before they were registered."""
        held = self._held(adopted)
        if held is not None:
            register.remove(adopted - held)
