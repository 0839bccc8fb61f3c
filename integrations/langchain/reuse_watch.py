"""A converted program that reuses nothing is told why, once."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from lmcache_rag.protocol import COMPUTED, decision_sentence

if TYPE_CHECKING:
    from lmcache_rag.engines.base import BlendOptions, Completion

    from ..blender import Blender, BlendPrompt

log = logging.getLogger("lmcache_rag")

_AFTER = 3  # prompts in a row, from the first


class ReuseWatch:
    """Counts prompts until something is reused. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done = False
        self._asked = 0
        self._empty = 0
        self._prefixes: set[str] = set()

    def no_passages(self, why: str) -> None:
        """A prompt had no passages that were found in it; `why`, as a sentence."""
        with self._lock:
            self._empty += not self._done
            if self._done or self._asked or self._empty < _AFTER:
                return
            self._done = True
        log.warning("Nothing was reused for the first %d prompts: they held no passage. %s", _AFTER, why)

    def cannot(self, why: str) -> None:
        """Prompts cannot be blended at all; `why`, as a sentence."""
        with self._lock:
            if self._done:
                return
            self._done = True
        log.warning("Nothing is reused: %s", why)

    def take(self, blender: Blender, prompt: BlendPrompt, done: Completion, blend: BlendOptions) -> None:
        """Take an answer."""
        if not prompt.texts or not blend.enabled or not blender.engine.info.can_blend:
            return  # that an engine cannot blend is said elsewhere
        with self._lock:
            if self._done:
                return
            self._asked += 1
            self._prefixes.add(prompt.prompt.fingerprint)
            if done.stats.reused_tokens or done.stats.recomputed_tokens:
                self._done = True
                return
            if self._asked < _AFTER:
                return
            self._done = True
        why = self._why(blender, prompt, done)
        log.warning("Nothing was reused for the first %d prompts with passages. %s", _AFTER, why)

    def _why(self, blender: Blender, prompt: BlendPrompt, done: Completion) -> str:
        block = blender.engine.info.kv_block
        if done.stats.decision in COMPUTED:
            return decision_sentence(done.stats.as_dict())
        if all(span.end - span.start < block for span in prompt.prompt.chunks):
            return f"The passages are shorter than {block} tokens, the block in which KV is kept. Split them larger."
        if len(self._prefixes) >= _AFTER:
            return (
                "The text before the passages was different each time, and their KV depends on it. Put what changes "
                "after the passages."
            )
        if not any(prompt.registered):
            return f"The passages are not registered: add them through LMCacheVectorStore. {blender.unregistered_note}"
        return (
            "The KV of these passages was not computed for this prompt. Give the prompt to "
            f"LMCacheVectorStore(prompts=[…]). {blender.missing_note}"
        )
