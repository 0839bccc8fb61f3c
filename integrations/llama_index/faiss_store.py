"""A LlamaIndex vector store over this library's own FAISS index and database, with metadata filters."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import numpy as np
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.indices.query.embedding_utils import get_top_k_embeddings_learner, get_top_k_mmr_embeddings
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    FilterCondition,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from llama_index.core.vector_stores.utils import build_metadata_filter_fn, metadata_dict_to_node, node_to_metadata_dict

from lmcache_rag.embedding import Embedder
from lmcache_rag.errors import ConfigError
from lmcache_rag.store import DocumentRef, Hit, NewChunk, NewDocument, Store

if TYPE_CHECKING:
    from lmcache_rag.workspace import Workspace

T = TypeVar("T")

_MODES = (
    VectorStoreQueryMode.DEFAULT,
    VectorStoreQueryMode.MMR,
    VectorStoreQueryMode.SVM,
    VectorStoreQueryMode.LOGISTIC_REGRESSION,
)
_EMBEDDER = "llama-index"  # the vectors come with the nodes; the index knows the model
_MMR_PREFETCH = 4  # times as many candidates as wanted, as in LlamaIndex's other stores
# Not asyncio's own threads: all may be waiting for the lock, in a user's asyncio.to_thread(store.add, ...).
_threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="lmcache-rag")


def group_of(node: BaseNode) -> str:
    """Return the id of the node's document, or the node's own id if it has none."""
    return str(node.ref_doc_id or node.node_id)


class EmbedderEmbedding(BaseEmbedding):
    """This library's embedder as LlamaIndex's embed model, for programs without embeddings.

    Args:
        embedder: A workspace's embedder.
        options: LlamaIndex's own, for example embed_batch_size.
    """

    _embedder: Embedder = PrivateAttr()

    def __init__(self, embedder: Embedder, **options: Any) -> None:
        super().__init__(**{"model_name": embedder.name, **options})
        self._embedder = embedder

    @classmethod
    def class_name(cls) -> str:
        """Class name."""
        return "LMCacheEmbedderEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return [float(x) for x in self._embedder.embed_query(query)]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return [[float(x) for x in row] for row in self._embedder.embed_documents(texts)]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


class FaissVectorStore(BasePydanticVectorStore):
    """Keeps nodes and their vectors in a folder, and finds them by cosine similarity. Changes are on disk at once.

    Each node is a document of the store. FAISS holds its vector; nodes with equal vectors share one.

    Args:
        folder: The folder, created if it is missing.
    """

    stores_text: bool = True
    folder: str
    _store: Store = PrivateAttr()

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder=os.fspath(folder))  # type: ignore[call-arg]
        self._store = Store.open(folder)

    @classmethod
    def of(cls, workspace: Workspace, *, space: str = "") -> FaissVectorStore:
        """Open the vector store of a workspace, inside its store's folder. `space` distinguishes several."""
        return cls(Path(workspace.store.path) / "llama-index" / (quote(space, safe="") or "default"))

    @classmethod
    def class_name(cls) -> str:
        """Class name."""
        return "LMCacheFaissVectorStore"

    @property
    def client(self) -> Store:
        """The underlying store."""
        return self._store

    # -- changes --------------------------------------------------------------------------------------------------

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Add nodes, replacing those with the same ids.

        Raises:
            ValueError: A node has no embedding.
            StoreError: An embedding has another length than the others, or the store cannot be written.
        """
        documents = [_document(node) for node in nodes]
        with self._store.writing():
            self._store.registry.put_documents(documents, embedder=_EMBEDDER)
        return [node.node_id for node in nodes]

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Async version of add, in a thread."""
        return await in_thread(self.add, nodes)

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Remove the nodes of a document."""
        self._remove(self._store.registry.doc_ids(source=ref_doc_id))

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Async version of delete, in a thread."""
        await in_thread(self.delete, ref_doc_id)

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Remove nodes by id, by filter, or by both; without either, nothing."""
        if node_ids is not None or filters is not None:
            self._remove([node.node_id for node in self.get_nodes(node_ids, filters)])

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Async version of delete_nodes, in a thread."""
        await in_thread(self.delete_nodes, node_ids, filters)

    def clear(self) -> None:
        """Remove all nodes."""
        self._remove(self._store.registry.doc_ids())

    async def aclear(self) -> None:
        """Async version of clear, in a thread."""
        await in_thread(self.clear)

    def persist(self, persist_path: str, fs: Any = None) -> None:
        """Save the index, which makes the next start faster; the nodes are on disk in `folder` already."""
        with self._store.writing():
            pass

    def close(self) -> None:
        """Release the files. Safe to call twice."""
        self._store.close()

    # -- search ---------------------------------------------------------------------------------------------------

    def ids(self) -> set[str]:
        """Return the ids of all nodes."""
        return set(self._store.registry.doc_ids())

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Return nodes by id (in this order, unknown ids left out), by filter, or by both; without either, all."""
        records = self._store.registry.documents(node_ids)
        return [_node(record.metadata) for record in records if matches_filters(record.metadata, filters)]

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """Async version of get_nodes, in a thread."""
        return await in_thread(self.get_nodes, node_ids, filters)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Return the nodes nearest to an embedding, best first.

        Args:
            query: Modes: default, mmr (with mmr_threshold), svm, logistic_regression.
            kwargs: mmr_threshold, mmr_prefetch_factor.

        Raises:
            ConfigError: The mode is none of these, or the query has no embedding.
        """
        if query.mode not in _MODES:
            raise ConfigError(
                f"This vector store has no mode {query.mode.value!r}.",
                remedy=f"Use one of {', '.join(mode.value for mode in _MODES)}, or wrap a store that has it.",
            )
        if query.query_embedding is None:
            raise ConfigError("The query has no embedding.", remedy="Give the index an embed_model.")
        k, allowed = query.similarity_top_k, _allowed(query)
        if query.mode == VectorStoreQueryMode.DEFAULT:
            found = self._nearest(query.query_embedding, k, allowed)
        elif query.mode == VectorStoreQueryMode.MMR:
            threshold = kwargs.get("mmr_threshold", query.mmr_threshold)
            many = self._nearest(query.query_embedding, k * kwargs.get("mmr_prefetch_factor", _MMR_PREFETCH), allowed)
            found = self._ranked(many, get_top_k_mmr_embeddings, query, mmr_threshold=threshold)
        else:
            every = self._nearest(query.query_embedding, max(1, len(self.ids())), allowed)
            found = self._ranked(every, get_top_k_embeddings_learner, query, query_mode=query.mode)
        nodes = [_node(ref.metadata) for _, ref, _ in found]
        return VectorStoreQueryResult(
            nodes=nodes, similarities=[score for _, _, score in found], ids=[node.node_id for node in nodes]
        )

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Async version of query, in a thread."""
        return await in_thread(self.query, query, **kwargs)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _remove(self, ids: Iterable[str]) -> None:
        with self._store.writing():
            self._store.registry.remove_documents(ids)

    def _nearest(
        self, vector: Sequence[float], k: int, allowed: Callable[[DocumentRef], bool] | None
    ) -> list[tuple[int, DocumentRef, float]]:
        """Return (vector id, node, score) of the k best nodes."""

        def where(hit: Hit) -> bool:
            return allowed is None or any(map(allowed, hit.documents))

        hits = self._store.index.search(vector, k, where=None if allowed is None else where)
        refs = [(hit.chunk_id, ref, hit.score) for hit in hits for ref in hit.documents]
        return [(key, ref, score) for key, ref, score in refs if allowed is None or allowed(ref)][:k]

    def _ranked(
        self,
        found: list[tuple[int, DocumentRef, float]],
        rank: Callable[..., tuple[list[float], list[Any]]],
        query: VectorStoreQuery,
        **options: Any,
    ) -> list[tuple[int, DocumentRef, float]]:
        """Rank the nodes found by one of LlamaIndex's own functions."""
        if not found:
            return []
        vectors = self._store.index.vectors([key for key, _, _ in found])
        scores, indices = rank(
            query.query_embedding,
            [row.tolist() for row in vectors],
            similarity_top_k=query.similarity_top_k,
            embedding_ids=list(range(len(found))),
            **options,
        )
        return [(found[i][0], found[i][1], float(score)) for score, i in zip(scores, indices, strict=True)]


def _allowed(query: VectorStoreQuery) -> Callable[[DocumentRef], bool] | None:
    """Return a function that decides whether a node may be found; None: all may. Empty lists of ids allow all ids."""
    nodes, documents, filters = set(query.node_ids or ()), set(query.doc_ids or ()), query.filters
    if not nodes and not documents and (filters is None or not filters.filters):
        return None
    return lambda ref: (
        (not nodes or ref.doc_id in nodes)
        and (not documents or ref.source in documents)
        and matches_filters(ref.metadata, filters)
    )


def _document(node: BaseNode) -> NewDocument:
    vector = np.asarray(node.get_embedding(), dtype=np.float32)
    name = hashlib.sha256(vector.tobytes()).hexdigest()  # the text of the "chunk"; the node's text is in its metadata
    metadata = node_to_metadata_dict(node, flat_metadata=False)
    chunk = NewChunk(name, 0, 0, vector)
    return NewDocument(node.node_id, node.hash, "", group_of(node), [chunk], metadata)


def _node(metadata: dict[str, Any]) -> BaseNode:
    return metadata_dict_to_node(metadata)


# -- metadata filters -------------------------------------------------------------------------------------------------


def matches_filters(metadata: Mapping[str, Any], filters: MetadataFilters | None) -> bool:
    """Return whether a node's metadata matches filters, nested ones too; without filters, True.

    A single filter means the same as in LlamaIndex's in-memory store. A value that cannot be compared does not match.
    """
    if filters is None or not filters.filters:
        return True
    matches = (_matches(metadata, part) for part in filters.filters)
    if filters.condition == FilterCondition.OR:
        return any(matches)
    if filters.condition == FilterCondition.NOT:
        return not any(matches)
    return all(matches)


def _matches(metadata: Mapping[str, Any], part: MetadataFilter | MetadataFilters) -> bool:
    if isinstance(part, MetadataFilters):
        return matches_filters(metadata, part)
    try:
        return build_metadata_filter_fn(lambda _: metadata, MetadataFilters(filters=[part]))("")
    except TypeError:  # a text and a number, for example
        return False


# -- threads ----------------------------------------------------------------------------------------------------------


async def in_thread(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run a function in a thread. A cancelled task first waits for the thread, which cannot be stopped."""
    call = partial(contextvars.copy_context().run, function, *args, **kwargs)
    future = asyncio.get_running_loop().run_in_executor(_threads, call)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # retrieved, so that asyncio does not log it; the cancellation is raised
        raise
