"""The scheduler's state of one request.

A request may hold a look-up, read locks at LMCache, a place among the look-ups in flight, tokens of the budget, and
pins on resident chunks. What releases them (methods of BlendScheduler where no class is named):

| call | what it releases |
| --- | --- |
| `fail` | after an error: `drop`, and nothing of the request is stored any more |
| `drop` | all but what a plan uses: pins, claim, look-up, the locks of a load that no worker has |
| `_exclude` | nothing: it holds nothing yet, and is closed before a look-up; it still gets statistics |
| (closed) | no call but a state: nothing is looked up or claimed any more |
| `_give_up` | its place in the LookupWindow and its look-up (`_abort`); it is closed |
| `_abort` | a look-up, to AbortedLookups: all its locks, once it is answered, and its session |
| `_withdraw` | read locks of what a plan would have loaded, if no worker has that plan |
| `_release` | read locks of the exact prefix that is not loaded (`RequestState.unused`) |
| `BlendBudget.withdraw` | the tokens of its claim in this step |
| `GpuChunks.unpin` | the blocks of resident chunks, to vLLM's pool |
| `LookupWindow.remove` | its place among the look-ups in flight |
| `finish` | the request ended: all but what a worker's plan uses, and the state itself |
| `remove` | what is left after an error, once LMCache's connector has ended the request too |
| `BlendWorker.cancel` | its work in the background stops; its blocks are free when its loads have ended |
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lmcache_rag.budget import Budget
from lmcache_rag.connector import metrics
from lmcache_rag.connector.metadata import BlendPlan, BlendResult, Claim, Match, StepShape, spans_of
from lmcache_rag.costs import Forecast


class Lookup(Protocol):
    """A look-up in flight; see lmcache_rag.connector.lmcache_client.BlendLookup."""

    request_id: str
    result: tuple[int, tuple[Match, ...]] | None

    def poll(self, seconds: float) -> bool:
        """Whether the result is there, waiting for it at most that long."""
        ...

    def release_prefix(self, start: int, end: int) -> None:
        """Release read locks of exact prefix chunks."""
        ...

    def end_session(self) -> None:
        """Release everything that was not loaded."""
        ...


@dataclass
class RequestState:
    """State of one request, from its arrival to its end. The prompt is dropped when a worker has its plan."""

    policy: str
    budget: Budget
    blend: bool
    tokens: array[int] = field(default_factory=lambda: array("q"))  # the prompt; empty when nothing is looked up
    lookup: Lookup | None = None
    started: bool = False  # vLLM's blocks were searched, and a look-up was started where that was not enough
    step: int = 0  # in which vLLM asked for it last
    asked_at: float = 0.0
    waiting_since: float = 0.0  # since when it waits for its turn, then for the answer; 0: the next poll sets it
    lookup_ms: float = 0.0
    prefix: int = 0  # tokens that LMCache holds from the prompt's beginning on
    claim: Claim | None = None
    local: int = 0
    background: bool = False  # the claim is blended during other requests' steps
    planned: bool = False  # blocks were allocated: there is nothing more to decide
    loads: tuple[int, int] = (0, 0)  # [start, end) of the exact prefix that a worker loads: that releases its locks
    unused: tuple[int, int] = (0, 0)  # [start, end) that is not loaded: BlendScheduler releases its read locks
    closed: bool = False  # nothing is claimed any more
    resident_only: bool = False  # nearly everything is resident in vLLM's pool: LMCache is not asked
    approximate_from: int | None = None  # first token whose KV is approximate
    blocks_hit: int = 0  # of the plan that a worker has
    spans: list[tuple[int, int]] | None = None  # [start, end) of each chunk that was hit; None: not in the answer
    ingest: bool = False
    always: bool = False  # blended even where computing it is as fast
    decision: str = ""  # a Decision, once one was taken
    forecast: Forecast | None = None  # what it was taken by
    free: int = 0  # so many tokens can be recomputed without any more time
    most: int = 0  # tokens that its blend recomputes at most
    explores: bool = False  # looked up and blended to measure that again
    prompt: int = 0  # tokens of the prompt
    done: int = 0  # tokens whose KV is there before the next step
    adapter: Any = None  # vLLM's LoRARequest
    result: BlendResult | None = None
    failure: str = ""

    @property
    def found(self) -> tuple[int, tuple[Match, ...]]:
        """What the look-up found: (tokens of the exact prefix, matches)."""
        return (self.lookup.result if self.lookup else None) or (0, ())

    def on_plan_sent(self) -> None:
        """A worker has the plan: drop what only the plan needed, and keep what the statistics need."""
        if self.claim is not None:
            self.blocks_hit = len(self.claim.matches)
            self.spans = spans_of(self.claim.matches) if self.spans is not None else None
        self.tokens, self.claim = array("q"), None
        if not self.unused[1]:
            self.lookup = None

    def plan(
        self, request_id: str, claimed: Claim, block_ids: list[int], configs: dict[str, Any] | None, salt: str
    ) -> BlendPlan:
        """What the workers have to do for a claim."""
        return BlendPlan(
            request_id,
            self.tokens,
            self.local,
            claimed.exact,
            claimed.matches,
            claimed.end,
            tuple(block_ids),
            self.policy,
            self.budget,
            salt,
            configs,
            self.background,
            failure=self.failure,
            free=self.free,
            adapter=self.adapter,
        )

    def statistics(self, prompt: int) -> dict[str, Any]:
        """The reuse statistics, see metrics.reuse_statistics."""
        found = metrics.reuse_statistics(
            prompt,
            self.policy,
            self.budget,
            local=self.local,
            result=self.result,
            failure=self.failure,
            lookup_ms=self.lookup_ms,
            blocks_hit=self.blocks_hit,
            spans=self.spans,
        )
        return found | metrics.decision_statistics(self.decision, self.forecast)


def take_step(
    states: Mapping[str, RequestState], plans: Sequence[BlendPlan], scheduled: Mapping[str, int]
) -> StepShape | None:
    """A step with these plans and tokens of requests; its shape if it computes one request and nothing else."""
    shape = None
    if len(scheduled) == 1:
        ((name, tokens),) = scheduled.items()
        blended = [plan.request_id for plan in plans] == [name]
        if (state := states.get(name)) is not None and (blended or (not plans and tokens > 1)):
            shape = StepShape(tokens, state.done, blended=blended)
    for name, tokens in scheduled.items():
        if state := states.get(name):
            state.done += tokens
    return shape


def has_embeddings(request: Any) -> bool:
    """Whether a prompt contains embeddings: token ids at their positions have no meaning."""
    return getattr(request, "prompt_embeds", None) is not None or request.prompt_token_ids is None


def is_text(request: Any) -> bool:
    """Whether a prompt is token ids alone: no pictures, sound or embeddings, whose positions have ids of no meaning."""
    return not getattr(request, "mm_features", None) and not has_embeddings(request)


def can_hit(request: Any, chunk: int) -> bool:
    """Whether a look-up could find anything: text only, longer than one LMCache chunk (`chunk` tokens), not resumed."""
    prompt = len(request.prompt_token_ids or ())
    if prompt <= chunk or getattr(request, "skip_reading_prefix_cache", False):
        return False
    if not is_text(request):
        return False
    return bool(request.num_tokens == prompt)  # a resumed request is not blended
