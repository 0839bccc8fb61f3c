"""What all sessions share: the store, the engines of each model, ingestion, and the progress of the start."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lmcache_rag.demo import samples
from lmcache_rag.demo.arms import Arm, Traffic, Wording, join_threads
from lmcache_rag.demo.record import Problem
from lmcache_rag.documents.finding import UPLOADS
from lmcache_rag.errors import DocumentError, EngineError, LMCacheRAGError
from lmcache_rag.workspace import Workspace

if TYPE_CHECKING:
    from lmcache_rag.engines.base import Engine
    from lmcache_rag.ingest import Ingestor, Progress
    from lmcache_rag.settings import Settings

log = logging.getLogger("lmcache_rag")

Phase: TypeAlias = Literal["new", "opening", "ingesting", "warming", "ready", "failed"]
CLOSE_S = 60.0  # longest wait for running computations
MOST_UPLOAD_BYTES = 32 * 2**20  # of one file
WARM_CHUNKS = 512  # a larger store is not sent to a server again at the start


@dataclass(frozen=True, slots=True)
class Start:
    """Progress of the start.

    Attributes:
        phase: What is being done.
        documents: Documents read, and in all.
        chunks: Chunks whose KV exists, and in all as far as is known.
        problem: Why it failed.
    """

    phase: Phase = "new"
    documents: tuple[int, int] = (0, 0)
    chunks: tuple[int, int] = (0, 0)
    problem: Problem | None = None


@dataclass(frozen=True)
class Stack:
    """Both arms of one model, and the workspace that ingests its documents."""

    workspace: Workspace
    blended: Arm
    baseline: Arm
    one_engine: bool

    def ingestor(self, on_progress: Callable[[Progress], None]) -> Ingestor:
        """Return an ingestor for this model."""
        from lmcache_rag.ingest import Ingestor

        mine = self.workspace
        return Ingestor(
            mine.store,
            mine.engine,
            mine.embedder,
            mine.prompts,
            mine.splitter,
            on_progress=on_progress,
            lock_timeout=mine.settings.lock_timeout_s,
        )

    @property
    def hint(self) -> str:
        """What another order of the passages does to the KV that both arms find."""
        embedded = self.workspace.engine.info.engine == "embedded"
        words = "Drag them into another order, or use the arrows, and ask again: blended KV is reused in any order."
        if embedded:
            words += " An exact prefix hit there: what all prompts begin with."
        if embedded and self.one_engine:
            return f"{words} Without blending, this engine has no prefix cache: it computes the whole prompt each time."
        return f"{words} Without blending, the server's prefix cache finds nothing after the first passage that moved."

    @property
    def arms(self) -> tuple[Arm, Arm]:
        """Both arms."""
        return self.blended, self.baseline


class Hub:
    """Shared by all sessions. Its blocking methods are safe to call from several threads.

    Args:
        settings: Settings of the store and the engine that blends.
        baseline: URLs of a server without blending; None: the engine that blends answers in full, too.
        engine: Use this engine instead of the one that the settings name.
        embedder: Use this embedder instead of the one that the settings name.
    """

    def __init__(
        self, settings: Settings, *, baseline: str | None = None, engine: Engine | None = None, embedder: Any = None
    ) -> None:
        self.settings, self.baseline_urls = settings, baseline
        self.start = Start()
        self.models: list[str] = []
        self._overrides = {"engine": engine, "embedder": embedder}
        self._stacks: dict[str, Stack] = {}
        self._lock = threading.RLock()
        self._ingesting = threading.Lock()
        self._opener: threading.Thread | None = None
        self._closing = threading.Event()

    # -- the start ------------------------------------------------------------------------------------------------

    def begin(self) -> threading.Thread:
        """Open everything in a thread; `start` holds the progress. Call it again after a failure."""
        with self._lock:
            self.start = Start("opening")
            self._opener = threading.Thread(target=self.open, name="lmcache-rag-demo-start", daemon=True)
            self._opener.start()
            return self._opener

    def open(self) -> None:
        """Open the default model's engine and store, and ingest the samples into a store of their own."""
        try:
            self.start = Start("opening")
            self.models = self._served()
            stack = self.stack(self.models[0] if self.models else "")
            _ = stack.workspace.embedder.dimension
            if callable(load := getattr(stack.workspace.engine, "load", None)):
                load()
            if self._may_ingest_samples(stack):
                self.start = Start("ingesting")
                with self._ingesting, stack.blended.traffic.work():
                    stack.ingestor(self._progress).ingest(samples.files())
            if stack.workspace.engine.info.engine != "embedded":
                self._warm(stack)
            self.start = replace(self.start, phase="ready")
        except Exception as problem:  # the page shows it
            if not isinstance(problem, LMCacheRAGError):
                log.exception("the demo could not start")
            self.start = Start("failed", problem=Problem.of(problem))

    def stack(self, model: str = "") -> Stack:
        """Both arms of a model, opened if they are not. "" is the first one.

        Raises:
            LMCacheRAGError: Its engine cannot be opened.
        """
        model = model or (self.models[0] if self.models else "")
        with self._lock:
            if model not in self._stacks:
                self._stacks[model] = self._open_stack(model)
            return self._stacks[model]

    @property
    def default_wording(self) -> Wording:
        """The words before the passages that the store's documents were ingested with."""
        return Wording(self.settings.system, self.settings.instruction)

    def close(self) -> None:
        """Stop the ingestion at its next passage, then close engines and store."""
        self._closing.set()
        if self._opener is not None:
            self._opener.join(CLOSE_S)
        join_threads(CLOSE_S)
        with self._lock:
            for stack in self._stacks.values():
                if not stack.one_engine and (other := stack.baseline.opened):
                    other.close()
                stack.workspace.close()
            self._stacks.clear()

    def _open_stack(self, model: str) -> Stack:
        settings = self.settings.model_copy(update={"model": model}) if model else self.settings
        workspace = Workspace(settings, **self._overrides)
        engine = workspace.engine
        # An engine in this process computes one request after the other.
        traffic = Traffic(exclusive=engine.info.engine == "embedded", settle=partial(join_threads, CLOSE_S))
        blended = Arm("blended", lambda: engine, traffic, blends=True)
        if self.baseline_urls is None:
            return Stack(workspace, blended, Arm("baseline", lambda: engine, traffic, blends=False), one_engine=True)
        other = partial(_baseline, self.baseline_urls, engine, settings.engine_timeout_s)
        baseline = Arm("baseline", other, Traffic(exclusive=False), blends=False)
        return Stack(workspace, blended, baseline, one_engine=False)

    def _served(self) -> list[str]:
        """Names of the models to choose from; empty where there is one only."""
        if self.settings.engine == "embedded" or self.settings.model or self._overrides["engine"] is not None:
            return []
        from lmcache_rag.engines.vllm_client import VLLMClient

        with VLLMClient(self.settings.engine, timeout=self.settings.engine_timeout_s, attempts=1) as client:
            names = client.served_names()
        return names if len(names) > 1 else []

    def _may_ingest_samples(self, stack: Stack) -> bool:
        """Whether the store is the demo's own: empty, or with samples and uploads only."""
        store = stack.workspace.store
        own = (str(samples.documents().resolve()), str(self._uploads().resolve()))
        return not store.read_only and all(document.source.startswith(own) for document in store.registry.documents())

    def _warm(self, stack: Stack) -> None:
        """Send a small store's chunks to the server again: it may have evicted their KV."""
        if stack.workspace.store.registry.stats().chunks > WARM_CHUNKS:
            return
        self.start = replace(self.start, phase="warming")
        with self._ingesting, stack.blended.traffic.work():
            stack.workspace.maintainer.warm(on_chunk=lambda done, known, _: self._count(done, known))

    def _check_open(self) -> None:
        """Raise EngineError if the demo was closed; what was ingested stays."""
        if self._closing.is_set():
            raise EngineError("The demo was closed.")

    def _count(self, done: int, known: int) -> None:
        self._check_open()
        self.start = replace(self.start, chunks=(done, known))

    def _progress(self, step: Progress) -> None:
        self._check_open()
        place = "documents" if step.step == "document" else "chunks"
        self.start = replace(self.start, **{place: (step.done, step.known)})  # type: ignore[arg-type]

    # -- documents ------------------------------------------------------------------------------------------------

    def upload(self, model: str, name: str, content: bytes, on_kv: Callable[[int, int], None]) -> str:
        """Ingest an uploaded file; it is kept in the store's folder. Returns the result as a sentence.

        Args:
            model: Whose KV is computed.
            name: The file's name.
            content: What it holds.
            on_kv: Called with (chunks with KV, chunks in all) after each.

        Raises:
            DocumentError: It cannot be read.
            LMCacheRAGError: See the store's and the engine's errors.
        """
        if len(content) > MOST_UPLOAD_BYTES:
            raise DocumentError(
                f"{name} is larger than {MOST_UPLOAD_BYTES >> 20} MiB.",
                remedy="Divide it, or ingest it with `lmcache-rag ingest`.",
            )
        folder = self._uploads() / hashlib.sha256(content).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _file_name(name)
        path.write_bytes(content)

        def step(progress: Progress) -> None:
            self._check_open()
            if progress.step == "kv":
                on_kv(progress.done, progress.known)

        stack = self.stack(model)
        with self._ingesting, stack.blended.traffic.work():
            report = stack.ingestor(step).ingest([path])
        if report.failed:
            path.unlink(missing_ok=True)
            raise DocumentError(report.failed[0].reason.replace(str(path), _file_name(name)))
        if report.unchanged:
            return "It was there already."
        return f"Ingested: {report.chunks_added} new passages, {report.kv.tokens:,} tokens of KV."

    def _uploads(self) -> Path:
        return Path(self.settings.store) / UPLOADS


def _baseline(urls: str, blended: Engine, timeout: float) -> Engine:
    from lmcache_rag.engines.vllm import VLLMEngine

    return VLLMEngine(urls, timeout=timeout, tokenizer=blended.tokenizer, kv_block=blended.info.kv_block)


def _file_name(name: str) -> str:
    """A file name without a path, that can stand in a folder."""
    kept = "".join(letter if letter.isprintable() and letter not in '/\\:*?"<>|' else "_" for letter in name)
    return kept.strip(" .")[-120:] or "upload.txt"
