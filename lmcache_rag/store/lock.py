"""One writer at a time: a file lock that the threads of one store share and that names its holder."""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lmcache_rag.errors import StoreLockedError
from lmcache_rag.store.faults import from_os


class WriterLock:
    """The right to write to a store, held by one process (one open store) at a time.

    Re-entrant, and shared by the threads of the process that holds it: their transactions take turns by themselves.
    The system releases it when the process ends in any way.

    Args:
        path: The lock file. Who holds it stands beside it, in a file with ".owner" appended.
    """

    def __init__(self, path: Path) -> None:
        # thread_local=False: a worker thread of the process that holds the lock must not wait for its own process.
        self._lock = FileLock(path, thread_local=False)
        self._owner = path.with_name(path.name + ".owner")
        self._mutex = threading.Lock()
        self._depth = 0

    @contextmanager
    def held(self, timeout: float) -> Iterator[bool]:
        """Hold the lock; yields whether this is the outermost hold.

        Args:
            timeout: Most seconds to wait; 0 tries once, a negative number waits for ever.

        Raises:
            StoreLockedError: Another process still holds it after this time.
            StoreReadOnlyError, StoreFullError: The lock file cannot be written.
        """
        outermost = self._acquire(timeout)
        try:
            yield outermost
        finally:
            self._release()

    def _acquire(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        if not self._mutex.acquire(timeout=max(timeout, 0.0) if timeout >= 0 else -1):
            raise self._locked()
        try:
            if self._depth == 0:
                self._acquire_file(max(deadline - time.monotonic(), 0.0) if timeout >= 0 else -1)
                self._write_owner()
            self._depth += 1
            return self._depth == 1
        finally:
            self._mutex.release()

    def _acquire_file(self, timeout: float) -> None:
        try:
            self._lock.acquire(timeout=timeout)
        except Timeout:
            raise self._locked() from None
        except RuntimeError:  # filelock refuses to wait for ever for what this very thread holds
            raise self._locked() from None
        except OSError as error:
            raise from_os(error, self._owner.parent) from error

    def _release(self) -> None:
        with self._mutex:
            self._depth -= 1
            if self._depth == 0:
                with suppress(OSError):
                    self._owner.unlink()
                self._lock.release()

    def _write_owner(self) -> None:
        # A courtesy to whoever waits: it must not stop the work, for example on a full disk.
        facts = {"pid": os.getpid(), "host": platform.node(), "program": Path(sys.argv[0]).name, "since": time.time()}
        with suppress(OSError):
            self._owner.write_text(json.dumps(facts), encoding="utf-8")

    def _locked(self) -> StoreLockedError:
        try:
            facts = json.loads(self._owner.read_text(encoding="utf-8"))
            since = time.strftime("%H:%M:%S", time.localtime(facts["since"]))
            who = f"Process {facts['pid']} ({facts['program']} on {facts['host']}, since {since})"
        except (OSError, ValueError, KeyError, TypeError):
            who = "Another process"
        return StoreLockedError(
            f"{who} is writing to the store {self._owner.parent}.",
            remedy="Wait until it has finished and run the same again, or stop that process.",
        )
