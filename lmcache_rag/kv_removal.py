"""Remove KV that no document needs any more: from the engine, from the store's files, and from servers with all tiers.

A removed chunk's KV is in the registry's trash, with the chunk's text, until it is gone everywhere: if a process is
killed or a server is down, a later command continues. A server stores KV in blocks that are named by all tokens up to
their end, so two chunks that begin with the same tokens share their first blocks; these stay as long as one chunk does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from lmcache_rag import lazy_fill
from lmcache_rag._utils import common_start
from lmcache_rag.errors import LMCacheRAGError

if TYPE_CHECKING:
    from lmcache_rag.engines.base import Engine, EngineInfo, ForgetResult, IngestPrompt
    from lmcache_rag.store import KVPurge, RemoveResult, Store, TrashRow

DISK = "disk"  # name of the store's KV files among the tiers
ELSEWHERE = "their KV is on a server: name it with --engine"
ANOTHER = "their KV is of another model, prefix or tenant than this server is asked with"
_PAGE = 256  # chunks whose texts are in memory at once
_CLEAR_EVERY = 32  # removals between two commits


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


class KVRemover:
    """Removes KV. All methods need the store's writing lock.

    Args:
        store: The store.
        drop: Drops KV by (fingerprint, key), of an engine that keeps it by these.
        engine: Reaches the servers; None: KV on servers waits.
        prompts: Makes the prompts of this model and tenant.
        ttl: Age in seconds at which KV is removed, even if a document needs it; None: never.
    """

    def __init__(
        self,
        store: Store,
        drop: Callable[[list[tuple[str, str]]], None],
        engine: Engine | None = None,
        prompts: IngestPrompts | None = None,
        *,
        ttl: float | None = None,
    ) -> None:
        self._store, self._drop, self._engine, self._prompts, self._ttl = store, drop, engine, prompts, ttl

    def purge(self, *, count: bool = False) -> KVPurge:
        """Remove the KV in the trash. A server that cannot be reached raises nothing: its KV waits.

        Args:
            count: Count what each tier holds, before and after.
        """
        from lmcache_rag.store.types import KVPurge

        registry = self._store.registry
        if self._ttl is not None:
            registry.trash_older_kv(time.time() - self._ttl)
        rows = registry.trash_rows()
        if not rows:
            return KVPurge()
        served = registry.server_fingerprints()
        there: dict[str, list[TrashRow]] = {}
        here = []
        for row in rows:
            if row.fingerprint in served and row.text:
                there.setdefault(row.fingerprint, []).append(row)
            else:
                here.append(row)
        done = self._purge_here(here, count=count) if here else KVPurge()
        for fingerprint, group in there.items():
            done += self._purge_on_servers(fingerprint, group, count=count)
        return done

    def _purge_here(self, rows: Sequence[TrashRow], *, count: bool) -> KVPurge:
        from lmcache_rag.engines.kv_files import KVFiles
        from lmcache_rag.store.types import KVPurge

        pairs = [(row.fingerprint, row.key) for row in rows]
        files = KVFiles(self._store.kv_dir)
        before = {DISK: sum(files.exists(*pair) for pair in pairs)} if count else {}
        self._drop(pairs)
        files.delete(pairs)  # of another engine than this one
        self._store.registry.clear_trash(pairs)
        left = {DISK: sum(files.exists(*pair) for pair in pairs)} if count else {}
        return KVPurge(len(pairs), before=before, left=left)

    def _purge_on_servers(self, fingerprint: str, rows: Sequence[TrashRow], *, count: bool) -> KVPurge:
        from lmcache_rag.engines.base import ForgetsChunks
        from lmcache_rag.store.types import KVPurge

        if self._engine is None or not isinstance(self._engine, ForgetsChunks):
            return KVPurge(waiting=len(rows), why=ELSEWHERE)
        prompts = self._prompts_of(fingerprint)
        if prompts is None:
            return KVPurge(waiting=len(rows), why=ANOTHER)
        lazy_fill.cancel(self._engine)  # or it could be ingested again meanwhile
        done, cleared = KVPurge(), list[tuple[str, str]]()
        results = self._engine.forget_chunks((self._shared(prompts, row.text or "") for row in rows), count=count)
        try:
            for row, result in zip(rows, results, strict=True):
                done += KVPurge(int(result.forgotten), 0, result.why, result.before, result.left)
                if result.forgotten:
                    cleared.append((row.fingerprint, row.key))
                elif not result.left:
                    break  # it cannot do it: nor for the others
                if len(cleared) >= _CLEAR_EVERY:
                    self._store.registry.clear_trash(cleared)
                    cleared.clear()
        except LMCacheRAGError as problem:
            done += KVPurge(why=problem.message)
        finally:
            self._store.registry.clear_trash(cleared)
        return done + KVPurge(waiting=len(rows) - done.dropped)

    def forget(self, doc_ids: Sequence[str], *, on_chunk: Callable[[int, int], None] | None = None) -> ForgetReport:
        """Remove documents, and delete the KV of chunks that only they hold, on the server too, for every prompt.

        The KV is deleted first: a run that is killed or fails leaves the documents, and the next one continues.

        Args:
            doc_ids: The documents.
            on_chunk: Called with (done, how many in all) after each chunk.

        Raises:
            EngineUnavailableError: The engine, or its KV store, cannot be reached. The documents stay.
            EngineError: The engine rejects it.
        """
        from lmcache_rag.engines.base import ForgetsChunks

        if self._engine is not None:
            lazy_fill.cancel(self._engine)
        deleted, staying, why = 0, 0, ""
        gone: list[tuple[str, str]] = []
        if isinstance(self._engine, ForgetsChunks) and self._prompts is not None:
            ids = self._store.registry.chunks_only_in(doc_ids)
            stuck: list[str] = []
            for prompts, held in self._other_prompts(ids):
                for result in self._engine.forget_chunks(self._keepable(held, prompts, set(ids))):
                    _note(result, prompts.fingerprint, gone, stuck)
            for result in self._engine.forget_chunks(self._keepable(ids, self._prompts, set(ids))):
                _note(result, self._prompts.fingerprint, gone, [])
                deleted, staying, why = deleted + result.forgotten, staying + (not result.forgotten), why or result.why
                if on_chunk:
                    on_chunk(deleted + staying, len(ids))
            if len(stuck) > staying:
                deleted, staying, why = max(0, len(ids) - len(stuck)), len(stuck), stuck[0]
        removed = self._store.registry.remove_documents(doc_ids)
        self._store.registry.clear_trash(gone)
        if not staying:
            self.purge()
        return ForgetReport(removed, deleted, staying, why)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _prompts_of(self, fingerprint: str) -> IngestPrompts | None:
        """The prompts of a fingerprint, if they are of this model and tenant."""
        from lmcache_rag.chunk_prompts import ChunkPrompts
        from lmcache_rag.tokenizer import SafeTokenizer

        own = self._prompts
        if own is None or self._engine is None or own.fingerprint == fingerprint:
            return own
        prefix = self._store.registry.prefixes().get(fingerprint)
        parts, tenant = SafeTokenizer.of(self._engine.tokenizer), getattr(own, "tenant", "")
        for neutral in (None, own.neutral_ids, ()) if prefix else ():
            made = ChunkPrompts(parts, own.info, prefix or (), tenant=tenant, neutral=neutral)
            if made.fingerprint == fingerprint:
                return made
        return None

    def _other_prompts(self, chunk_ids: Sequence[int]) -> Iterator[tuple[IngestPrompts, list[int]]]:
        """Other prompts for which KV of these chunks is recorded, with those chunks; of this model and tenant."""
        wanted = set(chunk_ids)
        for fingerprint in self._store.registry.prefixes() if wanted else ():
            if self._prompts is None or fingerprint == self._prompts.fingerprint:
                continue
            held = {row.chunk_id for row in self._store.registry.kv_rows(fingerprint)} & wanted
            made = self._prompts_of(fingerprint) if held else None
            if made is not None:
                yield made, sorted(held)

    def _keepable(self, chunk_ids: Sequence[int], prompts: IngestPrompts, leaving: set[int]) -> Iterator[IngestPrompt]:
        """Prompts of those of the chunks that can have KV."""
        assert self._engine is not None  # noqa: S101 - the caller has one
        room = self._engine.info.context_length - len(prompts.prefix_ids) - len(prompts.neutral_ids)
        for start in range(0, len(chunk_ids), _PAGE):
            for chunk in self._store.registry.chunks(chunk_ids[start : start + _PAGE]):
                if 0 < len(prompts.chunk_ids(chunk.text)) < room:
                    yield self._shared(prompts, chunk.text, leaving)

    def _shared(self, prompts: IngestPrompts, text: str, leaving: Collection[int] = ()) -> IngestPrompt:
        """The prompt of a chunk that leaves, with how many of its first tokens another chunk of the store has.

        Args:
            prompts: Makes it.
            text: The chunk.
            leaving: Chunks that leave with it.
        """
        ids, shared = prompts.chunk_ids(text), 0
        for other in self._store.registry.texts_like(text, without=leaving):
            shared = max(shared, common_start(ids, prompts.chunk_ids(other)))
        return replace(prompts.ingest(text), shared_tokens=shared)


def _note(result: ForgetResult, fingerprint: str, gone: list[tuple[str, str]], stuck: list[str]) -> None:
    if result.forgotten:
        gone.append((fingerprint, result.key))
    else:
        stuck.append(result.why)
