"""Look after a store: what is in it, is it right, is anything missing, what can go."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache_rag.kv import KVKeeper, KVTotals

if TYPE_CHECKING:
    from lmcache_rag.engines.base import Engine, KVUsage, PrecomputeResult, VerifyResult
    from lmcache_rag.prompt import PromptBuilder
    from lmcache_rag.store import RemoveResult, Store, StoreStats


@dataclass(frozen=True, slots=True)
class Status:
    """What is in a store.

    Attributes:
        store: Counts by the registry.
        usage: What the engine really holds.
        fingerprint: The current one: KV of others is stale.
        model: The engine's model.
        can_blend: Whether it can be blended.
        why_not: The reason when it cannot.
    """

    store: StoreStats
    usage: KVUsage
    fingerprint: str
    model: str
    can_blend: bool
    why_not: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Outcome of checking stored KV.

    Attributes:
        checked: Chunks looked at.
        bad: Those that were missing, damaged or different.
        repaired: How many of them are right now.
    """

    checked: int
    bad: tuple[VerifyResult, ...]
    repaired: int


class Maintainer:
    """Status, warm, verify and remove.

    Args:
        store: The store.
        engine: Keeps the KV.
        prompts: Makes the prompts.
        lock_timeout: Seconds to wait for another writer.
    """

    def __init__(self, store: Store, engine: Engine, prompts: PromptBuilder, *, lock_timeout: float = 30.0) -> None:
        self.store, self.engine, self.prompts = store, engine, prompts
        self.lock_timeout = lock_timeout
        self._keeper = KVKeeper(store, engine, prompts)

    def status(self) -> Status:
        """What is in the store. Writes nothing and loads no weights."""
        info = self.engine.info
        return Status(
            self.store.registry.stats(self.prompts.fingerprint),
            self.engine.usage(),
            self.prompts.fingerprint,
            info.model,
            info.can_blend,
            info.why_not,
        )

    def warm(self, *, on_chunk: Callable[[int, int, PrecomputeResult], None] | None = None) -> KVTotals:
        """Compute the KV of every chunk for which the engine has none, whether or not it was recorded once.

        Args:
            on_chunk: Called with (done, how many in all, result) after each.

        Raises:
            StoreLockedError: Another process is writing.
            PrecomputeError: KV could not be computed or kept; run again to go on.
        """
        with self.store.writing(timeout=self.lock_timeout):
            self._keeper.empty_trash()
            chunks = list(self.store.registry.chunks())
            unrecorded = {c.chunk_id for c in self.store.registry.chunks_without_kv(self.prompts.fingerprint)}
            absent = self.engine.missing([self.prompts.ingest(chunk.text) for chunk in chunks])
            todo = [c for c, gone in zip(chunks, absent, strict=True) if gone or c.chunk_id in unrecorded]
            done = 0

            def tick(result: PrecomputeResult) -> None:
                nonlocal done
                done += 1
                if on_chunk:
                    on_chunk(done, len(todo), result)

            return self._keeper.compute(todo, on_chunk=tick)

    async def awarm(self) -> KVTotals:
        """Async twin of warm, in a thread."""
        return await asyncio.to_thread(self.warm)

    def verify(
        self,
        *,
        sample: int | None = 20,
        repair: bool = True,
        seed: int | None = None,
        on_chunk: Callable[[int, int, VerifyResult], None] | None = None,
    ) -> VerifyReport:
        """Compute the KV of some chunks again and compare; what is wrong is dropped and, if wanted, computed anew.

        Args:
            sample: How many chunks; None: all whose KV is recorded.
            repair: False only reports.
            seed: Makes the sample repeatable.
            on_chunk: Called with (done, how many in all, result) after each.
        """
        fingerprint = self.prompts.fingerprint
        unrecorded = {chunk.chunk_id for chunk in self.store.registry.chunks_without_kv(fingerprint)}
        chunks = [chunk for chunk in self.store.registry.chunks() if chunk.chunk_id not in unrecorded]
        if sample is not None and sample < len(chunks):
            chunks = random.Random(seed).sample(chunks, sample)  # noqa: S311 - a sample, not a secret
        bad, results = [], []
        for done, chunk in enumerate(chunks, start=1):
            result = self.engine.verify(self.prompts.ingest(chunk.text))
            if result.status != "ok":
                bad.append(chunk)
                results.append(result)
            if on_chunk:
                on_chunk(done, len(chunks), result)
        repaired = 0
        if repair and bad:
            with self.store.writing(timeout=self.lock_timeout):
                self.engine.forget([(fingerprint, result.key) for result in results])
                totals = self._keeper.compute(bad)
                repaired = totals.computed + totals.existed
        return VerifyReport(len(chunks), tuple(results), repaired)

    def remove(self, doc_ids: Sequence[str]) -> RemoveResult:
        """Remove documents. A chunk and its KV leave with the last document that holds them."""
        with self.store.writing(timeout=self.lock_timeout):
            result = self.store.registry.remove_documents(doc_ids)
            self._keeper.empty_trash()
        return result

    def prune(self) -> int:
        """Drop KV of other fingerprints (another model, prefix or tenant); returns how many were dropped."""
        with self.store.writing(timeout=self.lock_timeout):
            self.store.registry.trash_other_kv(self.prompts.fingerprint)
            return self._keeper.empty_trash()
