"""What travels between the connector's two sides: plans to the workers, results back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple


class Match(NamedTuple):
    """One cached piece of a prompt: prompt[start:end] is what was cached at [old_start, old_end) of another sequence.

    `native` is the LMCache object that names it on the wire. A hot match is one block of vLLM's own KV cache instead,
    and `block` its id.
    """

    start: int
    end: int
    old_start: int
    old_end: int
    native: Any = None
    block: int = -1


def spans_of(matches: Sequence[Match]) -> list[tuple[int, int]]:
    """Matches as chunks: neighbours that were neighbours where they were cached are one."""
    spans: list[tuple[int, int]] = []
    first = here = there = -1  # where the last chunk starts and ends, and where it ended in its cache
    for start, end, old_start, old_end, _, _ in matches:
        if start != here or old_start != there:
            if first >= 0:
                spans.append((first, here))
            first = start
        here, there = end, old_end
    return [*spans, (first, here)] if first >= 0 else spans


@dataclass(frozen=True)
class BlendPlan:
    """What a worker has to do for one request before its forward pass.

    Attributes:
        request_id: The request, and the name of its LMCache session.
        token_ids: The whole prompt, as 64-bit numbers: they become a tensor as they lie in memory.
        local: vLLM holds the KV of this many tokens already.
        exact: KV up to here comes from an exact prefix: vLLM's, and LMCache's from `local` on.
        matches: Pieces to place behind that; ascending.
        end: vLLM counts everything up to here as computed.
        block_ids: The request's blocks.
        policy: Name of the recompute policy.
        ratio: Share of the placed tokens to recompute.
        cache_salt: The request's namespace.
        configs: Settings of the request for LMCache.
        background: Whether other requests run meanwhile: the request waits until a worker says that it is done.
        alone: Whether vLLM's step computes this request's last token, and nothing else: the blend computes it too, and
            vLLM need not read all weights once more for it.
        failure: Why everything is to be computed, and nothing loaded; empty when it is to be blended.
    """

    request_id: str
    token_ids: Sequence[int]
    local: int
    exact: int
    matches: tuple[Match, ...]
    end: int
    block_ids: tuple[int, ...]
    policy: str
    ratio: float
    cache_salt: str = ""
    configs: dict[str, Any] | None = None
    background: bool = False
    alone: bool = False
    failure: str = ""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The matches as chunks, see spans_of."""
        return spans_of(self.matches)


@dataclass(frozen=True)
class BlendResult:
    """What a worker did.

    Attributes:
        request_id: The request.
        prefix_tokens: Exact: held by vLLM or loaded by LMCache.
        reused_tokens: Taken from cached chunks as they are.
        recomputed_tokens: Selected in cached chunks and computed again.
        computed_tokens: Computed in the blend since nothing was cached: gaps, or all of it after a failure.
        load_ms: Time of the load.
        blend_ms: Time of selection and recomputation.
        failure: Why everything was computed; empty when the blend went through.
        hot_tokens: How many of the reused and recomputed tokens came from vLLM's own KV cache.
    """

    request_id: str
    prefix_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    computed_tokens: int
    load_ms: float
    blend_ms: float
    failure: str = ""
    hot_tokens: int = 0


@dataclass(frozen=True)
class Claim:
    """What of a prompt the connector says is there.

    Attributes:
        exact: Tokens of the exact prefix.
        matches: What is placed behind it.
        end: Tokens that vLLM may count as computed.
    """

    exact: int
    matches: tuple[Match, ...] = field(default=())
    end: int = 0

    @property
    def reused(self) -> int:
        """Tokens that the matches cover."""
        return sum(match.end - match.start for match in self.matches)

    def computed(self, policy: str, ratio: float) -> int:
        """Tokens that a blend of this claim computes, without its selection."""
        reused = self.reused
        again = {"none": 0, "all": reused}.get(policy, round(ratio * reused))
        return again + self.end - self.exact - reused


def claim(prompt: int, local: int, prefix: int, matches: Sequence[Match], *, least: int = 64, tail: int = 0) -> Claim:
    """What to claim of a prompt.

    The exact prefix comes first. Blending claims everything from there to the end of the last match, gaps included. One
    token at least is left to vLLM, which needs something to compute. A short rest of the prompt is claimed up to that
    token: computing it with the blend saves a pass through the model, and what is left runs as a CUDA graph.

    Args:
        prompt: Length of the prompt in tokens.
        local: Tokens that vLLM holds itself.
        prefix: Exact prefix tokens that LMCache holds.
        matches: What LMCache found elsewhere in the prompt, in any order.
        least: Fewer matched tokens than this are not worth a blend.
        tail: Most tokens behind the last match that are claimed with it.
    """
    exact = min(max(local, prefix), prompt - 1)
    apart: list[Match] = []
    end, covered = exact, 0
    for match in sorted(matches, key=attrgetter("start")):
        start, stop = match.start, match.end
        if stop < prompt and start >= end:
            apart.append(match)
            end, covered = stop, covered + stop - start
    if covered < max(least, 1):
        return Claim(exact, (), exact)
    return Claim(exact, tuple(apart), prompt - 1 if prompt - 1 - end <= tail else end)
