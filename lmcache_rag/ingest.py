"""Ingest documents: split, embed, index, and compute each chunk's KV once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from lmcache_rag._utils import well_formed
from lmcache_rag.documents import Document, ReadLimits, find_files
from lmcache_rag.documents.finding import named_by
from lmcache_rag.documents.loading import load_changed
from lmcache_rag.documents.versions import is_outdated
from lmcache_rag.errors import ConfigError, DocumentError
from lmcache_rag.kv_manager import KVManager, KVTotals, gone_documents
from lmcache_rag.kv_policy import KVPolicy

if TYPE_CHECKING:
    from lmcache_rag.documents import Chunk, Splitter
    from lmcache_rag.embedding import Embedder
    from lmcache_rag.engines.base import Engine
    from lmcache_rag.prompt import PromptBuilder
    from lmcache_rag.store import DocumentRecord, NewChunk, NewDocument, Registry, Store, StoredChunk

log = logging.getLogger("lmcache_rag.ingest")

_USUAL = KVPolicy()
_BATCH_CHUNKS = 64  # new chunks that are embedded and committed together
MOST_CHARACTERS = 100_000_000  # of documents that a preview keeps
_BATCH_DOCUMENTS = 256  # documents between two commits, even if they have few chunks

_RATE_TOKENS = 2000  # of fewer a rate is not worth keeping


def rate_key(fingerprint: str) -> str:
    """Name of the store's fact how many tokens of KV are computed in a second."""
    return f"ingest_rate:{fingerprint}"


Step: TypeAlias = Literal["document", "kv"]


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of one step: a document was read (tokens 0), or a chunk's KV exists now.

    Attributes:
        step: The step.
        done: How many are done.
        known: How many are known to be done in all, so far.
        tokens: Tokens of this step.
    """

    step: Step
    done: int
    known: int
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """A source that could not be ingested, and why."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class Unchanged:
    """A file that the store holds already; it was not parsed."""

    doc_id: str


@dataclass(frozen=True, slots=True)
class IngestReport:
    """Result of an ingestion.

    Attributes:
        added: Ids of new documents.
        updated: Ids of documents whose content or splitting changed.
        unchanged: How many documents were the same.
        failed: Sources that could not be read.
        chunks_added: Chunks that the store did not hold before.
        chunks_removed: Chunks that no document holds any more.
        kv: KV computed, and found to exist already.
        seconds: How long it took.
        pruned: Ids of documents that were removed since their files are gone.
        gone: Ids of documents whose files are gone and that stay in the store.
    """

    added: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    unchanged: int = 0
    failed: tuple[Failure, ...] = ()
    chunks_added: int = 0
    chunks_removed: int = 0
    kv: KVTotals = field(default_factory=KVTotals)
    seconds: float = 0.0
    pruned: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class IngestPlan:
    """What an ingestion would do.

    Attributes:
        documents: Documents that are new or have changed.
        unchanged: Documents that are the same.
        failed: Sources that cannot be read.
        chunks: Chunks that the store does not hold.
        tokens: Their tokens.
        kv_bytes: Size of the KV that would be computed.
        gone: Documents that would be removed with `prune`.
        kv_chunks: Chunks whose KV would be computed: the new ones, and those of unchanged documents that lack it.
        kv_tokens: Their tokens.
        changed: Documents of the store that would change.
    """

    documents: int
    unchanged: int
    failed: tuple[Failure, ...]
    chunks: int
    tokens: int
    kv_bytes: int
    gone: tuple[str, ...] = ()
    kv_chunks: int = 0
    kv_tokens: int = 0
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preview:
    """Sources that were read once, with the plan; `Ingestor.ingest` takes it in the place of the sources.

    Attributes:
        plan: What the ingestion would do.
        names: The files, folders and globs among the sources.
        items: What they mean. Documents beyond a size in all are not kept: their paths stand there.
        chunks: The chunks of the documents that are kept, by document id and content hash.
        reparse: Whether documents that another version of their parser read are among the items.
    """

    plan: IngestPlan
    names: tuple[str | Path, ...]
    items: tuple[Document | Failure | Path, ...]
    chunks: Mapping[tuple[str, str], list[Chunk]]
    reparse: bool = False

    @property
    def found(self) -> bool:
        """Whether there is any document."""
        return self.plan.documents + self.plan.unchanged > 0


class Ingestor:
    """Fills a store. It can be killed at any time and run again: finished work is not repeated.

    Args:
        store: The store.
        engine: Computes KV.
        embedder: Embeds chunks.
        prompts: Makes the prompts.
        splitter: Cuts documents into chunks.
        on_progress: Called after each step, in the calling thread.
        lock_timeout: Seconds to wait for another writer.
        limits: Most time and memory for reading one file; None: by environment, else 120 s and 2 GiB.
        policy: When KV is computed, how fast, and how long it is kept.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        embedder: Embedder,
        prompts: PromptBuilder,
        splitter: Splitter,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        lock_timeout: float = 30.0,
        limits: ReadLimits | None = None,
        policy: KVPolicy = _USUAL,
    ) -> None:
        self.store, self.engine, self.embedder = store, engine, embedder
        self.prompts, self.splitter = prompts, splitter
        self.kv = policy.mode == "now"
        self.on_progress = on_progress or (lambda progress: None)
        self.lock_timeout = lock_timeout
        self.limits = limits
        self._kv = KVManager(store, engine, prompts, policy=policy)

    def ingest(
        self,
        sources: Iterable[str | Path | Document] | Preview,
        *,
        kv: bool | None = None,
        prune: bool = False,
        reparse: bool = False,
    ) -> IngestReport:
        """Ingest files, folders, globs and documents. A source that cannot be read never stops the others.

        A file with the content that was read before is not read again, even if its parser has changed since.

        Args:
            sources: What to ingest, or the preview of it.
            kv: False only indexes; None: as the constructor was told.
            prune: Remove documents whose files are gone, if the sources name them or if a file with the same content
                is in the store under another path.
            reparse: Read files again that another version of their parser, or of the splitter, read.

        Raises:
            StoreLockedError: Another process is writing to the store.
            StoreError: The store cannot be written, or was made with another embedder.
            PrecomputeError: KV could not be computed or stored; run again to continue.
        """
        with_kv = self.kv if kv is None else kv
        begin = time.perf_counter()
        names: list[str | Path] = []
        items: Iterator[str | Path | Document | Failure]
        chunks: Mapping[tuple[str, str], list[Chunk]] = {}
        if isinstance(sources, Preview):
            names, chunks, items = list(sources.names), sources.chunks, iter(sources.items)
            reparse = reparse or sources.reparse
        else:
            items = _noted(sources, names)
        with self.store.writing(timeout=self.lock_timeout):
            run = _Run(self, with_kv, chunks, reparse=reparse)
            known = _known(self.store.registry, self.splitter, reparse=reparse)
            for item in expand(items, on_found=run.expect, is_known=known, limits=self.limits):
                run.take(item)
            run.flush()
            run.keep_rate()
            run.look_for_gone(names, prune=prune)
        return replace(run.report(), seconds=time.perf_counter() - begin)

    async def aingest(
        self,
        sources: Iterable[str | Path | Document] | Preview,
        *,
        kv: bool | None = None,
        prune: bool = False,
        reparse: bool = False,
    ) -> IngestReport:
        """Async version of ingest, in a thread."""
        return await asyncio.to_thread(self.ingest, sources, kv=kv, prune=prune, reparse=reparse)

    def plan(self, sources: Iterable[str | Path | Document], *, reparse: bool = False) -> IngestPlan:
        """Return what ingest would do. Writes nothing."""
        return preview(
            sources,
            self.splitter,
            self.prompts,
            self.store.registry,
            most_characters=0,
            reparse=reparse,
            limits=self.limits,
        ).plan

    def is_unchanged(self, document: Document, *, reparse: bool = False) -> bool:
        """Whether the store holds exactly this document, split into chunks of this size."""
        return _is_unchanged(self.store.registry, self.splitter, document, reparse=reparse)


class _Run:
    """One ingestion: gathers documents and commits them batch by batch."""

    def __init__(
        self, ingestor: Ingestor, with_kv: bool, chunks: Mapping[tuple[str, str], list[Chunk]], *, reparse: bool
    ) -> None:
        self._by = ingestor
        self._reparse = reparse
        self._same: set[str] = set()  # documents of the batch that were read again and gave the same chunks
        self._split = chunks  # of documents that were read before
        self._with_kv = with_kv
        self._pending: dict[str, tuple[Document, list[Chunk]]] = {}
        self._without_kv: list[str] = []  # documents whose chunks may still lack KV
        self._report = IngestReport()
        self._added: list[str] = []
        self._updated: list[str] = []
        self._documents = self._documents_known = self._kv_done = self._kv_known = 0
        self._seconds = 0.0  # in which KV was computed
        ingestor.store.registry.claim_embedder(ingestor.embedder.fingerprint, ingestor.embedder.dimension)
        ingestor._kv.empty_trash()

    def report(self) -> IngestReport:
        return replace(self._report, added=tuple(self._added), updated=tuple(self._updated))

    def expect(self, documents: int) -> None:
        """Count documents that are still to come."""
        self._documents_known += documents

    def take(self, item: Document | Failure | Unchanged) -> None:
        """Take one source; commits when a batch is full."""
        self._documents += 1
        if isinstance(item, Failure):
            self._add(failed=(*self._report.failed, item))
            log.warning("%s: %s", item.source, item.reason)
        elif isinstance(item, Unchanged) or self._by.is_unchanged(item, reparse=self._reparse):
            self._add(unchanged=self._report.unchanged + 1)
            self._without_kv.append(item.doc_id)
        else:
            if item.doc_id in self._pending:  # ingested twice: the later one is stored
                self.flush()
            chunks = self._split.get((item.doc_id, item.content_hash))
            chunks = self._by.splitter.split_document(item) if chunks is None else chunks
            self._pending[item.doc_id] = (item, chunks)
            if self._reparse and _gives_same(self._by.store.registry, item, chunks):
                self._same.add(item.doc_id)
        self._by.on_progress(Progress("document", self._documents, self._documents_known))
        waiting = sum(len(chunks) for _, chunks in self._pending.values())
        if waiting >= _BATCH_CHUNKS or len(self._pending) + len(self._without_kv) >= _BATCH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        """Embed, index and commit the batch, then compute its KV."""
        if self._pending:
            registry = self._by.store.registry
            results = registry.put_documents(self._new_documents(), embedder=self._by.embedder.fingerprint)
            self._without_kv += [result.doc_id for result in results]
            updated = [r.doc_id for r in results if r.status == "updated" and r.doc_id not in self._same]
            self._added += (result.doc_id for result in results if result.status == "added")
            self._updated += updated
            self._add(
                unchanged=self._report.unchanged + len(self._same),
                chunks_added=self._report.chunks_added + sum(r.added_chunks for r in results),
                chunks_removed=self._report.chunks_removed + sum(r.removed_chunks for r in results),
            )
            self._pending.clear()
            self._same.clear()
            self._by._kv.empty_trash()
        if self._with_kv and self._without_kv:
            self._compute_kv(self._without_kv)
        self._without_kv = []

    def keep_rate(self) -> None:
        """Record how fast KV was computed, so that the next ingestion can say how long it takes."""
        kv = self._report.kv
        if not kv.existed and kv.tokens >= _RATE_TOKENS and self._seconds > 0:
            rate = f"{kv.tokens / self._seconds:.1f}"
            self._by.store.registry.set_meta(rate_key(self._by.prompts.fingerprint), rate)

    def look_for_gone(self, names: list[str | Path], *, prune: bool) -> None:
        """Report documents whose files are gone; with `prune` remove those that were named or have moved."""
        registry = self._by.store.registry
        gone = gone_documents(registry)
        if prune and gone:
            pruned = _prunable(registry, gone, names)
            removed = registry.remove_documents(pruned)
            self._by._kv.empty_trash()
            gone = [record for record in gone if record.doc_id not in pruned]
            self._add(pruned=tuple(pruned), chunks_removed=self._report.chunks_removed + removed.removed_chunks)
        self._add(gone=tuple(record.doc_id for record in gone))

    def _compute_kv(self, doc_ids: list[str]) -> None:
        by = self._by
        chunks: list[StoredChunk] = by.store.registry.chunks_without_kv(by.prompts.fingerprint, doc_ids=doc_ids)
        self._kv_known += len(chunks)

        def tick(result: object) -> None:
            self._kv_done += 1
            tokens = getattr(result, "tokens", 0)
            by.on_progress(Progress("kv", self._kv_done, self._kv_known, tokens))

        begin = time.perf_counter()
        totals = by._kv.compute(chunks, on_chunk=tick)
        self._seconds += time.perf_counter() - begin
        self._add(kv=self._report.kv + totals)

    def _new_documents(self) -> list[NewDocument]:
        from lmcache_rag.store import NewChunk, NewDocument

        texts = list(dict.fromkeys(chunk.text for _, chunks in self._pending.values() for chunk in chunks))
        known = {chunk.text for chunk in self._by.store.registry.known_texts(texts).values()}
        new = [text for text in texts if text not in known]
        vectors = dict(zip(new, self._by.embedder.embed_documents(new), strict=True))

        def stored(chunk: Chunk) -> NewChunk:
            return NewChunk(chunk.text, chunk.tokens, chunk.start, vectors.get(chunk.text), chunk.metadata)

        return [
            NewDocument(
                doc_id=document.doc_id,
                content_hash=document.content_hash,
                splitter=self._by.splitter.fingerprint,
                source=document.source,
                chunks=[stored(chunk) for chunk in chunks],
                metadata=dict(document.metadata),
                parser=document.parser,
            )
            for document, chunks in self._pending.values()
        ]

    def _add(self, **changes: object) -> None:
        self._report = replace(self._report, **changes)  # type: ignore[arg-type]


def preview(
    sources: Iterable[str | Path | Document],
    splitter: Splitter,
    prompts: PromptBuilder,
    registry: Registry | None,
    *,
    most_characters: int = MOST_CHARACTERS,
    reparse: bool = False,
    limits: ReadLimits | None = None,
) -> Preview:
    """Read sources and find out what their ingestion would do. Writes nothing.

    Args:
        sources: What would be ingested.
        splitter: Cuts documents into chunks.
        prompts: Makes the prompts.
        registry: Of the store; None if there is no store yet.
        most_characters: Most characters of documents that are kept, so that they need not be read again.
        reparse: As Ingestor.ingest.
        limits: Most time and memory for reading one file.
    """
    documents, failed, unchanged, changed = 0, list[Failure](), list[str](), list[str]()
    new: dict[str, int] = {}
    kept: dict[tuple[str, str], list[Chunk]] = {}
    items, names = list[Document | Failure | Path](), list[str | Path]()
    room = most_characters
    known_file = None if registry is None else _known(registry, splitter, reparse=reparse)
    for item in expand(_noted(sources, names), is_known=known_file, limits=limits):
        if isinstance(item, Failure):
            failed.append(item)
            items.append(item)
            continue
        if isinstance(item, Unchanged):
            unchanged.append(item.doc_id)
            items.append(Path(item.doc_id))
            continue
        room -= len(item.text)
        # A document that a program gave cannot be read again, so it is kept in any case.
        from_file = item.doc_id == item.source and Path(item.doc_id).is_absolute()
        items.append(item if room >= 0 or not from_file else Path(item.doc_id))
        if registry is not None and _is_unchanged(registry, splitter, item, reparse=reparse):
            unchanged.append(item.doc_id)
            continue
        chunks = splitter.split_document(item)
        if room >= 0:
            kept[item.doc_id, item.content_hash] = chunks
        if registry is not None and reparse and _gives_same(registry, item, chunks):
            unchanged.append(item.doc_id)
            continue
        documents += 1
        if registry is not None and registry.document(item.doc_id) is not None:
            changed.append(item.doc_id)
        known = registry.known_texts([c.text for c in chunks]).values() if registry is not None else ()
        texts = {chunk.text for chunk in known}
        new |= {c.text: c.tokens for c in chunks if c.text not in texts}
    tokens = sum(new.values())
    lacking: list[StoredChunk] = []
    gone: list[str] = []
    if registry is not None:
        lacking = registry.chunks_without_kv(prompts.fingerprint, doc_ids=unchanged)
        gone = _prunable(registry, gone_documents(registry), names)
    kv_tokens = tokens + sum(chunk.tokens for chunk in lacking)
    plan = IngestPlan(
        documents=documents,
        unchanged=len(unchanged),
        failed=tuple(failed),
        chunks=len(new),
        tokens=tokens,
        kv_bytes=kv_tokens * prompts.info.kv_bytes_per_token,
        gone=tuple(gone),
        kv_chunks=len(new) + len(lacking),
        kv_tokens=kv_tokens,
        changed=tuple(changed),
    )
    return Preview(plan, tuple(names), tuple(items), kept, reparse)


def _known(registry: Registry, splitter: Splitter, *, reparse: bool) -> Callable[[str, str], bool]:
    """Whether a file, by id and content hash, is in the store and need not be parsed."""

    def known(doc_id: str, content_hash: str) -> bool:
        record = registry.document(doc_id)
        return record is not None and _still_holds(record, splitter, content_hash, reparse=reparse)

    return known


def _still_holds(record: DocumentRecord, splitter: Splitter, content_hash: str, *, reparse: bool) -> bool:
    same = record.content_hash == content_hash and record.splitter.endswith(f", {splitter.sizes}")
    return same and not (reparse and is_outdated(record))


def _is_unchanged(registry: Registry, splitter: Splitter, document: Document, *, reparse: bool) -> bool:
    record = registry.document(document.doc_id)
    return (
        record is not None
        and record.metadata == dict(document.metadata)
        and _still_holds(record, splitter, document.content_hash, reparse=reparse)
    )


def _gives_same(registry: Registry, document: Document, chunks: Sequence[Chunk]) -> bool:
    """Whether the store holds the document with the same chunks."""
    record = registry.document(document.doc_id)
    if record is None or record.content_hash != document.content_hash:
        return False
    return [chunk.text for chunk in registry.document_chunks(document.doc_id)] == [chunk.text for chunk in chunks]


def _prunable(registry: Registry, gone: Sequence[DocumentRecord], names: Iterable[str | Path]) -> list[str]:
    """Ids of documents without files that these sources name, or whose content is in the store under another path."""
    ids = {record.doc_id for record in gone}
    still = {record.content_hash for record in registry.documents() if record.doc_id not in ids}
    tests = [named_by(name) for name in names]
    return [
        record.doc_id for record in gone if record.content_hash in still or any(test(record.doc_id) for test in tests)
    ]


def _noted(sources: Iterable[str | Path | Document], names: list[str | Path]) -> Iterator[str | Path | Document]:
    """The sources, with each name of files noted in `names`."""
    if isinstance(sources, str | Path):
        raise ConfigError("Sources must be a list.", remedy=f"Write [{str(sources)!r}].")
    for source in sources:
        if not isinstance(source, Document):  # names its files
            names.append(source)
        yield source


def expand(
    sources: Iterable[str | Path | Document | Failure],
    *,
    on_found: Callable[[int], None] | None = None,
    is_known: Callable[[str, str], bool] | None = None,
    limits: ReadLimits | None = None,
) -> Iterator[Document | Failure | Unchanged]:
    """Read files, folders, globs and documents as documents; yields a Failure for each that cannot be read.

    Args:
        sources: What to ingest.
        on_found: Called with the number of items that are going to come, once it is known.
        is_known: Whether a file, by id and content hash, need not be parsed.
        limits: Most time and memory for reading one file; None: by environment, else the default.
    """
    limits = limits or ReadLimits.of()
    if isinstance(sources, str | Path):
        raise ConfigError("Sources must be a list.", remedy=f"Write [{str(sources)!r}].")
    report = on_found or (lambda number: None)
    for are_read, group in groupby(sources, key=lambda source: isinstance(source, Document | Failure)):
        if are_read:
            for document in group:
                report(1)
                if isinstance(document, Failure):
                    yield document
                    continue
                yield replace(document, text=well_formed(document.text))  # type: ignore[type-var,union-attr,misc]
            continue
        found = _find(group)  # type: ignore[arg-type]
        report(len(found))
        for item in found:
            if isinstance(item, Failure):
                yield item
                continue
            try:
                found_document = load_changed(item, is_known or (lambda doc_id, content_hash: False), limits=limits)
                yield Unchanged(found_document) if isinstance(found_document, str) else found_document
            except DocumentError as problem:
                yield Failure(str(item), str(problem))


def _find(paths: Iterable[str | Path]) -> list[Path | Failure]:
    current = ""

    def each() -> Iterator[str | Path]:
        nonlocal current
        for path in paths:
            current = str(path)
            yield path

    # find_files takes a path only when it is done with the one before, so a problem belongs to the latest.
    return [Failure(current, str(item)) if isinstance(item, DocumentError) else item for item in find_files(each())]
