"""Look after a store: what is in it, is it right, is anything missing, what can go."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from lmcache_rag.kv import ForgetReport, KVKeeper, KVTotals

if TYPE_CHECKING:
    from lmcache_rag.engines.base import Engine, KVUsage, PrecomputeResult, VerifyResult
    from lmcache_rag.prompt import PromptBuilder
    from lmcache_rag.store import RemoveResult, Store, StoredChunk, StoreStats

_BATCH = 256  # chunks whose texts are in memory at once


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
            todo = list(self._lacking())
            done = 0

            def tick(result: PrecomputeResult) -> None:
                nonlocal done
                done += 1
                if on_chunk:
                    on_chunk(done, len(todo), result)

            return self._keeper.compute(self._chunks(todo), on_chunk=tick)

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
        ids = sorted(self._recorded())
        if sample is not None and sample < len(ids):
            ids = sorted(random.Random(seed).sample(ids, sample))  # noqa: S311 - a sample, not a secret
        done, bad, results = 0, [], []
        for done, chunk in enumerate(self._chunks(ids), start=1):
            result = self.engine.verify(self.prompts.ingest(chunk.text))
            if result.status != "ok":
                bad.append(chunk.chunk_id)
                results.append(result)
            if on_chunk:
                on_chunk(done, len(ids), result)
        repaired = 0
        if repair and bad:
            with self.store.writing(timeout=self.lock_timeout):
                self.engine.forget([(self.prompts.fingerprint, result.key) for result in results])
                totals = self._keeper.compute(self._chunks(bad))
                repaired = totals.computed + totals.existed
        return VerifyReport(done, tuple(results), repaired)

    def remove(self, doc_ids: Sequence[str]) -> RemoveResult:
        """Remove documents. A chunk and its KV leave with the last document that holds them."""
        with self.store.writing(timeout=self.lock_timeout):
            result = self.store.registry.remove_documents(doc_ids)
            self._keeper.empty_trash()
        return result

    def forget(self, doc_ids: Sequence[str], *, on_chunk: Callable[[int, int], None] | None = None) -> ForgetReport:
        """Remove documents, and have the KV of chunks that only they hold deleted on the server too, at once.

        After remove(), a server keeps that KV until it evicts it. KV that another prefix, model or tenant has of the
        same chunks is not touched.

        Args:
            doc_ids: The documents.
            on_chunk: Called with (done, how many in all) after each chunk.

        Raises:
            EngineUnavailableError: The server, or its KV store, cannot be reached. The documents stay; run it again.
            EngineError: The server wants another key.
        """
        with self.store.writing(timeout=self.lock_timeout):
            return self._keeper.forget(doc_ids, on_chunk=on_chunk)

    def prune(self) -> int:
        """Drop KV of other fingerprints (another model, prefix or tenant); returns how many were dropped."""
        with self.store.writing(timeout=self.lock_timeout):
            self.store.registry.trash_other_kv(self.prompts.fingerprint)
            return self._keeper.empty_trash()

    # -- inside: chunks by their ids, so that a large store's texts are never in memory at once ----------------------

    def _recorded(self) -> set[int]:
        """Chunks whose KV is recorded under the current fingerprint."""
        return {row.chunk_id for row in self.store.registry.kv_rows(self.prompts.fingerprint)}

    def _lacking(self) -> Iterator[int]:
        """Chunks whose KV is not recorded or that the engine does not have, in the order of their ids."""
        recorded = self._recorded()
        chunks = self.store.registry.chunks()
        while batch := list(islice(chunks, _BATCH)):
            absent = self.engine.missing([self.prompts.ingest(chunk.text) for chunk in batch])
            for chunk, gone in zip(batch, absent, strict=True):
                if gone or chunk.chunk_id not in recorded:
                    yield chunk.chunk_id

    def _chunks(self, ids: Sequence[int]) -> Iterator[StoredChunk]:
        for start in range(0, len(ids), _BATCH):
            yield from self.store.registry.chunks(ids[start : start + _BATCH])
