"""Named facts about the whole store, and the generation that tells an index when it lags."""

from __future__ import annotations

import sqlite3

from lmcache_rag.errors import StoreError

GENERATION = "generation"  # raised by every transaction that adds, changes or removes an embedding
REMOVALS = "removals"  # the generation of the last transaction that took an embedding away
INDEX_STAMP = "index_stamp"  # names the index file that was saved last
EMBEDDER = "embedder"
DIMENSION = "dimension"
RESERVED = frozenset({GENERATION, REMOVALS, INDEX_STAMP, EMBEDDER, DIMENSION})


def get(connection: sqlite3.Connection, key: str) -> str | None:
    """The value of key, or None."""
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else row[0]


def get_int(connection: sqlite3.Connection, key: str) -> int:
    """The value of key as a number, 0 when it was never set."""
    return int(get(connection, key) or 0)


def put(connection: sqlite3.Connection, key: str, value: str | int | None) -> None:
    """Set key, or remove it when value is None."""
    if value is None:
        connection.execute("DELETE FROM meta WHERE key = ?", (key,))
    else:
        connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, str(value)))


def dimension(connection: sqlite3.Connection) -> int | None:
    """Length of the store's vectors, None before the first."""
    return get_int(connection, DIMENSION) or None


def require_embedder(connection: sqlite3.Connection, embedder: str) -> None:
    """Check that the store's embeddings can be compared with those of embedder.

    Raises:
        StoreError: A chunk has an embedding of another model.
    """
    known = get(connection, EMBEDDER)
    if known in (None, embedder):
        return
    if connection.execute("SELECT max(vector_generation) IS NOT NULL FROM chunks").fetchone()[0]:
        raise StoreError(
            f"The store's embeddings are of {known!r}, not of {embedder!r}.",
            remedy=f"Use the embedder {known!r}, embed the whole store anew, or use another store.",
        )


def claim_embedder(connection: sqlite3.Connection, embedder: str, length: int | None = None) -> None:
    """Make embedder, with vectors of this length if it is known, the store's.

    Raises:
        StoreError: A chunk has an embedding of another model, or of another length.
    """
    require_embedder(connection, embedder)
    if get(connection, EMBEDDER) != embedder:
        put(connection, EMBEDDER, embedder)
        put(connection, DIMENSION, None)
    if length is not None and dimension(connection) != length:
        if dimension(connection) is not None:
            raise StoreError(
                f"The store's embeddings have {dimension(connection)} dimensions, those of {embedder!r} {length}.",
                remedy="Use the embedder that the store was made with, or another store.",
            )
        put(connection, DIMENSION, length)


class Generation:
    """The generation that one transaction makes; written only if an embedding changed."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.number = get_int(connection, GENERATION) + 1
        self.changed = False
        self.removed = False

    def finish(self) -> None:
        """Record what happened, as the last act of the transaction."""
        if self.changed or self.removed:
            put(self._connection, GENERATION, self.number)
        if self.removed:
            put(self._connection, REMOVALS, self.number)
