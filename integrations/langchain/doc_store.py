"""A store of documents, with KV for their texts: for retrievers that search small pieces and return larger texts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from langchain_core.documents import Document
from langchain_core.stores import BaseStore, InMemoryBaseStore

from lmcache_rag.errors import ConfigError
from lmcache_rag.kv_manager import KVTotals

from ..kv_registry import KVRegistry, as_workspace
from .retrieved import RETRIEVED
from .spaces import refuse_pickling, space_of

_BATCH = 256  # documents read at a time


class LMCacheDocStore(BaseStore[str, Document]):
    """Forwards everything to a store of documents, and registers what is set, so that its KV is computed once.

    ParentDocumentRetriever and MultiVectorRetriever search small pieces and return the documents that these are part
    of, from their `docstore`. These are the texts in prompts: wrap the docstore, and leave the vector store of the
    pieces as it is, since no prompt holds the pieces.

    Changes go to the store first: if KV then cannot be computed, the call raises; repeat it or call `warm()`.

    Args:
        inner: The store: InMemoryStore, create_kv_docstore(LocalFileStore(...)), …
        source: The program's own langchain_openai object, a vLLM server's URL, an engine or a Workspace.
        store: Folder of the registry; None: from the settings.
        space: Name of this store, where several share a workspace. None: its kind.

    Raises:
        ConfigError: `source` is missing.
    """

    def __init__(
        self,
        inner: BaseStore[str, Any],
        source: Any = None,
        *,
        store: str | Path | None = None,
        space: str | None = None,
    ) -> None:
        if source is None:
            raise ConfigError(
                "LMCacheDocStore needs `source`: an LLM object, URL, engine or Workspace.",
                remedy="Give the program's LLM object, a server's URL, an engine or a Workspace as second argument.",
            )
        self.inner, self._source, self._folder = inner, source, store
        self._lock = threading.RLock()
        self.space = space_of(self, inner, source, store, "docstore:") if space is None else space

    @cached_property
    def _register(self) -> KVRegistry:
        return KVRegistry.of(as_workspace(self._source, store=self._folder), space=self.space)

    @property
    def register(self) -> KVRegistry:
        """The registered texts; connects to the engine at first use."""
        with self._lock:
            return self._register

    # -- LangChain's interface ------------------------------------------------------------------------------------

    def mget(self, keys: Sequence[str]) -> list[Document | None]:
        """Return the documents with these keys; None for unknown ones."""
        self._warn_of_leftovers()
        found = self.inner.mget(keys)
        RETRIEVED.note(found)
        return found

    async def amget(self, keys: Sequence[str]) -> list[Document | None]:
        """Async version of mget."""
        await asyncio.to_thread(self._warn_of_leftovers)
        found = await self.inner.amget(keys)
        RETRIEVED.note(found)
        return found

    def mset(self, key_value_pairs: Sequence[tuple[str, Document]]) -> None:
        """Set documents, and compute the KV of their texts.

        Raises:
            ConfigError: A value is no Document. Nothing was set.
            PrecomputeError: KV could not be computed. The documents were set; repeat the call.
        """
        texts = _texts(key_value_pairs)
        self.inner.mset(key_value_pairs)
        self.register.add(texts)

    async def amset(self, key_value_pairs: Sequence[tuple[str, Document]]) -> None:
        """Async version of mset."""
        texts = _texts(key_value_pairs)
        await self.inner.amset(key_value_pairs)
        await asyncio.to_thread(lambda: self.register.add(texts))

    def mdelete(self, keys: Sequence[str]) -> None:
        """Delete documents, and KV that no other document needs."""
        self.inner.mdelete(keys)
        self.register.remove(keys)

    async def amdelete(self, keys: Sequence[str]) -> None:
        """Async version of mdelete."""
        await self.inner.amdelete(keys)
        await asyncio.to_thread(lambda: self.register.remove(keys))

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """Yield all keys, or those that begin so."""
        yield from self.inner.yield_keys(prefix=prefix)

    async def ayield_keys(self, *, prefix: str | None = None) -> AsyncIterator[str]:
        """Async version of yield_keys."""
        async for key in self.inner.ayield_keys(prefix=prefix):
            yield key

    # -- KV -------------------------------------------------------------------------------------------------------

    def warm(self) -> KVTotals:
        """Register what the store holds, also from before it was wrapped, and compute KV that is missing.

        Raises:
            PrecomputeError: KV could not be computed; call it again to continue.
        """
        register, live = self.register, self._live()
        known = register.texts()
        register.remove(known.keys() - live.keys())
        totals = register.add({key: text for key, text in live.items() if known.get(key) != text})
        return totals + register.warm()

    async def awarm(self) -> KVTotals:
        """Async version of warm, in a thread."""
        return await asyncio.to_thread(self.warm)

    def _warn_of_leftovers(self) -> None:
        """Warn once, at the first reading, of texts that are registered, and that the store in memory does not hold."""
        if isinstance(self.inner, InMemoryBaseStore) and "_register" in self.__dict__:
            held = list(self.inner.yield_keys())
            self.register.warn_of_leftovers(held, name=self.space, remedy="warm() of this docstore")

    def _live(self) -> dict[str, str]:
        keys, live = sorted(self.inner.yield_keys()), {}
        for start in range(0, len(keys), _BATCH):
            batch = keys[start : start + _BATCH]
            found = zip(batch, self.inner.mget(batch), strict=True)
            live.update(_texts([(key, document) for key, document in found if document is not None]))
        return live

    def __getstate__(self) -> NoReturn:
        raise refuse_pickling(self)


def _texts(pairs: Sequence[tuple[str, Any]]) -> dict[str, str]:
    for key, value in pairs:
        if not isinstance(value, Document):
            raise ConfigError(
                f"The value of {key!r} is {type(value).__name__}, not a Document.",
                remedy="Give MultiVectorRetriever a docstore instead of a byte_store, made by create_kv_docstore().",
            )
    return {str(key): document.page_content for key, document in pairs}
