"""Notices passages whose text was changed between the vector store and the prompt."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from .node_text import node_text

log = logging.getLogger("lmcache_rag")

_REMEMBERED = 1024  # changed texts


class Noticer:
    """Remembers which postprocessor made a text, and says once for each what that costs. Safe to use from threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._makers: OrderedDict[str, str] = OrderedDict()
        self._told: set[str] = set()

    def postprocess(
        self, postprocessors: Sequence[BaseNodePostprocessor], nodes: list[NodeWithScore], query: QueryBundle
    ) -> list[NodeWithScore]:
        """Apply postprocessors, in order."""
        for postprocessor in postprocessors:
            before = _texts(nodes)  # now: some change nodes in place
            nodes = postprocessor.postprocess_nodes(nodes, query_bundle=query)
            self._remember(postprocessor, _texts(nodes) - before)
        return nodes

    async def apostprocess(
        self, postprocessors: Sequence[BaseNodePostprocessor], nodes: list[NodeWithScore], query: QueryBundle
    ) -> list[NodeWithScore]:
        """Async twin of postprocess."""
        for postprocessor in postprocessors:
            before = _texts(nodes)
            nodes = await postprocessor.apostprocess_nodes(nodes, query_bundle=query)
            self._remember(postprocessor, _texts(nodes) - before)
        return nodes

    def warn(self, changed: Sequence[str], passages: int, what_follows: str) -> None:
        """Say, once for each cause, that these texts have no KV of their own, and what becomes of them."""
        with self._lock:
            causes = [self._makers.get(text, "") for text in changed]
            new = set(causes) - self._told
            self._told |= new
        for cause in sorted(new):
            count = causes.count(cause)
            what = (
                f"{cause} changed the text of {count} of {passages} passages"
                if cause
                else f"{count} of {passages} passages are not texts of an LMCacheVectorStore: something changed them "
                "after retrieval, or they were never added through one (adopt() registers what was there before)"
            )
            log.warning(
                "%s. Such passages have no KV when they are first asked for, and count as missed. %s Rerankers, "
                "filters and reorderings keep texts as they are.",
                what,
                what_follows,
            )

    def _remember(self, postprocessor: BaseNodePostprocessor, made: set[str]) -> None:
        with self._lock:
            for text in made:
                self._makers[text] = type(postprocessor).__name__
                self._makers.move_to_end(text)
            while len(self._makers) > _REMEMBERED:
                self._makers.popitem(last=False)


def _texts(nodes: Sequence[NodeWithScore]) -> set[str]:
    return {node_text(node.node) for node in nodes}
