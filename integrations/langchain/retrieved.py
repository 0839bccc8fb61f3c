"""The passages that were retrieved lately, so that they are found again in a text that a program made of them."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from langchain_core.documents import Document

log = logging.getLogger("lmcache_rag")

_KEPT = 512
_SEARCHES = 3  # until it is said that nothing blends
_SHORTEST = 24  # characters; a shorter text may stand in a message by chance


class RetrievedPassages:
    """The texts that searches returned last, in this process. Thread-safe: tools run in threads of their own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._texts: OrderedDict[str, None] = OrderedDict()
        self._searches = 0
        self._blends = False

    def expect_blends(self) -> None:
        """Something in this process answers from KV."""
        self._blends = True

    def note(self, found: Any) -> Any:
        """Note the documents in a search's result; returns the result.

        Warns once if nothing in this process answers from their KV, which then was computed in vain.
        """
        texts = passages_in(found)
        if texts and not self._blends:
            with self._lock:
                self._searches += 1
                warn = self._searches == _SEARCHES
            if warn:
                log.warning(
                    "Passages with KV were retrieved, but nothing in this program answers from it. Use blend(llm) in "
                    "the chain, or BlendMiddleware in create_agent; see docs/langchain.md."
                )
        with self._lock:
            for text in texts:
                self._texts[text] = None
                self._texts.move_to_end(text)
            while len(self._texts) > _KEPT:
                self._texts.popitem(last=False)
        return found

    def texts(self) -> list[str]:
        """The texts, the latest last."""
        with self._lock:
            return list(self._texts)


RETRIEVED = RetrievedPassages()


def passages_in(found: Any) -> list[str]:
    """Return the texts of the Documents in a search's result or a tool's artifact: in lists, pairs and mappings."""
    if isinstance(found, Document):
        return [found.page_content] if len(found.page_content) >= _SHORTEST else []
    if isinstance(found, Mapping):
        found = list(found.values())
    if isinstance(found, Iterable) and not isinstance(found, str | bytes):
        return [text for one in found if not isinstance(one, str | bytes | float) for text in passages_in(one)]
    return []


def split_at_passages(text: str, passages: Iterable[str]) -> list[tuple[bool, str]]:
    """Cut a text at the passages in it; returns (whether it is a passage, part). The longest are found first."""
    spans: list[tuple[int, int]] = []
    for passage in sorted(set(passages), key=len, reverse=True):
        start = text.find(passage)
        while start >= 0:
            end = start + len(passage)
            if all(end <= begun or start >= ended for begun, ended in spans):
                spans.append((start, end))
            start = text.find(passage, end)
    parts, at = [], 0
    for start, end in sorted(spans):
        parts += [(False, text[at:start]), (True, text[start:end])]
        at = end
    return [part for part in (*parts, (False, text[at:])) if part[1]]
