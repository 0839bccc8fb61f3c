"""Any vector store, with the KV of its documents: computed when they are added, dropped when they are deleted."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal, NoReturn, overload

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore

from lmcache_rag.embedding import SentenceTransformerEmbedder
from lmcache_rag.errors import ConfigError
from lmcache_rag.kv_manager import KVTotals
from lmcache_rag.kv_policy import kv_mode
from lmcache_rag.settings import Settings
from lmcache_rag.workspace import Workspace

from ..adoption import PAGE, Adoption, AdoptProgress
from ..kv_registry import KVRegistry, as_workspace
from ..listing import Listing, in_memory, listing_of
from .faiss_store import EmbedderEmbeddings, FaissStore
from .retrieved import RETRIEVED
from .spaces import refuse_pickling, space_of
from .templates import ingest_prompts

log = logging.getLogger("lmcache_rag")

_IDS = uuid.UUID("6c6d6361-6368-652d-7261-672d69647300")  # the namespace of ids that are made of texts
_PAGE = 256  # rows that a vector store lists at once


def _forwarded(name: str) -> Any:
    """Return a method that calls the method of the same name on `inner`, and notes the documents that it returns."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._warn_of_leftovers()
        return RETRIEVED.note(getattr(self.inner, name)(*args, **kwargs))

    method.__name__, method.__doc__ = name, f"{name} of the vector store."
    return method


def _aforwarded(name: str) -> Any:
    """As _forwarded, for an async method."""

    async def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        await asyncio.to_thread(self._warn_of_leftovers)
        return RETRIEVED.note(await getattr(self.inner, name)(*args, **kwargs))

    method.__name__, method.__doc__ = name, f"{name} of the vector store."
    return method


class LMCacheVectorStore(VectorStore):
    """Forwards everything to a vector store, and registers what is added, so that its KV is computed once.

    A document is one chunk: its KV serves every question that retrieves it. Equal texts share one KV; changed metadata
    computes nothing. Documents without ids that are added to a store in memory (InMemoryVectorStore, FAISS) get ids by
    their text, so that a program that fills it at each start registers each text once. Searches never use the engine,
    so that retrieval works while it is down. Additions and deletions go to the vector store first: if KV then cannot be
    computed, the call raises; repeat it or call `warm()`. Methods of the vector store that are not LangChain's (`get`,
    …) work too. Call `warm()` after changing `inner` directly.

    Args:
        inner: The vector store. None: FaissStore, ours.
        source: The program's own langchain_openai object, a vLLM server's URL, an engine or a Workspace.
        embedding: Embeddings for our own store; None: from the settings. An `inner` has its own.
        store: Folder of the registry, and of our own vector store; None: from the settings.
        space: Name of this vector store, where several share a workspace. None: its kind and collection; the second of
            a kind without collections gets a number, and a warning.
        adopt: Adopt what the vector store already holds, in the background; see adopt(). Failures are logged.
        prompts: For which prompts KV is computed, each once: prompt templates, steps made by blend(), AgentPrompts,
            or None for this library's own words. Empty: these words only.
        kv: When KV of added documents is computed: "now", "lazy" (after questions that use them) or "none" (by warm());
            None: by the settings, LMCACHE_RAG_KV or the store's settings.toml, else now.
        pin: Whether a server keeps the KV of added texts from being evicted; None: by the settings, LMCACHE_RAG_PIN.

    Raises:
        ConfigError: `source` is missing, or `kv` is none of these.
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
        prompts: Sequence[Any] = (),
        kv: str | None = None,
        pin: bool | None = None,
    ) -> None:
        if source is None:
            raise ConfigError(
                "LMCacheVectorStore needs `source`: an LLM object, URL, engine or Workspace.",
                remedy="Give the program's LLM object, a server's URL, an engine or a Workspace as second argument.",
            )
        self._source, self._folder, self._prompts = source, store, tuple(prompts)
        self._kv, self._pin = None if kv is None else kv_mode(kv), pin
        self._lock = threading.RLock()
        self._ids_in_flight: set[str] = set()
        self.inner: VectorStore = inner if inner is not None else self._own(embedding, space or "")
        self.space = space_of(self, self.inner, source, store) if space is None else space
        self._adoption: Adoption | None = None
        if adopt:
            self._adopt_in_background()

    @cached_property
    def _register(self) -> KVRegistry:
        workspace, listing = as_workspace(self._source, store=self._folder), _listing_of(self.inner)
        return KVRegistry.of(
            workspace,
            space=self.space,
            canonical=listing.canonical if listing else str,
            prompts=[ingest_prompts(one, workspace, self._source) for one in self._prompts],
            kv=self._kv,
            pin=self._pin,
        )

    @property
    def register(self) -> KVRegistry:
        """The registered texts; connects to the engine at first use."""
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

    def __getstate__(self) -> NoReturn:
        raise refuse_pickling(self)

    # -- additions ------------------------------------------------------------------------------------------------

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Add documents, replacing those with the same ids, and compute KV; returns the ids.

        Args:
            documents: The documents.
            kwargs: `ids`, `batch_size` and other options of the vector store.

        Raises:
            PrecomputeError: KV could not be computed. The documents were added; repeat the call.
        """
        with self._with_ids(documents, kwargs) as kwargs:
            ids = self.inner.add_documents(documents, **kwargs)
        self._registered(documents, ids, self.register.add)
        return ids

    async def aadd_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Async version of add_documents."""
        with self._with_ids(documents, kwargs) as kwargs:
            ids = await self.inner.aadd_documents(documents, **kwargs)
        await asyncio.to_thread(lambda: self._registered(documents, ids, self.register.add))
        return ids

    def update_documents(self, ids: list[str], documents: list[Document]) -> None:
        """Replace documents, if the vector store has this method (Chroma)."""
        self.inner.update_documents(ids, documents)  # type: ignore[attr-defined]
        self._registered(documents, ids, self.register.add)

    def update_document(self, document_id: str, document: Document) -> None:
        """Replace one document, if the vector store has `update_documents`."""
        self.update_documents([document_id], [document])

    # -- deletions ------------------------------------------------------------------------------------------------

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """Remove documents, and KV that no other document needs.

        Args:
            ids: Their ids. None removes all, unless keywords select some.
            kwargs: The vector store's own, for example `filter` of our FaissStore or `where` of Chroma. Only the KV of
                documents that it no longer holds is dropped then.

        Raises:
            ConfigError: The vector store ignores keywords, or cannot say which documents it deleted.
        """
        if ids is not None and not ids:
            return True
        before = self._deletable(ids, kwargs)
        wanted = sorted(before) if ids is None and not kwargs else ids
        done = self.inner.delete(wanted, **kwargs) if wanted or kwargs else True
        self._forget(before, done, kwargs)
        return done

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """Async version of delete."""
        if ids is not None and not ids:
            return True
        before = await asyncio.to_thread(self._deletable, ids, kwargs)
        wanted = sorted(before) if ids is None and not kwargs else ids
        done = await self.inner.adelete(wanted, **kwargs) if wanted or kwargs else True
        await asyncio.to_thread(self._forget, before, done, kwargs)
        return done

    def delete_collection(self) -> None:
        """Remove the collection, if the vector store has this method (Chroma)."""
        self.inner.delete_collection()  # type: ignore[attr-defined]
        self.register.clear()

    def reset_collection(self) -> None:
        """Empty the collection, if the vector store has this method (Chroma)."""
        self.inner.reset_collection()  # type: ignore[attr-defined]
        self.register.clear()

    # -- search: the vector store's own ---------------------------------------------------------------------------

    similarity_search = _forwarded("similarity_search")
    similarity_search_with_score = _forwarded("similarity_search_with_score")
    similarity_search_with_relevance_scores = _forwarded("similarity_search_with_relevance_scores")
    similarity_search_by_vector = _forwarded("similarity_search_by_vector")
    max_marginal_relevance_search = _forwarded("max_marginal_relevance_search")
    max_marginal_relevance_search_by_vector = _forwarded("max_marginal_relevance_search_by_vector")
    search = _forwarded("search")
    get_by_ids = _forwarded("get_by_ids")
    asimilarity_search = _aforwarded("asimilarity_search")
    asimilarity_search_with_score = _aforwarded("asimilarity_search_with_score")
    asimilarity_search_with_relevance_scores = _aforwarded("asimilarity_search_with_relevance_scores")
    asimilarity_search_by_vector = _aforwarded("asimilarity_search_by_vector")
    amax_marginal_relevance_search = _aforwarded("amax_marginal_relevance_search")
    amax_marginal_relevance_search_by_vector = _aforwarded("amax_marginal_relevance_search_by_vector")
    asearch = _aforwarded("asearch")
    aget_by_ids = _aforwarded("aget_by_ids")

    # -- KV -------------------------------------------------------------------------------------------------------

    def warm(self) -> KVTotals:
        """Compute KV that the engine has lost, and update the registry from the vector store.

        A record manager (langchain_core.indexing) outlives the KV: it skips documents whose KV is gone. Call this after
        a restart of the server, or after changing the inner store directly. If the vector store cannot list what it
        holds, only the KV of registered texts is computed, and a warning says so.

        Raises:
            PrecomputeError: KV could not be computed; call it again to continue.
        """
        register, live = self.register, _texts_of(self.inner)
        totals = KVTotals()
        if live is None:
            log.warning(_cannot_list(self.inner, self.space))
        else:
            known = register.texts()
            register.remove(known.keys() - live.keys())
            totals += register.add({key: text for key, text in live.items() if known.get(key) != text})
        return totals + register.warm()

    async def awarm(self) -> KVTotals:
        """Async version of warm, in a thread."""
        return await asyncio.to_thread(self.warm)

    @overload
    def adopt(
        self,
        documents: Iterable[Document] | None = None,
        *,
        background: Literal[False] = False,
        on_progress: Callable[[AdoptProgress], None] | None = None,
    ) -> KVTotals: ...

    @overload
    def adopt(
        self,
        documents: Iterable[Document] | None = None,
        *,
        background: Literal[True],
        on_progress: Callable[[AdoptProgress], None] | None = None,
    ) -> Adoption: ...

    def adopt(
        self,
        documents: Iterable[Document] | None = None,
        *,
        background: bool = False,
        on_progress: Callable[[AdoptProgress], None] | None = None,
    ) -> KVTotals | Adoption:
        """Compute the KV of documents that were in the vector store before it was wrapped.

        What is done already is skipped: call it again after a failure or a restart, and it continues.

        Args:
            documents: The documents, with the ids that the vector store has for them; None: all that it holds.
            background: Return at once, and adopt in a thread, in pauses between questions.
            on_progress: Called after each few documents, for example `print`.

        Returns:
            What was computed; with `background`, the Adoption, which has progress, wait(), result() and stop().

        Raises:
            ConfigError: The vector store cannot list its documents; give them.
            PrecomputeError: KV could not be computed; call it again to continue.
        """
        if documents is None and _listing_of(self.inner) is None:
            raise ConfigError(
                f"What {type(self.inner).__name__} holds cannot be listed.",
                remedy="Give the documents, with their ids: adopt(documents).",
            )
        self._adoption = adoption = self._adoption_of(documents, on_progress)
        return adoption.start() if background else adoption.run()

    async def aadopt(
        self,
        documents: Iterable[Document] | None = None,
        *,
        on_progress: Callable[[AdoptProgress], None] | None = None,
    ) -> KVTotals:
        """Async version of adopt. Cancelling it stops the work after the document in flight."""
        return await self.adopt(documents, background=True, on_progress=on_progress).aresult()

    @property
    def adoption(self) -> Adoption | None:
        """The last adoption, for example the one that began when the vector store was wrapped."""
        return self._adoption

    # -- create, save, load ---------------------------------------------------------------------------------------

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
        """Make a vector store with these texts, over `inner` or our own. `source` and the rest as for the class."""
        store = cls(inner, source, embedding=embedding, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def save_local(self, folder: str | Path, **kwargs: Any) -> None:
        """Save the vector store, if it can be saved. KV and registry are always on disk."""
        self.inner.save_local(folder, **kwargs)  # type: ignore[attr-defined]

    @classmethod
    def load_local(cls, folder: str | Path, embeddings: Embeddings, source: Any, **kwargs: Any) -> LMCacheVectorStore:
        """Open a folder that our own vector store was saved to, and adopt what is not registered yet."""
        return cls(FaissStore.load_local(folder, embeddings), source, **kwargs)

    # -- inside ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _with_ids(self, documents: Sequence[Document], kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Return the options with ids for documents without one, if the vector store is in memory.

        It would draw random ones at each start of the program, and what an earlier run registered would never be found
        again. An id is made of the text, and a number where it is taken.
        """
        held = in_memory(self.inner)
        ids = list(kwargs.get("ids") or [document.id for document in documents])
        if held is None or len(ids) != len(documents) or all(ids):
            yield kwargs
            return
        made: set[str] = set()
        with self._lock:
            taken = {*ids, *held, *self._ids_in_flight}
            for at, document in enumerate(documents):
                if not ids[at]:
                    ids[at] = next(key for key in _ids_of(document.page_content) if key not in taken)
                    taken.add(ids[at])
                    made.add(ids[at])
            self._ids_in_flight |= made
        try:
            yield {**kwargs, "ids": ids}
        finally:
            with self._lock:
                self._ids_in_flight -= made

    def _warn_of_leftovers(self) -> None:
        """Warn once, at the first search, of texts that are registered, and that the store in memory does not hold."""
        held = in_memory(self.inner)
        ready = "_register" in self.__dict__ and not (self._adoption and self._adoption.running)
        if held is not None and ready:
            self.register.warn_of_leftovers(map(str, list(held)), name=self.space, remedy="warm() of this vector store")

    def _registered(
        self, documents: Sequence[Document], ids: Sequence[str], register: Callable[[dict[str, str]], KVTotals]
    ) -> None:
        if len(ids) != len(documents):
            raise ConfigError(
                f"{type(self.inner).__name__} returned {len(ids)} ids for {len(documents)} documents.",
                remedy="Without the documents' ids their KV cannot be dropped again: use another vector store.",
            )
        register({key: doc.page_content for key, doc in zip(ids, documents, strict=True)})

    def _deletable(self, ids: list[str] | None, kwargs: dict[str, Any]) -> set[str]:
        """Return the documents that a deletion may remove: with keywords, the registered ones that are there now."""
        if kwargs and getattr(type(self.inner), "delete", None) is InMemoryVectorStore.delete:
            raise ConfigError(
                f"{type(self.inner).__name__} deletes by ids only, and ignores {', '.join(map(repr, sorted(kwargs)))}.",
                remedy="Give the ids of the documents.",
            )
        if ids is not None:
            return set(ids)
        if not kwargs:
            return self.register.ids() | set(_texts_of(self.inner) or ())
        held = self._held(self.register.ids())
        if held is None:
            raise ConfigError(
                f"{type(self.inner).__name__} cannot say which documents it deletes by {', '.join(sorted(kwargs))}.",
                remedy="Give their ids, so that their KV is dropped with them.",
            )
        return held

    def _forget(self, before: set[str], done: bool | None, kwargs: dict[str, Any]) -> None:
        """Drop the KV of documents that were deleted: all of `before`, unless keywords or a failure left some."""
        left = self._held(before) if kwargs or done is False else set()
        self.register.remove(before - (before if left is None else left))

    def _held(self, ids: set[str]) -> set[str] | None:
        """Return which of the ids the vector store holds, or None if it cannot say."""
        live = _texts_of(self.inner)
        if live is not None:
            listing = _listing_of(self.inner)
            return {key for key in ids if (listing.canonical(key) if listing else key) in live}
        try:
            return {str(document.id) for document in self.inner.get_by_ids(sorted(ids))} if ids else set()
        except NotImplementedError:
            return None

    def _own(self, embedding: Embeddings | None, space: str) -> FaissStore:
        opened = self._source if isinstance(self._source, Workspace) else None
        settings = opened.settings if opened else Settings.load(self._folder)
        if embedding is None:
            own = opened.embedder if opened else SentenceTransformerEmbedder(settings.embedder, device=settings.device)
            embedding = EmbedderEmbeddings(own)
        return FaissStore(embedding, settings.store / "vectors" / (space or "default"))

    def _adopt_in_background(self) -> None:
        """Adopt what the vector store holds, if it holds something; report if that cannot be known."""
        listing = _listing_of(self.inner)
        if listing is None:
            log.warning(_cannot_list(self.inner, self.space))
            return
        try:
            count = listing.count()
        except Exception as problem:  # the vector store's own: it reports it at its first use
            log.warning("What %s holds could not be listed: %s. Call adopt() later.", self.space, problem)
            return
        if count:
            log.info("%s holds %d documents; KV that is missing is computed in the background.", self.space, count)
            if isinstance(self._source, Workspace) and self._source.has_engine:
                _ = self.register  # now: a workspace that is closed meanwhile would be opened again
            self._adoption = self._adoption_of(None, None).start()

    def _adoption_of(
        self, documents: Iterable[Document] | None, on_progress: Callable[[AdoptProgress], None] | None
    ) -> Adoption:
        listing = _listing_of(self.inner)
        if documents is not None:
            return Adoption(
                lambda: self.register, lambda: _pages_of(documents), name=self.space, on_progress=on_progress
            )
        assert listing is not None  # noqa: S101 - the callers have asked

        def pages() -> Iterator[dict[str, tuple[str, str]]]:
            for page in listing.pages(PAGE):
                yield {row.id: (row.text, "") for row in page}

        return Adoption(
            lambda: self.register,
            pages,
            name=self.space,
            count=listing.count,
            held=self._held,
            on_progress=on_progress,
        )


# -- what other vector stores hold ------------------------------------------------------------------------------------


def _listing_of(inner: VectorStore) -> Listing | None:
    return Listing.of_texts(inner.texts) if isinstance(inner, FaissStore) else listing_of(inner)


def _texts_of(inner: VectorStore) -> dict[str, str] | None:
    """Return all texts of a vector store by id, or None if it cannot list them; see listing_of()."""
    listing = _listing_of(inner)
    return None if listing is None else {row.id: row.text for page in listing.pages(_PAGE) for row in page}


def _pages_of(documents: Iterable[Document]) -> Iterator[dict[str, tuple[str, str]]]:
    """Return documents in pages. One without an id is registered under a digest of its text."""
    rest = iter(documents)
    while page := list(islice(rest, PAGE)):
        yield {str(document.id or _digest(document.page_content)): (document.page_content, "") for document in page}


def _ids_of(text: str) -> Iterator[str]:
    """Yield the ids of documents with this text, in the order in which they are taken."""
    return (str(uuid.uuid5(_IDS, f"{_digest(text)} {number}")) for number in count())


def _digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"


def _cannot_list(inner: VectorStore, space: str) -> str:
    return (
        f"What {space} ({type(inner).__name__}) holds cannot be listed: documents that were added to it before it was "
        "wrapped are computed by questions until you give them to adopt(documents). adopt=False leaves this out."
    )
