"""The bar over a prompt: what was done with each part of it, in the prompt's order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from lmcache_rag.demo.record import Turn

Kind: TypeAlias = Literal["prefix", "reused", "recomputed", "computed", "cached"]
KINDS: tuple[Kind, ...] = ("prefix", "reused", "recomputed", "computed")
WORDS: dict[Kind, str] = {
    "prefix": "exact prefix",
    "reused": "reused",
    "recomputed": "recomputed",
    "computed": "computed",
    "cached": "reused, some of them recomputed",  # where a server does not say which
}


class Segment(NamedTuple):
    """Some tokens of a prompt with which the same was done; `passage` counts from 0, None is what is around them."""

    kind: Kind
    tokens: int
    passage: int | None


def totals(turn: Turn) -> dict[Kind, int]:
    """The counts over the whole prompt; empty where the engine gave none."""
    if turn.completion is None:
        return {}
    stats = turn.completion.stats
    return {
        "prefix": stats.prefix_tokens,
        "reused": stats.reused_tokens,
        "recomputed": stats.recomputed_tokens,
        "computed": stats.computed_tokens,
    }


def segments(turn: Turn) -> list[Segment]:
    """The bar's segments, in the prompt's order: passages, and what is before, between and after them.

    Inside a passage they stand by kind, as recomputed tokens are spread over it.
    """
    sums = totals(turn)
    chunks = turn.completion.chunks if turn.completion else ()
    if turn.completion is None or not chunks:
        return [Segment(kind, count, None) for kind, count in sums.items() if count]
    inner: list[list[Segment]] = []
    for index, chunk in enumerate(chunks):
        counts: dict[Kind, int] = {"prefix": chunk.prefix_tokens}
        if chunk.recomputed_tokens is None:
            counts["cached"] = chunk.reused_tokens
        else:
            counts |= {"reused": chunk.reused_tokens, "recomputed": chunk.recomputed_tokens}
        counts["computed"] = chunk.computed_tokens
        inner.append([Segment(kind, count, index) for kind, count in counts.items() if count])
    # Around the passages an exact prefix comes first, and all else is computed.
    exact = sums["prefix"] - sum(chunk.prefix_tokens for chunk in chunks)
    length = turn.completion.stats.prompt_tokens
    found: list[Segment] = []
    at = 0
    for (start, end), pieces in zip([*turn.spans, (length, length)], [*inner, []], strict=True):
        prefix = min(exact, start - at)
        exact -= prefix
        around: dict[Kind, int] = {"prefix": prefix, "computed": start - at - prefix}
        found += [Segment(kind, count, None) for kind, count in around.items() if count]
        found += pieces
        at = end
    return found
