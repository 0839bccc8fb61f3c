"""Metadata between scheduler and workers: plans to the workers, results and handshakes to the scheduler.

The two classes that vLLM itself transports are subclasses of vLLM's. The others can be used without vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from operator import attrgetter
from typing import Any, NamedTuple

from lmcache_rag.budget import Budget
from lmcache_rag.policies import at_most, get_policy
from lmcache_rag.protocol import CannotBlend, SelfCheck, Unsupported

if find_spec("vllm"):
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorHandshakeMetadata,
        KVConnectorWorkerMetadata,
    )
else:
    KVConnectorHandshakeMetadata = KVConnectorWorkerMetadata = object


class Match(NamedTuple):
    """One cached piece of a prompt: prompt[start:end] is what was cached at [old_start, old_end) of another sequence.

    `native` is the LMCache object that names it on the wire. A resident match is one block of vLLM's own KV cache
    instead, and `block` its id.
    """

    start: int
    end: int
    old_start: int
    old_end: int
    native: Any = None
    block: int = -1


def spans_of(matches: Sequence[Match]) -> list[tuple[int, int]]:
    """Matches merged to chunks: adjacent matches that were adjacent when they were cached count as one."""
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
        matches: Pieces to place after that; ascending.
        end: vLLM counts everything up to here as computed.
        block_ids: The request's blocks, by id.
        policy: Name of the recompute policy.
        budget: How many of the placed tokens to recompute.
        cache_salt: The request's cache_salt.
        configs: Settings of the request for LMCache.
        background: Whether other requests run meanwhile: the request waits until a worker reports that it is done.
        alone: Whether vLLM's step computes this request's last token, and nothing else: the blend computes it too, and
            vLLM need not read all weights once more for it.
        failure: Why everything is to be computed and nothing loaded (a Fallback); empty when it is to be blended.
        free: So many of the placed tokens can be recomputed without any more time; the same on all ranks.
        adapter: The request's LoRA adapter, vLLM's LoRARequest; None: the model alone.
    """

    request_id: str
    token_ids: Sequence[int]
    local: int
    exact: int
    matches: tuple[Match, ...]
    end: int
    block_ids: tuple[int, ...]
    policy: str
    budget: Budget
    cache_salt: str = ""
    configs: dict[str, Any] | None = None
    background: bool = False
    alone: bool = False
    failure: str = ""
    free: int = 0
    adapter: Any = None

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
        computed_tokens: Computed in the blend because nothing was cached: gaps, or all of it after a failure.
        load_ms: Time of the load.
        blend_ms: Time of selection and recomputation.
        failure: Why everything was computed (a Fallback); empty when the blend succeeded.
        hot_tokens: How many of the reused and recomputed tokens were resident in vLLM's own KV cache.
        budget_reason: Why so many tokens were recomputed (a BudgetReason); empty when nothing was blended.
        select_ms: Time of the selection alone.
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
    budget_reason: str = ""
    select_ms: float = 0.0


@dataclass(frozen=True)
class StepShape:
    """A step whose time is measured, as it computes a part of one request and nothing else.

    Attributes:
        tokens: Tokens that vLLM computes.
        context: Tokens before them.
        blended: Whether a blend runs before them in the step.
    """

    tokens: int
    context: int
    blended: bool = False


@dataclass(frozen=True)
class StepTime:
    """A measured step: its shape, and the milliseconds of the worker; of a blended one, without load and passes."""

    shape: StepShape
    ms: float


@dataclass(frozen=True)
class Claim:
    """The part of a prompt that the connector claims to provide.

    Attributes:
        exact: Tokens of the exact prefix.
        matches: Pieces that are placed after it.
        end: Tokens that vLLM may count as computed.
    """

    exact: int
    matches: tuple[Match, ...] = field(default=())
    end: int = 0

    @property
    def reused(self) -> int:
        """Tokens that the matches cover."""
        return sum(match.end - match.start for match in self.matches)

    def computed(self, policy: str, budget: Budget, free: int = 0) -> int:
        """Most tokens that a blend of this claim computes, without its selection.

        With `auto` the scores decide later how many are recomputed: its ceiling counts here.
        """
        reused, chunks = self.reused, len(spans_of(self.matches))
        return at_most(get_policy(policy), budget, reused, chunks, free) + self.end - self.exact - reused


def claim(prompt: int, local: int, prefix: int, matches: Sequence[Match], *, least: int = 64, tail: int = 0) -> Claim:
    """Choose the part of a prompt to claim.

    The exact prefix comes first. Blending claims everything from there to the end of the last match, gaps included. At
    least one token is left to vLLM, which needs something to compute. A short rest of the prompt is claimed up to that
    token: computing it with the blend saves a pass through the model, and the last token runs as a CUDA graph.

    Args:
        prompt: Length of the prompt in tokens.
        local: Tokens that vLLM holds itself.
        prefix: Exact prefix tokens that LMCache holds.
        matches: What LMCache found elsewhere in the prompt, in any order.
        least: Fewer matched tokens than this are not worth a blend.
        tail: Most tokens after the last match that are claimed with it.
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


NOT_READY = Unsupported(CannotBlend.NOT_READY, "vLLM's workers have not reported yet")


@dataclass
class BlendHandshakeMetadata(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What a worker reports to the scheduler at start.

    Attributes:
        unsupported: Why it cannot blend; None when it can.
        self_check: Whether a blend was compared with a full prefill; None where it cannot blend.
        costs: What its passes take, see lmcache_rag.costs.CostModel.as_dict; None: not measured.
        costs_file: Where costs of this model on this GPU are kept; "": nowhere.
    """

    unsupported: Unsupported | None
    self_check: SelfCheck | None = None
    costs: dict[str, Any] | None = None
    costs_file: str = ""


@dataclass
class BlendWorkerMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What the workers did in a step.

    Attributes:
        results: Of the plans.
        timed_out: (request, blocks) of each rank's loads that it stopped waiting for.
        ended: Requests whose timed-out loads have ended, once for each rank.
        lmcache: What LMCache's own connector reports: receipts of stores, events.
        steps: Measured steps.
    """

    results: list[BlendResult] = field(default_factory=list)
    timed_out: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    lmcache: KVConnectorWorkerMetadata | None = None
    steps: list[StepTime] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Merge another rank's. Results of all ranks are the same except for their times; the rest differs."""
        if not isinstance(other, BlendWorkerMetadata):
            other = BlendWorkerMetadata(lmcache=other)
        lmcache = self.lmcache or other.lmcache
        if self.lmcache is not None and other.lmcache is not None:
            lmcache = self.lmcache.aggregate(other.lmcache)
        return BlendWorkerMetadata(
            self.results or other.results,
            self.timed_out + other.timed_out,
            self.ended + other.ended,
            lmcache,
            self.steps or other.steps,
        )
