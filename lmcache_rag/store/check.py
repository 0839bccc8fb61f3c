"""Whether a database is sound: its file, its references, and what the library promises about them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from lmcache_rag.errors import StoreCorruptError
from lmcache_rag.store import meta, queries
from lmcache_rag.store.vectors import from_blobs

# Each counts rows that must not exist.
_PROMISES = {
    "chunks stand in no document": """SELECT count(*) FROM chunks
        WHERE chunk_id NOT IN (SELECT chunk_id FROM doc_chunks)""",
    "records of KV belong to no chunk": "SELECT count(*) FROM kv WHERE kv_id NOT IN (SELECT kv_id FROM kv_chunks)",
    "keys are both in use and in the trash": "SELECT count(*) FROM trash JOIN kv USING (fingerprint, key)",
    "chunks have two keys under one fingerprint": """SELECT count(*) FROM (SELECT 1 FROM kv_chunks JOIN kv USING (kv_id)
        GROUP BY chunk_id, fingerprint HAVING count(*) > 1)""",
    "embeddings are of another model than the store's": """SELECT count(*) FROM chunks
        WHERE embedder <> (SELECT value FROM meta WHERE key = 'embedder')""",
}


def problems(connection: sqlite3.Connection, path: Path) -> list[str]:
    """Everything that is wrong, in words."""
    try:
        found = [row[0] for row in connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
        found += [
            f"{row[0]} refers to a missing row of {row[2]}" for row in connection.execute("PRAGMA foreign_key_check")
        ]
        for promise, sql in _PROMISES.items():
            count = connection.execute(sql).fetchone()[0]
            if count:
                found.append(f"{count} {promise}")
        after, page = 0, [0]
        while page:
            chunks = queries.stored_chunks(connection, path, "chunk_id > ? ORDER BY chunk_id LIMIT 256", [after])
            page = [chunk.chunk_id for chunk in chunks]
            after = page[-1] if page else after
        dimension = meta.dimension(connection)
        for (blob,) in connection.execute("SELECT embedding FROM chunks WHERE embedding IS NOT NULL"):
            from_blobs([blob], dimension or 1, path)
    except StoreCorruptError as error:
        return [error.message]
    except sqlite3.DatabaseError as error:
        return [str(error)]
    return found
