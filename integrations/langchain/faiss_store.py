"""A LangChain vector store over this library's own FAISS index and database."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from lmcache_rag.embedding import as_embedder, unit_length
from lmcache_rag.errors import ConfigError, DocumentError
from lmcache_rag.store import DocumentRef, Hit, NewChunk, NewDocument, Store, text_hash

from .embeddings import EmbedderEmbeddings
from .filters import Filter, as_function

_SOURCE = "langchain"
_META = "m."  # before each name of metadata: "source" and "doc_id" mean other things to the store
_BATCH = 256  # documents between two commits


class FaissStore(VectorStore):
    """Documents in SQLite, vectors in FAISS, in one folder; what is added is on disk when the call returns.

    Scores are cosine similarities, larger is nearer. Metadata must be JSON. Safe to use from several threads, event
    loops and processes.

    Args:
        embedding: The user's embeddings. A folder holds the vectors of one embedding model.
        folder: Where; made if it is missing. Or an open Store.
    """

    def __init__(self, embedding: Embeddings, folder: str | Path | Store) -> None:
        self._embedding = embedding
        self._embedder = embedding.embedder if isinstance(embedding, EmbedderEmbeddings) else as_embedder(embedding)
        self.store = folder if isinstance(folder, Store) else Store.open(folder)

    @property
    def embeddings(self) -> Embeddings:
        """The user's embeddings."""
        return self._embedding

    # -- changes ------------------------------------------------------------------------------------------------

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Add documents, each in place of what stood under its id; returns their ids.

        Args:
            documents: The documents. Their own ids are used, else new ones are made.
            kwargs: `ids` wins over the documents' own; everything else is ignored.

        Raises:
            DocumentError: A text is not valid Unicode.
            StoreError: The store cannot be written, has vectors of other embeddings, or metadata is not JSON.
        """
        given = kwargs.get("ids")
        if given is not None and len(given) != len(documents):
            raise ValueError(f"There are {len(given)} ids for {len(documents)} documents.")
        keys = given or [None] * len(documents)
        ids = [str(key or doc.id or uuid.uuid4()) for key, doc in zip(keys, documents, strict=True)]
        texts = [doc.page_content for doc in documents]
        try:
            names = [text_hash(text) for text in texts]
        except UnicodeEncodeError as problem:
            raise DocumentError(
                f"A text is not valid Unicode: {problem}.", remedy="Decode it with errors='replace'."
            ) from problem
        if not documents:
            return []
        fingerprint = self._embedder.fingerprint
        with self.store.writing(timeout=30.0):
            known = self.store.registry.known_texts(texts, embedder=fingerprint)
            new = {name: text for name, text in zip(names, texts, strict=True) if name not in known}
            vectors = dict(zip(new, self._embedder.embed_documents(list(new.values())) if new else (), strict=True))
            rows = [
                NewDocument(
                    key,
                    name,
                    "",
                    _SOURCE,
                    [NewChunk(doc.page_content, 0, 0, vectors.get(name))],
                    {_META + field: value for field, value in doc.metadata.items()},
                )
                for key, name, doc in zip(ids, names, documents, strict=True)
            ]
            for start in range(0, len(rows), _BATCH):
                self.store.registry.put_documents(rows[start : start + _BATCH], embedder=fingerprint)
        return ids

    async def aadd_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Async twin of add_documents, in a thread."""
        return await asyncio.to_thread(self.add_documents, documents, **kwargs)

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Remove documents; None removes all. Ids that are not there are ignored."""
        wanted = self.store.registry.doc_ids() if ids is None else [str(key) for key in ids]
        if wanted:
            with self.store.writing(timeout=30.0):
                self.store.registry.remove_documents(wanted)
        return True

    # -- questions ----------------------------------------------------------------------------------------------

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents of these ids that are there, in this order."""
        registry = self.store.registry
        records = {record.doc_id: record for record in registry.documents(ids)}
        return [
            _document(key, "".join(chunk.text for chunk in registry.document_chunks(key)), records[key].metadata)
            for key in ids
            if key in records
        ]

    def texts(self) -> dict[str, str]:
        """Text by id, of all documents."""
        registry = self.store.registry
        return {key: "".join(chunk.text for chunk in registry.document_chunks(key)) for key in registry.doc_ids()}

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """The k nearest documents, best first. `filter` as in lmcache_rag.integrations.langchain.filters."""
        return [doc for doc, _ in self.similarity_search_with_score(query, k, **kwargs)]

    def similarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """The same with their cosine similarities."""
        return self._search(self._embedder.embed_query(query), k, filter)

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """The k documents nearest to a vector."""
        return [doc for doc, _ in self._search(unit_length(embedding), k, filter)]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """The k documents that are near and unlike each other, of the fetch_k nearest."""
        vector = self._embedder.embed_query(query)
        return self.max_marginal_relevance_search_by_vector(vector.tolist(), k, fetch_k, lambda_mult, **kwargs)

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """The same for a vector."""
        asked = unit_length(embedding)
        found = self._hits(asked, max(fetch_k, k), filter)[: max(fetch_k, k)]
        if not found:
            return []
        vectors = list(self.store.index.vectors([chunk for chunk, _, _ in found]))
        chosen = maximal_marginal_relevance(asked, vectors, lambda_mult=lambda_mult, k=k)
        return [found[index][1] for index in chosen]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda score: min(1.0, max(0.0, score))

    # -- async: the embedding natively, the search in a thread ------------------------------------------------------

    async def asimilarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """Async twin of similarity_search."""
        return [doc for doc, _ in await self.asimilarity_search_with_score(query, k, **kwargs)]

    async def asimilarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """Async twin of similarity_search_with_score."""
        vector = unit_length(await self._embedding.aembed_query(query))
        return await asyncio.to_thread(self._search, vector, k, filter)

    # -- save and load ----------------------------------------------------------------------------------------------

    def save_local(self, folder: str | Path) -> None:
        """Copy the documents and their vectors into another folder, in place of what is there."""
        with Store.open(folder) as target, target.writing():
            target.registry.remove_documents(target.registry.doc_ids())
            registry, fingerprint = self.store.registry, self.store.registry.embedder
            for record in registry.documents():
                chunks = registry.document_chunks(record.doc_id)
                vectors = self.store.index.vectors([chunk.chunk_id for chunk in chunks])
                new = [NewChunk(c.text, c.tokens, 0, vector) for c, vector in zip(chunks, vectors, strict=True)]
                row = NewDocument(record.doc_id, record.content_hash, "", record.source, new, record.metadata)
                target.registry.put_documents([row], embedder=fingerprint)

    @classmethod
    def load_local(cls, folder: str | Path, embeddings: Embeddings) -> FaissStore:
        """Open a folder that a FaissStore worked in, or was saved to.

        Raises:
            StoreError: There is none.
        """
        return cls(embeddings, Store.open(folder, create=False))

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        folder: str | Path = "",
        **kwargs: Any,
    ) -> FaissStore:
        """A store in that folder with these texts."""
        if not folder:
            raise ConfigError("A FaissStore lies in a folder.", remedy="Give folder=….")
        made = cls(embedding, folder)
        made.add_texts(texts, metadatas, ids=ids)
        return made

    def close(self) -> None:
        """Release the files. Safe to call twice."""
        self.store.close()

    # -- inside -------------------------------------------------------------------------------------------------

    def _search(self, vector: Any, k: int, filter: Filter | None) -> list[tuple[Document, float]]:
        return [(doc, score) for _, doc, score in self._hits(vector, k, filter)[:k]]

    def _hits(self, vector: Any, k: int, filter: Filter | None) -> list[tuple[int, Document, float]]:
        """(chunk, document, score), best first; equal texts of several ids are several documents."""
        self.store.registry.require_embedder(self._embedder.fingerprint)
        wanted = as_function(filter) if filter else None

        def documents(hit: Hit) -> Iterable[Document]:
            made = [_document(ref.doc_id, hit.text, ref.metadata) for ref in _refs(hit)]
            return [doc for doc in made if wanted is None or wanted(doc)]

        where = None if wanted is None else lambda hit: bool(documents(hit))
        hits = self.store.index.search(vector, k, where=where)
        return [(hit.chunk_id, doc, hit.score) for hit in hits for doc in documents(hit)]


def _refs(hit: Hit) -> Iterable[DocumentRef]:
    return {ref.doc_id: ref for ref in hit.documents}.values()


def _document(key: str, text: str, metadata: dict[str, Any]) -> Document:
    return Document(id=key, page_content=text, metadata={name[len(_META) :]: value for name, value in metadata.items()})
