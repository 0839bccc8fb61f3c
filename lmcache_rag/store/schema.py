"""The tables, and how an older store becomes a current one."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from lmcache_rag.errors import StoreError, StoreReadOnlyError, StoreVersionError

APPLICATION_ID = 0x4C4D4352  # "LMCR": tells our files from other SQLite databases

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
    # AUTOINCREMENT: an id that left never comes back for another text, so an index that lags cannot confuse the two.
    # The embedding comes last, so that reading a text does not walk over it.
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
    # Triggers, so that no path through the code can lose track of KV: it stands either in kv or in the trash.
    """CREATE TRIGGER kv_unused AFTER DELETE ON kv_chunks
        WHEN NOT EXISTS (SELECT 1 FROM kv_chunks WHERE kv_id = OLD.kv_id)
        BEGIN DELETE FROM kv WHERE kv_id = OLD.kv_id; END""",
    """CREATE TRIGGER kv_left AFTER DELETE ON kv
        BEGIN INSERT OR IGNORE INTO trash (fingerprint, key) VALUES (OLD.fingerprint, OLD.key); END""",
    """CREATE TRIGGER kv_back AFTER INSERT ON kv
        BEGIN DELETE FROM trash WHERE fingerprint = NEW.fingerprint AND key = NEW.key; END""",
)

# The statements at place i lead from version i to version i + 1; published versions never change.
MIGRATIONS: tuple[tuple[str, ...], ...] = (_VERSION_1,)


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
    """Bring the database to the current version, in one transaction: a failure leaves it as it was."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        if needs_migration(connection, path):  # again, now that nobody else can be doing it
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
