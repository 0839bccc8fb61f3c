"""Embeddings between numpy and the database: float32, finite, of unit length, all of one dimension."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lmcache_rag.errors import StoreError
from lmcache_rag.store import meta
from lmcache_rag.store.faults import corrupt
from lmcache_rag.store.types import Vector

_UNIT = 1e-3  # how far from 1 the length of a stored vector can be; float32 rounding stays far below


def normalised(embeddings: Sequence[Vector | Sequence[float]] | Vector, dimension: int | None) -> Vector:
    """Vectors as rows of unit length, shape [n, dimension]; a zero vector stays zero.

    Raises:
        StoreError: They are not finite numbers, or not of this dimension.
    """
    try:
        rows: NDArray[np.float64] = np.asarray(embeddings, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"Embeddings must be vectors of numbers, all of one length: {error}.", remedy="Check the embedder."
        ) from error
    if rows.ndim != 2 or rows.shape[1] == 0 or (dimension is not None and rows.shape[1] != dimension):
        raise StoreError(
            f"Embeddings have the shape {list(rows.shape)}; this store needs [n, {dimension or 'dimension'}].",
            remedy="Use the embedder that the store was made with.",
        )
    if not np.isfinite(rows).all():
        raise StoreError("An embedding holds NaN or infinity.", remedy="Check the embedder and the text it was given.")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    # A vector that is of unit length already keeps its bits, so that storing it again changes nothing.
    lengths[(lengths == 0) | (np.abs(lengths - 1) < 1e-6)] = 1
    return np.ascontiguousarray(rows / lengths, dtype=np.float32)


class VectorWriter:
    """Checks the embeddings of one transaction and gives them the form that they are stored in.

    Args:
        connection: A connection inside a transaction.
        embedder: Who made the embeddings.

    Raises:
        StoreError: The store belongs to another embedder.
    """

    def __init__(self, connection: sqlite3.Connection, embedder: str) -> None:
        meta.claim_embedder(connection, embedder)
        self._connection = connection
        self._dimension = meta.dimension(connection)

    def blobs(self, embeddings: Sequence[Vector | Sequence[float]]) -> list[bytes]:
        """The embeddings as little-endian float32 bytes, of unit length."""
        if len(embeddings) == 0:
            return []
        rows = normalised(embeddings, self._dimension)
        if self._dimension is None:
            self._dimension = rows.shape[1]
            meta.put(self._connection, meta.DIMENSION, self._dimension)
        return [row.astype("<f4").tobytes() for row in rows]


def from_blobs(blobs: Iterable[bytes], dimension: int, path: Path) -> Vector:
    """Stored bytes as rows of shape [n, dimension].

    Raises:
        StoreCorruptError: The bytes are not embeddings that this library has written.
    """
    joined = b"".join(blobs)
    if len(joined) % (4 * dimension):
        raise corrupt(path, "an embedding has the wrong length")
    rows = np.frombuffer(joined, dtype="<f4").reshape(-1, dimension).astype(np.float32, copy=False)
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(rows, axis=1)
        if not ((np.abs(lengths - 1) < _UNIT) | (lengths == 0)).all():
            raise corrupt(path, "an embedding is not a unit vector")
    return rows
