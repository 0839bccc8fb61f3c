"""Keep the engine's KV and the registry's record of it in step; maintain a store: status, warm, verify, remove."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from lmcache_rag.documents.access import is_gone
from lmcache_rag.documents.versions import is_outdated, was_file
from lmcache_rag.errors import ConfigError
from lmcache_rag.kv_policy import KVPolicy, RateLimit
from lmcache_rag.kv_removal import ForgetReport, IngestPrompts, KVRemover

if TYPE_CHECKING:
    from lmcache_rag.engines.base import Engine, IngestPrompt, KVUsage, PrecomputeResult, VerifyResult
    from lmcache_rag.engines.chunk_cache import KVStore
    from lmcache_rag.prompt import PromptBuilder
    from lmcache_rag.store import DocumentRecord, KVPurge, KVRow, Registry, RemoveResult, Store, StoredChunk, StoreStats
    from lmcache_rag.store_model import Identity

log = logging.getLogger("lmcache_rag")

_USUAL = KVPolicy()
_PAGE = 256  # chunks whose texts are in memory at once
_RECORD_EVERY = 8  # chunks between two commits; a killed run repeats no computation, see KVManager


@dataclass(frozen=True, slots=True)
class KVTotals:
    """Result of a run of KV computation. `existed`: chunks whose KV existed already and was only recorded."""

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


class KVManager:
    """Computes KV through the engine and records it.

    The engine stores KV before the registry records it. If a process is killed between the two, the next run
    finds the KV by its key and records it without computing it again. Conversely, KV whose last chunk was removed is in
    the registry's trash until the engine has dropped it.

    Args:
        store: The store.
        engine: Computes and keeps KV.
        prompts: Makes the prompts, and with them the keys.
        policy: How fast KV is computed, and how long it is kept.
    """

    def __init__(self, store: Store, engine: Engine, prompts: IngestPrompts, *, policy: KVPolicy = _USUAL) -> None:
        self._store, self._engine, self._prompts = store, engine, prompts
        self._remover = KVRemover(store, lambda pairs: engine.forget(pairs), engine, prompts, ttl=policy.ttl)
        self._rate_limit = RateLimit(policy.rate)
        self._pins = policy.pin is True

    def compute(
        self,
        chunks: Iterable[StoredChunk],
        *,
        on_chunk: Callable[[PrecomputeResult], None] | None = None,
        stop: threading.Event | None = None,
        pin: bool | None = None,
    ) -> KVTotals:
        """Compute and record the KV of these chunks, skipping what the engine has. Needs the store's writing lock.

        Args:
            chunks: The chunks.
            on_chunk: Called after each.
            stop: Once it is set, failed chunks are not retried.
            pin: Whether each is pinned before its KV is computed; None: by the policy.

        Raises:
            PinRefusedError: A chunk cannot be pinned; its KV is not computed then.
            PrecomputeError: A chunk's KV could not be computed. KV that was computed before is recorded.
        """
        from lmcache_rag.store import KVRow

        totals = KVTotals()
        rows: list[KVRow] = []
        waiting: list[StoredChunk] = []

        def prompts() -> Iterator[IngestPrompt]:
            for chunk in chunks:
                prompt = self._prompts.ingest(chunk.text)
                self._rate_limit.wait(len(prompt.chunk_ids), stop)
                if self._pins if pin is None else pin:
                    self.pin(prompt)
                waiting.append(chunk)
                yield prompt

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

    def pin(self, prompt: IngestPrompt, *, pin: bool = True) -> None:
        """Pin a chunk's KV in the engine's memory, or end that.

        Raises:
            ConfigError: The engine evicts nothing that could be pinned.
            PinRefusedError: It has no room for more pins.
        """
        from lmcache_rag.engines.base import PinsChunks

        if not isinstance(self._engine, PinsChunks):
            raise ConfigError(
                f"Chunks are pinned on a server; the engine is {self._engine.info.engine}.",
                remedy="Name the server with --engine URL, or leave out --pin.",
            )
        self._engine.pin_chunk(prompt, pin=pin)

    def keep(self, texts: Sequence[str]) -> KVTotals:
        """Compute and record the KV of texts that are in the store, unless another process writes to it."""
        if self._store.read_only:
            return KVTotals()
        with self._store.writing(timeout=0):
            known = self._store.registry.stored_texts(texts).values()
            absent = self._engine.missing([self._prompts.ingest(chunk.text) for chunk in known])
            return self.compute([chunk for chunk, gone in zip(known, absent, strict=True) if gone])

    def fill(self, text: str, stop: threading.Event) -> PrecomputeResult | None:
        """Compute the KV of a text that a question used; it is recorded if the text is in the store.

        Args:
            text: The text.
            stop: Once it is set, failed chunks are not retried.

        Returns:
            The engine's result; None if it has the KV already, or if the store cannot be written.

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
            self.compute(known, on_chunk=done.append, stop=stop, pin=False)
        return done[0] if done else None

    def forget(self, doc_ids: Sequence[str], *, on_chunk: Callable[[int, int], None] | None = None) -> ForgetReport:
        """Remove documents, their KV first; see KVRemover.forget."""
        return self._remover.forget(doc_ids, on_chunk=on_chunk)

    def purge(self, *, count: bool = False) -> KVPurge:
        """Remove KV that no chunk needs any more; see KVRemover.purge."""
        return self._remover.purge(count=count)

    def empty_trash(self) -> int:
        """As purge(); returns of how many chunks KV was removed. What waits for a server is in the log."""
        done = self.purge()
        if done.waiting:
            log.warning("KV of %d removed chunk(s) is still on a server: %s", done.waiting, done.why)
        return done.dropped

    def _record(self, rows: list[KVRow]) -> None:
        from lmcache_rag.store.registry import PREFIX

        if rows:
            info = self._prompts.info
            facts = {
                "engine": info.engine,
                "model": info.model,
                "dtype": info.dtype,
                PREFIX: list(self._prompts.prefix_ids),
            }
            self._store.registry.record_kv(self._prompts.fingerprint, facts, rows)
            rows.clear()


# -- maintenance ------------------------------------------------------------------------------------------------------

_BATCH = 256  # chunks whose texts are in memory at once


@dataclass(frozen=True, slots=True)
class Status:
    """Status of a store.

    Attributes:
        store: Counts by the registry.
        usage: KV that the engine holds.
        fingerprint: The current one: KV of others is stale.
        model: The engine's model.
        can_blend: Whether it can be blended.
        why_not: The reason when it cannot.
        gone: Ids of documents whose files are gone.
        outdated: Ids of documents that another version of their parser, or of the splitter, read.
    """

    store: StoreStats
    usage: KVUsage
    fingerprint: str
    model: str
    can_blend: bool
    why_not: str
    gone: tuple[str, ...] = ()
    outdated: tuple[str, ...] = ()


def gone_documents(registry: Registry) -> list[DocumentRecord]:
    """The documents that were read from files which are not there any more. Others never count: they had no file."""
    return [record for record in registry.named_by_source() if was_file(record) and is_gone(record.doc_id)]


def outdated_documents(registry: Registry) -> list[DocumentRecord]:
    """The documents that were read by another version of their parser, or of the splitter, than today's."""
    return [record for record in registry.named_by_source() if is_outdated(record)]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Outcome of checking stored KV.

    Attributes:
        checked: Chunks that were checked.
        bad: Chunks whose KV was missing, damaged or different.
        repaired: How many of them were repaired.
    """

    checked: int
    bad: tuple[VerifyResult, ...]
    repaired: int


class StoredKV:
    """What can be done to a store's KV files without the model that computed them.

    Args:
        store: The store.
        kv: Its files.
        lock_timeout: Seconds to wait for another writer.
    """

    def __init__(self, store: Store, kv: KVStore, *, lock_timeout: float) -> None:
        self._store, self._kv, self._lock_timeout = store, kv, lock_timeout

    def status(self, known: Identity) -> Status:
        """Status of the store, whose KV is computed with this."""
        from lmcache_rag.engines.base import KVUsage

        gone = tuple(record.doc_id for record in gone_documents(self._store.registry))
        outdated = tuple(record.doc_id for record in outdated_documents(self._store.registry))
        stats = self._store.registry.stats(known.fingerprint)
        usage = KVUsage(*self._kv.files.usage())
        return Status(stats, usage, known.fingerprint, known.model, known.can_blend, known.why_not, gone, outdated)

    def is_complete(self, fingerprint: str) -> bool:
        """Whether every chunk has its KV, recorded and in a file, and no other KV waits to be dropped."""
        registry = self._store.registry
        if registry.stats(fingerprint).chunks_without_kv or registry.trash(1, here=True):
            return False
        return all(self._kv.has(fingerprint, row.key) for row in registry.kv_rows(fingerprint))

    def remove(self, doc_ids: Sequence[str], *, count: bool = False) -> RemoveResult:
        """Remove documents; see Maintainer.remove. KV on servers waits."""
        with self._store.writing(timeout=self._lock_timeout):
            result = self._store.registry.remove_documents(doc_ids)
            return replace(result, kv=KVRemover(self._store, self._kv.forget_chunks).purge(count=count))


class Maintainer:
    """Status, warm, verify and remove.

    Args:
        store: The store.
        engine: Keeps the KV.
        prompts: Makes the prompts.
        lock_timeout: Seconds to wait for another writer.
        policy: How fast KV is computed, and how long it is kept.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        prompts: PromptBuilder,
        *,
        lock_timeout: float = 30.0,
        policy: KVPolicy = _USUAL,
    ) -> None:
        self.store, self.engine, self.prompts = store, engine, prompts
        self.lock_timeout = lock_timeout
        self._kv = KVManager(store, engine, prompts, policy=policy)

    def status(self) -> Status:
        """Status of the store. Writes nothing and loads no weights."""
        info = self.engine.info
        return Status(
            self.store.registry.stats(self.prompts.fingerprint),
            self.engine.usage(),
            self.prompts.fingerprint,
            info.model,
            info.can_blend,
            info.why_not,
            tuple(record.doc_id for record in gone_documents(self.store.registry)),
            tuple(record.doc_id for record in outdated_documents(self.store.registry)),
        )

    def warm(
        self,
        chunk_ids: Sequence[int] | None = None,
        *,
        on_chunk: Callable[[int, int, PrecomputeResult], None] | None = None,
    ) -> KVTotals:
        """Compute the KV of every chunk for which the engine has none, whether or not it was recorded once.

        Args:
            chunk_ids: Only these chunks, in this order; None: all.
            on_chunk: Called with (done, how many in all, result) after each.

        Raises:
            StoreLockedError: Another process is writing.
            PrecomputeError: KV could not be computed or stored; run again to continue.
        """
        with self.store.writing(timeout=self.lock_timeout):
            self._kv.empty_trash()
            todo = list(self._lacking())
            if chunk_ids is not None:
                lacking = set(todo)
                todo = [chunk_id for chunk_id in dict.fromkeys(chunk_ids) if chunk_id in lacking]
            done = 0

            def tick(result: PrecomputeResult) -> None:
                nonlocal done
                done += 1
                if on_chunk:
                    on_chunk(done, len(todo), result)

            return self._kv.compute(self._chunks(todo), on_chunk=tick, pin=False)

    def pin(
        self,
        chunk_ids: Sequence[int] | None = None,
        *,
        pin: bool = True,
        on_chunk: Callable[[int, int], None] | None = None,
    ) -> int:
        """Pin the KV of chunks in a server's memory, or end that; returns of how many. What is missing is not computed.

        Args:
            chunk_ids: Only these chunks, in this order; None: all.
            pin: False ends the pins.
            on_chunk: Called with (done, how many in all) after each.

        Raises:
            ConfigError: The engine is no server.
            PinRefusedError: There is no room for more pins. Those that were pinned stay so.
        """
        ids = [chunk.chunk_id for chunk in self.store.registry.chunks()] if chunk_ids is None else list(chunk_ids)
        done = 0
        for chunk in self._chunks(ids):
            self._kv.pin(self.prompts.ingest(chunk.text), pin=pin)
            done += 1
            if on_chunk:
                on_chunk(done, len(ids))
        return done

    async def awarm(self) -> KVTotals:
        """Async version of warm, in a thread."""
        return await asyncio.to_thread(self.warm)

    def verify(
        self,
        *,
        sample: int | None = 20,
        repair: bool = True,
        seed: int | None = None,
        on_chunk: Callable[[int, int, VerifyResult], None] | None = None,
    ) -> VerifyReport:
        """Compute the KV of some chunks again and compare; wrong KV is dropped and, with `repair`, recomputed.

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
                totals = self._kv.compute(self._chunks(bad))
                repaired = totals.computed + totals.existed
        return VerifyReport(done, tuple(results), repaired)

    def remove(self, doc_ids: Sequence[str], *, count: bool = False) -> RemoveResult:
        """Remove documents. A chunk and its KV are removed with the last document that holds them, on servers too.

        If a server cannot be reached, the documents leave all the same; the KV there waits for a call that reaches it.

        Args:
            doc_ids: The documents.
            count: Count what each tier held of the removed chunks, before and after.
        """
        with self.store.writing(timeout=self.lock_timeout):
            result = self.store.registry.remove_documents(doc_ids)
            return replace(result, kv=self._kv.purge(count=count))

    def forget(self, doc_ids: Sequence[str], *, on_chunk: Callable[[int, int], None] | None = None) -> ForgetReport:
        """Remove documents as remove(), but only once the KV of chunks that only they hold is deleted on the server.

        KV that another model or tenant has of the same chunks is not touched.

        Args:
            doc_ids: The documents.
            on_chunk: Called with (done, how many in all) after each chunk.

        Raises:
            EngineUnavailableError: The server, or its KV store, cannot be reached. The documents stay; run it again.
            EngineError: The server rejected the key.
        """
        with self.store.writing(timeout=self.lock_timeout):
            return self._kv.forget(doc_ids, on_chunk=on_chunk)

    def prune(self) -> int:
        """Drop KV of other fingerprints (another model, prefix or tenant), and KV that is too old; returns how many."""
        with self.store.writing(timeout=self.lock_timeout):
            self.store.registry.trash_other_kv(self.prompts.fingerprint)
            dropped = self._kv.empty_trash()
            self.store.registry.trash_other_kv(self.prompts.fingerprint)  # facts that were needed to remove it
            return dropped

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
