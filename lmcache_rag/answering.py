"""From chunks and a question to an answer of the engine: what RAG and the integrations have in common."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lmcache_rag.engines.base import BlendOptions, Completion, Sampling, StreamEvent
from lmcache_rag.errors import LMCacheRAGError, StoreLockedError
from lmcache_rag.kv import KVKeeper

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
    """

    def __init__(self, store: Store, engine: Engine, prompts: PromptBuilder, *, keep_missing: bool = True) -> None:
        self._engine = engine
        self.keep_missing = keep_missing
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
    ) -> Iterator[StreamEvent]:
        """Answer piece by piece; after the Completion, missing KV is computed and kept.

        Args:
            texts: The chunks in the prompt.
            prompt: The prompt.
            sampling: How tokens are chosen.
            blend: How KV is reused.
            notes: Warnings for the Completion.
        """
        blend = self.allowed(blend)
        for event in self._engine.stream(prompt, sampling, blend):
            if isinstance(event, Completion):
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
