"""Any LlamaIndex vector store, with the KV of its nodes."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any, Literal, overload

from llama_index.core import StorageContext
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms.llm import LLM
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)

from lmcache_rag.errors import ConfigError, LMCacheRAGError, PrecomputeError, StoreLockedError
from lmcache_rag.kv_manager import KVTotals

from ..adoption import PAGE, Adoption, AdoptProgress
from ..kv_registry import KVRegistry, as_workspace
from .derived import DerivedTexts
from .faiss_store import FaissVectorStore, group_of, in_thread
from .listing import get_nodes, nodes_of
from .llm import EngineLLM, workspace_of
from .prompts import ingest_prompts, node_text

log = logging.getLogger("lmcache_rag")

_POLL_S = 0.01  # of a waiting event loop
_CHECK_S = 0.25  # of a waiting thread, for a deadlock
_ADOPT_DOCSTORE = "adopt(index.docstore.docs.values())"
_PAGE = 256  # nodes that the wrapped store lists at once
_PATIENCE_S = 60.0  # that a thread waits where there may be a deadlock


@dataclass(frozen=True, slots=True)
class _Holder:
    """The holder of a SyncAsyncLock: a thread, or a task of an event loop."""

    thread: int
    loop: asyncio.AbstractEventLoop | None = None
    task: asyncio.Task[Any] | None = None


class SyncAsyncLock:
    """A lock for `with` and `async with`: changes from threads and event loops take turns.

    A waiting event loop runs its other tasks. A waiting thread gets an error if the holder may need it to continue:

    - at once, if the holder is this thread, or a task of the event loop that runs in this thread;
    - after _PATIENCE_S, if the holder is a task, or an event loop runs in this thread.

    Otherwise it waits without limit. Nothing ever runs without the lock.

    Raises:
        StoreLockedError: The thread may not wait.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: _Holder | None = None  # written by the holder only

    def __enter__(self) -> None:
        holder, since, pause = None, time.monotonic(), 0.0
        while not self._lock.acquire(timeout=pause):
            if holder is not self._holder:  # another holder: count again
                holder, since = self._holder, time.monotonic()
            _refuse_deadlock(holder, time.monotonic() - since)
            pause = _CHECK_S
        self._holder = _Holder(threading.get_ident())

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    async def __aenter__(self) -> None:
        me = _Holder(threading.get_ident(), asyncio.get_running_loop(), asyncio.current_task())
        # Not in a thread: if this task were cancelled meanwhile, the thread would take the lock and never release it.
        while not self._lock.acquire(blocking=False):
            if (holder := self._holder) is not None and _contains(holder, me):
                raise _nested()
            await asyncio.sleep(_POLL_S)
        self._holder = me

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        self._holder = None
        self._lock.release()


def _contains(holder: _Holder, me: _Holder) -> bool:
    """Return whether the holder waits for this call: it is this task, or a sync change further up in this thread."""
    return holder.task is me.task if holder.task is not None else holder.thread == me.thread


def _nested() -> StoreLockedError:
    return StoreLockedError(
        "A change of this vector store was called from inside another change of the same store.",
        remedy="Call the wrapped store (`inner`) there.",
    )


def _refuse_deadlock(holder: _Holder | None, waited: float) -> None:
    """Raise if the holder may be waiting for this thread."""
    if holder is None:
        return
    try:
        loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
    except RuntimeError:
        loop = None
    if holder.loop is None and holder.thread == threading.get_ident():
        raise _nested()
    if loop is not None and holder.loop is loop:
        raise StoreLockedError(
            "An async change of this vector store is under way in this event loop, which this call would block.",
            remedy="Await async_add(), adelete(), adelete_nodes() or aclear() instead.",
        )
    if waited >= _PATIENCE_S and (loop is not None or holder.loop is not None):
        raise StoreLockedError(
            f"Another change has held this vector store for {waited:.0f} s, and may be waiting for this thread.",
            remedy="Repeat the call after it has ended, or await the async methods, which block no thread.",
        )


class LMCacheVectorStore(BasePydanticVectorStore):
    """Wraps a vector store and keeps the KV of its nodes: the nodes in the store have KV, no others.

    KV is computed before a node can be found, and dropped after the node is removed. An addition that fails, because
    the engine is down for example, changes neither side; repeat it. In an IngestionPipeline, the vector store is where
    KV is computed: a transformation would be skipped if the pipeline's cache has its result. With `num_workers`, other
    processes split and embed; the KV is computed in the process that called run(). Changes take turns; one that would
    wait for itself raises StoreLockedError.

    Args:
        inner: The wrapped store; None: our own, FAISS and SQLite in the workspace's folder.
        source: A Workspace, an engine, the URL of a vLLM server, or an LLM object that has one.
        space: Name of this store, where several share a workspace.
        target_metadata_key: Compute the KV of this entry of the nodes' metadata instead of their text, since a
            MetadataReplacementPostProcessor with the same key puts it into prompts ("window").
        adopt: Adopt what the store holds already, in the background; see adopt(). If False, only warn of it.
        store: Folder of the registry, see lmcache_rag.integrations.kv_registry.as_workspace.
        prompts: For which prompts KV is computed, each once: templates, as `text_qa_template`; a BlendSynthesizer; None
            for the workspace's own. Empty: that only.
        kv: When KV of added nodes is computed: "now", "lazy" (after questions that use them) or "none" (by warm());
            None: by the settings, LMCACHE_RAG_KV or the store's settings.toml, else now.
        pin: Whether a server keeps the KV of added texts from being evicted; None: by the settings, LMCACHE_RAG_PIN.

    Raises:
        ConfigError: The source has no engine, a template cannot be blended, or `kv` is none of these.
        EngineUnavailableError: The server cannot be reached.
        EngineError: It serves another model than that of the LLM object.
    """

    stores_text: bool = True
    space: str = ""
    target_metadata_key: str | None = None
    _derived: DerivedTexts = PrivateAttr()
    _inner: BasePydanticVectorStore = PrivateAttr()
    _register: KVRegistry = PrivateAttr()
    _lock: SyncAsyncLock = PrivateAttr(default_factory=SyncAsyncLock)
    _adoption: Adoption | None = PrivateAttr(default=None)

    def __init__(
        self,
        inner: BasePydanticVectorStore | None,
        source: Any,
        *,
        space: str = "",
        target_metadata_key: str | None = None,
        adopt: bool = False,
        store: str | os.PathLike[str] | None = None,
        prompts: Sequence[Any] = (),
        kv: str | None = None,
        pin: bool | None = None,
    ) -> None:
        workspace = workspace_of(source) if store is None else as_workspace(source, store=os.fspath(store))
        llm = source if isinstance(source, LLM) or not prompts else EngineLLM.of(workspace)
        made = [ingest_prompts(one, workspace, llm) for one in prompts]
        register = KVRegistry.of(workspace, space=space, prompts=made, kv=kv, pin=pin)
        inner = FaissVectorStore.of(workspace, space=space) if inner is None else inner
        facts: dict[str, Any] = {"stores_text": inner.stores_text, "is_embedding_query": inner.is_embedding_query}
        super().__init__(**facts, space=space, target_metadata_key=target_metadata_key)  # type: ignore[call-arg]
        self._inner, self._register = inner, register
        self._derived = DerivedTexts(workspace, register, made)
        self._warn_of_shared_space(os.fspath(workspace.store.path))
        if not self._is_registered() and adopt and nodes_of(inner) is not None:
            self.adopt(background=True)

    @classmethod
    def class_name(cls) -> str:
        """Class name."""
        return "LMCacheVectorStore"

    @property
    def inner(self) -> BasePydanticVectorStore:
        """The wrapped store."""
        return self._inner

    @property
    def client(self) -> Any:
        """The client of the wrapped store."""
        return self._inner.client

    @property
    def kv(self) -> KVRegistry:
        """The registry of the nodes' ids and texts."""
        return self._register

    # -- additions ------------------------------------------------------------------------------------------------

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Compute the nodes' KV, then add them, replacing those with the same ids.

        Raises:
            PrecomputeError: KV could not be computed. Nothing was added.
            DocumentError: A node's text is not valid Unicode.
        """
        texts, groups = self._texts(nodes), self._groups(nodes)
        with self._lock:
            before = self._register.entries(texts)
            try:
                self._register.add(texts, groups=groups)
                return self._inner.add(nodes, **kwargs)
            except BaseException:
                self._restore(texts, before)
                raise

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Async version of add."""
        texts, groups = self._texts(nodes), self._groups(nodes)
        async with self._lock:
            before = self._register.entries(texts)
            try:
                await in_thread(self._register.add, texts, groups=groups)
                return await self._inner.async_add(nodes, **kwargs)
            except BaseException:
                await in_thread(self._restore, texts, before)
                raise

    # -- removals -------------------------------------------------------------------------------------------------

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Remove the nodes of a document, then their KV."""
        with self._lock:
            self._inner.delete(ref_doc_id, **delete_kwargs)
            self._forget(self._gone(self._register.ids(ref_doc_id), delete_kwargs))

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Async version of delete."""
        async with self._lock:
            await self._inner.adelete(ref_doc_id, **delete_kwargs)
            await in_thread(self._forget, self._gone(self._register.ids(ref_doc_id), delete_kwargs))

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Remove nodes by id and filters, as the wrapped store supports them, then their KV.

        Raises:
            ConfigError: Neither ids nor filters were given, or the wrapped store cannot list the nodes that match.
        """
        with self._lock:
            before = self._named(node_ids, filters)
            arguments = self._delete_arguments(node_ids, filters, before)
            if arguments != ([], None):
                self._inner.delete_nodes(*arguments, **delete_kwargs)
            self._forget(self._gone(before, delete_kwargs))

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Async version of delete_nodes."""
        async with self._lock:
            before = self._named(node_ids, filters)
            arguments = self._delete_arguments(node_ids, filters, before)
            if arguments != ([], None):
                await self._inner.adelete_nodes(*arguments, **delete_kwargs)
            await in_thread(self._forget, self._gone(before, delete_kwargs))

    def clear(self) -> None:
        """Remove all nodes, then the KV of this space."""
        with self._lock:
            self._inner.clear()
            self._clear()

    async def aclear(self) -> None:
        """Async version of clear."""
        async with self._lock:
            await self._inner.aclear()
            await in_thread(self._clear)

    # -- search ------------------------------------------------------------------------------------------------

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Call the wrapped store."""
        self._warn_of_leftovers()
        return self._inner.query(query, **kwargs)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Call the wrapped store."""
        await in_thread(self._warn_of_leftovers)
        return await self._inner.aquery(query, **kwargs)

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Call the wrapped store."""
        return self._inner.get_nodes(node_ids, filters)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """Call the wrapped store."""
        return await self._inner.aget_nodes(node_ids, filters)

    def persist(self, persist_path: str, fs: Any = None) -> None:
        """Call the wrapped store. Registry and KV are always on disk, in the workspace's folder."""
        self._inner.persist(persist_path, fs)

    # -- KV -------------------------------------------------------------------------------------------------------

    @overload
    def adopt(
        self,
        nodes: Iterable[BaseNode] | None = None,
        *,
        background: Literal[False] = False,
        on_progress: Callable[[AdoptProgress], None] | None = None,
    ) -> KVTotals: ...

    @overload
    def adopt(
        self,
        nodes: Iterable[BaseNode] | None = None,
        *,
        background: Literal[True],
        on_progress: Callable[[AdoptProgress], None] | None = None,
    ) -> Adoption: ...

    def adopt(
        self,
        nodes: Iterable[BaseNode] | None = None,
        *,
        background: bool = False,
        on_progress: Callable[[AdoptProgress], None] | None = None,
    ) -> KVTotals | Adoption:
        """Compute the KV of nodes that were in the wrapped store before it was wrapped.

        What is done already is skipped: call it again after a failure or a restart, and it continues.

        Args:
            nodes: The nodes; None: all of the wrapped store. Those that it does not hold are left out, if it can say
                that, so that a whole docstore can be given: `adopt(index.docstore.docs.values())`.
            background: Return at once, and adopt in a thread, in pauses between questions.
            on_progress: Called after each few nodes, for example `print`.

        Returns:
            What was computed; with `background`, the Adoption, which has progress, wait(), result() and stop().

        Raises:
            ConfigError: The wrapped store cannot list its nodes; give them.
            PrecomputeError: KV could not be computed; call it again to continue.
        """
        listing = nodes_of(self._inner)
        if nodes is None and listing is None:
            why = "cannot list its nodes" if self._inner.stores_text else "holds no texts"
            raise ConfigError(f"{self._inner.class_name()} {why}.", remedy=f"Give the nodes: {_ADOPT_DOCSTORE}.")
        self._adoption = adoption = Adoption(
            lambda: self._register,
            lambda: self._pages(nodes),
            name=self._inner.class_name(),
            count=(listing and nodes is None and listing.count) or (lambda: None),
            held=self._held_of,
            on_progress=on_progress,
        )
        return adoption.start() if background else adoption.run()

    async def aadopt(
        self,
        nodes: Iterable[BaseNode] | None = None,
        *,
        on_progress: Callable[[AdoptProgress], None] | None = None,
    ) -> KVTotals:
        """Async version of adopt. Cancelling it stops the work after the node in flight."""
        return await self.adopt(nodes, background=True, on_progress=on_progress).aresult()

    @property
    def adoption(self) -> Adoption | None:
        """The last adoption, for example the one that began when the store was wrapped."""
        return self._adoption

    def register_nodes(self, nodes: Iterable[BaseNode]) -> KVTotals:
        """Compute the KV of nodes that prompts hold and this store does not: parents, for an AutoMergingRetriever.

        Without this they are registered at their first use, and have KV from the second. They leave with the last node
        of their document.

        Args:
            nodes: For example `(node for node in storage_context.docstore.docs.values() if node.child_nodes)`.

        Raises:
            PrecomputeError: KV could not be computed; call it again to continue.
        """
        return self._derived.add(nodes)

    def warm(self) -> KVTotals:
        """Compute the KV of every registered node for which the engine has none, for example after a restart.

        Nodes that are not registered are left to adopt(); a warning names their number.
        """
        self._is_registered(always_warn=True)
        return self._register.warm() + self._derived.register.warm()

    async def awarm(self) -> KVTotals:
        """Async version of warm."""
        return await in_thread(self.warm)

    def prune(self) -> int:
        """Drop the KV of nodes that the wrapped store no longer holds; returns how many.

        Needed after the wrapped store was changed directly: loaded from an older file, or started empty.
        """
        with self._lock:
            removed = self._register.remove(self._register.ids() - self._held(None, None))
            self._derived.remove_orphans()
            return removed

    # -- inside ---------------------------------------------------------------------------------------------------

    def _texts(self, nodes: Sequence[BaseNode]) -> dict[str, str]:
        """Return the text of each node as it comes into prompts."""
        key, texts = self.target_metadata_key, {}
        for node in nodes:
            if key is not None and node.metadata.get(key) is not None:
                node = node.model_copy()
                node.set_content(node.metadata[key])
            texts[node.node_id] = node_text(node)
        return texts

    def _groups(self, nodes: Sequence[BaseNode]) -> dict[str, str]:
        """Return the document of each node. LlamaIndex's stores write "None" for a node without one."""
        if isinstance(self._inner, FaissVectorStore):
            return {node.node_id: group_of(node) for node in nodes}
        return {node.node_id: node.ref_doc_id or "None" for node in nodes}

    def _forget(self, node_ids: set[str]) -> None:
        """Drop the KV of nodes, and of parents and windows whose document has no node any more."""
        groups = self._derived.groups(node_ids)
        self._register.remove(node_ids)
        self._derived.register.remove(node_ids)  # their windows
        self._derived.remove_orphans(groups)

    def _clear(self) -> None:
        self._register.clear()
        self._derived.register.clear()

    def _restore(self, texts: dict[str, str], before: dict[str, tuple[str, str]]) -> None:
        """Undo a failed addition: register the earlier texts again, and remove the others."""
        try:
            try:
                if before:  # first, before their KV is dropped
                    old = {key: text for key, (text, _) in before.items()}
                    self._register.add(old, groups={key: group for key, (_, group) in before.items()})
            finally:
                self._register.remove(texts.keys() - before.keys())
        except PrecomputeError:
            log.debug("the old texts are registered again; warm() computes their KV where it is missing")
        except LMCacheRAGError as problem:
            log.warning("The addition failed, and so did undoing it: %s Add the nodes again.", problem)

    def _held(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> set[str]:
        """Return the ids of the wrapped store's nodes, or of those that match, if it can list them."""
        if isinstance(self._inner, SimpleVectorStore):  # it can delete by filters, but not list
            return set(self._inner.data.embedding_dict)
        if node_ids is not None or (filters is not None and filters.filters):
            return {node.node_id for node in get_nodes(self._inner, node_ids, filters)}
        if isinstance(self._inner, FaissVectorStore):
            return self._inner.ids()
        listing = nodes_of(self._inner)
        pages = [get_nodes(self._inner)] if listing is None else listing.pages(_PAGE)
        return {node.node_id for page in pages for node in page}

    def _held_of(self, node_ids: set[str]) -> set[str] | None:
        """Return those of the ids that the wrapped store holds, or None if it cannot say."""
        try:
            return (self._held(sorted(node_ids), None) & node_ids) if node_ids else node_ids
        except ConfigError:
            return None

    def _pages(self, nodes: Iterable[BaseNode] | None) -> Iterator[dict[str, tuple[str, str]]]:
        """Return nodes as (text, group) by id, in pages."""
        listing = nodes_of(self._inner)
        if nodes is None:
            assert listing is not None  # noqa: S101 - adopt() has asked
            pages: Iterator[list[BaseNode]] = listing.pages(PAGE)
        else:
            rest = iter(nodes)
            pages = iter(lambda: list(islice(rest, PAGE)), [])
        for page in pages:
            if nodes is not None and (held := self._held_of({node.node_id for node in page})) is not None:
                page = [node for node in page if node.node_id in held]
            groups = self._groups(page)
            yield {key: (text, groups[key]) for key, text in self._texts(page).items()}

    def _warn_of_shared_space(self, folder: str) -> None:
        """Warn if another vector store, which is still in use, has the same name in this workspace."""
        other = _spaces.get((folder, self.space))
        if other is not None and not _is_same(other.inner, self._inner):
            log.warning(
                "Two vector stores have the name %r in one workspace: clear() and prune() of one drop the KV of the "
                "other's nodes. Give each its own: LMCacheVectorStore(..., space=...).",
                self.space,
            )
        _spaces[folder, self.space] = self

    def _warn_of_leftovers(self) -> None:
        """Warn once, at the first search, of nodes that are registered, and that a store in memory does not hold."""
        if isinstance(self._inner, SimpleVectorStore) and not (self._adoption and self._adoption.running):
            held = list(self._inner.data.embedding_dict)
            name, remedy = self._inner.class_name(), "prune() of this vector store"
            self._register.warn_of_leftovers(held, name=name, remedy=remedy)

    def _is_registered(self, *, always_warn: bool = False) -> bool:
        """Return whether all nodes of the wrapped store are registered; warn if not.

        Args:
            always_warn: Warn of a store whose nodes cannot be counted although some of its nodes are registered.
        """
        name, known, listing = self._inner.class_name(), len(self._register.ids()), nodes_of(self._inner)
        count: int | None = None
        try:
            if isinstance(self._inner, SimpleVectorStore):
                count = len(self._inner.data.embedding_dict)
            elif listing is not None and listing.count is not None:
                count = listing.count()
        except Exception as problem:  # the store's own: it reports it at its first use
            log.warning("What %s holds could not be listed: %s. Call adopt() later.", name, problem)
            return False
        if count is not None and count <= known:
            return True
        if count is None and known and not always_warn:  # adopt() was called, or nodes were added
            return False
        how = "adopt()" if listing is not None else _ADOPT_DOCSTORE
        log.warning(
            "%s, and %d are registered. %s registers nodes that were in the store before it was wrapped, and computes "
            "their KV; until then questions compute them.",
            f"{name} holds {count} nodes" if count is not None else f"It is not known how many nodes {name} holds",
            known,
            how,
        )
        return False

    def _named(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> set[str]:
        """Return the nodes that delete_nodes() names; of a SimpleVectorStore with filters, all that it may delete."""
        if filters is None or not filters.filters:
            if node_ids is None:
                raise ConfigError(
                    "delete_nodes() names no nodes, so nothing was deleted.",
                    remedy="Give node_ids or filters; clear() removes all nodes.",
                )
            return set(node_ids)
        found = self._held(None, filters)  # without ids: some stores take one of the two, or find what matches either
        return found if node_ids is None else found & set(node_ids)

    def _delete_arguments(
        self, node_ids: list[str] | None, filters: MetadataFilters | None, found: set[str]
    ) -> tuple[list[str] | None, MetadataFilters | None]:
        """Return the arguments of the wrapped store's delete_nodes: ids where it could list them.

        Some stores can find by filters, but not delete by filters alone (Chroma's).
        """
        if filters is None or not filters.filters:
            return node_ids, None
        if isinstance(self._inner, SimpleVectorStore):
            return node_ids, filters
        return sorted(found), None

    def _gone(self, named: set[str], options: Mapping[str, Any]) -> set[str]:
        """Return those of the nodes that the wrapped store no longer holds after a deletion.

        Options of its own can spare nodes: Milvus's partition, Qdrant's shard.
        """
        if isinstance(self._inner, SimpleVectorStore):
            return named - set(self._inner.data.embedding_dict)
        if not options or not named:
            return named
        try:
            return named - self._held(sorted(named), None)
        except ConfigError:  # it cannot list
            return named

    def __getstate__(self) -> dict[Any, Any]:
        raise ConfigError(
            "An LMCacheVectorStore stays in its process: it holds the engine and the store.",
            remedy="Create one in each process. An IngestionPipeline with num_workers does not need this: its workers "
            "only split and embed.",
        )


# By (registry's folder, space): the vector store that has it, as long as it is in use.
_spaces: weakref.WeakValueDictionary[tuple[str, str], LMCacheVectorStore] = weakref.WeakValueDictionary()


def _is_same(one: BasePydanticVectorStore, other: BasePydanticVectorStore) -> bool:
    """Return whether two objects are one store: the same object, or one of the same folder or collection."""
    if one is other:
        return True
    names = ("folder", "collection_name", "table_name")
    return type(one) is type(other) and any(
        getattr(one, name, None) and getattr(one, name) == getattr(other, name, None) for name in names
    )


def blend_storage_context(
    llm: Any, *, persist_dir: str | None = None, adopt: bool = False, **options: Any
) -> StorageContext:
    """Return a StorageContext like LlamaIndex's default one, whose vector store keeps KV.

    Args:
        llm: As `source` of LMCacheVectorStore.
        persist_dir: Folder that an index was persisted to; None: begin empty.
        adopt: Compute the KV of the nodes in the folder in the background, if it was persisted without this library.
        options: Of LMCacheVectorStore.
    """
    inner = SimpleVectorStore() if persist_dir is None else SimpleVectorStore.from_persist_dir(persist_dir)
    vector_store = LMCacheVectorStore(inner, llm, **options)
    context = StorageContext.from_defaults(vector_store=vector_store, persist_dir=persist_dir)
    if adopt:
        vector_store.adopt(list(context.docstore.docs.values()), background=True)
    return context
