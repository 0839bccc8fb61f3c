"""Our FAISS index and SQLite database as a LlamaIndex vector store of its own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.indices.query.embedding_utils import get_top_k_embeddings_learner, get_top_k_mmr_embeddings
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

from lmcache_rag.errors import ConfigError
from lmcache_rag.store import DocumentRef, Hit, NewChunk, NewDocument, Store

from .filters import fulfils
from .in_turn import in_thread

if TYPE_CHECKING:
    from lmcache_rag.workspace import Workspace

_MODES = (
    VectorStoreQueryMode.DEFAULT,
    VectorStoreQueryMode.MMR,
    VectorStoreQueryMode.SVM,
    VectorStoreQueryMode.LOGISTIC_REGRESSION,
)
_EMBEDDER = "llama-index"  # the vectors come with the nodes; which model made them is the index's affair
_MMR_PREFETCH = 4  # times as many candidates as wanted, as LlamaIndex's other stores have it


def group_of(node: BaseNode) -> str:
    """The document that a node is a part of; a node that has none stands for itself."""
    return str(node.ref_doc_id or node.node_id)


class FaissVectorStore(BasePydanticVectorStore):
    """Keeps nodes and their vectors in a folder, and finds them by cosine similarity. Everything is kept at once.

    Each node is a document of the store; what FAISS holds is its vector, so nodes with equal vectors share one.

    Args:
        folder: The folder; made if it is missing.
    """

    stores_text: bool = True
    folder: str
    _store: Store = PrivateAttr()

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder=os.fspath(folder))  # type: ignore[call-arg]
        self._store = Store.open(folder)

    @classmethod
    def of(cls, workspace: Workspace, *, space: str = "") -> FaissVectorStore:
        """The one of a workspace, inside its store's folder. `space` tells several apart."""
        return cls(Path(workspace.store.path) / "llama-index" / (quote(space, safe="") or "default"))

    @classmethod
    def class_name(cls) -> str:
        """Class name."""
        return "LMCacheFaissVectorStore"

    @property
    def client(self) -> Store:
        """The store behind it."""
        return self._store

    # -- changes ------------------------------------------------------------------------------------------------

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Keep nodes, each in place of what stood under its id.

        Raises:
            ValueError: A node has no embedding.
            StoreError: An embedding has another length than the others, or the store cannot be written.
        """
        documents = [_document(node) for node in nodes]
        with self._store.writing():
            self._store.registry.put_documents(documents, embedder=_EMBEDDER)
        return [node.node_id for node in nodes]

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Async twin of add, in a thread."""
        return await in_thread(self.add, nodes)

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Remove the nodes of a document."""
        self._remove(self._store.registry.doc_ids(source=ref_doc_id))

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Async twin of delete, in a thread."""
        await in_thread(self.delete, ref_doc_id)

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Remove nodes by id, by filter, or those that fulfil both; without either, nothing."""
        if node_ids is not None or filters is not None:
            self._remove([node.node_id for node in self.get_nodes(node_ids, filters)])

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Async twin of delete_nodes, in a thread."""
        await in_thread(self.delete_nodes, node_ids, filters)

    def clear(self) -> None:
        """Remove all nodes."""
        self._remove(self._store.registry.doc_ids())

    async def aclear(self) -> None:
        """Async twin of clear, in a thread."""
        await in_thread(self.clear)

    def persist(self, persist_path: str, fs: Any = None) -> None:
        """Everything is kept already, in `folder`; this saves the index, which makes the next start faster."""
        with self._store.writing():
            pass

    def close(self) -> None:
        """Release the files. Safe to call twice."""
        self._store.close()

    # -- questions ----------------------------------------------------------------------------------------------

    def ids(self) -> set[str]:
        """The ids of all nodes."""
        return set(self._store.registry.doc_ids())

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Nodes by id (in the order given, unknown ids left out), by filter, or by both; without either, all."""
        records = self._store.registry.documents(node_ids)
        return [_node(record.metadata) for record in records if fulfils(record.metadata, filters)]

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """Async twin of get_nodes, in a thread."""
        return await in_thread(self.get_nodes, node_ids, filters)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The nodes nearest to an embedding, best first.

        Args:
            query: Modes: default, mmr (with mmr_threshold), svm, logistic_regression.
            kwargs: mmr_threshold, mmr_prefetch_factor.

        Raises:
            ConfigError: Another mode, or no embedding.
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
        nodes = [_node(place.metadata) for _, place, _ in found]
        return VectorStoreQueryResult(
            nodes=nodes, similarities=[score for _, _, score in found], ids=[node.node_id for node in nodes]
        )

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Async twin of query, in a thread."""
        return await in_thread(self.query, query, **kwargs)

    # -- inside -------------------------------------------------------------------------------------------------

    def _remove(self, ids: Iterable[str]) -> None:
        with self._store.writing():
            self._store.registry.remove_documents(ids)

    def _nearest(
        self, vector: Sequence[float], k: int, allowed: Callable[[DocumentRef], bool] | None
    ) -> list[tuple[int, DocumentRef, float]]:
        """(vector's id, node, score) of the k best nodes."""

        def where(hit: Hit) -> bool:
            return allowed is None or any(map(allowed, hit.documents))

        hits = self._store.index.search(vector, k, where=None if allowed is None else where)
        places = [(hit.chunk_id, place, hit.score) for hit in hits for place in hit.documents]
        return [(key, place, score) for key, place, score in places if allowed is None or allowed(place)][:k]

    def _ranked(
        self,
        found: list[tuple[int, DocumentRef, float]],
        rank: Callable[..., tuple[list[float], list[Any]]],
        query: VectorStoreQuery,
        **options: Any,
    ) -> list[tuple[int, DocumentRef, float]]:
        """Let one of LlamaIndex's own functions choose among the nodes found."""
        if not found:
            return []
        vectors = self._store.index.vectors([key for key, _, _ in found])
        scores, places = rank(
            query.query_embedding,
            [row.tolist() for row in vectors],
            similarity_top_k=query.similarity_top_k,
            embedding_ids=list(range(len(found))),
            **options,
        )
        return [(found[at][0], found[at][1], float(score)) for score, at in zip(scores, places, strict=True)]


def _allowed(query: VectorStoreQuery) -> Callable[[DocumentRef], bool] | None:
    """Whether a node may be found. Empty lists of ids mean that nothing is asked of the ids."""
    nodes, documents, filters = set(query.node_ids or ()), set(query.doc_ids or ()), query.filters
    if not nodes and not documents and (filters is None or not filters.filters):
        return None
    return lambda place: (
        (not nodes or place.doc_id in nodes)
        and (not documents or place.source in documents)
        and fulfils(place.metadata, filters)
    )


def _document(node: BaseNode) -> NewDocument:
    vector = np.asarray(node.get_embedding(), dtype=np.float32)
    name = hashlib.sha256(vector.tobytes()).hexdigest()  # the text of the "chunk": the node's own is in its metadata
    metadata = node_to_metadata_dict(node, flat_metadata=False)
    chunk = NewChunk(name, 0, 0, vector)
    return NewDocument(node.node_id, node.hash, "", group_of(node), [chunk], metadata)


def _node(metadata: dict[str, Any]) -> BaseNode:
    return metadata_dict_to_node(metadata)
