"""Which chunks fit the model's context."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache_rag.errors import ContextLengthError

if TYPE_CHECKING:
    from lmcache_rag.prompt import PromptBuilder, Turn
    from lmcache_rag.store import Hit

log = logging.getLogger("lmcache_rag")


@dataclass(frozen=True, slots=True)
class Fitted:
    """Chunks by whether they fit: `kept` in their order, `dropped` lowest score first."""

    kept: tuple[Hit, ...]
    dropped: tuple[Hit, ...]


def fit(
    prompts: PromptBuilder,
    question: str,
    hits: Sequence[Hit],
    *,
    limit: int,
    history: Sequence[Turn] = (),
    max_tokens: int = 0,
) -> Fitted:
    """Choose the chunks that fit the context beside question and answer; the lowest scores are dropped first.

    Args:
        prompts: Makes the prompt.
        question: The question.
        hits: The chunks.
        limit: The model's context, in tokens.
        history: Earlier turns of the conversation.
        max_tokens: Most tokens of the answer.

    Raises:
        ContextLengthError: Not even the question fits.
    """
    bare = len(prompts.query([], question, history))
    if bare >= limit:
        raise ContextLengthError(
            f"The question{' and the conversation' if history else ''} take {bare} tokens, the model's context "
            f"holds {limit}.",
            remedy="Ask a shorter question." if not history else "Ask a shorter question or start a new chat.",
        )
    # An answer wants room too, but never so much that no passage is left.
    room = limit - bare - min(max_tokens, (limit - bare) // 2)
    separator = max(len(prompts.encode(prompts.format.separator)), 1) + 2
    sizes = [len(prompts.chunk_ids(hit.text)) + separator for hit in hits]
    total = sum(sizes)
    dropped: list[int] = []
    for index in sorted(range(len(hits)), key=lambda i: hits[i].score):
        if total <= room:
            break
        dropped.append(index)
        total -= sizes[index]
    if dropped:
        log.warning(
            "%d of %d chunks do not fit the context of %d tokens and were dropped, lowest score first. "
            "Lower --top-k or --max-tokens, or use a model with a longer context.",
            len(dropped),
            len(hits),
            limit,
        )
    gone = set(dropped)
    return Fitted(tuple(h for i, h in enumerate(hits) if i not in gone), tuple(hits[i] for i in dropped))
