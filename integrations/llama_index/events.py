"""What the dispatcher hears of an answer."""

from __future__ import annotations

from typing import Any

from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined] # it is documented
from llama_index.core.instrumentation.events import BaseEvent

from lmcache_rag.engines.base import Completion

from ..blender import Prompted, counts

dispatcher = get_dispatcher(__name__)


class BlendEvent(BaseEvent):
    """A finished answer and what was reused for it.

    Attributes:
        stats: The reuse statistics as plain numbers; see lmcache_rag.engines.base.ReuseStats.
        warnings: What the user should know.
        passages: How many passages stood in the prompt.
        changed: How many of the passages something changed after retrieval; they were computed in full.
        dropped: How many did not fit the context.
        finish_reason: Why the answer ended: stop, length or cancelled.
    """

    stats: dict[str, Any]
    warnings: list[str]
    passages: int
    changed: int
    dropped: int
    finish_reason: str

    @classmethod
    def class_name(cls) -> str:
        """Class name."""
        return "LMCacheBlendEvent"


def tell(prompted: Prompted, done: Completion, changed: int) -> dict[str, Any]:
    """Send the event; returns the same facts for the response's metadata."""
    facts: dict[str, Any] = {
        "stats": counts(done.stats),
        "warnings": list(done.warnings),
        "passages": len(prompted.texts),
        "changed": changed,
        "dropped": len(prompted.dropped),
        "finish_reason": done.finish_reason,
    }
    dispatcher.event(BlendEvent(**facts))
    return facts
