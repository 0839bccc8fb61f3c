"""Whether a request is blended, and when its blend may run.

It is blended only where that is predicted to give its first token earlier than computing it (BlendGate).

A blend must not make other requests wait for long (BlendBudget). An idle engine blends a request within one step
(SYNC), which gives the lowest TTFT. While others run, KV is loaded in the background and blended in pieces, one in each
step, next to their tokens (ASYNC; vLLM calls that an asynchronous load). What fits neither is asked for again in the
next step (DEFER).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import update_wrapper
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from lmcache_rag.budget import Budget
from lmcache_rag.connector.metadata import BlendResult, Claim, StepShape, StepTime
from lmcache_rag.costs import HEAD, SELECTING, CostModel, Exploration, Forecast, Recheck, Work
from lmcache_rag.policies import at_most, get_policy
from lmcache_rag.protocol import BOUNDARY_GAUGE, COMPUTED, COST_GAUGE, Decision, named_spans

if TYPE_CHECKING:
    from lmcache_rag.connector.request_state import RequestState

log = logging.getLogger("lmcache_rag")


class Admission(Enum):
    """How a blend may run."""

    SYNC = "within this step"
    ASYNC = "in the background"
    DEFER = "in a later step"


SHORT = 1024  # a step that computes fewer tokens takes the CPU longer than the GPU
EVERY = 8  # such a step is measured once in so many times: CUDA events and their result delay it by about 0.5 ms


@dataclass(frozen=True)
class Allowance:
    """What a step may blend in the background.

    Attributes:
        tokens: Most tokens to compute; only a selection's pass over the suffix may exceed it a little.
        idle: Whether the step has nothing else to do.
        timed: The step, if its time is to be measured.
    """

    tokens: int = 0
    idle: bool = False
    timed: StepShape | None = None


@dataclass
class BlendBudget:
    """Admits blends. Counts tokens that are computed, not those that are reused.

    Args:
        step_tokens: Most tokens that the blends of a step compute, except for a blend within the step of an idle
            engine.
        idle_tokens: Most tokens of a blend within the step of an idle engine.
        overlap: Whether blends may run in the background at all.
        max_background: Most blends in the background.
        slots: LoRA adapters that can run in one step.
    """

    step_tokens: int
    idle_tokens: int
    overlap: bool = True
    max_background: int = 8
    slots: int = 0
    _running: set[str] = field(default_factory=set)  # requests that ran in the last step and have not ended since
    _background: set[str] = field(default_factory=set)  # until a worker is done with them
    _claims: dict[str, tuple[Admission, int]] = field(default_factory=dict)  # of this step
    _short: int = 0  # short steps that could have been measured
    _adapters: dict[str, int] = field(default_factory=dict)  # of requests that were asked for, by its number
    _asked: set[str] = field(default_factory=set)  # requests with an adapter that may run in this step

    def admit(self, tokens: int) -> Admission:
        """How a blend that computes so many tokens can run."""
        if not self.overlap:
            fits = not self._sync_tokens or self._sync_tokens + tokens <= self.step_tokens
            return Admission.SYNC if fits else Admission.DEFER
        if self.idle and tokens <= self.idle_tokens:
            return Admission.SYNC
        return Admission.DEFER if self.full else Admission.ASYNC

    @property
    def idle(self) -> bool:
        """Whether nothing runs, as far as is known."""
        return not (self._running or self._background or self._claims)

    @property
    def full(self) -> bool:
        """Whether no more blends can start in the background."""
        claimed = sum(how is Admission.ASYNC for how, _ in self._claims.values())
        return self.overlap and len(self._background) + claimed >= self.max_background

    def has_slot(self, request: Any) -> bool:
        """Whether a request can run without taking a slot from a LoRA adapter that blends in the background.

        VLLM does not count the adapters of requests that wait for their KV. Each of their passes needs a slot beside
        the adapters of its step: those of new requests wait as long.
        """
        adapter = getattr(request, "lora_request", None)
        if adapter is None:
            return True
        name, own = request.request_id, int(adapter.lora_int_id)
        background = self._in_use(self._background)
        if background:
            in_use = background | self._in_use(self._running) | self._in_use(self._asked)
            if own not in in_use and len(in_use) >= self.slots:
                return False
        self._adapters[name] = own
        self._asked.add(name)
        return True

    def _in_use(self, requests: Iterable[str]) -> set[int]:
        return {self._adapters[name] for name in requests if name in self._adapters}

    def claim(self, request_id: str, how: Admission, tokens: int) -> None:
        """A blend is going to run, if vLLM has blocks for it."""
        self._claims[request_id] = (how, tokens)

    def withdraw(self, request_id: str) -> None:
        """A blend that was claimed is not going to run."""
        self._claims.pop(request_id, None)

    def on_allocated(self, request_id: str) -> None:
        """VLLM has allocated blocks for a claim: its blend is going to run."""
        if self._claims.get(request_id, (Admission.SYNC, 0))[0] is Admission.ASYNC:
            self._background.add(request_id)

    def on_step(self, scheduled: Collection[str], timed: StepShape | None = None) -> Allowance:
        """End the scheduling of a step that runs these requests. Returns what it may blend in the background.

        Args:
            scheduled: The requests.
            timed: The step, if its time shows what the work of one request takes.
        """
        if self._background or (timed is not None and not self._measures(timed)):
            timed = None
        allowance = Allowance(max(0, self.step_tokens - self._sync_tokens), not scheduled, timed)
        self._running, self._claims, self._asked = set(scheduled), {}, set()
        return allowance

    def _measures(self, shape: StepShape) -> bool:
        """Whether to measure a step. The first short one is measured, and then one in EVERY."""
        if shape.blended or shape.tokens >= SHORT:
            return True
        self._short += 1
        return self._short % EVERY == 1

    def on_blended(self, request_id: str) -> None:
        """A worker is done with a blend."""
        self._background.discard(request_id)

    def on_finished(self, request_id: str) -> None:
        """A request ended. A blend of it that is under way in a worker continues."""
        self._running.discard(request_id)
        self._adapters.pop(request_id, None)

    @property
    def background(self) -> int:
        """Blends in the background."""
        return len(self._background)

    @property
    def _sync_tokens(self) -> int:
        return sum(tokens for how, tokens in self._claims.values() if how is Admission.SYNC)


# -- whether a request is blended --------------------------------------------------------------------------------------

CHUNK = 512  # tokens of the chunks for which the boundary is shown
EXACT_SHARE = 0.1  # how much a look-up changes the share of tokens that are found as exact prefix
KEEP_S = 60.0  # costs are written to their file once in so many seconds
SHOW_S = 1.0  # and published once in so many
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _locked(method: Callable[Concatenate[BlendGate, _P], _R]) -> Callable[Concatenate[BlendGate, _P], _R]:
    """The scheduler's call of a gate, while no other thread asks `may_gain`."""

    def locked(self: BlendGate, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self.lock:
            return method(self, *args, **kwargs)

    update_wrapper(locked, method)
    return locked


class BlendGate:
    """Decides whether a request is blended, from what its alternatives are predicted to take.

    Alone, its time to the first token counts: look-up, load, selection and recomputation against a prefill. While
    others run, the GPU's time counts: look-up and load wait beside their steps, and what a blend saves is free for
    them. The exact prefix is used in both. What is unknown is tried.

    A request that cannot gain even if all of it were cached is not looked up: it starts as on stock vLLM.

    Args:
        costs: What the work takes here.
        min_gain: Share of the time that a blend must save; None: everything is blended.
        least_tokens: Fewer tokens than this of an exact prefix are not loaded.

    Attributes:
        lock: Held by the scheduler's calls, since another thread may ask `may_gain`.
    """

    def __init__(self, costs: CostModel, min_gain: float | None, least_tokens: int = 128) -> None:
        self.lock = Lock()
        self.costs, self.min_gain, self._least = costs, min_gain, least_tokens
        self._exploration, self._recheck = Exploration(), Recheck()
        self._exact = 1.0  # share of the tokens which vLLM did not hold that recent look-ups found as exact prefix
        self._file: Path | None = None
        self._kept = (0, time.monotonic())  # observations in the file, and when it was written
        self._shown = (0, -SHOW_S)  # the same of the metrics

    # -- decisions ----------------------------------------------------------------------------------------------------

    @_locked
    def skips_lookup(self, request: Any, state: RequestState, *, busy: bool) -> bool:
        """Whether the request is computed without a look-up: nothing that this could find would be worth it."""
        prompt = len(request.prompt_token_ids or ())
        if state.blend:
            forecast = self._without_gain(request.kv_transfer_params, prompt, state, busy=busy)
        else:
            forecast = None if busy else self._without_prefix(prompt, state)
        if forecast is None:
            return False
        if self._exploration.is_due(prompt, forecast):
            state.explores = True
            return False
        if state.blend:
            state.decision, state.forecast = Decision.NOT_FASTER, forecast
        return True

    def _without_prefix(self, prompt: int, state: RequestState) -> Forecast | None:
        """Of a request that is not to be blended: with and without a look-up, where an exact prefix is not worth one.

        None where it is. An ingestion is looked up always: what LMCache holds of it need not be computed.
        """
        if self.min_gain is None or state.ingest or state.explores:
            return None
        work = Work(prompt, state.local, state.local)
        computed, lookup = self.costs.compute_ms(work, looked_up=False), self.costs.lookup_ms(prompt)
        if computed is None or lookup is None or self._may_find_exact_prefix(work):
            return None
        return Forecast(computed + lookup, computed)

    def may_gain(self, params: Any, state: RequestState, *, busy: bool) -> bool:
        """Whether a new request is worth a look-up, by its accepted parameters. Decides and counts nothing.

        For another thread than the scheduler's. It does not wait: False if the scheduler uses the gate at this time.
        """
        if not self.lock.acquire(blocking=False):
            return False
        try:
            return self._without_gain(params, state.prompt, state, busy=busy) is None
        finally:
            self.lock.release()

    def _without_gain(self, params: Any, prompt: int, state: RequestState, *, busy: bool) -> Forecast | None:
        """What is predicted of a request that cannot gain whatever a look-up finds; None of any other."""
        if self.min_gain is None or state.always or not state.blend or state.decision or state.explores:
            return None
        local, spans = state.local, named_spans(params, prompt)
        placed = sum(max(0, end - max(start, local)) for start, end in spans) or max(prompt - local - HEAD, 0)
        selected = self._recomputed(state.policy, state.budget, placed, len(spans) or 1)
        tier = "hot" if state.resident_only else "l1"
        work = Work(
            prompt,
            local,
            local,
            {tier: placed},
            computed=selected + max(prompt - 1 - local - placed, 0),
            rest=1,
            policy=state.policy,
            selects=state.policy in SELECTING and selected < placed,
            looked_up=not state.resident_only,
        )
        forecast = self.costs.gpu_forecast(work) if busy else self.costs.forecast(work, looked_up=False)
        if forecast is None or forecast.gains(self.min_gain) or self._may_find_exact_prefix(work):
            return None
        return forecast

    def _recomputed(self, policy: str, budget: Budget, placed: int, chunks: int) -> int:
        """How many of the tokens of so many chunks are probably recomputed."""
        most = at_most(get_policy(policy), budget, placed, chunks)
        return self.costs.recomputed(policy, most) if budget.auto else most

    def _may_find_exact_prefix(self, work: Work) -> bool:
        """Whether a look-up is worth its time for the exact prefixes that look-ups find here."""
        if not work.looked_up:
            return False
        lookup = self.costs.lookup_ms(work.prompt)
        exact = work.local + int(self._exact * (work.prompt - 1 - work.local))
        loaded = self.costs.compute_ms(Work(work.prompt, work.local, exact, looked_up=False))
        computed = self.costs.compute_ms(work, looked_up=False)
        if lookup is None or loaded is None or computed is None:
            return True
        return computed - loaded > lookup

    @_locked
    def blends(self, state: RequestState, claimed: Claim, prompt: int, *, busy: bool) -> bool:
        """Whether a request is blended as claimed; if not, its exact prefix is used, and the rest computed."""
        if not state.decision:
            auto = state.budget.auto and not busy  # beside others a token costs their time
            state.free = self.costs.free_tokens(prompt, state.policy) if auto else 0
            state.decision, state.forecast = self._decide(state, claimed, prompt, busy=busy)
        return state.decision not in COMPUTED

    @_locked
    def loads(self, state: RequestState, exact: int, prompt: int, *, busy: bool) -> bool:
        """Whether an exact prefix of so many tokens is loaded, and not computed with the rest of the prompt.

        While others run it is: a load waits beside their steps.
        """
        if self.min_gain is None or state.always or busy:
            return True
        loaded = self.costs.compute_ms(Work(prompt, state.local, exact, looked_up=False))
        computed = self.costs.compute_ms(Work(prompt, state.local, state.local, looked_up=False))
        return loaded is None or computed is None or loaded <= computed

    def _decide(
        self, state: RequestState, claimed: Claim, prompt: int, *, busy: bool
    ) -> tuple[Decision, Forecast | None]:
        hot = sum(match.end - match.start for match in claimed.matches if match.block >= 0)
        left = claimed.end - claimed.exact - claimed.reused
        state.most = claimed.computed(state.policy, state.budget, state.free) - left
        selected = max(self.costs.recomputed(state.policy, state.most), min(state.free, state.most))
        computed = (selected if state.budget.auto else state.most) + left
        work = Work(
            prompt,
            state.local,
            claimed.exact if claimed.exact - state.local >= self._least else state.local,
            {"hot": hot, "l1": claimed.reused - hot},
            computed=computed,
            rest=prompt - claimed.end,
            policy=state.policy,
            selects=state.policy in SELECTING and computed < claimed.end - claimed.exact,
            looked_up=state.lookup is not None,
        )
        forecast = self.costs.gpu_forecast(work) if busy else self.costs.forecast(work)
        if self.min_gain is None or state.always:
            return Decision.ALWAYS, forecast if forecast and forecast.known else None
        if forecast is None or (forecast.gains(self.min_gain) and not forecast.known):
            return Decision.UNKNOWN, None
        if forecast.gains(self.min_gain):
            again = not busy and not state.explores and self._recheck.is_due(prompt - work.exact, forecast)
            return Decision.COMPUTED_AGAIN if again else Decision.BLENDED, forecast
        if state.explores or self._exploration.is_due(prompt, forecast):
            return Decision.MEASURED, forecast
        return Decision.NOT_FASTER, forecast

    # -- observations -------------------------------------------------------------------------------------------------

    @_locked
    def on_found(self, state: RequestState, *, idle: bool) -> None:
        """A look-up has its result. Its time counts only where no step of other requests delayed it."""
        if not state.ingest:
            found = state.prefix - state.local
            share = found / max(state.prompt - 1 - state.local, 1) if found >= self._least else 0.0
            self._exact += EXACT_SHARE * (min(share, 1.0) - self._exact)
        if idle:
            self.costs.lookup.observe((state.prompt,), state.lookup_ms)

    @_locked
    def on_result(self, state: RequestState, result: BlendResult) -> None:
        """A plan was carried out. In the background its times depend on other requests."""
        if state.background or result.failure:
            return
        placed = result.reused_tokens + result.recomputed_tokens
        loaded = placed - result.hot_tokens + max(result.prefix_tokens - state.local, 0)
        if loaded or result.hot_tokens:
            self.costs.load.observe((result.hot_tokens, loaded, 0), result.load_ms)
        if placed:
            selects = state.policy in SELECTING and 0 < result.recomputed_tokens < placed
            tokens = result.recomputed_tokens + result.computed_tokens
            self.costs.observe_passes(state.policy, tokens, state.prompt, result.blend_ms, selects=selects)
            if state.budget.auto:
                self.costs.observe_recomputed(state.policy, result.recomputed_tokens, state.most)

    @_locked
    def on_steps(self, steps: Iterable[StepTime]) -> None:
        """Steps were measured."""
        for step in steps:
            if step.shape.blended and step.shape.tokens == 1:
                self.costs.finish.observe((1,), step.ms)
            elif not step.shape.blended:
                self.costs.prefill.observe((step.shape.tokens, step.shape.context, 1), step.ms)
                self._recheck.on_computed(step.shape.tokens)
        self._keep()

    # -- kept per model and GPU ---------------------------------------------------------------------------------------

    @_locked
    def take(self, measured: Mapping[str, Any] | None, file: str) -> None:
        """Take what a worker measured at start, and the file in which costs are kept for later starts; "": none."""
        if measured and not self.costs.update(measured):
            log.warning(
                "The costs that were measured at start cannot be read: requests are blended until they are known"
            )
        self._file = Path(file) if file else None
        self._kept = (0, time.monotonic() - KEEP_S)

    def _keep(self) -> None:
        count, now = self.costs.count, time.monotonic()
        if self._file is None or count == self._kept[0] or now - self._kept[1] < KEEP_S:
            return
        self._kept = (count, now)
        fresh = self._file.with_suffix(".new")
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(self.costs.as_dict()), encoding="ascii")
            fresh.replace(self._file)

    # -- figures ------------------------------------------------------------------------------------------------------

    @_locked
    def take_figures(self, policy: str, budget: Budget) -> list[list[Any]]:
        """What the work takes, and from where on a prompt is blended, for the metrics; none if it is known there.

        Args:
            policy: The server's default.
            budget: The server's default.
        """
        count, now = self.costs.count, time.monotonic()
        if count == self._shown[0] or now - self._shown[1] < SHOW_S:
            return []
        self._shown = (count, now)
        found: list[list[Any]] = [[COST_GAUGE, name, ms] for name, ms in self.costs.figures().items()]
        return found + [[BOUNDARY_GAUGE, tier, tokens] for tier, tokens in self._boundaries(policy, budget).items()]

    def _boundaries(self, policy: str, budget: Budget) -> dict[str, float]:
        """From how many tokens on a prompt with all its chunks cached is blended, by tier; 0: at no length."""
        found: dict[str, float] = {}
        for tier in ("l1", "hot"):
            if self.costs.load_ms(tier, 1) and self.min_gain is not None:
                tokens = self.costs.boundary(
                    lambda placed: self._recomputed(policy, budget, placed, -(-placed // CHUNK)),
                    self.min_gain,
                    tier=tier,
                    policy=policy,
                )
                found[tier] = float(tokens or 0)
        return found
