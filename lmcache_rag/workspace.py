"""A workspace: store, engine and embedder made from settings, and what works on them (ingestor, RAG, maintainer)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lmcache_rag import lazy_fill
from lmcache_rag._utils import without_garbage_collection
from lmcache_rag.engines.base import BlendOptions, Sampling
from lmcache_rag.kv_policy import KVPolicy
from lmcache_rag.settings import Settings

if TYPE_CHECKING:
    from lmcache_rag.documents import Document, ReadLimits, Splitter
    from lmcache_rag.embedding import Embedder
    from lmcache_rag.engines.base import Engine
    from lmcache_rag.ingest import Ingestor, Preview
    from lmcache_rag.kv_manager import Maintainer, StoredKV
    from lmcache_rag.prompt import PromptBuilder
    from lmcache_rag.rag import RAG
    from lmcache_rag.store import Store
    from lmcache_rag.store_model import Identity
    from lmcache_rag.trace import TraceWriter
    from lmcache_rag.weights import Source

_GB = 1_000_000_000
KV_FOLDER = "kv"  # in the store; an engine may be opened before there is a store


class Workspace:
    """Opens parts when they are first used, so that `status` loads no weights. Use it as a context manager.

    Args:
        settings: The settings.
        create: Make the store if it does not exist.
        engine: Use this engine instead of the one that the settings name.
        embedder: Use this embedder instead of the one that the settings name.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        create: bool = True,
        engine: Engine | None = None,
        embedder: Embedder | None = None,
    ) -> None:
        self.settings = settings
        self._create = create
        self._engine, self._embedder = engine, embedder

    @classmethod
    def open(cls, store: str | Path | None = None, *, create: bool = True, **settings: Any) -> Workspace:
        """Open with settings from arguments, then environment, then the store's settings.toml, then defaults.

        `engine` is a setting like the others ("embedded", or URLs of vLLM servers), or an engine that exists already;
        `embedder` is a name, or an embedder that exists already.
        """
        engine, embedder = None, None
        if not isinstance(settings.get("engine"), str | list | tuple):
            engine = settings.pop("engine", None)
        if not isinstance(settings.get("embedder"), str):
            embedder = settings.pop("embedder", None)
        return cls(Settings.load(store, **settings), create=create, engine=engine, embedder=embedder)

    @cached_property
    def store(self) -> Store:
        """The store."""
        from lmcache_rag.store import Store

        return Store.open(self.settings.store, create=self._create)

    @property
    def has_store(self) -> bool:
        """Whether there is a store, made by this workspace or before."""
        return "store" in self.__dict__ or (self.settings.store / "store.db").exists()

    @cached_property
    def engine(self) -> Engine:
        """The engine."""
        if self._engine is not None:
            return self._engine
        if self.settings.engine != "embedded":
            from lmcache_rag.credentials import ingest_key_for
            from lmcache_rag.engines.vllm import VLLMEngine

            return VLLMEngine(
                self.settings.engine,
                self.settings.model,
                timeout=self.settings.engine_timeout_s,
                concurrency=self.settings.ingest_in_flight,
                ingest_key=ingest_key_for(self.settings),
            )
        if not self._create:
            _ = self.store  # if there is none, that is the error
        with without_garbage_collection():
            from lmcache_rag.engines.embedded import EmbeddedEngine

            return EmbeddedEngine(
                self._source,
                kv_dir=self.settings.store / KV_FOLDER,
                device=self.settings.device,
                dtype=self.settings.dtype,
                kv_budget=int(self.settings.kv_budget_gb * _GB),
                memory_budget=int(self.settings.memory_budget_gb * _GB),
                min_gain=self.settings.min_gain,
            )

    @property
    def has_engine(self) -> bool:
        """Whether the engine is there already, so that using it loads nothing."""
        return self._engine is not None or "engine" in self.__dict__

    @cached_property
    def _source(self) -> Source:
        """Where the embedded engine's model is: the one that the settings name, else the store's."""
        from lmcache_rag.store_model import find_store_model
        from lmcache_rag.weights import find_model

        if self.settings.model is not None:
            return find_model(self.settings.model)
        return find_store_model(self.store.registry if self.has_store else None)

    def record_model(self) -> None:
        """Record in the store which model its KV is computed with, if that is not recorded yet. See store_model."""
        if self._engine is None and self.settings.engine == "embedded":
            from lmcache_rag.store_model import record

            record(self.store, self.settings, self._source, self.engine.info, self.prompts.fingerprint)

    @property
    def identity(self) -> Identity | None:
        """The fingerprint of the KV and its model, without loading anything; None if that is not recorded."""
        from lmcache_rag.store_model import known_identity

        if self._engine is not None or self.settings.engine != "embedded":
            return None
        return known_identity(self.store.registry, self.settings)

    @property
    def stored_kv(self) -> StoredKV | None:
        """The store's KV files, without a model; None if the engine is the caller's own."""
        if self._engine is not None:
            return None
        from lmcache_rag.engines.chunk_cache import KVStore
        from lmcache_rag.engines.kv_files import KVFiles
        from lmcache_rag.kv_manager import StoredKV

        kv = KVStore(KVFiles(self.store.kv_dir), memory_budget=0, device=None)
        return StoredKV(self.store, kv, lock_timeout=self.settings.lock_timeout_s)

    @cached_property
    def embedder(self) -> Embedder:
        """The embedder."""
        if self._embedder is not None:
            return self._embedder
        from lmcache_rag.embedding import SentenceTransformerEmbedder

        return SentenceTransformerEmbedder(self.settings.embedder, device=self.settings.device)

    @cached_property
    def prompts(self) -> PromptBuilder:
        """The prompts of this engine, system text, instruction and tenant."""
        return self.prompts_with()

    def prompts_with(self, *, system: str | None = None, instruction: str | None = None) -> PromptBuilder:
        """As `prompts`, with another system text or instruction. Their KV is another than that of `prompts`."""
        from lmcache_rag.prompt import PromptBuilder, PromptFormat

        own = self.settings
        texts = {
            "system": own.system if system is None else system,
            "instruction": own.instruction if instruction is None else instruction,
        }
        words = PromptFormat(**{name: text for name, text in texts.items() if text is not None})  # type: ignore[arg-type]
        engine = self.engine
        with without_garbage_collection():  # a tokenizer is a large heap of small objects
            return PromptBuilder(engine.tokenizer, engine.info, format=words, tenant=self.settings.tenant)

    @cached_property
    def splitter(self) -> Splitter:
        """The splitter, sized in the model's tokens."""
        from lmcache_rag.documents import Splitter

        return Splitter(
            self.prompts.encode,
            chunk_tokens=self.settings.chunk_tokens,
            overlap_tokens=self.settings.chunk_overlap,
        )

    @cached_property
    def ingestor(self) -> Ingestor:
        """Fills the store."""
        from lmcache_rag.ingest import Ingestor

        self.record_model()
        return Ingestor(
            self.store,
            self.engine,
            self.embedder,
            self.prompts,
            self.splitter,
            lock_timeout=self.settings.lock_timeout_s,
            limits=self._limits,
            policy=self.kv_policy,
        )

    @property
    def kv_policy(self) -> KVPolicy:
        """When KV is computed, how fast, and how long it is kept."""
        settings = self.settings
        return KVPolicy(settings.kv, settings.kv_ttl, settings.ingest_rate, settings.pin)

    @property
    def _limits(self) -> ReadLimits:
        from lmcache_rag.documents import ReadLimits

        return ReadLimits(self.settings.document_seconds, self.settings.document_mb)

    def preview(self, sources: Iterable[str | Path | Document], *, reparse: bool = False) -> Preview:
        """Read sources and find out what their ingestion would do; for Ingestor.ingest. Makes no store."""
        from lmcache_rag.ingest import preview

        registry = self.store.registry if self.has_store else None
        return preview(sources, self.splitter, self.prompts, registry, reparse=reparse, limits=self._limits)

    def ingest_rate(self) -> float:
        """Tokens a second at which KV is computed, by the store's last ingestion or measured now; 0: unknown."""
        from lmcache_rag.ingest import rate_key

        if self.has_store and (known := self.store.registry.get_meta(rate_key(self.prompts.fingerprint))):
            return float(known)
        measure = getattr(self.engine, "prefill_rate", None)
        return float(measure()) if callable(measure) else 0.0

    @property
    def blend_options(self) -> BlendOptions:
        """How the settings say that KV is reused."""
        chosen = self.settings
        return BlendOptions(chosen.policy, chosen.ratio, chosen.blend, order=chosen.order)

    def most_used(self, trace: str | Path, top: int | None = None) -> list[int]:
        """Ids of the store's chunks that a retrieval trace or question log used, the most used first.

        The chunks of lines without `chunks` are retrieved now, which needs the embedder. Names of other stores' chunks
        are left out.

        Args:
            trace: The file, see lmcache_rag.trace.
            top: Most ids; None: all.

        Raises:
            ConfigError: The file cannot be read, or has another form.
        """
        from lmcache_rag.rag import retrieve
        from lmcache_rag.trace import read_trace

        uses, known = Counter[int](), dict[str, int]()
        for line in read_trace(trace):
            if line.chunks:
                if new := [name for name in line.chunks if name not in known]:
                    known |= self.store.registry.chunk_ids(new)
                uses.update(known[name] for name in set(line.chunks) if name in known)
            elif line.question.strip():
                hits = retrieve(self.store, self.embedder, line.question, self.settings.top_k)
                uses.update(hit.chunk_id for hit in hits)
        return [chunk_id for chunk_id, _ in uses.most_common(top)]

    @cached_property
    def rag(self) -> RAG:
        """Answers from the store."""
        from lmcache_rag.rag import RAG

        return RAG(
            self.store,
            self.engine,
            self.embedder,
            self.prompts,
            top_k=self.settings.top_k,
            sampling=Sampling(max_tokens=self.settings.max_tokens, temperature=self.settings.temperature),
            blend=self.blend_options,
            keep_missing=self.settings.fills != "never",
            cite=self.settings.cite,
            trace=self.trace,
        )

    @cached_property
    def trace(self) -> TraceWriter | None:
        """Where it is recorded which chunks each question used, by the setting `trace`.

        Raises:
            ConfigError: The file cannot be written.
        """
        from lmcache_rag.trace import opened

        return opened(self.settings.trace)

    @cached_property
    def maintainer(self) -> Maintainer:
        """Maintains the store: status, warm, verify, remove."""
        from lmcache_rag.kv_manager import Maintainer

        timeout = self.settings.lock_timeout_s
        return Maintainer(self.store, self.engine, self.prompts, lock_timeout=timeout, policy=self.kv_policy)

    def close(self) -> None:
        """Close everything that was opened here; an engine that was passed in stays open. Safe to call twice."""
        if {"engine", "store"} <= self.__dict__.keys():
            lazy_fill.cancel(self.engine, self.store)
        if (trace := self.__dict__.pop("trace", None)) is not None:
            trace.close()
        for name in ("engine", "store"):
            part = self.__dict__.pop(name, None)
            if part is not None and part is not self._engine:
                part.close()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
