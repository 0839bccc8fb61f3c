"""Where connections come from: a database that can be written, or one that can only be looked at."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Protocol

logger = logging.getLogger("lmcache_rag.store")

_BUSY_SECONDS = 30  # our own writers take turns by a lock; this is for other programs that look into the file

# What SQLite says when it cannot make its -shm file: the folder cannot be written, or the disk is full.
_NO_SHM = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL}


class Source(Protocol):
    """Opens connections to one state of the database file."""

    def connect(self) -> sqlite3.Connection:
        """Open one more connection, usable from any thread, without implicit transactions."""
        ...

    def changed(self) -> bool:
        """Whether the file has changed in a way that connections opened before cannot see."""
        ...

    def close(self) -> None:
        """Remove what the source made for itself."""
        ...


def _connect(path: Path, options: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?{options}"
    connection = sqlite3.connect(
        uri, uri=True, isolation_level=None, check_same_thread=False, timeout=_BUSY_SECONDS, cached_statements=256
    )
    try:
        # A kill cannot lose what was committed; a power cut can lose the last commits, but never damages the file.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA cell_size_check = ON")  # a damaged page is noticed before it is believed
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()  # the first look at the file itself
    except BaseException:
        connection.close()
        raise
    return connection


class Live:
    """The database file with its write-ahead log: sees every commit of every process.

    Args:
        path: The database file.
        mode: SQLite's "rwc" (make it if it is missing), "rw" or "ro".
        query_only: Refuse writes although the file could be written.
    """

    def __init__(self, path: Path, mode: str, *, query_only: bool = False) -> None:
        self._path = path
        self._mode = mode
        self._query_only = query_only

    def connect(self) -> sqlite3.Connection:
        """Open one more connection."""
        connection = _connect(self._path, f"mode={self._mode}")
        if self._query_only:
            connection.execute("PRAGMA query_only = ON")
        return connection

    def changed(self) -> bool:
        """Never: SQLite itself shows every commit."""
        return False

    def close(self) -> None:
        """Nothing to remove."""


class Frozen:
    """A database file that nobody is writing and beside which no file can be made.

    SQLite wants to make its -shm file beside a write-ahead log. Where it cannot, the file is opened as immutable when
    the log is empty, and otherwise file and log are copied to a private temporary folder first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._signature = self._look()
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        log = _log_of(path)
        if log.exists() and log.stat().st_size > 0:
            logger.warning("%s was not closed, and no file can be made beside it: reading a temporary copy.", path)
            self._copy = tempfile.TemporaryDirectory(prefix="lmcache-rag-")
            for file in (path, log):
                shutil.copyfile(file, Path(self._copy.name) / file.name)

    def connect(self) -> sqlite3.Connection:
        """Open one more connection."""
        if self._copy is not None:
            return _connect(Path(self._copy.name) / self._path.name, "mode=rw")
        return _connect(self._path, "immutable=1")

    def changed(self) -> bool:
        """Whether another user has written to the database meanwhile."""
        return self._look() != self._signature

    def close(self) -> None:
        """Remove the temporary copy."""
        if self._copy is not None:
            self._copy.cleanup()

    def _look(self) -> tuple[int, ...]:
        signature: list[int] = []
        for file in (self._path, _log_of(self._path)):
            try:
                stat = file.stat()
                signature += [stat.st_ino, stat.st_size, stat.st_mtime_ns]
            except FileNotFoundError:
                signature.append(-1)
        return tuple(signature)


def can_write(folder: Path, path: Path) -> bool:
    """Whether this process can write to the database file path in folder."""
    return os.access(folder, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))


def open_for_reading(path: Path) -> Source:
    """Choose how to read the database file at path.

    Raises:
        sqlite3.Error: The file cannot be read in any way.
        OSError: It cannot be copied.
    """
    live = Live(path, "rw", query_only=True) if can_write(path.parent, path) else Live(path, "ro")
    try:
        live.connect().close()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in _NO_SHM:
            raise
        return Frozen(path)
    return live


def _log_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")
