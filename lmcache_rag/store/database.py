"""The SQLite file of a store: any number of readers, one writer at a time."""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lmcache_rag.errors import StoreError, StoreLockedError
from lmcache_rag.store.connections import (
    ConnectionSource,
    LiveSource,
    cannot_write,
    corrupt,
    from_os,
    migrate,
    needs_migration,
    open_for_reading,
    read_older,
    translated,
)

_MAX_IDLE = 8
_CHECK_UP_TO = 256 * 2**20


class WriterLock:
    """The right to write to a store, held by one process (one open store) at a time.

    Re-entrant, and shared by the threads of the process that holds it: their transactions take turns by themselves.
    The system releases it when the process ends in any way.

    Args:
        path: The lock file. Its holder is recorded next to it, in a file with ".owner" appended.
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
        # Only for messages of waiting processes: an error here, such as a full disk, must not stop the work.
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


class Database:
    """The SQLite file of a store. Safe to use from several threads and several processes.

    Args:
        path: The database file; it is made if it is missing and can be written.
        lock: What a writer must hold.
        read_only: Refuse every write.
        lock_timeout: Most seconds that a write waits for the lock.
        refusal: Makes the error of a rejected write from the store's folder.

    Raises:
        StoreError: Or one of its subclasses, when the file cannot be used.
    """

    def __init__(
        self,
        path: Path,
        lock: WriterLock,
        *,
        read_only: bool,
        lock_timeout: float,
        refusal: Callable[[Path], StoreError] = cannot_write,
    ) -> None:
        self.path = path
        self.read_only = read_only
        self._refusal = refusal
        self._lock = lock
        self._lock_timeout = lock_timeout
        self._pid = os.getpid()
        self._mutex = threading.Lock()  # guards the source and the idle connections
        self._write_turn = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._writer: sqlite3.Connection | None = None
        self._closed = False
        with translated(path):
            self._source: ConnectionSource = open_for_reading(path) if read_only else self._open_for_writing()
            connection = self._source.connect()
            try:
                self._prepare(connection)
                self._check_pages(connection)
            except BaseException:
                connection.close()
                self._source.close()
                raise
            self._idle.append(connection)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        if self.read_only:
            read_older(connection, self.path)

    def _open_for_writing(self) -> ConnectionSource:
        if not self.path.exists() or self._is_old():
            with self._lock.held(self._lock_timeout):
                connection = LiveSource(self.path, "rwc").connect()
                try:
                    connection.execute("PRAGMA journal_mode = WAL")
                    migrate(connection, self.path)
                finally:
                    connection.close()
        # Not "rwc" from here on: a store that is deleted while open must not be created again, empty.
        return LiveSource(self.path, "rw")

    def _is_old(self) -> bool:
        connection = LiveSource(self.path, "rw").connect()
        try:
            return needs_migration(connection, self.path)
        finally:
            connection.close()

    def _check_pages(self, connection: sqlite3.Connection) -> None:
        # About 1 ms per MB. Beyond this size damage is found when it is read, not before.
        if self.path.stat().st_size <= _CHECK_UP_TO:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise corrupt(self.path, found.splitlines()[-1])

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees one state of the store for as long as the block lasts.

        Raises:
            StoreError: Or one of its subclasses.
        """
        with translated(self.path):
            source, connection = self._borrow()
            try:
                connection.execute("BEGIN")
                yield connection
            finally:
                self._give_back(source, connection)

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are committed together at the end of the block, or rolled back if it raises.

        Raises:
            StoreLockedError: Another process is writing.
            StoreReadOnlyError, StoreFullError, StoreCorruptError: The file cannot be written.
        """
        self._check_usable()
        self.require_writable()
        with self._lock.held(self._lock_timeout), self._write_turn, translated(self.path):
            connection = self._writer_connection()
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    self._roll_back(connection)

    def require_writable(self) -> None:
        """Check that the store can be written.

        Raises:
            StoreReadOnlyError, StoreFullError: It cannot.
        """
        if self.read_only:
            raise self._refusal(self.path.parent)

    def close(self) -> None:
        """Close every connection. Safe to call twice."""
        with self._mutex:
            self._closed = True
            connections, self._idle = self._idle, []
        with self._write_turn:
            if self._writer is not None:
                connections.append(self._writer)
                self._writer = None
        if os.getpid() == self._pid:  # connections of the parent process are not ours to close
            for connection in connections:
                connection.close()
            self._source.close()

    @property
    def closed(self) -> bool:
        """Whether it can no longer be used, here or in this process at all."""
        return self._closed or os.getpid() != self._pid

    def _check_usable(self) -> None:
        if self._closed:
            raise StoreError(f"The store {self.path.parent} has been closed.", remedy="Open it again.")
        if os.getpid() != self._pid:
            raise StoreError(
                f"The store {self.path.parent} was opened in another process.",
                remedy="Open it in each process, after the fork.",
            )

    def _borrow(self) -> tuple[ConnectionSource, sqlite3.Connection]:
        self._check_usable()
        with self._mutex:
            if self._source.changed():
                stale, self._idle = self._idle, []
                for connection in stale:
                    connection.close()
                self._source.close()
                self._source = open_for_reading(self.path)
            if self._idle:
                return self._source, self._idle.pop()
            source = self._source
        connection = source.connect()
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return source, connection

    def _give_back(self, source: ConnectionSource, connection: sqlite3.Connection) -> None:
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            connection.close()
            return
        with self._mutex:
            if source is self._source and not self._closed and len(self._idle) < _MAX_IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def _writer_connection(self) -> sqlite3.Connection:
        self._check_usable()
        if self._writer is None:
            self._writer = self._source.connect()
        return self._writer

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute("ROLLBACK")
        except sqlite3.Error:
            # The next connection that reads the file rolls back what was not committed.
            self._writer = None
            with suppress(sqlite3.Error):
                connection.close()
