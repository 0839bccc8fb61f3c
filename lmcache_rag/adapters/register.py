"""KV for the texts of a store that is not ours: a framework's vector store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lmcache_rag.errors import DocumentError
from lmcache_rag.kv_manager import ForgetReport, KVManager, KVTotals

if TYPE_CHECKING:
    from lmcache_rag.engines.base import Engine
    from lmcache_rag.prompt import PromptBuilder
    from lmcache_rag.store import NewDocument, Store, StoredChunk
    from lmcache_rag.workspace import Workspace

log = logging.getLogger("lmcache_rag")

_BATCH = 256  # texts between two commits


class KVRegister:
    """Knows which texts stand in another store, by its ids, and keeps their KV. Safe to use from several threads.

    Each text is one chunk, as the other store has it. Equal texts share one chunk and one KV; it leaves with the last
    id. What is registered is committed before KV is computed: an addition that fails half-way is repaired by doing it
    again, or by warm().

    Args:
        store: Our store, beside the other one.
        engine: Computes and keeps KV.
        prompts: Makes the prompts, and with them the keys.
        space: Name of the other store, where several share ours.
        lock_timeout: Seconds to wait for another process that is writing.
    """

    def __init__(
        self, store: Store, engine: Engine, prompts: PromptBuilder, *, space: str = "", lock_timeout: float = 30.0
    ) -> None:
        self.store, self.engine, self.prompts = store, engine, prompts
        self.space = space
        self.lock_timeout = lock_timeout
        self._keeper = KVManager(store, engine, prompts)
        self._head = f"{space}\x1f"  # before each id; no framework's ids begin so

    @classmethod
    def of(cls, workspace: Workspace, *, space: str = "") -> KVRegister:
        """Over the parts of a workspace."""
        return cls(
            workspace.store,
            workspace.engine,
            workspace.prompts,
            space=space,
            lock_timeout=workspace.settings.lock_timeout_s,
        )

    # -- changes ------------------------------------------------------------------------------------------------

    def add(self, texts: Mapping[str, str], *, groups: Mapping[str, str] | None = None) -> KVTotals:
        """Register texts under their ids, in place of what stood there, and compute the KV that is not there yet.

        A text that has no tokens, or more than the context holds, is registered without KV.

        Args:
            texts: Text by id.
            groups: Group by id, for example the document that a text is a part of; see ids().

        Raises:
            DocumentError: A text is not valid Unicode.
            StoreError: The store cannot be written.
            PrecomputeError: KV could not be computed. The texts are registered; add them again, or call warm().
        """
        items, groups = list(texts.items()), groups or {}
        totals = KVTotals()
        with self.store.writing(timeout=self.lock_timeout):
            for start in range(0, len(items), _BATCH):
                batch = items[start : start + _BATCH]
                self.store.registry.put_documents(
                    [self._document(key, text, groups.get(key, self.space)) for key, text in batch], embedder=None
                )
            for start in range(0, len(items), _BATCH):
                ids = [self._head + key for key, _ in items[start : start + _BATCH]]
                todo = self.store.registry.chunks_without_kv(self.prompts.fingerprint, doc_ids=ids)
                totals += self._keeper.compute(self._computable(todo))
            # Last: where KV could not be computed, the caller may want to go back to the texts of before.
            self._keeper.empty_trash()
        return totals

    async def aadd(self, texts: Mapping[str, str], *, groups: Mapping[str, str] | None = None) -> KVTotals:
        """Async twin of add, in a thread."""
        return await asyncio.to_thread(self.add, dict(texts), groups=groups)

    def remove(self, ids: Iterable[str]) -> int:
        """Take ids out; KV that no other id needs goes. Unknown ids are ignored. Returns how many were known."""
        wanted = [self._head + key for key in ids]
        if not wanted:
            return 0
        with self.store.writing(timeout=self.lock_timeout):
            removed = self.store.registry.remove_documents(wanted)
            self._keeper.empty_trash()
        return removed.documents

    async def aremove(self, ids: Iterable[str]) -> int:
        """Async twin of remove, in a thread."""
        return await asyncio.to_thread(self.remove, list(ids))

    def forget(self, ids: Iterable[str]) -> ForgetReport:
        """Take ids out, and have KV that no other id needs deleted on the server too; see Maintainer.forget."""
        with self.store.writing(timeout=self.lock_timeout):
            return self._keeper.forget([self._head + key for key in ids])

    async def aforget(self, ids: Iterable[str]) -> ForgetReport:
        """Async twin of forget, in a thread."""
        return await asyncio.to_thread(self.forget, list(ids))

    def clear(self) -> int:
        """Take all ids of this space out. Returns how many there were."""
        return self.remove(self.ids())

    def warm(self) -> KVTotals:
        """Compute the KV of every registered text for which the engine has none.

        Raises:
            PrecomputeError: KV could not be computed; call it again to go on.
        """
        with self.store.writing(timeout=self.lock_timeout):
            chunks = self._computable(list(self.store.registry.stored_texts(self.texts().values()).values()))
            absent = self.engine.missing([self.prompts.ingest(chunk.text) for chunk in chunks])
            return self._keeper.compute([chunk for chunk, gone in zip(chunks, absent, strict=True) if gone])

    async def awarm(self) -> KVTotals:
        """Async twin of warm, in a thread."""
        return await asyncio.to_thread(self.warm)

    # -- questions ----------------------------------------------------------------------------------------------

    def ids(self, group: str | None = None) -> set[str]:
        """All ids of this space, or those of one group."""
        return {key[len(self._head) :] for key in self.store.registry.doc_ids(self._head, source=group)}

    def texts(self) -> dict[str, str]:
        """Text by id, of this space."""
        return {
            key: "".join(chunk.text for chunk in self.store.registry.document_chunks(self._head + key))
            for key in self.ids()
        }

    def entries(self, ids: Iterable[str]) -> dict[str, tuple[str, str]]:
        """(text, group) by id, of those of the ids that are known."""
        size = len(self._head)
        return {
            record.doc_id[size:]: (
                "".join(chunk.text for chunk in self.store.registry.document_chunks(record.doc_id)),
                record.source,
            )
            for record in self.store.registry.documents([self._head + key for key in ids])
        }

    # -- inside -------------------------------------------------------------------------------------------------

    def _document(self, key: str, text: str, group: str) -> NewDocument:
        from lmcache_rag.store import NewChunk, NewDocument, text_hash

        try:
            name = text_hash(text)
        except UnicodeEncodeError as problem:
            raise DocumentError(
                f"The text of {key!r} is not valid Unicode: {problem}.", remedy="Decode it with errors='replace'."
            ) from problem
        chunk = NewChunk(text, len(self.prompts.chunk_ids(text)), 0)
        return NewDocument(self._head + key, name, "", group, [chunk])

    def _computable(self, chunks: Sequence[StoredChunk]) -> list[StoredChunk]:
        room = self.engine.info.context_length - len(self.prompts.prefix_ids)
        sizes = [len(self.prompts.chunk_ids(chunk.text)) for chunk in chunks]
        if long := sum(size >= room for size in sizes):
            log.warning("%d text(s) are longer than the model's context: they have no KV. Split them smaller.", long)
        return [chunk for chunk, size in zip(chunks, sizes, strict=True) if 0 < size < room]
