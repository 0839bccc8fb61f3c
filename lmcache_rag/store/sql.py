"""Storing, replacing and removing documents, inside one transaction of the caller."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from lmcache_rag.errors import StoreError
from lmcache_rag.store import meta
from lmcache_rag.store.types import NewChunk, NewDocument, PutResult, PutStatus, RemoveResult, text_hash
from lmcache_rag.store.vectors import VectorWriter


@dataclass
class _Counts:
    doc_id: str
    status: PutStatus = "unchanged"
    added: int = 0
    removed: int = 0
    kept: int = 0
    touched: bool = False  # a chunk that was there got an embedding or another token count

    def result(self) -> PutResult:
        return PutResult(self.doc_id, self.status, self.added, self.removed, self.kept)


@dataclass
class _Batch:
    """What one transaction knows: who owns the chunks that may have lost their last document."""

    connection: sqlite3.Connection
    generation: meta.Generation
    writer: VectorWriter | None
    embedder: str | None
    suspects: dict[int, _Counts] = field(default_factory=dict)


def put(connection: sqlite3.Connection, documents: Sequence[NewDocument], embedder: str | None) -> list[PutResult]:
    """Store each document in place of what stood under its id.

    Chunks that lost their last document leave at the end, so that a text that moves from one document of the batch to
    another stays the same chunk.

    Raises:
        StoreError: A chunk has no embedding, metadata is not JSON, or the store belongs to another embedder.
    """
    writer = VectorWriter(connection, embedder) if embedder is not None else None
    batch = _Batch(connection, meta.Generation(connection), writer, embedder)
    counts = [_put_one(batch, document) for document in documents]
    for chunk_id in _drop_unused(connection, batch.generation, batch.suspects):
        batch.suspects[chunk_id].removed += 1
    batch.generation.finish()
    return [count.result() for count in counts]


def remove(connection: sqlite3.Connection, doc_ids: Sequence[str]) -> RemoveResult:
    """Remove documents, and the chunks that no other document holds."""
    wanted = list(dict.fromkeys(doc_ids))
    unknown: list[str] = []
    suspects: dict[int, None] = {}
    for doc_id in wanted:
        rows = connection.execute("SELECT DISTINCT chunk_id FROM doc_chunks WHERE doc_id = ?", (doc_id,)).fetchall()
        if connection.execute("DELETE FROM documents WHERE doc_id = ?", (doc_id,)).rowcount == 0:
            unknown.append(doc_id)
        suspects.update((row[0], None) for row in rows)
    generation = meta.Generation(connection)
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
        "SELECT chunk_id, start FROM doc_chunks WHERE doc_id = ? ORDER BY ordinal", (document.doc_id,)
    ).fetchall()
    places = [(chunk_id, chunk.start) for chunk_id, chunk in _chunk_ids(batch, document, counts)]
    if old_row == row and old_places == places and not counts.touched:
        return counts
    counts.status = "added" if old_row is None else "updated"
    connection.execute(
        """INSERT INTO documents (doc_id, content_hash, splitter, source, metadata, updated_at)
        VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (doc_id) DO UPDATE SET content_hash = excluded.content_hash,
        splitter = excluded.splitter, source = excluded.source, metadata = excluded.metadata,
        updated_at = excluded.updated_at""",
        (document.doc_id, *row, time.time()),
    )
    if old_places != places:
        connection.execute("DELETE FROM doc_chunks WHERE doc_id = ?", (document.doc_id,))
        connection.executemany(
            "INSERT INTO doc_chunks (doc_id, ordinal, chunk_id, start) VALUES (?, ?, ?, ?)",
            ((document.doc_id, ordinal, *place) for ordinal, place in enumerate(places)),
        )
        gone = {chunk_id for chunk_id, _ in old_places} - {chunk_id for chunk_id, _ in places}
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


def _drop_unused(connection: sqlite3.Connection, generation: meta.Generation, suspects: Iterable[int]) -> list[int]:
    """Delete those of the chunks that no document holds any more; their KV goes to the trash by trigger."""
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
