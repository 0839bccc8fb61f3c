"""The registry of a store: documents, their chunks with embeddings, and which KV exists for them.

KV that no chunk needs any more goes to the trash until an engine has dropped it. Triggers of the schema keep KV and
trash apart: KV that loses its last chunk moves to the trash in the same transaction, KV that is recorded again
leaves it.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from heapq import nlargest
from typing import Any, TypeVar

from lmcache_rag._utils import common_start
from lmcache_rag.store import sql
from lmcache_rag.store.database import Database
from lmcache_rag.store.types import (
    DocumentRecord,
    FingerprintStats,
    KVRow,
    NewDocument,
    PutResult,
    RemoveResult,
    StoredChunk,
    StoreStats,
    TrashRow,
    text_hash,
)

T = TypeVar("T")
PREFIX = "prefix"  # of a fingerprint's facts: the token ids, see prefixes()
_PAGE = 256  # rows read at a time, so that no transaction stays open while the caller works on them

_WITHOUT_KV = """NOT EXISTS (SELECT 1 FROM kv_chunks JOIN kv USING (kv_id)
    WHERE kv_chunks.chunk_id = chunks.chunk_id AND fingerprint = ?)"""

_DROP_OTHER_KEYS = """DELETE FROM kv_chunks WHERE chunk_id = ? AND EXISTS
    (SELECT 1 FROM kv WHERE kv.kv_id = kv_chunks.kv_id AND fingerprint = ? AND key <> ?)"""
_UPSERT = """INSERT INTO kv (fingerprint, key, tokens, nbytes, created_at) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (fingerprint, key) DO UPDATE SET tokens = excluded.tokens, nbytes = excluded.nbytes"""
_USE = """INSERT OR IGNORE INTO kv_chunks (chunk_id, kv_id)
    SELECT ?, kv_id FROM kv WHERE fingerprint = ? AND key = ?"""
_DISCARD = """INSERT OR IGNORE INTO trash (fingerprint, key) SELECT ?1, ?2
    WHERE NOT EXISTS (SELECT 1 FROM kv WHERE fingerprint = ?1 AND key = ?2)"""

_TRASH = """INSERT OR REPLACE INTO trash (fingerprint, key, text) SELECT fingerprint, key, min(text)
    FROM kv JOIN kv_chunks USING (kv_id) JOIN chunks USING (chunk_id)"""

_ONLY_IN = """WITH documents_left AS (SELECT value FROM json_each(?)),
    leaving AS (SELECT DISTINCT chunk_id FROM doc_chunks AS held WHERE doc_id IN documents_left AND NOT EXISTS
        (SELECT 1 FROM doc_chunks WHERE chunk_id = held.chunk_id AND doc_id NOT IN documents_left))
    SELECT chunk_id FROM leaving WHERE NOT EXISTS
        (SELECT 1 FROM kv_chunks AS own JOIN kv_chunks AS other USING (kv_id)
        WHERE own.chunk_id = leaving.chunk_id AND other.chunk_id NOT IN leaving) ORDER BY chunk_id"""


class Registry:
    """Reads and writes the database of a store. Safe to use from several threads.

    Every method that changes something does so in one transaction: wholly, or not at all. It waits for the store's
    writer lock if another process holds it; hold Store.writing() around work of several steps.

    Raises:
        StoreError: Any method can raise it, or one of its subclasses, when the database cannot be used.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    # Documents

    def document(self, doc_id: str) -> DocumentRecord | None:
        """One document, or None."""
        with self._database.read() as connection:
            return next(iter(sql.document_records(connection, [doc_id])), None)

    def documents(self, doc_ids: Iterable[str] | None = None) -> Iterator[DocumentRecord]:
        """All documents in the order of their ids, or those named that the store holds."""
        if doc_ids is not None:
            with self._database.read() as connection:
                found = sql.document_records(connection, doc_ids)
            yield from found
            return
        yield from self._pages(sql.next_documents, lambda record: record.doc_id)

    def named_by_source(self) -> Iterator[DocumentRecord]:
        """The documents whose id is their source, as that of files, in the order of their ids."""
        yield from self._pages(partial(sql.next_documents, named_by_source=True), lambda record: record.doc_id)

    def doc_ids(self, prefix: str = "", *, source: str | None = None) -> list[str]:
        """Ids of the documents whose ids begin so (and that have this source), in order; reads nothing else of them."""
        query = "SELECT doc_id FROM documents WHERE doc_id >= ?1 AND doc_id < ?2 AND (?3 IS NULL OR source = ?3)"
        with self._database.read() as connection:
            rows = connection.execute(f"{query} ORDER BY doc_id", (prefix, prefix + "\U0010ffff", source)).fetchall()
        return [row[0] for row in rows]

    def put_documents(self, new: Iterable[NewDocument], *, embedder: str | None) -> list[PutResult]:
        """Store documents, each replacing the one with its id, all in one transaction.

        Args:
            new: The documents, whole.
            embedder: Name of the model of the embeddings. None stores chunks that no search finds.

        Raises:
            StoreError: A chunk has no embedding and the store has none for its text, or the embeddings do not fit
                the store.
        """
        batch = list(new)  # not inside the transaction: the caller's iterator may use the store itself
        with self._database.write() as connection:
            return sql.put_documents(connection, batch, embedder)

    def remove_documents(self, doc_ids: Iterable[str]) -> RemoveResult:
        """Remove documents, and those of their chunks that no other document holds."""
        wanted = list(doc_ids)
        with self._database.write() as connection:
            return sql.remove_documents(connection, wanted)

    # Chunks and embeddings

    def known_texts(self, texts: Iterable[str], *, embedder: str | None = None) -> dict[str, StoredChunk]:
        """The texts that need no embedding, by their text_hash.

        Args:
            texts: Texts of chunks.
            embedder: Only texts that this model embedded; None means the store's own.
        """
        condition = "text_hash IN (SELECT value FROM json_each(?)) AND embedding IS NOT NULL"
        with self._database.read() as connection:
            parameters = [json.dumps(list({text_hash(text) for text in texts}))]
            if embedder is not None:
                condition += " AND embedder = ?"
                parameters.append(embedder)
            found = sql.stored_chunks(connection, self._database.path, condition, parameters)
        return {chunk.text_hash: chunk for chunk in found}

    def stored_texts(self, texts: Iterable[str]) -> dict[str, StoredChunk]:
        """The texts that are chunks of a document, embedded or not, by their text_hash."""
        wanted = {text_hash(text) for text in texts}
        with self._database.read() as connection:
            condition = "text_hash IN (SELECT value FROM json_each(?))"
            found = sql.stored_chunks(connection, self._database.path, condition, [json.dumps(list(wanted))])
        return {chunk.text_hash: chunk for chunk in found}

    def chunks(self, chunk_ids: Iterable[int] | None = None) -> Iterator[StoredChunk]:
        """All chunks in the order of their ids, or those named that the store holds."""
        if chunk_ids is None:
            yield from self._chunk_pages("TRUE")
            return
        with self._database.read() as connection:
            found = sql.stored_chunks(
                connection,
                self._database.path,
                "chunk_id IN (SELECT value FROM json_each(?)) ORDER BY chunk_id",
                [json.dumps([int(chunk_id) for chunk_id in chunk_ids])],
            )
        yield from found

    def chunk_ids(self, names: Iterable[str]) -> dict[str, int]:
        """Ids of chunks by their names in a retrieval trace: the text_hash, or the id itself; unknown ones left out."""
        wanted = json.dumps(list(dict.fromkeys(names)))
        with self._database.read() as connection:
            by_hash = connection.execute(
                "SELECT text_hash, chunk_id FROM chunks WHERE text_hash IN (SELECT value FROM json_each(?))", (wanted,)
            ).fetchall()
            by_id = connection.execute(
                "SELECT CAST(chunk_id AS TEXT), chunk_id FROM chunks WHERE chunk_id IN "
                "(SELECT CAST(value AS INTEGER) FROM json_each(?) WHERE value NOT GLOB '*[^0-9]*')",
                (wanted,),
            ).fetchall()
        return dict(by_id) | dict(by_hash)

    def document_chunks(self, doc_id: str) -> list[StoredChunk]:
        """A document's chunks in its order; a text that occurs twice is returned twice."""
        with self._database.read() as connection:
            order = [
                row[0]
                for row in connection.execute(
                    "SELECT chunk_id FROM doc_chunks WHERE doc_id = ? ORDER BY ordinal", (doc_id,)
                )
            ]
            found = sql.stored_chunks(
                connection, self._database.path, "chunk_id IN (SELECT value FROM json_each(?))", [json.dumps(order)]
            )
        by_id = {chunk.chunk_id: chunk for chunk in found}
        return [by_id[chunk_id] for chunk_id in order]

    def claim_embedder(self, embedder: str, dimension: int | None = None) -> None:
        """Make a model the store's embedder before anything is embedded; no write if it is so already.

        Raises:
            StoreError: The store has embeddings of another model.
        """
        with self._database.read() as connection:
            known = (sql.read_meta(connection, sql.EMBEDDER), sql.dimension(connection))
        if known != (embedder, dimension or known[1]):
            with self._database.write() as connection:
                sql.claim_embedder(connection, embedder, dimension)

    def require_embedder(self, embedder: str) -> None:
        """Check that a model's vectors can be compared with the store's.

        Raises:
            StoreError: The store has embeddings of another model.
        """
        with self._database.read() as connection:
            sql.require_embedder(connection, embedder)

    # KV

    def record_kv(self, fingerprint: str, facts: Mapping[str, Any], rows: Iterable[KVRow]) -> int:
        """Record KV that an engine has stored; returns for how many of the rows.

        A chunk that was removed meanwhile gets no record: its KV goes to the trash.

        Args:
            fingerprint: Of the engine and the prompt's prefix.
            facts: What the fingerprint was made from, to show to users.
            rows: The KV, by chunk.
        """
        batch = list(rows)
        with self._database.write() as connection:
            return _record(connection, fingerprint, facts, batch)

    def kv_rows(self, fingerprint: str) -> Iterator[KVRow]:
        """All KV recorded under the fingerprint, by chunk; a key that serves two chunks is returned twice."""

        def page(connection: sqlite3.Connection, after: int | None, limit: int) -> list[KVRow]:
            query = """SELECT chunk_id, key, tokens, nbytes FROM kv_chunks JOIN kv USING (kv_id)
                WHERE fingerprint = ? AND chunk_id > ? ORDER BY chunk_id LIMIT ?"""
            return [KVRow(*row) for row in connection.execute(query, (fingerprint, after or 0, limit))]

        yield from self._pages(page, lambda row: row.chunk_id)

    def prefixes(self) -> dict[str, tuple[int, ...]]:
        """The prompts' prefixes by fingerprint, of those that were recorded with theirs."""
        with self._database.read() as connection:
            rows = connection.execute("SELECT fingerprint, facts FROM fingerprints").fetchall()
        found = {fingerprint: json.loads(facts).get(PREFIX) for fingerprint, facts in rows}
        return {fingerprint: tuple(prefix) for fingerprint, prefix in found.items() if prefix}

    def chunks_without_kv(self, fingerprint: str, *, doc_ids: Iterable[str] | None = None) -> list[StoredChunk]:
        """Chunks for which no KV is recorded under the fingerprint, of all documents or of those named."""
        if doc_ids is None:
            return list(self._chunk_pages(_WITHOUT_KV, fingerprint))
        condition = (
            f"{_WITHOUT_KV} AND chunk_id IN (SELECT chunk_id FROM doc_chunks JOIN json_each(?) ON doc_id = value)"
        )
        return list(self._chunk_pages(condition, fingerprint, json.dumps(list(doc_ids))))

    def chunks_only_in(self, doc_ids: Iterable[str]) -> list[int]:
        """Ids of chunks that are deleted with these documents: no other holds them, or a chunk that shares their KV."""
        with self._database.read() as connection:
            return [row[0] for row in connection.execute(_ONLY_IN, (json.dumps(list(doc_ids)),))]

    def trash_other_kv(self, fingerprint: str) -> int:
        """Move the KV of all other fingerprints to the trash. Returns how many keys."""
        with self._database.write() as connection:
            connection.execute(f"{_TRASH} WHERE fingerprint <> ? GROUP BY kv_id", (fingerprint,))
            count = connection.execute("DELETE FROM kv WHERE fingerprint <> ?", (fingerprint,)).rowcount
            for other, facts in connection.execute("SELECT fingerprint, facts FROM fingerprints").fetchall():
                # The facts are needed until the KV is gone from a server.
                needed = "SELECT 1 FROM trash WHERE fingerprint = ? LIMIT 1"
                if other != fingerprint and not (
                    _is_served(json.loads(facts)) and connection.execute(needed, (other,)).fetchone()
                ):
                    connection.execute("DELETE FROM fingerprints WHERE fingerprint = ?", (other,))
            return count

    def trash_older_kv(self, created_before: float) -> int:
        """Move KV that was computed before this time (time.time()) to the trash. Returns how many keys."""
        with self._database.write() as connection:
            connection.execute(f"{_TRASH} WHERE kv.created_at < ? GROUP BY kv_id", (created_before,))
            return connection.execute("DELETE FROM kv WHERE created_at < ?", (created_before,)).rowcount

    def trash(self, limit: int | None = None, *, here: bool = False) -> list[tuple[str, str]]:
        """(fingerprint, key) of KV that no chunk needs: let the engine forget it, then call clear_trash().

        Args:
            limit: Most pairs.
            here: Leave out KV that servers hold.
        """
        served = self.server_fingerprints() if here else set()
        return [(row.fingerprint, row.key) for row in self.trash_rows() if row.fingerprint not in served][:limit]

    def trash_rows(self) -> list[TrashRow]:
        """KV that no chunk needs, with the text that it is of, by fingerprint and key."""
        with self._database.read() as connection:
            query = "SELECT fingerprint, key, text FROM trash ORDER BY fingerprint, key"
            return [TrashRow(*row) for row in connection.execute(query)]

    def server_fingerprints(self) -> set[str]:
        """Fingerprints whose KV servers hold, and not an engine in this process."""
        with self._database.read() as connection:
            rows = connection.execute("SELECT fingerprint, facts FROM fingerprints").fetchall()
        return {fingerprint for fingerprint, facts in rows if _is_served(json.loads(facts))}

    def texts_like(self, text: str, *, without: Collection[int] = (), most: int = 4) -> list[str]:
        """Other chunks that have the most characters at their beginning in common with a text, at least 16.

        Args:
            text: The text.
            without: Ids of chunks that do not count.
            most: Most texts.
        """
        query = "SELECT chunk_id, text FROM chunks WHERE substr(text, 1, 16) = substr(?1, 1, 16) AND text <> ?1"
        with self._database.read() as connection:
            found = (other for chunk_id, other in connection.execute(query, (text,)) if chunk_id not in without)
            return nlargest(most, found, key=lambda other: common_start(text, other))

    def clear_trash(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Record that the engine has dropped these (fingerprint, key) pairs.

        Returns those that were recorded again in the meantime: their records are removed, because the KV may be
        gone, and they stay in the trash. The next computation records them again.
        """
        batch = list(pairs)
        with self._database.write() as connection:
            return _clear_trash(connection, batch)

    # The whole store

    def get_meta(self, key: str) -> str | None:
        """A named fact about the store, or None."""
        with self._database.read() as connection:
            return sql.read_meta(connection, key)

    def set_meta(self, key: str, value: str | None) -> None:
        """Record a named fact about the store; None removes it."""
        with self._database.write() as connection:
            sql.write_meta(connection, key, value)

    @property
    def embedder(self) -> str | None:
        """The model of the store's embeddings, None before the first."""
        return self.get_meta(sql.EMBEDDER)

    def stats(self, current: str | None = None) -> StoreStats:
        """Counts over the whole store.

        Args:
            current: Fingerprint in use; KV of all others is stale. None calls none stale.
        """
        with self._database.read() as connection:
            row = connection.execute(
                f"""SELECT (SELECT count(*) FROM documents), count(*), total(tokens),
                count(*) - count(vector_generation), total(?1 IS NOT NULL AND {_WITHOUT_KV.replace("?", "?1")}),
                (SELECT count(*) FROM trash) FROM chunks""",
                (current,),
            ).fetchone()
            return StoreStats(
                documents=row[0],
                chunks=row[1],
                tokens=int(row[2]),
                chunks_without_embedding=row[3],
                chunks_without_kv=int(row[4]),
                embedder=sql.read_meta(connection, sql.EMBEDDER),
                dimension=sql.dimension(connection),
                kv=_kv_stats(connection, current),
                trash=row[5],
                database_bytes=self._database.path.stat().st_size,
            )

    # Reading long tables page by page

    def _chunk_pages(self, condition: str, *parameters: str) -> Iterator[StoredChunk]:
        def page(connection: sqlite3.Connection, after: int | None, limit: int) -> list[StoredChunk]:
            query = f"{condition} AND chunk_id > ? ORDER BY chunk_id LIMIT ?"
            return sql.stored_chunks(connection, self._database.path, query, [*parameters, after or 0, limit])

        yield from self._pages(page, lambda chunk: chunk.chunk_id)

    def _pages(
        self, page: Callable[[sqlite3.Connection, Any, int], list[T]], place: Callable[[T], int | str]
    ) -> Iterator[T]:
        after: int | str | None = None
        while True:
            with self._database.read() as connection:
                rows = page(connection, after, _PAGE)
            yield from rows
            if len(rows) < _PAGE:
                return
            after = place(rows[-1])


def _is_served(facts: Mapping[str, Any]) -> bool:
    """Whether KV with these facts is on a server. Older versions recorded no engine; a server's dtype is unknown."""
    return facts.get("engine") == "vllm" if "engine" in facts else facts.get("dtype") == "unknown"


def _record(connection: sqlite3.Connection, fingerprint: str, facts: Mapping[str, Any], rows: Iterable[KVRow]) -> int:
    """Record KV that an engine has stored; returns for how many of the rows.

    A chunk that was removed meanwhile gets no record: its KV goes to the trash unless another chunk uses it.
    """
    now = time.time()
    connection.execute(
        "INSERT OR IGNORE INTO fingerprints (fingerprint, facts, created_at) VALUES (?, ?, ?)",
        (fingerprint, json.dumps(dict(facts), sort_keys=True, default=str), now),
    )
    recorded = 0
    for row in rows:
        if connection.execute("SELECT 1 FROM chunks WHERE chunk_id = ?", (row.chunk_id,)).fetchone() is None:
            connection.execute(_DISCARD, (fingerprint, row.key))
            continue
        # One chunk has one key under a fingerprint; another key means that its token ids have changed.
        connection.execute(_DROP_OTHER_KEYS, (row.chunk_id, fingerprint, row.key))
        connection.execute(_UPSERT, (fingerprint, row.key, row.tokens, row.nbytes, now))
        connection.execute(_USE, (row.chunk_id, fingerprint, row.key))
        recorded += 1
    return recorded


def _clear_trash(connection: sqlite3.Connection, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Take (fingerprint, key) pairs that an engine has dropped out of the trash.

    A pair that was recorded again while the engine dropped it cannot be trusted: the record is withdrawn and the pair
    stays in the trash, so that it is dropped and computed once more. Returns such pairs.
    """
    revived: list[tuple[str, str]] = []
    for pair in pairs:
        if connection.execute("DELETE FROM trash WHERE fingerprint = ? AND key = ?", pair).rowcount == 0 and (
            connection.execute("DELETE FROM kv WHERE fingerprint = ? AND key = ?", pair).rowcount > 0
        ):
            revived.append(pair)
    return revived


def _kv_stats(connection: sqlite3.Connection, current: str | None) -> tuple[FingerprintStats, ...]:
    """Counts by fingerprint, the current one first, then the newest."""
    rows = connection.execute(
        """SELECT f.fingerprint, f.facts, f.created_at, count(kv_id), total(tokens), total(nbytes)
        FROM fingerprints f LEFT JOIN kv USING (fingerprint) GROUP BY f.fingerprint
        ORDER BY f.fingerprint IS NOT ?, f.created_at DESC""",
        (current,),
    )
    return tuple(
        FingerprintStats(
            fingerprint=row[0],
            facts={name: value for name, value in json.loads(row[1]).items() if name != PREFIX},
            created_at=row[2],
            keys=row[3],
            tokens=int(row[4]),
            nbytes=int(row[5]),
            stale=current is not None and row[0] != current,
        )
        for row in rows
    )
