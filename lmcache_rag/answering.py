"""From chunks and a question to an answer of the engine: what RAG and the integrations have in common."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lmcache_rag.engines.base import BlendOptions, Completion, Sampling, StreamEvent
from lmcache_rag.errors import LMCacheRAGError, StoreLockedError
from lmcache_rag.kv import KVKeeper
from lmcache_rag.lazy_fill import LazyFillMode, fill_of

if TYPE_CHECKING:
    from lmcache_rag.engines.base import Engine, QueryPrompt
    from lmcache_rag.prompt import PromptBuilder
    from lmcache_rag.store import Store

log = logging.getLogger("lmcache_rag")


class Answering:
    """Lets an engine answer, says once where it does not blend, and keeps the KV that a question missed.

    Args:
        store: Where the chunks are registered.
        engine: Computes the answers.
        prompts: Makes the prompts.
        keep_missing: Compute and keep the KV of registered chunks that had none, once the question is answered.
        lazy_fill: Ingest chunks without KV in the background instead, whether they are registered or not: at which use.
            None: not in the background.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        prompts: PromptBuilder,
        *,
        keep_missing: bool = True,
        lazy_fill: LazyFillMode | None = None,
    ) -> None:
        self._store, self._engine = store, engine
        self.keep_missing = keep_missing and lazy_fill is None
        self.lazy_fill = lazy_fill
        self._kv = KVKeeper(store, engine, prompts)
        self._told = False
        self._tell = threading.Lock()

    def stream(
        self,
        texts: Sequence[str],
        prompt: QueryPrompt,
        sampling: Sampling,
        blend: BlendOptions,
        notes: Sequence[str] = (),
        registered: Sequence[bool] = (),
    ) -> Iterator[StreamEvent]:
        """Answer piece by piece; missing KV is computed and kept after the Completion, or in the background.

        Args:
            texts: The chunks in the prompt.
            prompt: The prompt.
            sampling: How tokens are chosen.
            blend: How KV is reused.
            notes: Warnings for the Completion.
            registered: For each text, whether it stands in the store; for lazy fill.
        """
        blend = self.allowed(blend)
        self.begin()
        for event in self._engine.stream(prompt, sampling, blend):
            if isinstance(event, Completion):
                event = self.filled(texts, registered, prompt, event, blend)
                yield replace(event, warnings=(*event.warnings, *notes)) if notes else event
                self.keep(texts, event, blend)
            else:
                yield event

    def allowed(self, blend: BlendOptions) -> BlendOptions:
        """For an engine that falls back where it cannot blend: says so once, and asks it for a full prefill."""
        info = self._engine.info
        if blend.enabled and not info.can_blend and info.falls_back:
            with self._tell:
                if not self._told and not info.said_why:
                    self._told = True
                    log.warning("%s does not blend: %s. Answers come from full prefills.", info.model, info.why_not)
            return replace(blend, enabled=False)
        return blend

    def begin(self) -> None:
        """A question begins: what is ingested in the background waits for it."""
        if self.lazy_fill not in (None, "never"):
            fill_of(self._engine).question()

    def filled(
        self,
        texts: Sequence[str],
        registered: Sequence[bool],
        prompt: QueryPrompt,
        done: Completion,
        blend: BlendOptions,
    ) -> Completion:
        """Have chunks ingested in the background whose KV an answer missed; the answer says so. Never waits.

        A registered chunk was declared as one to keep, so it is ingested at its first use. An embedded engine keeps KV
        of registered chunks only: nothing would ever delete the files of others.
        """
        if self.lazy_fill in (None, "never") or not (blend.enabled and done.missed):
            return done
        fill, queued = fill_of(self._engine), 0
        for index in done.missed:
            known = index < len(registered) and registered[index]
            if known or self._engine.info.engine != "embedded":
                queued += fill.offer(
                    prompt.chunks[index].key,
                    partial(self._kv.fill, texts[index]),
                    uses=1 if known or self.lazy_fill == "first" else 2,
                    owner=self._store,
                )
        if not queued:
            return done
        return replace(done, warnings=(*done.warnings, f"{queued} passage(s) without KV are ingested now."))

    def keep(self, texts: Sequence[str], done: Completion, blend: BlendOptions) -> None:
        """Keep the KV that a question missed; not worth failing an answer for."""
        if not (self.keep_missing and blend.enabled and done.stats.chunks_missed):
            return
        try:
            self._kv.keep(texts)
        except StoreLockedError:
            log.debug("another writer is at work; the missing KV stays for the next question")
        except LMCacheRAGError as problem:
            log.warning("The KV that was missing is not kept: %s", problem)
