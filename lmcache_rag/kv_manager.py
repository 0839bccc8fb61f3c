"""Keep the engine's KV and the registry's record of it in step; maintain a store: status, warm, verify, remove."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from lmcache_rag import lazy_fill
from lmcache_rag.documents.access import is_gone
from lmcache_rag.documents.versions import is_outdated, was_file

if TYPE_CHECKING:
    from lmcache_rag.engines.base import Engine, EngineInfo, IngestPrompt, KVUsage, PrecomputeResult, VerifyResult
    from lmcache_rag.engines.chunk_cache import KVStore
    from lmcache_rag.prompt import PromptBuilder
    from lmcache_rag.store import DocumentRecord, KVRow, Registry, RemoveResult, Store, StoredChunk, StoreStats
    from lmcache_rag.store_model import Identity

log = logging.getLogger("lmcache_rag")

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


@dataclass(frozen=True, slots=True)
class ForgetReport:
    """Result of a forget.

    Attributes:
        removed: Documents and chunks that were removed from the store.
        deleted: Chunks whose KV was deleted on the server; 0 for an engine that keeps its KV itself.
        staying: Chunks whose KV stays on the server until it is evicted there.
        why: Why it stays.
    """

    removed: RemoveResult
    deleted: int
    staying: int
    why: str


class IngestPrompts(Protocol):
    """Makes the ingest prompts of one prefix: a PromptBuilder, or a ChunkPrompts of messages."""

    info: EngineInfo
    prefix_ids: tuple[int, ...]
    neutral_ids: tuple[int, ...]
    fingerprint: str

    def chunk_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a chunk."""
        ...

    def ingest(self, chunk: str) -> IngestPrompt:
        """Prefix ⧺ neutral passages ⧺ chunk."""
        ...


class KVManager:
    """Computes KV through the engine and records it.

    The engine stores KV before the registry records it. If a process is killed between the two, the next run
    finds the KV by its key and records it without computing it again. Conversely, KV whose last chunk was removed is in
    the registry's trash until the engine has dropped it.

    Args:
        store: The store.
        engine: Computes and keeps KV.
        prompts: Makes the prompts, and with them the keys.
    """

    def __init__(self, store: Store, engine: Engine, prompts: IngestPrompts) -> None:
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
            PrecomputeError: A chunk's KV could not be computed. KV that was computed before is recorded.
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
            self.compute(known, on_chunk=done.append, stop=stop)
        return done[0] if done else None

    def forget(self, doc_ids: Sequence[str], *, on_chunk: Callable[[int, int], None] | None = None) -> ForgetReport:
        """Remove documents, and delete the KV of chunks that only they hold, on the server too, for every prompt.

        The KV is deleted first: a run that is killed or fails leaves the documents, and the next one continues. Needs
        the store's writing lock.

        Args:
            doc_ids: The documents.
            on_chunk: Called with (done, how many in all) after each chunk.

        Raises:
            EngineUnavailableError: The engine, or its KV store, cannot be reached. The documents stay.
            EngineError: The engine rejects it.
        """
        from lmcache_rag.engines.base import ForgetsChunks

        lazy_fill.cancel(self._engine)  # or it could be ingested again meanwhile
        deleted, staying, why = 0, 0, ""
        if isinstance(self._engine, ForgetsChunks):
            ids = self._store.registry.chunks_only_in(doc_ids)
            stuck = [
                result.why
                for prompts, held in self._other_prompts(ids)
                for result in self._engine.forget_chunks(self._keepable(held, prompts))
                if not result.forgotten
            ]
            for result in self._engine.forget_chunks(self._keepable(ids, self._prompts)):
                deleted, staying, why = deleted + result.forgotten, staying + (not result.forgotten), why or result.why
                if on_chunk:
                    on_chunk(deleted + staying, len(ids))
            if len(stuck) > staying:
                deleted, staying, why = max(0, len(ids) - len(stuck)), len(stuck), stuck[0]
        removed = self._store.registry.remove_documents(doc_ids)
        self.empty_trash()
        return ForgetReport(removed, deleted, staying, why)

    def _other_prompts(self, chunk_ids: Sequence[int]) -> Iterator[tuple[IngestPrompts, list[int]]]:
        """Other prompts for which KV of these chunks is recorded, with those chunks; of this model and tenant."""
        from lmcache_rag.chunk_prompts import ChunkPrompts
        from lmcache_rag.tokenizer import SafeTokenizer

        wanted, own = set(chunk_ids), self._prompts
        for fingerprint, prefix in self._store.registry.prefixes().items() if wanted else ():
            if fingerprint == own.fingerprint:
                continue
            parts = SafeTokenizer.of(self._engine.tokenizer)
            held = {row.chunk_id for row in self._store.registry.kv_rows(fingerprint)} & wanted
            tenant = getattr(own, "tenant", "")
            for neutral in (None, own.neutral_ids, ()) if held else ():
                made = ChunkPrompts(parts, own.info, prefix, tenant=tenant, neutral=neutral)
                if made.fingerprint == fingerprint:
                    yield made, sorted(held)
                    break

    def _keepable(self, chunk_ids: Sequence[int], prompts: IngestPrompts) -> Iterator[IngestPrompt]:
        """Prompts of those of the chunks that can have KV."""
        room = self._engine.info.context_length - len(prompts.prefix_ids) - len(prompts.neutral_ids)
        for start in range(0, len(chunk_ids), _PAGE):
            for chunk in self._store.registry.chunks(chunk_ids[start : start + _PAGE]):
                if 0 < len(prompts.chunk_ids(chunk.text)) < room:
                    yield prompts.ingest(chunk.text)

    def empty_trash(self) -> int:
        """Let the engine drop KV that no chunk needs any more. Needs the store's writing lock."""
        return empty_trash(self._store, self._engine.forget)

    def _record(self, rows: list[KVRow]) -> None:
        from lmcache_rag.store.registry import PREFIX

        if rows:
            info = self._prompts.info
            facts = {"model": info.model, "dtype": info.dtype, PREFIX: list(self._prompts.prefix_ids)}
            self._store.registry.record_kv(self._prompts.fingerprint, facts, rows)
            rows.clear()


def empty_trash(store: Store, forget: Callable[[list[tuple[str, str]]], None]) -> int:
    """Drop KV that no chunk needs any more, by this function; returns how much. Needs the store's writing lock."""
    pairs = store.registry.trash()
    if pairs:
        forget(pairs)
        store.registry.clear_trash(pairs)
    return len(pairs)


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
    return [record for record in registry.documents() if was_file(record) and is_gone(record.doc_id)]


def outdated_documents(registry: Registry) -> list[DocumentRecord]:
    """The documents that were read by another version of their parser, or of the splitter, than today's."""
    return [record for record in registry.documents() if is_outdated(record)]


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
        if registry.stats(fingerprint).chunks_without_kv or registry.trash(1):
            return False
        return all(self._kv.has(fingerprint, row.key) for row in registry.kv_rows(fingerprint))

    def remove(self, doc_ids: Sequence[str]) -> RemoveResult:
        """Remove documents; see Maintainer.remove."""
        with self._store.writing(timeout=self._lock_timeout):
            result = self._store.registry.remove_documents(doc_ids)
            empty_trash(self._store, self._kv.forget_chunks)
        return result


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
        self._kv = KVManager(store, engine, prompts)

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

    def warm(self, *, on_chunk: Callable[[int, int, PrecomputeResult], None] | None = None) -> KVTotals:
        """Compute the KV of every chunk for which the engine has none, whether or not it was recorded once.

        Args:
            on_chunk: Called with (done, how many in all, result) after each.

        Raises:
            StoreLockedError: Another process is writing.
            PrecomputeError: KV could not be computed or stored; run again to continue.
        """
        with self.store.writing(timeout=self.lock_timeout):
            self._kv.empty_trash()
            todo = list(self._lacking())
            done = 0

            def tick(result: PrecomputeResult) -> None:
                nonlocal done
                done += 1
                if on_chunk:
                    on_chunk(done, len(todo), result)

            return self._kv.compute(self._chunks(todo), on_chunk=tick)

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

    def remove(self, doc_ids: Sequence[str]) -> RemoveResult:
        """Remove documents. A chunk and its KV are removed with the last document that holds them."""
        with self.store.writing(timeout=self.lock_timeout):
            result = self.store.registry.remove_documents(doc_ids)
            self._kv.empty_trash()
        return result

    def forget(self, doc_ids: Sequence[str], *, on_chunk: Callable[[int, int], None] | None = None) -> ForgetReport:
        """Remove documents, and delete the KV of chunks that only they hold, on the server too, at once.

        After remove(), a server keeps that KV until it evicts it. KV that another prefix, model or tenant has of the
        same chunks is not touched.

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
        """Drop KV of other fingerprints (another model, prefix or tenant); returns how many were dropped."""
        with self.store.writing(timeout=self.lock_timeout):
            self.store.registry.trash_other_kv(self.prompts.fingerprint)
            return self._kv.empty_trash()

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
