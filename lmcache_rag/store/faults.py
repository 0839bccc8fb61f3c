"""Turns what SQLite and the file system report into errors that say what to do."""

from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmcache_rag.errors import (
    StoreCorruptError,
    StoreError,
    StoreFullError,
    StoreLockedError,
    StoreReadOnlyError,
)

_FULL = {errno.ENOSPC, errno.EDQUOT}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_ROOM = 1 << 16  # with less than this free, an unexplained I/O error of SQLite means a full disk


def corrupt(path: Path, reason: str) -> StoreCorruptError:
    """The store's database is damaged."""
    return StoreCorruptError(
        f"The store's database {path} is damaged ({reason}).",
        remedy=f"Move {path.name}, {path.name}-wal and {path.name}-shm aside and ingest again; "
        "computed KV is kept by content and will be found again.",
    )


def cannot_write(path: Path) -> StoreReadOnlyError:
    """The store cannot be written."""
    return StoreReadOnlyError(
        f"The store {path} cannot be written.",
        remedy="Make the folder writable for this user, or copy it to a place that is.",
    )


def full(path: Path) -> StoreFullError:
    """The device is full."""
    return StoreFullError(
        f"No space is left for the store {path}; what was stored before is intact.",
        remedy="Free some space on the device, then run the same again.",
    )


def _no_room(path: Path) -> bool:
    try:
        return shutil.disk_usage(path.parent).free < _NO_ROOM
    except OSError:
        return False


def from_sqlite(error: sqlite3.Error, path: Path) -> StoreError:
    """The store error that an error of SQLite on the file path stands for."""
    code = getattr(error, "sqlite_errorcode", None)
    primary = code & 0xFF if code is not None else None
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or "Could not decode" in str(error):
        return corrupt(path, str(error))
    if primary == sqlite3.SQLITE_FULL:
        return full(path.parent)
    if primary == sqlite3.SQLITE_READONLY:
        return cannot_write(path.parent)
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreLockedError(
            f"Another program holds the database {path}.", remedy="Close it, or wait until it has finished."
        )
    if primary in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and _no_room(path):
        return full(path.parent)
    return StoreError(
        f"The store's database {path} gave an error: {error}.",
        remedy="Check the folder and its file system; the store itself was left as it was.",
    )


def from_os(error: OSError, path: Path) -> StoreError:
    """The store error that an error of the file system stands for."""
    if error.errno in _FULL:
        return full(path)
    if error.errno in _READ_ONLY:
        return cannot_write(path)
    return StoreError(f"The store {path} cannot be used: {error}.", remedy="Check the path and its file system.")


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Errors of SQLite on the file path, and of the file system beside it, leave as store errors."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise StoreError(
            f"Text that is not valid Unicode cannot be stored: {error.object[error.start : error.start + 1]!a} "
            f"at character {error.start} of {error.object[:40]!a}.",
            remedy='Replace such characters first, for example with text.encode("utf-8", "replace").decode().',
        ) from error
    except sqlite3.Error as error:
        raise from_sqlite(error, path) from error
    except OSError as error:
        raise from_os(error, path.parent) from error
