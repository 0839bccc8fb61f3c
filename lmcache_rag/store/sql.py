"""The store's SQL, on a connection of the caller: documents, chunks, hits, embeddings, facts about the store.

Functions that write run inside one transaction of the caller.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from lmcache_rag._utils import needs
from lmcache_rag.errors import ConfigError, StoreError
from lmcache_rag.store.connections import corrupt
from lmcache_rag.store.types import (
    DocumentRecord,
    DocumentRef,
    Hit,
    NewChunk,
    NewDocument,
    PutResult,
    PutStatus,
    RemoveResult,
    StoredChunk,
    Vector,
    text_hash,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Facts about the store

GENERATION = "generation"  # raised by every transaction that adds, changes or removes an embedding
REMOVALS = "removals"  # the generation of the last transaction that took an embedding away
INDEX_STAMP = "index_stamp"  # names the index file that was saved last
EMBEDDER = "embedder"
DIMENSION = "dimension"


def read_meta(connection: sqlite3.Connection, key: str) -> str | None:
    """The value of key, or None."""
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else row[0]


def read_meta_int(connection: sqlite3.Connection, key: str) -> int:
    """The value of key as a number, 0 when it was never set."""
    return int(read_meta(connection, key) or 0)


def write_meta(connection: sqlite3.Connection, key: str, value: str | int | None) -> None:
    """Set key, or remove it when value is None."""
    if value is None:
        connection.execute("DELETE FROM meta WHERE key = ?", (key,))
    else:
        connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, str(value)))


def dimension(connection: sqlite3.Connection) -> int | None:
    """Length of the store's vectors, None before the first."""
    return read_meta_int(connection, DIMENSION) or None


def require_embedder(connection: sqlite3.Connection, embedder: str) -> None:
    """Check that the store's embeddings can be compared with those of embedder.

    Raises:
        StoreError: A chunk has an embedding of another model.
    """
    known = read_meta(connection, EMBEDDER)
    if known in (None, embedder):
        return
    if connection.execute("SELECT max(vector_generation) IS NOT NULL FROM chunks").fetchone()[0]:
        raise StoreError(
            f"The store's embeddings are of {known!r}, not of {embedder!r}.",
            remedy=f"Use the embedder {known!r}, embed the whole store again, or use another store.",
        )


def claim_embedder(connection: sqlite3.Connection, embedder: str, length: int | None = None) -> None:
    """Make embedder, with vectors of this length if it is known, the store's.

    Raises:
        StoreError: A chunk has an embedding of another model, or of another length.
    """
    require_embedder(connection, embedder)
    if read_meta(connection, EMBEDDER) != embedder:
        write_meta(connection, EMBEDDER, embedder)
        write_meta(connection, DIMENSION, None)
    if length is not None and dimension(connection) != length:
        if dimension(connection) is not None:
            raise StoreError(
                f"The store's embeddings have {dimension(connection)} dimensions, those of {embedder!r} {length}.",
                remedy="Use the embedder that the store was made with, or another store.",
            )
        write_meta(connection, DIMENSION, length)


class Generation:
    """The generation of one transaction; written only if an embedding changed."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.number = read_meta_int(connection, GENERATION) + 1
        self.changed = False
        self.removed = False

    def finish(self) -> None:
        """Write the generation, as the last step of the transaction."""
        if self.changed or self.removed:
            write_meta(self._connection, GENERATION, self.number)
        if self.removed:
            write_meta(self._connection, REMOVALS, self.number)


# Embeddings

_UNIT = 1e-3  # how far from 1 the length of a stored vector can be; float32 rounding stays far below


def normalised(embeddings: Sequence[Vector | Sequence[float]] | Vector, dimension: int | None) -> Vector:
    """Vectors as rows of unit length, shape [n, dimension]; a zero vector stays zero.

    Raises:
        StoreError: They are not finite numbers, or not of this dimension.
    """
    with needs("store"):
        import numpy as np

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
        raise StoreError("An embedding holds NaN or infinity.", remedy="Check the embedder and the text it embedded.")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    # A vector that is of unit length already keeps its bits, so that storing it again changes nothing.
    lengths[(lengths == 0) | (np.abs(lengths - 1) < 1e-6)] = 1
    return np.ascontiguousarray(rows / lengths, dtype=np.float32)


class VectorWriter:
    """Checks the embeddings of one transaction and converts them to the stored form.

    Args:
        connection: A connection inside a transaction.
        embedder: Name of the embedder that made them.

    Raises:
        StoreError: The store belongs to another embedder.
    """

    def __init__(self, connection: sqlite3.Connection, embedder: str) -> None:
        claim_embedder(connection, embedder)
        self._connection = connection
        self._dimension = dimension(connection)

    def blobs(self, embeddings: Sequence[Vector | Sequence[float]]) -> list[bytes]:
        """The embeddings as little-endian float32 bytes, of unit length."""
        if len(embeddings) == 0:
            return []
        rows = normalised(embeddings, self._dimension)
        if self._dimension is None:
            self._dimension = rows.shape[1]
            write_meta(self._connection, DIMENSION, self._dimension)
        return [row.astype("<f4").tobytes() for row in rows]


def from_blobs(blobs: Iterable[bytes], dimension: int, path: Path) -> Vector:
    """Stored bytes as rows of shape [n, dimension].

    Raises:
        StoreCorruptError: The bytes are not embeddings that this library has written.
    """
    with needs("store"):
        import numpy as np

    joined = b"".join(blobs)
    if len(joined) % (4 * dimension):
        raise corrupt(path, "an embedding has the wrong length")
    rows = np.frombuffer(joined, dtype="<f4").reshape(-1, dimension).astype(np.float32, copy=False)
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(rows, axis=1)
        if not ((np.abs(lengths - 1) < _UNIT) | (lengths == 0)).all():
            raise corrupt(path, "an embedding is not a unit vector")
    return rows


# Reading

Scalar: TypeAlias = str | int | float | bool
Filter: TypeAlias = Mapping[str, Scalar | Collection[Scalar]]

_DOCUMENT = """SELECT doc_id, content_hash, splitter, source, metadata,
    (SELECT count(*) FROM doc_chunks WHERE doc_chunks.doc_id = documents.doc_id), updated_at, parser FROM documents"""
_CHUNK = "SELECT chunk_id, text, tokens, text_hash FROM chunks"
_PLACES = """SELECT
    doc_chunks.chunk_id, documents.doc_id, source, ordinal, documents.metadata, start, doc_chunks.metadata
    FROM doc_chunks JOIN documents USING (doc_id)"""


class Condition:
    """A filter on documents as a piece of SQL.

    Args:
        where: Wanted values by name. "doc_id" and "source" are the document's own fields, every other name is looked
            up in its metadata. A list, tuple or set means any of its values.

    Raises:
        ConfigError: A value is not text, a number or a truth value.
    """

    def __init__(self, where: Filter) -> None:
        parts: list[str] = []
        self.parameters: list[str] = []
        for name, wanted in where.items():
            values = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
            if not all(isinstance(value, str | int | float) for value in values):
                raise ConfigError(
                    f"The filter on {name!r} must be text, a number, a truth value or a list of these; got {wanted!r}.",
                    remedy="Give a function as filter for anything else.",
                )
            if name in ("doc_id", "source"):
                parts.append(f"documents.{name} IN (SELECT value FROM json_each(?))")
            else:
                parts.append(
                    """EXISTS (SELECT 1 FROM json_each(documents.metadata) AS fact WHERE fact.key = ?
                    AND fact.type NOT IN ('array', 'object') AND fact.value IN (SELECT value FROM json_each(?)))"""
                )
                self.parameters.append(name)
            self.parameters.append(json.dumps(values))
        self.sql = " AND ".join(parts) or "TRUE"

    def chunk_ids(self, connection: sqlite3.Connection) -> list[int]:
        """The chunks of all documents that match it."""
        rows = connection.execute(
            f"SELECT DISTINCT chunk_id FROM doc_chunks JOIN documents USING (doc_id) WHERE {self.sql}", self.parameters
        )
        return [row[0] for row in rows]


def document_records(connection: sqlite3.Connection, doc_ids: Iterable[str]) -> list[DocumentRecord]:
    """The documents named, without those that the store does not hold."""
    found = (connection.execute(f"{_DOCUMENT} WHERE doc_id = ?", (doc_id,)).fetchone() for doc_id in doc_ids)
    return [_document(row) for row in found if row is not None]


def next_documents(
    connection: sqlite3.Connection, after: str | None, limit: int, *, named_by_source: bool = False
) -> list[DocumentRecord]:
    """The next documents after an id, in the order of their ids.

    Args:
        connection: Connection to read with.
        after: The id; None: from the first on.
        limit: Most documents.
        named_by_source: Only those whose id is their source, as that of files.
    """
    # "?1 IS NULL OR doc_id > ?1" would read the index from its beginning for each page.
    begin = "doc_id >= ''" if after is None else "doc_id > ?1"
    condition = f"{begin} AND doc_id = source" if named_by_source else begin
    sql = f"{_DOCUMENT} WHERE {condition} ORDER BY doc_id LIMIT ?2"
    return [_document(row) for row in connection.execute(sql, (after, limit))]


def _document(row: tuple[str, str, str, str, str, int, float, str]) -> DocumentRecord:
    return DocumentRecord(row[0], row[1], row[2], row[3], json.loads(row[4]), row[5], row[6], row[7])


def stored_chunks(
    connection: sqlite3.Connection, path: Path, condition: str = "TRUE", parameters: Sequence[str | int] = ()
) -> list[StoredChunk]:
    """Chunks that match a condition (a piece of SQL).

    Raises:
        StoreCorruptError: A text is not the one that was stored.
    """
    chunks = [StoredChunk(*row) for row in connection.execute(f"{_CHUNK} WHERE {condition}", parameters)]
    for chunk in chunks:
        if text_hash(chunk.text) != chunk.text_hash:
            raise corrupt(path, f"the text of chunk {chunk.chunk_id} has changed")
    return chunks


def hits(
    connection: sqlite3.Connection, path: Path, scores: Mapping[int, float], condition: Condition | None = None
) -> list[Hit]:
    """Chunks with the documents that hold them, best first, equal scores by id.

    Args:
        connection: Connection to read with.
        path: The database file, for messages.
        scores: Score by chunk id; ids that the store does not hold are left out.
        condition: Name only documents that match it.
    """
    ids = json.dumps(list(scores))
    among = "chunk_id IN (SELECT value FROM json_each(?))"
    places: defaultdict[int, list[DocumentRef]] = defaultdict(list)
    sql, parameters = (condition.sql, condition.parameters) if condition is not None else ("TRUE", [])
    for chunk_id, doc_id, source, ordinal, metadata, start, own in connection.execute(
        f"{_PLACES} WHERE doc_chunks.{among} AND {sql} ORDER BY documents.doc_id, ordinal", (ids, *parameters)
    ):
        facts = json.loads(metadata) | (json.loads(own) if own else {})
        places[chunk_id].append(DocumentRef(doc_id, source, ordinal, facts, start))
    found = [
        Hit(chunk.chunk_id, chunk.text, scores[chunk.chunk_id], chunk.tokens, tuple(places[chunk.chunk_id]))
        for chunk in stored_chunks(connection, path, among, (ids,))
    ]
    return sorted(found, key=lambda hit: (-hit.score, hit.chunk_id))


# Writing documents


@dataclass
class _Counts:
    doc_id: str
    status: PutStatus = "unchanged"
    added: int = 0
    removed: int = 0
    kept: int = 0
    touched: bool = False  # an existing chunk got an embedding or another token count

    def result(self) -> PutResult:
        return PutResult(self.doc_id, self.status, self.added, self.removed, self.kept)


@dataclass
class _Batch:
    """State of one transaction: owners of the chunks that may have lost their last document."""

    connection: sqlite3.Connection
    generation: Generation
    writer: VectorWriter | None
    embedder: str | None
    suspects: dict[int, _Counts] = field(default_factory=dict)


def put_documents(
    connection: sqlite3.Connection, documents: Sequence[NewDocument], embedder: str | None
) -> list[PutResult]:
    """Store each document, replacing the one with its id.

    Chunks that lost their last document are deleted at the end, so that a text that moves from one document of the
    batch to another stays the same chunk.

    Raises:
        StoreError: A chunk has no embedding, metadata is not JSON, or the store belongs to another embedder.
    """
    writer = VectorWriter(connection, embedder) if embedder is not None else None
    batch = _Batch(connection, Generation(connection), writer, embedder)
    counts = [_put_one(batch, document) for document in documents]
    for chunk_id in _drop_unused(connection, batch.generation, batch.suspects):
        batch.suspects[chunk_id].removed += 1
    batch.generation.finish()
    return [count.result() for count in counts]


def remove_documents(connection: sqlite3.Connection, doc_ids: Sequence[str]) -> RemoveResult:
    """Remove documents, and the chunks that no other document holds."""
    wanted = list(dict.fromkeys(doc_ids))
    unknown: list[str] = []
    suspects: dict[int, None] = {}
    for doc_id in wanted:
        rows = connection.execute("SELECT DISTINCT chunk_id FROM doc_chunks WHERE doc_id = ?", (doc_id,)).fetchall()
        if connection.execute("DELETE FROM documents WHERE doc_id = ?", (doc_id,)).rowcount == 0:
            unknown.append(doc_id)
        suspects.update((row[0], None) for row in rows)
    generation = Generation(connection)
    removed = _drop_unused(connection, generation, suspects)
    generation.finish()
    return RemoveResult(len(wanted) - len(unknown), len(removed), len(suspects) - len(removed), tuple(unknown))


def _put_one(batch: _Batch, document: NewDocument) -> _Counts:
    connection = batch.connection
    counts = _Counts(document.doc_id)
    if "\0" in document.doc_id:  # SQLite's JSON functions, which take lists of ids, end text there
        raise StoreError(f"A document's id cannot hold a NUL character; got {document.doc_id!r}.", remedy="Rename it.")
    row = (document.content_hash, document.splitter, document.source, _as_json(document.doc_id, document.metadata))
    old_row = connection.execute(
        "SELECT content_hash, splitter, source, metadata FROM documents WHERE doc_id = ?", (document.doc_id,)
    ).fetchone()
    old_places = connection.execute(
        "SELECT chunk_id, start, metadata FROM doc_chunks WHERE doc_id = ? ORDER BY ordinal", (document.doc_id,)
    ).fetchall()
    places = [
        (chunk_id, chunk.start, _as_json(document.doc_id, chunk.metadata) if chunk.metadata else None)
        for chunk_id, chunk in _chunk_ids(batch, document, counts)
    ]
    if old_row == row and old_places == places and not counts.touched:
        connection.execute(
            "UPDATE documents SET parser = ?1 WHERE doc_id = ?2 AND parser <> ?1", (document.parser, document.doc_id)
        )
        return counts
    counts.status = "added" if old_row is None else "updated"
    connection.execute(
        """INSERT INTO documents (doc_id, content_hash, splitter, source, metadata, updated_at, parser)
        VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (doc_id) DO UPDATE SET content_hash = excluded.content_hash,
        splitter = excluded.splitter, source = excluded.source, metadata = excluded.metadata,
        updated_at = excluded.updated_at, parser = excluded.parser""",
        (document.doc_id, *row, time.time(), document.parser),
    )
    if old_places != places:
        connection.execute("DELETE FROM doc_chunks WHERE doc_id = ?", (document.doc_id,))
        connection.executemany(
            "INSERT INTO doc_chunks (doc_id, ordinal, chunk_id, start, metadata) VALUES (?, ?, ?, ?, ?)",
            ((document.doc_id, ordinal, *place) for ordinal, place in enumerate(places)),
        )
        gone = {place[0] for place in old_places} - {place[0] for place in places}
        batch.suspects.update((chunk_id, counts) for chunk_id in gone)
    return counts


def _chunk_ids(batch: _Batch, document: NewDocument, counts: _Counts) -> list[tuple[int, NewChunk]]:
    """Find or make the chunks of a document, in its order."""
    ids: dict[str, int] = {}
    answer: list[tuple[int, NewChunk]] = []
    for chunk in document.chunks:
        name = text_hash(chunk.text)
        if name not in ids:
            ids[name] = _chunk_id(batch, document.doc_id, name, chunk, counts)
        answer.append((ids[name], chunk))
    return answer


def _chunk_id(batch: _Batch, doc_id: str, name: str, chunk: NewChunk, counts: _Counts) -> int:
    connection, generation = batch.connection, batch.generation
    row = connection.execute("SELECT chunk_id, tokens, embedder FROM chunks WHERE text_hash = ?", (name,)).fetchone()
    vector: tuple[str | None, int | None, bytes | None] = (None, None, None)
    if batch.writer is not None and (row is None or row[2] != batch.embedder):
        if chunk.embedding is None:
            raise StoreError(
                f"A chunk of {doc_id!r} at character {chunk.start} has no embedding, and the store has none for it.",
                remedy="Embed every text that known_texts() does not return.",
            )
        vector = (batch.embedder, generation.number, batch.writer.blobs([chunk.embedding])[0])
        generation.changed = True
    if row is None:
        counts.added += 1
        cursor = connection.execute(
            """INSERT INTO chunks (text_hash, text, tokens, embedder, vector_generation, embedding)
            VALUES (?, ?, ?, ?, ?, ?)""",
            (name, chunk.text, chunk.tokens, *vector),
        )
        return cast(int, cursor.lastrowid)
    counts.kept += 1
    chunk_id: int = row[0]
    if vector[2] is not None:
        connection.execute(
            "UPDATE chunks SET embedder = ?, vector_generation = ?, embedding = ? WHERE chunk_id = ?",
            (*vector, chunk_id),
        )
        counts.touched = True
    if row[1] != chunk.tokens:  # counted by another tokenizer
        connection.execute("UPDATE chunks SET tokens = ? WHERE chunk_id = ?", (chunk.tokens, chunk_id))
        counts.touched = True
    return chunk_id


def _drop_unused(connection: sqlite3.Connection, generation: Generation, suspects: Iterable[int]) -> list[int]:
    """Delete the chunks that no document holds any more; a trigger moves their KV to the trash."""
    gone = connection.execute(
        """SELECT chunk_id, embedding IS NOT NULL FROM chunks
        WHERE chunk_id IN (SELECT value FROM json_each(?))
        AND NOT EXISTS (SELECT 1 FROM doc_chunks WHERE doc_chunks.chunk_id = chunks.chunk_id)""",
        (json.dumps(list(suspects)),),
    ).fetchall()
    connection.executemany("DELETE FROM chunks WHERE chunk_id = ?", ((row[0],) for row in gone))
    generation.removed = generation.removed or any(row[1] for row in gone)
    return [row[0] for row in gone]


def _as_json(doc_id: str, metadata: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(metadata), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"The metadata of {doc_id!r} cannot be kept as JSON: {error}.",
            remedy="Use text, numbers, true, false, none, lists and dictionaries.",
        ) from error
