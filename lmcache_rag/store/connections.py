"""Connections to the store's SQLite file, to be written or only read; its errors and its schema."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from lmcache_rag.errors import (
    StoreCorruptError,
    StoreError,
    StoreFullError,
    StoreLockedError,
    StoreReadOnlyError,
    StoreVersionError,
)

logger = logging.getLogger("lmcache_rag.store")

_BUSY_SECONDS = 30  # our own writers take turns by a lock; this is for other programs that use the file

# SQLite's errors when it cannot create its -shm file: the folder cannot be written, or the disk is full.
_NO_SHM = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL}


class ConnectionSource(Protocol):
    """Opens connections to one state of the database file."""

    def connect(self) -> sqlite3.Connection:
        """Open one more connection, usable from any thread, without implicit transactions."""
        ...

    def changed(self) -> bool:
        """Whether the file has changed in a way that connections opened before cannot see."""
        ...

    def close(self) -> None:
        """Remove temporary files of the source."""
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
        connection.execute("PRAGMA cell_size_check = ON")  # a damaged page is detected before it is used
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()  # the first read of the file itself
    except BaseException:
        connection.close()
        raise
    return connection


class LiveSource:
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


class ReadOnlySource:
    """A database file in a folder where this process can create no file, and that no process is writing.

    SQLite creates its -shm file next to a write-ahead log. Where it cannot, the file is opened as immutable when
    the log is empty, and otherwise file and log are copied to a private temporary folder first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._signature = self._look()
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        log = _log_of(path)
        if log.exists() and log.stat().st_size > 0:
            logger.warning("%s was not closed, and its folder is not writable: reading a temporary copy.", path)
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


def open_for_reading(path: Path) -> ConnectionSource:
    """Choose how to read the database file at path.

    Raises:
        sqlite3.Error: The file cannot be read in any way.
        OSError: It cannot be copied.
    """
    live = LiveSource(path, "rw", query_only=True) if can_write(path.parent, path) else LiveSource(path, "ro")
    try:
        live.connect().close()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in _NO_SHM:
            raise
        return ReadOnlySource(path)
    return live


def _log_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


# Errors of SQLite and of the file system, as errors with a remedy

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
    """The store error for an error of SQLite on the file `path`."""
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
    """The store error for an error of the file system."""
    if error.errno in _FULL:
        return full(path)
    if error.errno in _READ_ONLY:
        return cannot_write(path)
    return StoreError(f"The store {path} cannot be used: {error}.", remedy="Check the path and its file system.")


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raise errors of SQLite and of the file system about this file as store errors."""
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


# Schema

APPLICATION_ID = 0x4C4D4352  # "LMCR": distinguishes our files from other SQLite databases

_VERSION_1 = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE documents (
        doc_id TEXT PRIMARY KEY NOT NULL,
        content_hash TEXT NOT NULL,
        splitter TEXT NOT NULL,
        source TEXT NOT NULL,
        metadata TEXT NOT NULL,
        updated_at REAL NOT NULL
    ) WITHOUT ROWID""",
    # AUTOINCREMENT: the id of a deleted chunk is never used for another text, so an outdated index cannot confuse them.
    # The embedding is the last column, so that reading a text does not read it.
    """CREATE TABLE chunks (
        chunk_id INTEGER PRIMARY KEY AUTOINCREMENT,
        text_hash TEXT NOT NULL UNIQUE,
        tokens INTEGER NOT NULL,
        embedder TEXT,
        vector_generation INTEGER,
        text TEXT NOT NULL,
        embedding BLOB,
        CHECK ((embedding IS NULL) = (vector_generation IS NULL) AND (embedding IS NULL) = (embedder IS NULL))
    )""",
    "CREATE INDEX chunks_by_generation ON chunks (vector_generation)",
    """CREATE TABLE doc_chunks (
        doc_id TEXT NOT NULL REFERENCES documents ON DELETE CASCADE,
        ordinal INTEGER NOT NULL,
        chunk_id INTEGER NOT NULL REFERENCES chunks,
        start INTEGER NOT NULL,
        PRIMARY KEY (doc_id, ordinal)
    ) WITHOUT ROWID""",
    "CREATE INDEX doc_chunks_by_chunk ON doc_chunks (chunk_id)",
    """CREATE TABLE fingerprints (
        fingerprint TEXT PRIMARY KEY NOT NULL,
        facts TEXT NOT NULL,
        created_at REAL NOT NULL
    ) WITHOUT ROWID""",
    """CREATE TABLE kv (
        kv_id INTEGER PRIMARY KEY,
        fingerprint TEXT NOT NULL REFERENCES fingerprints,
        key TEXT NOT NULL,
        tokens INTEGER NOT NULL,
        nbytes INTEGER NOT NULL,
        created_at REAL NOT NULL,
        UNIQUE (fingerprint, key)
    )""",
    # Texts whose token ids are equal share their KV, so one row of kv can serve several chunks.
    """CREATE TABLE kv_chunks (
        chunk_id INTEGER NOT NULL REFERENCES chunks ON DELETE CASCADE,
        kv_id INTEGER NOT NULL REFERENCES kv ON DELETE CASCADE,
        PRIMARY KEY (chunk_id, kv_id)
    ) WITHOUT ROWID""",
    "CREATE INDEX kv_chunks_by_kv ON kv_chunks (kv_id)",
    "CREATE TABLE trash (fingerprint TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (fingerprint, key)) WITHOUT ROWID",
    # Triggers, so that no code path can lose track of KV: it is either in kv or in the trash.
    """CREATE TRIGGER kv_unused AFTER DELETE ON kv_chunks
        WHEN NOT EXISTS (SELECT 1 FROM kv_chunks WHERE kv_id = OLD.kv_id)
        BEGIN DELETE FROM kv WHERE kv_id = OLD.kv_id; END""",
    """CREATE TRIGGER kv_left AFTER DELETE ON kv
        BEGIN INSERT OR IGNORE INTO trash (fingerprint, key) VALUES (OLD.fingerprint, OLD.key); END""",
    """CREATE TRIGGER kv_back AFTER INSERT ON kv
        BEGIN DELETE FROM trash WHERE fingerprint = NEW.fingerprint AND key = NEW.key; END""",
)

_VERSION_2 = (
    # The parser that read the document, with its version; '' where that is not known, or a program gave the text.
    "ALTER TABLE documents ADD COLUMN parser TEXT NOT NULL DEFAULT ''",
    # Facts about the chunk's place, such as a page, as JSON; NULL without any.
    "ALTER TABLE doc_chunks ADD COLUMN metadata TEXT",
)

_VERSION_3 = (
    # The text of a chunk whose KV is in the trash: a server removes KV by its tokens. NULL where it is not known.
    "ALTER TABLE trash ADD COLUMN text TEXT",
    """CREATE TRIGGER chunk_left BEFORE DELETE ON chunks
        BEGIN INSERT OR REPLACE INTO trash (fingerprint, key, text)
        SELECT fingerprint, key, OLD.text FROM kv_chunks AS own JOIN kv USING (kv_id) WHERE own.chunk_id = OLD.chunk_id
        AND NOT EXISTS (SELECT 1 FROM kv_chunks WHERE kv_id = own.kv_id AND chunk_id <> own.chunk_id); END""",
    # Chunks that may begin with the same tokens, see Registry.texts_like.
    "CREATE INDEX chunks_by_head ON chunks (substr(text, 1, 16))",
)

# The statements at place i lead from version i to version i + 1; published versions never change.
MIGRATIONS: tuple[tuple[str, ...], ...] = (_VERSION_1, _VERSION_2, _VERSION_3)

# Temporary views that show a store of version i, which cannot be written, as one of version i + 1.
_READ_AS: dict[int, tuple[str, ...]] = {
    1: (
        "CREATE TEMP VIEW documents AS SELECT *, '' AS parser FROM main.documents",
        "CREATE TEMP VIEW doc_chunks AS SELECT *, NULL AS metadata FROM main.doc_chunks",
    ),
    2: ("CREATE TEMP VIEW trash AS SELECT *, NULL AS text FROM main.trash",),
}


def read_older(connection: sqlite3.Connection, path: Path) -> None:
    """Make a store of an older version, which cannot be written, readable through this connection.

    Raises:
        StoreError: It is empty, too old, newer than this library, or another program's.
    """
    if not needs_migration(connection, path):
        return
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    steps = [_READ_AS.get(step) for step in range(version, current_version())]
    if None in steps:
        raise cannot_migrate(connection, path)
    if connection.execute("SELECT NOT EXISTS (SELECT 1 FROM temp.sqlite_master)").fetchone()[0]:
        connection.execute("PRAGMA query_only = OFF")  # which forbids temporary views too
        connection.execute("PRAGMA temp_store = MEMORY")
        for statements in steps:
            for statement in statements or ():
                connection.execute(statement)
        connection.execute("PRAGMA query_only = ON")


def current_version() -> int:
    """The version that this library writes."""
    return len(MIGRATIONS)


def needs_migration(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the database is empty or of an older version.

    Raises:
        StoreVersionError: It is newer than this library.
        StoreError: It is another program's database.
    """
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    application: int = connection.execute("PRAGMA application_id").fetchone()[0]
    empty = connection.execute("SELECT NOT EXISTS (SELECT 1 FROM sqlite_master)").fetchone()[0]
    if application != APPLICATION_ID and not (empty and version == 0):
        raise StoreError(f"{path} is another program's database, not a store.", remedy="Name another store folder.")
    if version > current_version():
        raise StoreVersionError(
            f"The store {path.parent} has version {version}; this library knows versions up to {current_version()}.",
            remedy="Upgrade it with: pip install --upgrade lmcache-rag, or use another store folder.",
        )
    return version < current_version()


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the database to the current version, in one transaction: a failure changes nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        if needs_migration(connection, path):  # again, now that no other process can be doing it
            version: int = connection.execute("PRAGMA user_version").fetchone()[0]
            for statements in MIGRATIONS[version:]:
                for statement in statements:
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {current_version()}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def cannot_migrate(connection: sqlite3.Connection, path: Path) -> StoreError:
    """The error for an empty or older database that is only to be read."""
    if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
        return StoreError(f"There is no store in {path.parent}.", remedy="Make one with: lmcache-rag ingest.")
    return StoreReadOnlyError(
        f"The store {path.parent} was written by an older version and cannot be written here.",
        remedy="Open it once where it can be written, which brings it up to date.",
    )
