"""The truth about a store: documents, their chunks with embeddings, and which KV exists for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lmcache_rag.errors import ConfigError
from lmcache_rag.store import kv, meta, queries, sql
from lmcache_rag.store.check import problems
from lmcache_rag.store.kv import KVTable
from lmcache_rag.store.types import (
    DocumentRecord,
    NewChunk,
    NewDocument,
    PutResult,
    RemoveResult,
    StoredChunk,
    StoreStats,
    Vector,
    text_hash,
)
from lmcache_rag.store.vectors import VectorWriter


class Registry(KVTable):
    """Reads and writes the database of a store. Safe to use from several threads.

    Every method that changes something does so in one transaction: wholly, or not at all. It waits for the store's
    writer lock if another process holds it; hold Store.writing() around work of several steps.

    Raises:
        StoreError: Any method can raise it, or one of its subclasses, when the database cannot be used.
    """

    # Documents

    def document(self, doc_id: str) -> DocumentRecord | None:
        """One document, or None."""
        with self._database.read() as connection:
            return next(iter(queries.document_records(connection, [doc_id])), None)

    def documents(self, doc_ids: Iterable[str] | None = None) -> Iterator[DocumentRecord]:
        """All documents in the order of their ids, or those named that the store holds."""
        if doc_ids is not None:
            with self._database.read() as connection:
                found = queries.document_records(connection, doc_ids)
            yield from found
            return
        yield from self._pages(queries.next_documents, lambda record: record.doc_id)

    def doc_ids(self, prefix: str = "", *, source: str | None = None) -> list[str]:
        """Ids of the documents whose ids begin so (and that have this source), in order; reads nothing else of them."""
        sql = "SELECT doc_id FROM documents WHERE doc_id >= ?1 AND doc_id < ?2 AND (?3 IS NULL OR source = ?3)"
        with self._database.read() as connection:
            rows = connection.execute(f"{sql} ORDER BY doc_id", (prefix, prefix + "\U0010ffff", source)).fetchall()
        return [row[0] for row in rows]

    def put_document(
        self,
        doc_id: str,
        *,
        content_hash: str,
        splitter: str,
        source: str,
        metadata: Mapping[str, Any],
        chunks: Sequence[NewChunk],
        embedder: str | None,
    ) -> PutResult:
        """Store a document in place of what stood under its id; see put_documents."""
        document = NewDocument(doc_id, content_hash, splitter, source, chunks, metadata)
        return self.put_documents([document], embedder=embedder)[0]

    def put_documents(self, new: Iterable[NewDocument], *, embedder: str | None) -> list[PutResult]:
        """Store documents, each in place of what stood under its id, all in one transaction.

        Args:
            new: The documents, whole.
            embedder: Name of the model of the embeddings. None stores chunks that no search finds.

        Raises:
            StoreError: A chunk has no embedding and the store has none for its text, or the embeddings do not fit
                the store.
        """
        batch = list(new)  # not inside the transaction: the caller's iterator may use the store itself
        with self._database.write() as connection:
            return sql.put(connection, batch, embedder)

    def remove_documents(self, doc_ids: Iterable[str]) -> RemoveResult:
        """Remove documents, and those of their chunks that no other document holds."""
        wanted = list(doc_ids)
        with self._database.write() as connection:
            return sql.remove(connection, wanted)

    # Chunks and embeddings

    def known_texts(self, texts: Iterable[str], *, embedder: str | None = None) -> dict[str, StoredChunk]:
        """Those of the texts that need no embedding, by their text_hash.

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
            found = queries.stored_chunks(connection, self._database.path, condition, parameters)
        return {chunk.text_hash: chunk for chunk in found}

    def stored_texts(self, texts: Iterable[str]) -> dict[str, StoredChunk]:
        """Those of the texts that are chunks of a document, embedded or not, by their text_hash."""
        wanted = {text_hash(text) for text in texts}
        with self._database.read() as connection:
            condition = "text_hash IN (SELECT value FROM json_each(?))"
            found = queries.stored_chunks(connection, self._database.path, condition, [json.dumps(list(wanted))])
        return {chunk.text_hash: chunk for chunk in found}

    def chunks(self, chunk_ids: Iterable[int] | None = None) -> Iterator[StoredChunk]:
        """All chunks in the order of their ids, or those named that the store holds."""
        if chunk_ids is None:
            yield from self._chunk_pages("TRUE")
            return
        with self._database.read() as connection:
            found = queries.stored_chunks(
                connection,
                self._database.path,
                "chunk_id IN (SELECT value FROM json_each(?)) ORDER BY chunk_id",
                [json.dumps([int(chunk_id) for chunk_id in chunk_ids])],
            )
        yield from found

    def document_chunks(self, doc_id: str) -> list[StoredChunk]:
        """A document's chunks in its order; a text that stands in it twice comes twice."""
        with self._database.read() as connection:
            order = [
                row[0]
                for row in connection.execute(
                    "SELECT chunk_id FROM doc_chunks WHERE doc_id = ? ORDER BY ordinal", (doc_id,)
                )
            ]
            found = queries.stored_chunks(
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
            known = (meta.get(connection, meta.EMBEDDER), meta.dimension(connection))
        if known != (embedder, dimension or known[1]):
            with self._database.write() as connection:
                meta.claim_embedder(connection, embedder, dimension)

    def require_embedder(self, embedder: str) -> None:
        """Check that a model's vectors can be compared with the store's.

        Raises:
            StoreError: The store has embeddings of another model.
        """
        with self._database.read() as connection:
            meta.require_embedder(connection, embedder)

    def chunks_without_embedding(self) -> Iterator[StoredChunk]:
        """Chunks that no search finds until set_embeddings() is called for them."""
        yield from self._chunk_pages("embedding IS NULL")

    def change_embedder(self, embedder: str) -> int:
        """Give the store another embedder; returns how many chunks have to be embedded anew.

        Go through chunks_without_embedding() afterwards; that can be interrupted and resumed.
        """
        with self._database.write() as connection:
            generation = meta.Generation(connection)
            changed = connection.execute(
                """UPDATE chunks SET embedder = NULL, vector_generation = NULL, embedding = NULL
                WHERE embedder <> ?""",
                (embedder,),
            ).rowcount
            if changed:
                generation.removed = True
                generation.finish()
            meta.claim_embedder(connection, embedder)
            return changed

    def set_embeddings(self, embeddings: Mapping[int, Vector | Sequence[float]], *, embedder: str) -> int:
        """Store vectors by chunk id; ids that have left are skipped. Returns how many were stored."""
        with self._database.write() as connection:
            writer, generation = VectorWriter(connection, embedder), meta.Generation(connection)
            blobs = writer.blobs(list(embeddings.values()))
            rows = [(embedder, generation.number, blob, key) for key, blob in zip(embeddings, blobs, strict=True)]
            stored = connection.executemany(
                "UPDATE chunks SET embedder = ?, vector_generation = ?, embedding = ? WHERE chunk_id = ?", rows
            ).rowcount
            generation.changed = stored > 0
            generation.finish()
            return max(stored, 0)

    # The whole store

    def get_meta(self, key: str) -> str | None:
        """A named fact about the store, or None."""
        with self._database.read() as connection:
            return meta.get(connection, key)

    def set_meta(self, key: str, value: str | None) -> None:
        """Set a named fact; None removes it.

        Raises:
            ConfigError: The store keeps this fact itself.
        """
        if key in meta.RESERVED:
            raise ConfigError(f"The store keeps {key!r} itself.", remedy="Choose another name.")
        with self._database.write() as connection:
            meta.put(connection, key, value)

    @property
    def embedder(self) -> str | None:
        """The model of the store's embeddings, None before the first."""
        return self.get_meta(meta.EMBEDDER)

    def stats(self, current: str | None = None) -> StoreStats:
        """Counts over the whole store.

        Args:
            current: Fingerprint in use; KV of all others is stale. None calls none stale.
        """
        with self._database.read() as connection:
            row = connection.execute(
                f"""SELECT (SELECT count(*) FROM documents), count(*), total(tokens),
                count(*) - count(vector_generation), total(?1 IS NOT NULL AND {kv.WITHOUT_KV.replace("?", "?1")}),
                (SELECT count(*) FROM trash) FROM chunks""",
                (current,),
            ).fetchone()
            return StoreStats(
                documents=row[0],
                chunks=row[1],
                tokens=int(row[2]),
                chunks_without_embedding=row[3],
                chunks_without_kv=int(row[4]),
                embedder=meta.get(connection, meta.EMBEDDER),
                dimension=meta.dimension(connection),
                kv=kv.stats(connection, current),
                trash=row[5],
                database_bytes=self._database.path.stat().st_size,
            )

    def check(self) -> list[str]:
        """Read the whole database and say what is wrong with it; an empty list means that it is sound."""
        with self._database.read() as connection:
            return problems(connection, self._database.path)
