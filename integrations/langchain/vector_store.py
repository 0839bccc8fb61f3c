"""Any vector store, with the KV of its documents computed when they come and dropped when they go."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

from lmcache_rag.embedding import SentenceTransformerEmbedder
from lmcache_rag.errors import ConfigError, LMCacheRAGError
from lmcache_rag.kv import KVTotals
from lmcache_rag.settings import Settings
from lmcache_rag.workspace import Workspace

from ..kv_registry import KVRegister
from ..resolve import as_workspace
from .delegation import asked, asked_async
from .embeddings import EmbedderEmbeddings
from .faiss_store import FaissStore
from .listing import name_of, texts_of

log = logging.getLogger("lmcache_rag")


class LMCacheVectorStore(VectorStore):
    """Hands everything on to a vector store, and registers what is added, so that its KV is computed once.

    A document is one chunk, as it stands: its KV serves every question that retrieves it. Equal texts share one KV;
    metadata may change without computing anything. Questions never touch the engine, so retrieval goes on while it is
    down. Additions and deletions go to the vector store first: if KV then cannot be computed, the call raises, and
    doing it again (or `warm()`) repairs it. Methods of the vector store that are not LangChain's (`get`, …) are there
    too; those that change it past this class are made good by `warm()`.

    Args:
        inner: The vector store. None: FaissStore, ours.
        source: What answers: the program's own langchain_openai object, a vLLM server's URL, an engine or a Workspace.
        embedding: Embeddings for our own store; None: as the settings say. A given vector store has its own.
        store: Folder of the registry, and of our own vector store; None: as the settings say.
        space: Name of this vector store, where several share a workspace. None: its kind and collection.
        adopt: Register what the vector store holds already. An engine that is down costs a warning then.

    Raises:
        ConfigError: There is no source.
    """

    def __init__(
        self,
        inner: VectorStore | None = None,
        source: Any = None,
        *,
        embedding: Embeddings | None = None,
        store: str | Path | None = None,
        space: str | None = None,
        adopt: bool = True,
    ) -> None:
        if source is None:
            raise ConfigError(
                "LMCacheVectorStore does not know what answers.",
                remedy="Give the program's LLM object, a server's URL, an engine or a Workspace as second argument.",
            )
        self._source, self._folder = source, store
        self._lock = threading.RLock()
        self.inner: VectorStore = inner if inner is not None else self._own(embedding, space or "")
        self.space = name_of(self.inner) if space is None else space
        if adopt:
            self._adopt()

    @cached_property
    def _register(self) -> KVRegister:
        return KVRegister.of(as_workspace(self._source, store=self._folder), space=self.space)

    @property
    def register(self) -> KVRegister:
        """Which texts are registered; connects to the engine when it is first needed."""
        with self._lock:
            return self._register

    @property
    def embeddings(self) -> Embeddings | None:
        """The vector store's embeddings."""
        return self.inner.embeddings

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("inner", "_source"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    # -- additions ----------------------------------------------------------------------------------------------

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Add documents, each in place of what stood under its id, and compute KV; returns their ids.

        Args:
            documents: The documents.
            kwargs: `ids`, `batch_size` and whatever the vector store knows.

        Raises:
            PrecomputeError: KV could not be computed. The documents are there; do it again.
        """
        ids = self.inner.add_documents(documents, **kwargs)
        self._registered(documents, ids, self.register.add)
        return ids

    async def aadd_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Async twin of add_documents."""
        ids = await self.inner.aadd_documents(documents, **kwargs)
        await asyncio.to_thread(lambda: self._registered(documents, ids, self.register.add))
        return ids

    def update_documents(self, ids: list[str], documents: list[Document]) -> None:
        """Where the vector store has this method (Chroma): put documents in place of others."""
        self.inner.update_documents(ids, documents)  # type: ignore[attr-defined]
        self._registered(documents, ids, self.register.add)

    def update_document(self, document_id: str, document: Document) -> None:
        """The same for one document."""
        self.update_documents([document_id], [document])

    # -- deletions ----------------------------------------------------------------------------------------------

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """Remove documents, and KV that no other document needs; None removes all."""
        wanted = self._all_ids() if ids is None else list(ids)
        done = self.inner.delete(wanted, **kwargs) if wanted else True
        self.register.remove(wanted)
        return done

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """Async twin of delete."""
        wanted = await asyncio.to_thread(self._all_ids) if ids is None else list(ids)
        done = await self.inner.adelete(wanted, **kwargs) if wanted else True
        await asyncio.to_thread(lambda: self.register.remove(wanted))
        return done

    def delete_collection(self) -> None:
        """Where the vector store has this method (Chroma): remove it with everything in it."""
        self.inner.delete_collection()  # type: ignore[attr-defined]
        self.register.clear()

    def reset_collection(self) -> None:
        """Where the vector store has this method (Chroma): empty it."""
        self.inner.reset_collection()  # type: ignore[attr-defined]
        self.register.clear()

    # -- questions: the vector store's own ------------------------------------------------------------------------

    similarity_search = asked("similarity_search")
    similarity_search_with_score = asked("similarity_search_with_score")
    similarity_search_with_relevance_scores = asked("similarity_search_with_relevance_scores")
    similarity_search_by_vector = asked("similarity_search_by_vector")
    max_marginal_relevance_search = asked("max_marginal_relevance_search")
    max_marginal_relevance_search_by_vector = asked("max_marginal_relevance_search_by_vector")
    search = asked("search")
    get_by_ids = asked("get_by_ids")
    asimilarity_search = asked_async("asimilarity_search")
    asimilarity_search_with_score = asked_async("asimilarity_search_with_score")
    asimilarity_search_with_relevance_scores = asked_async("asimilarity_search_with_relevance_scores")
    asimilarity_search_by_vector = asked_async("asimilarity_search_by_vector")
    amax_marginal_relevance_search = asked_async("amax_marginal_relevance_search")
    amax_marginal_relevance_search_by_vector = asked_async("amax_marginal_relevance_search_by_vector")
    asearch = asked_async("asearch")
    aget_by_ids = asked_async("aget_by_ids")

    # -- KV -----------------------------------------------------------------------------------------------------------

    def warm(self) -> KVTotals:
        """Bring KV back that the engine has lost, and the registry in step with the vector store.

        A record manager (langchain_core.indexing) outlives the KV: it skips documents whose KV is gone. Call this after
        a server's restart, or after the vector store was changed past this class. A vector store that cannot list what
        it holds is not compared with the registry.

        Raises:
            PrecomputeError: KV could not be computed; call it again to go on.
        """
        register, live = self.register, texts_of(self.inner)
        totals = KVTotals()
        if live is not None:
            known = register.texts()
            register.remove(known.keys() - live.keys())
            totals += register.add({key: text for key, text in live.items() if known.get(key) != text})
        return totals + register.warm()

    async def awarm(self) -> KVTotals:
        """Async twin of warm, in a thread."""
        return await asyncio.to_thread(self.warm)

    # -- made, saved, loaded ------------------------------------------------------------------------------------------

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        source: Any = None,
        inner: VectorStore | None = None,
        **kwargs: Any,
    ) -> LMCacheVectorStore:
        """A vector store with these texts: over `inner`, or our own. `source` and the rest as for the class."""
        made = cls(inner, source, embedding=embedding, **kwargs)
        made.add_texts(texts, metadatas, ids=ids)
        return made

    def save_local(self, folder: str | Path, **kwargs: Any) -> None:
        """Save the vector store, where it can be saved. KV and registry are on disk already."""
        self.inner.save_local(folder, **kwargs)  # type: ignore[attr-defined]

    @classmethod
    def load_local(cls, folder: str | Path, embeddings: Embeddings, source: Any, **kwargs: Any) -> LMCacheVectorStore:
        """Open a folder that our own vector store was saved to; what is not registered yet is registered."""
        return cls(FaissStore.load_local(folder, embeddings), source, **kwargs)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _registered(
        self, documents: Sequence[Document], ids: Sequence[str], register: Callable[[dict[str, str]], KVTotals]
    ) -> None:
        if len(ids) != len(documents):
            raise ConfigError(
                f"{type(self.inner).__name__} returned {len(ids)} ids for {len(documents)} documents.",
                remedy="Without the documents' ids their KV cannot be dropped again: use another vector store.",
            )
        register({key: doc.page_content for key, doc in zip(ids, documents, strict=True)})

    def _all_ids(self) -> list[str]:
        live = texts_of(self.inner)
        return sorted(self.register.ids() | set(live or ()))

    def _own(self, embedding: Embeddings | None, space: str) -> FaissStore:
        opened = self._source if isinstance(self._source, Workspace) else None
        settings = opened.settings if opened else Settings.load(self._folder)
        if embedding is None:
            own = opened.embedder if opened else SentenceTransformerEmbedder(settings.embedder, device=settings.device)
            embedding = EmbedderEmbeddings(own)
        return FaissStore(embedding, settings.store / "vectors" / (space or "default"))

    def _adopt(self) -> None:
        live = texts_of(self.inner)
        if not live:
            return
        try:
            known = self.register.texts()
            if new := {key: text for key, text in live.items() if known.get(key) != text}:
                log.info("%d documents of %s are new here; their KV is computed.", len(new), self.space)
                self.register.add(new)
        except LMCacheRAGError as problem:
            log.warning("What %s holds is not registered yet; call warm() later. %s", self.space, problem)
