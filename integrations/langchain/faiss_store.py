"""A LangChain vector store over this library's own FAISS index and database, with metadata filters."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from lmcache_rag.embedding import Embedder, as_embedder, unit_length
from lmcache_rag.errors import ConfigError, DocumentError
from lmcache_rag.store import DocumentRef, Hit, NewChunk, NewDocument, Store, text_hash

Filter: TypeAlias = Mapping[str, Any] | Callable[[Document], bool]

_SOURCE = "langchain"
_META = "m."  # before each name of metadata: "source" and "doc_id" mean other things to the store
_BATCH = 256  # documents between two commits
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda have, want: have == want,
    "$ne": lambda have, want: have != want,
    "$in": lambda have, want: have in want,
    "$nin": lambda have, want: have not in want,
    "$gt": lambda have, want: have > want,
    "$gte": lambda have, want: have >= want,
    "$lt": lambda have, want: have < want,
    "$lte": lambda have, want: have <= want,
}


class EmbedderEmbeddings(Embeddings):
    """This library's embedder as LangChain's embeddings, for programs without embeddings.

    Args:
        embedder: A workspace's embedder.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed texts that will be searched."""
        return [[float(x) for x in row] for row in self.embedder.embed_documents(texts)]

    def embed_query(self, text: str) -> list[float]:
        """Embed a question."""
        return [float(x) for x in self.embedder.embed_query(text)]


class FaissStore(VectorStore):
    """Documents in SQLite and vectors in FAISS, in one folder; additions are on disk when the call returns.

    Scores are cosine similarities, larger is nearer. Metadata must be JSON. Safe to use from several threads, event
    loops and processes.

    Args:
        embedding: The user's embeddings. A folder holds the vectors of one embedding model.
        folder: The folder, created if it is missing; or an open Store.
    """

    def __init__(self, embedding: Embeddings, folder: str | Path | Store) -> None:
        self._embedding = embedding
        self._embedder = embedding.embedder if isinstance(embedding, EmbedderEmbeddings) else as_embedder(embedding)
        self.store = folder if isinstance(folder, Store) else Store.open(folder)

    @property
    def embeddings(self) -> Embeddings:
        """The user's embeddings."""
        return self._embedding

    # -- changes --------------------------------------------------------------------------------------------------

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Add documents, replacing those with the same ids; returns the ids.

        Args:
            documents: The documents. Those without an id get a new one.
            kwargs: `ids` override the documents' own; all others are ignored.

        Raises:
            DocumentError: A text is not valid Unicode.
            StoreError: The store cannot be written, has vectors of other embeddings, or metadata is not JSON.
        """
        wanted = kwargs.get("ids")
        if wanted is not None and len(wanted) != len(documents):
            raise ValueError(f"There are {len(wanted)} ids for {len(documents)} documents.")
        keys = wanted or [None] * len(documents)
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
        """Async version of add_documents, in a thread."""
        return await asyncio.to_thread(self.add_documents, documents, **kwargs)

    def delete(self, ids: list[str] | None = None, *, filter: Filter | None = None, **kwargs: Any) -> bool:
        """Remove documents by id, by filter (see matches_filters), or by both; without either, all.

        Unknown ids are ignored.

        Raises:
            ConfigError: Another keyword was given, or the filter is empty or not valid.
        """
        if kwargs:
            raise ConfigError(
                f"FaissStore.delete has no keyword {sorted(kwargs)[0]!r}.", remedy="Give ids, filter, or both."
            )
        wanted = self.store.registry.doc_ids() if ids is None else [str(key) for key in ids]
        if filter is not None:
            if not filter:
                raise ConfigError("The filter is empty.", remedy="Leave it out to delete all documents.")
            matches = matches_filters(filter)
            wanted = [str(document.id) for document in self.get_by_ids(wanted) if matches(document)]
        if wanted:
            with self.store.writing(timeout=30.0):
                self.store.registry.remove_documents(wanted)
        return True

    # -- search ---------------------------------------------------------------------------------------------------

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Return the documents with these ids, in this order; unknown ids are left out."""
        registry = self.store.registry
        records = {record.doc_id: record for record in registry.documents(ids)}
        return [
            _document(key, "".join(chunk.text for chunk in registry.document_chunks(key)), records[key].metadata)
            for key in ids
            if key in records
        ]

    def texts(self) -> dict[str, str]:
        """Return the texts of all documents by id."""
        registry = self.store.registry
        return {key: "".join(chunk.text for chunk in registry.document_chunks(key)) for key in registry.doc_ids()}

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """Return the k nearest documents, best first; for `filter` see matches_filters."""
        return [doc for doc, _ in self.similarity_search_with_score(query, k, **kwargs)]

    def similarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """Return the k nearest documents with their cosine similarities, best first."""
        return self._search(self._embedder.embed_query(query), k, filter)

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """Return the k documents nearest to a vector."""
        return [doc for doc, _ in self._search(unit_length(embedding), k, filter)]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Return k documents of the fetch_k nearest that are near to the query and unlike each other."""
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
        """Return k documents of the fetch_k nearest to a vector that are unlike each other."""
        query = unit_length(embedding)
        found = self._hits(query, max(fetch_k, k), filter)[: max(fetch_k, k)]
        if not found:
            return []
        vectors = list(self.store.index.vectors([chunk for chunk, _, _ in found]))
        chosen = maximal_marginal_relevance(query, vectors, lambda_mult=lambda_mult, k=k)
        return [found[index][1] for index in chosen]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda score: min(1.0, max(0.0, score))

    # -- async: the embedding natively, the search in a thread ----------------------------------------------------

    async def asimilarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """Async version of similarity_search."""
        return [doc for doc, _ in await self.asimilarity_search_with_score(query, k, **kwargs)]

    async def asimilarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """Async version of similarity_search_with_score."""
        vector = unit_length(await self._embedding.aembed_query(query))
        return await asyncio.to_thread(self._search, vector, k, filter)

    # -- save and load --------------------------------------------------------------------------------------------

    def save_local(self, folder: str | Path) -> None:
        """Copy the documents and their vectors into another folder, replacing its contents."""
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
        """Open a folder that a FaissStore wrote or was saved to.

        Raises:
            StoreError: The folder has no store.
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
        """Make a store in that folder with these texts."""
        if not folder:
            raise ConfigError("A FaissStore needs a folder.", remedy="Give folder=….")
        store = cls(embedding, folder)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def close(self) -> None:
        """Release the files. Safe to call twice."""
        self.store.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _search(self, vector: Any, k: int, filter: Filter | None) -> list[tuple[Document, float]]:
        return [(doc, score) for _, doc, score in self._hits(vector, k, filter)[:k]]

    def _hits(self, vector: Any, k: int, filter: Filter | None) -> list[tuple[int, Document, float]]:
        """Return (chunk id, document, score), best first; equal texts of several ids are several documents."""
        self.store.registry.require_embedder(self._embedder.fingerprint)
        matches = matches_filters(filter) if filter else None

        def documents(hit: Hit) -> Iterable[Document]:
            found = [_document(ref.doc_id, hit.text, ref.metadata) for ref in _refs(hit)]
            return [doc for doc in found if matches is None or matches(doc)]

        where = None if matches is None else lambda hit: bool(documents(hit))
        hits = self.store.index.search(vector, k, where=where)
        return [(hit.chunk_id, doc, hit.score) for hit in hits for doc in documents(hit)]


def _refs(hit: Hit) -> Iterable[DocumentRef]:
    return {ref.doc_id: ref for ref in hit.documents}.values()


def _document(key: str, text: str, metadata: dict[str, Any]) -> Document:
    return Document(id=key, page_content=text, metadata={name[len(_META) :]: value for name, value in metadata.items()})


# -- metadata filters -------------------------------------------------------------------------------------------------


def matches_filters(filter: Filter) -> Callable[[Document], bool]:
    """Return a filter as a function of a document.

    Args:
        filter: A function; or names with a value, a list of values (any of them), or operators such as
            ``{"year": {"$gte": 2020}}``; ``$and`` and ``$or`` take lists of such.

    Raises:
        ConfigError: An operator is unknown.
    """
    if callable(filter):
        return filter
    parts = [_condition(name, value) for name, value in filter.items()]
    return lambda document: all(part(document) for part in parts)


def _condition(name: str, value: Any) -> Callable[[Document], bool]:
    if name in ("$and", "$or"):
        parts = [matches_filters(part) for part in value]
        combine = all if name == "$and" else any
        return lambda document: combine(part(document) for part in parts)
    if name.startswith("$"):
        raise ConfigError(
            f"The filter has the operator {name!r}, which is not known.",
            remedy="Conditions are combined by $and and $or; or give a function of a Document as filter.",
        )
    if not isinstance(value, Mapping):
        wanted = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
        return lambda document: name in document.metadata and document.metadata[name] in wanted
    if unknown := set(value) - set(_OPERATORS):
        raise ConfigError(
            f"The filter on {name!r} has the operator {sorted(unknown)[0]!r}.",
            remedy=f"Use one of {', '.join(_OPERATORS)}, or give a function of a Document as filter.",
        )
    tests = [(_OPERATORS[operator], want) for operator, want in value.items()]
    return lambda document: all(_holds(test, document.metadata.get(name), want) for test, want in tests)


def _holds(test: Callable[[Any, Any], bool], have: Any, want: Any) -> bool:
    try:
        return test(have, want)
    except TypeError:  # a missing value, or one that cannot be compared, does not match
        return False
