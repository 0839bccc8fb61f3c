"""Which chunk's KV exists, for which engine fingerprint; and the trash, KV that an engine has yet to drop.

Triggers of the schema keep KV and trash apart: KV that loses its last chunk moves to the trash in the same transaction,
KV that is recorded again leaves it.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lmcache_rag.store.tables import Tables
from lmcache_rag.store.types import FingerprintStats, KVRow, StoredChunk

WITHOUT_KV = """NOT EXISTS (SELECT 1 FROM kv_chunks JOIN kv USING (kv_id)
    WHERE kv_chunks.chunk_id = chunks.chunk_id AND fingerprint = ?)"""

_DROP_OTHER_KEYS = """DELETE FROM kv_chunks WHERE chunk_id = ? AND EXISTS
    (SELECT 1 FROM kv WHERE kv.kv_id = kv_chunks.kv_id AND fingerprint = ? AND key <> ?)"""
_UPSERT = """INSERT INTO kv (fingerprint, key, tokens, nbytes, created_at) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (fingerprint, key) DO UPDATE SET tokens = excluded.tokens, nbytes = excluded.nbytes"""
_USE = """INSERT OR IGNORE INTO kv_chunks (chunk_id, kv_id)
    SELECT ?, kv_id FROM kv WHERE fingerprint = ? AND key = ?"""
_DISCARD = """INSERT OR IGNORE INTO trash (fingerprint, key) SELECT ?1, ?2
    WHERE NOT EXISTS (SELECT 1 FROM kv WHERE fingerprint = ?1 AND key = ?2)"""

_ONLY_IN = """WITH documents_left AS (SELECT value FROM json_each(?)),
    leaving AS (SELECT DISTINCT chunk_id FROM doc_chunks AS held WHERE doc_id IN documents_left AND NOT EXISTS
        (SELECT 1 FROM doc_chunks WHERE chunk_id = held.chunk_id AND doc_id NOT IN documents_left))
    SELECT chunk_id FROM leaving WHERE NOT EXISTS
        (SELECT 1 FROM kv_chunks AS own JOIN kv_chunks AS other USING (kv_id)
        WHERE own.chunk_id = leaving.chunk_id AND other.chunk_id NOT IN leaving) ORDER BY chunk_id"""


class KVTable(Tables):
    """The part of the registry that is about KV."""

    def record_kv(self, fingerprint: str, facts: Mapping[str, Any], rows: Iterable[KVRow]) -> int:
        """Record KV that an engine now keeps; returns for how many of the rows.

        A chunk that has left meanwhile gets no record: its KV goes to the trash.

        Args:
            fingerprint: Of the engine and the prompt's prefix.
            facts: What the fingerprint stands for, to show to people.
            rows: The KV, by chunk.
        """
        batch = list(rows)
        with self._database.write() as connection:
            return _record(connection, fingerprint, facts, batch)

    def forget_kv(self, fingerprint: str, keys: Iterable[str] | None = None) -> int:
        """Move recorded KV to the trash, all of the fingerprint when keys is None. Returns how many keys."""
        wanted = None if keys is None else list(keys)
        with self._database.write() as connection:
            return _forget(connection, fingerprint, wanted)

    def kv_keys(self, fingerprint: str) -> set[str]:
        """Keys of all KV recorded under the fingerprint."""
        with self._database.read() as connection:
            return {row[0] for row in connection.execute("SELECT key FROM kv WHERE fingerprint = ?", (fingerprint,))}

    def kv_rows(self, fingerprint: str) -> Iterator[KVRow]:
        """All KV recorded under the fingerprint, by chunk; a key that serves two chunks comes twice."""

        def page(connection: sqlite3.Connection, after: int | None, limit: int) -> list[KVRow]:
            sql = """SELECT chunk_id, key, tokens, nbytes FROM kv_chunks JOIN kv USING (kv_id)
                WHERE fingerprint = ? AND chunk_id > ? ORDER BY chunk_id LIMIT ?"""
            return [KVRow(*row) for row in connection.execute(sql, (fingerprint, after or 0, limit))]

        yield from self._pages(page, lambda row: row.chunk_id)

    def chunks_without_kv(self, fingerprint: str, *, doc_ids: Iterable[str] | None = None) -> list[StoredChunk]:
        """Chunks for which no KV is recorded under the fingerprint, of all documents or of those named."""
        if doc_ids is None:
            return list(self._chunk_pages(WITHOUT_KV, fingerprint))
        condition = (
            f"{WITHOUT_KV} AND chunk_id IN (SELECT chunk_id FROM doc_chunks JOIN json_each(?) ON doc_id = value)"
        )
        return list(self._chunk_pages(condition, fingerprint, json.dumps(list(doc_ids))))

    def chunks_only_in(self, doc_ids: Iterable[str]) -> list[int]:
        """Ids of chunks that leave with these documents: no other holds them, or a chunk that shares their KV."""
        with self._database.read() as connection:
            return [row[0] for row in connection.execute(_ONLY_IN, (json.dumps(list(doc_ids)),))]

    def trash_other_kv(self, fingerprint: str) -> int:
        """Move the KV of all other fingerprints to the trash. Returns how many keys."""
        with self._database.write() as connection:
            count = connection.execute("DELETE FROM kv WHERE fingerprint <> ?", (fingerprint,)).rowcount
            connection.execute("DELETE FROM fingerprints WHERE fingerprint <> ?", (fingerprint,))
            return count

    def trash(self, limit: int | None = None) -> list[tuple[str, str]]:
        """(fingerprint, key) of KV that no chunk needs: let the engine forget it, then call clear_trash()."""
        with self._database.read() as connection:
            sql = "SELECT fingerprint, key FROM trash ORDER BY fingerprint, key LIMIT ?"
            return [(row[0], row[1]) for row in connection.execute(sql, (-1 if limit is None else limit,))]

    def clear_trash(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Say that the engine has dropped these (fingerprint, key) pairs.

        Returns those that were recorded again in the meantime: their records are withdrawn, because the KV may be
        gone, and they stay in the trash. They come out right at the next computation.
        """
        batch = list(pairs)
        with self._database.write() as connection:
            return _clear_trash(connection, batch)


def _record(connection: sqlite3.Connection, fingerprint: str, facts: Mapping[str, Any], rows: Iterable[KVRow]) -> int:
    """Record KV that an engine keeps; returns for how many of the rows.

    A chunk that has left meanwhile gets no record: its KV goes to the trash unless another chunk uses it.
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
        # One chunk has one key under a fingerprint; another one means that its token ids are others now.
        connection.execute(_DROP_OTHER_KEYS, (row.chunk_id, fingerprint, row.key))
        connection.execute(_UPSERT, (fingerprint, row.key, row.tokens, row.nbytes, now))
        connection.execute(_USE, (row.chunk_id, fingerprint, row.key))
        recorded += 1
    return recorded


def _forget(connection: sqlite3.Connection, fingerprint: str, keys: Iterable[str] | None) -> int:
    """Move KV to the trash, all of the fingerprint when keys is None; returns how many keys were recorded."""
    if keys is not None:
        wanted = json.dumps(list(keys))
        sql = "DELETE FROM kv WHERE fingerprint = ? AND key IN (SELECT value FROM json_each(?))"
        return connection.execute(sql, (fingerprint, wanted)).rowcount
    count = connection.execute("DELETE FROM kv WHERE fingerprint = ?", (fingerprint,)).rowcount
    connection.execute("DELETE FROM fingerprints WHERE fingerprint = ?", (fingerprint,))
    return count


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


def stats(connection: sqlite3.Connection, current: str | None) -> tuple[FingerprintStats, ...]:
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
            facts=json.loads(row[1]),
            created_at=row[2],
            keys=row[3],
            tokens=int(row[4]),
            nbytes=int(row[5]),
            stale=current is not None and row[0] != current,
        )
        for row in rows
    )
