"""Any LlamaIndex vector store, with the KV of what stands in it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)

from lmcache_rag.errors import ConfigError, LMCacheRAGError, PrecomputeError
from lmcache_rag.kv import KVTotals

from ..kv_registry import KVRegister
from ..resolve import as_workspace
from .faiss_store import FaissVectorStore, group_of
from .in_turn import InTurn, in_thread
from .llm import workspace_of
from .node_text import node_text

log = logging.getLogger("lmcache_rag")


class LMCacheVectorStore(BasePydanticVectorStore):
    """Does what the store inside does, and keeps the KV of its nodes: what is in the store has KV, nothing else.

    KV is computed before a node can be found, and dropped after it is gone. An addition that fails (because the engine
    is down, say) leaves both sides as they were; do it again. In an IngestionPipeline it is the part that decides about
    KV: a transformation would be skipped where the pipeline's cache has its result. With `num_workers`, other processes
    split and embed; the KV is computed in the process that called run().

    Args:
        inner: The store; None: our own, FAISS and SQLite in the workspace's folder.
        source: A Workspace, an engine, the URL of a vLLM server, or the LLM object that names one.
        space: Name of this store, where several share a workspace.
        store: Folder of the registry, see lmcache_rag.integrations.resolve.as_workspace.

    Raises:
        ConfigError: The source names no engine.
        EngineUnavailableError: The server cannot be reached.
        EngineError: It serves another model than the LLM object says.
    """

    stores_text: bool = True
    space: str = ""
    _inner: BasePydanticVectorStore = PrivateAttr()
    _register: KVRegister = PrivateAttr()
    _in_turn: InTurn = PrivateAttr(default_factory=InTurn)

    def __init__(
        self,
        inner: BasePydanticVectorStore | None,
        source: Any,
        *,
        space: str = "",
        store: str | os.PathLike[str] | None = None,
    ) -> None:
        workspace = workspace_of(source) if store is None else as_workspace(source, store=os.fspath(store))
        register = KVRegister.of(workspace, space=space)
        inner = FaissVectorStore.of(workspace, space=space) if inner is None else inner
        facts: dict[str, Any] = {"stores_text": inner.stores_text, "is_embedding_query": inner.is_embedding_query}
        super().__init__(**facts, space=space)  # type: ignore[call-arg]
        self._inner, self._register = inner, register

    @classmethod
    def class_name(cls) -> str:
        """Class name."""
        return "LMCacheVectorStore"

    @property
    def inner(self) -> BasePydanticVectorStore:
        """The store inside."""
        return self._inner

    @property
    def client(self) -> Any:
        """The client of the store inside."""
        return self._inner.client

    @property
    def kv(self) -> KVRegister:
        """What is known of the KV: which ids, which texts."""
        return self._register

    # -- additions ----------------------------------------------------------------------------------------------

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Compute the nodes' KV, then add them, each in place of what stood under its id.

        Raises:
            PrecomputeError: KV could not be computed. Nothing was added.
            DocumentError: A node's text is not valid Unicode.
        """
        texts, groups = _texts(nodes), self._groups(nodes)
        with self._in_turn:
            before = self._register.entries(texts)
            try:
                self._register.add(texts, groups=groups)
                return self._inner.add(nodes, **kwargs)
            except BaseException:
                self._restore(texts, before)
                raise

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Async twin of add."""
        texts, groups = _texts(nodes), self._groups(nodes)
        async with self._in_turn:
            before = self._register.entries(texts)
            try:
                await in_thread(self._register.add, texts, groups=groups)
                return await self._inner.async_add(nodes, **kwargs)
            except BaseException:
                await in_thread(self._restore, texts, before)
                raise

    # -- removals -----------------------------------------------------------------------------------------------

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Remove the nodes of a document, then their KV."""
        with self._in_turn:
            self._inner.delete(ref_doc_id, **delete_kwargs)
            self._register.remove(self._register.ids(ref_doc_id))

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Async twin of delete."""
        async with self._in_turn:
            await self._inner.adelete(ref_doc_id, **delete_kwargs)
            await in_thread(self._register.remove, self._register.ids(ref_doc_id))

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Remove nodes by id and filters, as the store inside understands them, then their KV.

        Raises:
            ConfigError: Filters were given, and the store inside cannot tell which nodes fulfil them.
        """
        gone = node_ids if filters is None else None
        with self._in_turn:
            before = self._held(node_ids, filters) if gone is None else set()
            asked = self._asked(node_ids, filters, before)
            if asked != ([], None):
                self._inner.delete_nodes(*asked, **delete_kwargs)
            self._register.remove(self._gone(before) if gone is None else gone)

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Async twin of delete_nodes."""
        gone = node_ids if filters is None else None
        async with self._in_turn:
            before = self._held(node_ids, filters) if gone is None else set()
            asked = self._asked(node_ids, filters, before)
            if asked != ([], None):
                await self._inner.adelete_nodes(*asked, **delete_kwargs)
            await in_thread(self._register.remove, self._gone(before) if gone is None else gone)

    def clear(self) -> None:
        """Remove all nodes, then the KV of this space."""
        with self._in_turn:
            self._inner.clear()
            self._register.clear()

    async def aclear(self) -> None:
        """Async twin of clear."""
        async with self._in_turn:
            await self._inner.aclear()
            await in_thread(self._register.remove, self._register.ids())

    # -- questions ----------------------------------------------------------------------------------------------

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """As the store inside."""
        return self._inner.query(query, **kwargs)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """As the store inside."""
        return await self._inner.aquery(query, **kwargs)

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """As the store inside."""
        return self._inner.get_nodes(node_ids, filters)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """As the store inside."""
        return await self._inner.aget_nodes(node_ids, filters)

    def persist(self, persist_path: str, fs: Any = None) -> None:
        """As the store inside. The registry and the KV are always on disk already, in the workspace's folder."""
        self._inner.persist(persist_path, fs)

    # -- KV -----------------------------------------------------------------------------------------------------

    def adopt(self, nodes: Iterable[BaseNode] | None = None) -> KVTotals:
        """Compute the KV of nodes that were in the store inside before it was wrapped.

        Args:
            nodes: The nodes; None: all that the store inside holds. Those that it does not hold are left out, so that
                a whole docstore will do: `adopt(index.docstore.docs.values())`.

        Raises:
            ConfigError: The store inside cannot tell its nodes; give them.
            PrecomputeError: KV could not be computed; call it again to go on.
        """
        if nodes is None and not self._inner.stores_text:
            raise ConfigError(
                f"{self._inner.class_name()} holds no texts.", remedy="Write adopt(index.docstore.docs.values())."
            )
        with self._in_turn:
            held = self._held(None, None)
            given = self._inner.get_nodes() if nodes is None else nodes
            found = [node for node in given if node.node_id in held]
            return self._register.add(_texts(found), groups=self._groups(found))

    def warm(self) -> KVTotals:
        """Compute the KV of every node for which the engine has none, for example after its cache was emptied."""
        return self._register.warm()

    async def awarm(self) -> KVTotals:
        """Async twin of warm."""
        return await in_thread(self._register.warm)

    def prune(self) -> int:
        """Drop the KV of nodes that the store inside does not hold any more; returns how many.

        Needed after the store inside was changed behind our back: loaded from an older file, or started empty.
        """
        with self._in_turn:
            return self._register.remove(self._register.ids() - self._held(None, None))

    # -- inside -------------------------------------------------------------------------------------------------

    def _groups(self, nodes: Sequence[BaseNode]) -> dict[str, str]:
        """The document of each node. "None" is what LlamaIndex's stores write where a node has none."""
        if isinstance(self._inner, FaissVectorStore):
            return {node.node_id: group_of(node) for node in nodes}
        return {node.node_id: node.ref_doc_id or "None" for node in nodes}

    def _restore(self, texts: dict[str, str], before: dict[str, tuple[str, str]]) -> None:
        """After a failed addition: what was registered before, and nothing else of this addition."""
        try:
            try:
                if before:  # first, while their KV is not dropped yet
                    old = {key: text for key, (text, _) in before.items()}
                    self._register.add(old, groups={key: group for key, (_, group) in before.items()})
            finally:
                self._register.remove(texts.keys() - before.keys())
        except PrecomputeError:
            log.debug("the old texts are registered again; their KV, where it is gone, comes with warm()")
        except LMCacheRAGError as problem:
            log.warning("The addition failed, and so did taking it back: %s Add the nodes again.", problem)

    def _held(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> set[str]:
        """Ids of nodes inside, or of those that fulfil the conditions where the store inside can tell."""
        if isinstance(self._inner, FaissVectorStore) and filters is None and node_ids is None:
            return self._inner.ids()
        if isinstance(self._inner, SimpleVectorStore):  # it can delete by filters, but not tell
            return set(self._inner.data.embedding_dict)
        try:
            return {node.node_id for node in self._inner.get_nodes(node_ids, filters)}
        except NotImplementedError as problem:
            raise ConfigError(
                f"{self._inner.class_name()} cannot tell which nodes it holds.", remedy="Name the nodes by their ids."
            ) from problem

    def _asked(
        self, node_ids: list[str] | None, filters: MetadataFilters | None, found: set[str]
    ) -> tuple[list[str] | None, MetadataFilters | None]:
        """What the store inside is asked to delete: by id where it told which nodes are meant.

        Some stores that can find by filters cannot delete by them alone (Chroma's).
        """
        if filters is None or isinstance(self._inner, SimpleVectorStore):
            return node_ids, filters
        return sorted(found), None

    def _gone(self, before: set[str]) -> set[str]:
        """Those of the nodes that the store inside does not hold any more."""
        if isinstance(self._inner, SimpleVectorStore):
            return before - set(self._inner.data.embedding_dict)
        return before

    def __getstate__(self) -> dict[Any, Any]:
        raise ConfigError(
            "An LMCacheVectorStore stays in its process: it holds the engine and the store.",
            remedy="Make one in each process. An IngestionPipeline with num_workers does not need this: its workers "
            "only split and embed.",
        )


def _texts(nodes: Sequence[BaseNode]) -> dict[str, str]:
    return {node.node_id: node_text(node) for node in nodes}
