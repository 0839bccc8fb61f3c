"""Keep the engine's KV and the registry's record of it in step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lmcache_rag import lazy_fill

if TYPE_CHECKING:
    from lmcache_rag.engines.base import Engine, IngestPrompt, PrecomputeResult
    from lmcache_rag.prompt import PromptBuilder
    from lmcache_rag.store import KVRow, RemoveResult, Store, StoredChunk

log = logging.getLogger("lmcache_rag")

_PAGE = 256  # chunks whose texts are in memory at once
_RECORD_EVERY = 8  # chunks between two commits: a killed run computes at most none of them again, see KVKeeper


@dataclass(frozen=True, slots=True)
class KVTotals:
    """What a run of KV computation did. `existed` were there already and only needed recording."""

    computed: int = 0
    existed: int = 0
    tokens: int = 0
    nbytes: int = 0

    def __add__(self, other: KVTotals) -> KVTotals:
        return KVTotals(
            self.computed + other.computed,
            self.existed + other.existed,
            self.tokens + other.tokens,
            self.nbytes + other.nbytes,
        )


@dataclass(frozen=True, slots=True)
class ForgetReport:
    """What a forget did.

    Attributes:
        removed: What left the store.
        deleted: Chunks whose KV was deleted on the server; 0 for an engine that keeps its KV itself.
        staying: Chunks whose KV stays on the server until it is evicted there.
        why: Why it stays.
    """

    removed: RemoveResult
    deleted: int
    staying: int
    why: str


class KVKeeper:
    """Computes KV through the engine and records it.

    The engine keeps KV before the registry records it. A process killed between the two leaves KV that the next run
    finds by its key and records without computing it again. The other way round, KV whose last chunk left stands in
    the registry's trash until the engine has dropped it.

    Args:
        store: The store.
        engine: Computes and keeps KV.
        prompts: Makes the prompts, and with them the keys.
    """

    def __init__(self, store: Store, engine: Engine, prompts: PromptBuilder) -> None:
        self._store, self._engine, self._prompts = store, engine, prompts

    def compute(
        self,
        chunks: Iterable[StoredChunk],
        *,
        on_chunk: Callable[[PrecomputeResult], None] | None = None,
        stop: threading.Event | None = None,
    ) -> KVTotals:
        """Compute and record the KV of these chunks, skipping what the engine has. Needs the store's writing lock.

        Raises:
            PrecomputeError: A chunk's KV could not be computed. What was finished before is recorded.
        """
        from lmcache_rag.store import KVRow

        totals = KVTotals()
        rows: list[KVRow] = []
        waiting: list[StoredChunk] = []

        def prompts() -> Iterator[IngestPrompt]:
            for chunk in chunks:
                waiting.append(chunk)
                yield self._prompts.ingest(chunk.text)

        begin = self._engine.precompute if stop is None else partial(self._engine.precompute, stop=stop)
        try:
            for result in begin(prompts()):
                chunk = waiting.pop(0)
                rows.append(KVRow(chunk.chunk_id, result.key, result.tokens, result.nbytes))
                totals += KVTotals(int(result.computed), int(not result.computed), result.tokens, result.nbytes)
                if len(rows) >= _RECORD_EVERY:
                    self._record(rows)
                if on_chunk:
                    on_chunk(result)
        finally:
            self._record(rows)
        return totals

    def keep(self, texts: Sequence[str]) -> KVTotals:
        """Compute and record the KV of texts that stand in the store, if nobody else is writing to it."""
        if self._store.read_only:
            return KVTotals()
        with self._store.writing(timeout=0):
            known = self._store.registry.stored_texts(texts).values()
            absent = self._engine.missing([self._prompts.ingest(chunk.text) for chunk in known])
            return self.compute([chunk for chunk, gone in zip(known, absent, strict=True) if gone])

    def fill(self, text: str, stop: threading.Event) -> PrecomputeResult | None:
        """Have the KV of a text computed that a question used; it is recorded where the text stands in the store.

        Args:
            text: The text.
            stop: Once it is set, what failed is not tried again.

        Returns:
            What the engine did; None where it has the KV by now, or where nothing may be written.

        Raises:
            StoreLockedError: Another process writes to the store.
            PrecomputeError: The KV could not be computed.
        """
        prompt = self._prompts.ingest(text)
        if not any(self._engine.missing([prompt])):
            return None
        if not self._store.registry.stored_texts([text]):
            return next(iter(self._engine.precompute([prompt], stop=stop)), None)
        if self._store.read_only:
            return None
        done: list[PrecomputeResult] = []
        with self._store.writing(timeout=0):
            known = self._store.registry.stored_texts([text]).values()
            self.compute(known, on_chunk=done.append, stop=stop)
        return done[0] if done else None

    def forget(self, doc_ids: Sequence[str], *, on_chunk: Callable[[int, int], None] | None = None) -> ForgetReport:
        """Remove documents, and have the KV of chunks that only they hold deleted where the engine keeps it.

        The KV goes first: a run that is killed or fails leaves the documents, and the next one goes on. Needs the
        store's writing lock.

        Args:
            doc_ids: The documents.
            on_chunk: Called with (done, how many in all) after each chunk.

        Raises:
            EngineUnavailableError: The engine, or its KV store, cannot be reached. The documents stay.
            EngineError: The engine does not let us.
        """
        from lmcache_rag.engines.base import ForgetsChunks

        lazy_fill.cancel(self._engine)  # or it could be ingested again meanwhile
        deleted, staying, why = 0, 0, ""
        if isinstance(self._engine, ForgetsChunks):
            ids = self._store.registry.chunks_only_in(doc_ids)
            for result in self._engine.forget_chunks(self._keepable(ids)):
                deleted, staying, why = deleted + result.forgotten, staying + (not result.forgotten), why or result.why
                if on_chunk:
                    on_chunk(deleted + staying, len(ids))
        removed = self._store.registry.remove_documents(doc_ids)
        self.empty_trash()
        return ForgetReport(removed, deleted, staying, why)

    def _keepable(self, chunk_ids: Sequence[int]) -> Iterator[IngestPrompt]:
        """Prompts of those of the chunks that can have KV."""
        room = self._engine.info.context_length - len(self._prompts.prefix_ids)
        for start in range(0, len(chunk_ids), _PAGE):
            for chunk in self._store.registry.chunks(chunk_ids[start : start + _PAGE]):
                if 0 < len(self._prompts.chunk_ids(chunk.text)) < room:
                    yield self._prompts.ingest(chunk.text)

    def empty_trash(self) -> int:
        """Let the engine drop KV that no chunk needs any more. Needs the store's writing lock."""
        pairs = self._store.registry.trash()
        if pairs:
            self._engine.forget(pairs)
            self._store.registry.clear_trash(pairs)
        return len(pairs)

    def _record(self, rows: list[KVRow]) -> None:
        if rows:
            facts = {"model": self._prompts.info.model, "dtype": self._prompts.info.dtype}
            self._store.registry.record_kv(self._prompts.fingerprint, facts, rows)
            rows.clear()
