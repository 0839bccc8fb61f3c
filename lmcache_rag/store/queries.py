"""Reading documents, chunks and hits, on a connection of the caller."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from lmcache_rag.errors import ConfigError
from lmcache_rag.store.faults import corrupt
from lmcache_rag.store.types import DocumentRecord, DocumentRef, Hit, StoredChunk, text_hash

Scalar: TypeAlias = str | int | float | bool
Filter: TypeAlias = Mapping[str, Scalar | Collection[Scalar]]

_DOCUMENT = """SELECT doc_id, content_hash, splitter, source, metadata,
    (SELECT count(*) FROM doc_chunks WHERE doc_chunks.doc_id = documents.doc_id), updated_at FROM documents"""
_CHUNK = "SELECT chunk_id, text, tokens, text_hash FROM chunks"
_PLACES = """SELECT doc_chunks.chunk_id, documents.doc_id, source, ordinal, metadata, start
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
        """The chunks of all documents that fulfil it."""
        rows = connection.execute(
            f"SELECT DISTINCT chunk_id FROM doc_chunks JOIN documents USING (doc_id) WHERE {self.sql}", self.parameters
        )
        return [row[0] for row in rows]


def document_records(connection: sqlite3.Connection, doc_ids: Iterable[str]) -> list[DocumentRecord]:
    """The documents named, without those that the store does not hold."""
    found = (connection.execute(f"{_DOCUMENT} WHERE doc_id = ?", (doc_id,)).fetchone() for doc_id in doc_ids)
    return [_document(row) for row in found if row is not None]


def next_documents(connection: sqlite3.Connection, after: str | None, limit: int) -> list[DocumentRecord]:
    """The next documents after an id, in the order of their ids."""
    sql = f"{_DOCUMENT} WHERE ?1 IS NULL OR doc_id > ?1 ORDER BY doc_id LIMIT ?2"
    return [_document(row) for row in connection.execute(sql, (after, limit))]


def _document(row: tuple[str, str, str, str, str, int, float]) -> DocumentRecord:
    return DocumentRecord(row[0], row[1], row[2], row[3], json.loads(row[4]), row[5], row[6])


def stored_chunks(
    connection: sqlite3.Connection, path: Path, condition: str = "TRUE", parameters: Sequence[str | int] = ()
) -> list[StoredChunk]:
    """Chunks that fulfil a condition (a piece of SQL).

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
        condition: Name only documents that fulfil it.
    """
    ids = json.dumps(list(scores))
    among = "chunk_id IN (SELECT value FROM json_each(?))"
    places: defaultdict[int, list[DocumentRef]] = defaultdict(list)
    sql, parameters = (condition.sql, condition.parameters) if condition is not None else ("TRUE", [])
    for chunk_id, doc_id, source, ordinal, metadata, start in connection.execute(
        f"{_PLACES} WHERE doc_chunks.{among} AND {sql} ORDER BY documents.doc_id, ordinal", (ids, *parameters)
    ):
        places[chunk_id].append(DocumentRef(doc_id, source, ordinal, json.loads(metadata), start))
    found = [
        Hit(chunk.chunk_id, chunk.text, scores[chunk.chunk_id], chunk.tokens, tuple(places[chunk.chunk_id]))
        for chunk in stored_chunks(connection, path, among, (ids,))
    ]
    return sorted(found, key=lambda hit: (-hit.score, hit.chunk_id))
