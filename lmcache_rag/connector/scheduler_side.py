"""Scheduler side: looks up what of a prompt is cached, claims it, and hands plans to the workers.

Knows vLLM's requests by few attributes only and LMCache not at all, so that it can be tested without either.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lmcache_rag.connector.abandoned import Abandoned, Lookup
from lmcache_rag.connector.filed import FiledBlocks
from lmcache_rag.connector.hot_side import HotSide, without_overlap
from lmcache_rag.connector.options import ConnectorOptions
from lmcache_rag.connector.pace import Allowance, Pace
from lmcache_rag.connector.plan import BlendPlan, BlendResult, Claim, Match, claim
from lmcache_rag.connector.request_state import RequestState, may_hit, statistics
from lmcache_rag.protocol import LOADS, Fallback, ingests, read_params

log = logging.getLogger("lmcache_rag")

_EARLY = 32


@dataclass
class SchedulerSide:
    """Decides what to claim.

    Args:
        options: Settings.
        chunk: Tokens of an LMCache chunk.
        look_up: Starts a look-up for a request; None when LMCache cannot be reached.
        hide: Makes a request's blocks from a token on unreachable for other requests.
        hot: What vLLM itself still holds; None without prefix caching.
        filed: What vLLM's prefix cache says is there and is not yet; None without prefix caching.
        count: Told of the reuse statistics of each request that ran, when it ends.
    """

    options: ConnectorOptions
    chunk: int
    look_up: Callable[[Any], Lookup | None]
    hide: Callable[[Any, int], None]
    hot: HotSide | None = None
    filed: FiledBlocks | None = None
    count: Callable[[dict[str, Any]], None] | None = None
    _states: dict[str, RequestState] = field(default_factory=dict)
    _plans: list[BlendPlan] = field(default_factory=list)
    _abandoned: Abandoned = field(default_factory=Abandoned)
    _silent: float | None = None  # since when LMCache has not answered what it was asked, as far as was warned of

    def __post_init__(self) -> None:
        self.pace = Pace(self.options.step_tokens, self.options.idle_tokens, self.options.overlap)

    def arrived(self, request: Any) -> None:
        """A request is new: look it up while it waits. Of a long queue not all: read locks end by themselves."""
        if len(self._states) < _EARLY:
            self._begin(request)

    def matched(self, request: Any, local: int) -> int | None:
        """How many tokens behind the `local` first ones are there; None: ask again in the next step."""
        state = self._states.get(request.request_id) or self._begin(request)
        if state.planned:
            # Planned and asked again means preempted: the request goes on from vLLM's own blocks and is not blended
            # again. LMCache's share was loaded and its locks are gone; the statistics tell of the first run.
            return 0
        state.local = local
        if state.over:
            return 0
        if not self._found(request, state):
            return None if not state.over else 0
        prefix, matches = (state.lookup.result if state.lookup else None) or (0, ())
        if self.pace.full and (state.hot_only or prefix > local or (matches and state.blend)):
            return None  # its turn is yet to come; what is found now may be gone by then
        hot = self.hot.find(request) if self.hot and state.blend else []
        if state.hot_only and not (self.hot and self.hot.enough(request, hot)):
            state.hot_only, state.claim = False, None  # evicted while the request waited
            self._ask(request, state)
            if state.over or not self._found(request, state):
                return None if not state.over else 0
        prompt = len(request.prompt_token_ids or ())
        wanted = self._wanted(state, prompt, local, hot)
        if wanted.end <= local:
            state.claim = wanted
            return 0
        if self.filed and self.filed.hold(request.block_hashes, local):
            return None  # what it shares with another request is computed in this step, behind the blend
        tokens = wanted.computed(state.policy, state.ratio)
        way = self.pace.way(tokens)
        if way == "later":
            return None
        state.background = way == "beside"
        if state.background and wanted.matches:
            # The request waits without blocks for more than is claimed, so all but the last token is.
            wanted = claim(prompt, local, wanted.exact, wanted.matches, least=0, tail=prompt)
        state.claim = wanted
        self.pace.claim(request.request_id, way, tokens)
        if wanted.matches:
            self._mark(request, state, wanted.matches[0].start)
            if self.hot:
                self.hot.claim(request.request_id, wanted.matches)
        return wanted.end - local

    def _wanted(self, state: RequestState, prompt: int, local: int, hot: list[Match]) -> Claim:
        prefix, matches = (state.lookup.result if state.lookup else None) or (0, ())
        found = without_overlap(matches, hot, prompt) if state.blend else ()
        least = self.options.least_tokens
        wanted = claim(prompt, local, prefix, found, least=least, tail=self.options.tail_tokens)
        if not wanted.matches and wanted.end - local < least:
            return Claim(local, (), local)  # computed with the rest of the prompt, sooner than it is loaded
        return wanted

    def in_background(self, request_id: str) -> bool:
        """Whether what was claimed is loaded while the request waits."""
        state = self._states.get(request_id)
        return state is not None and state.background

    def _begin(self, request: Any) -> RequestState:
        params, complaints = read_params(
            request.kv_transfer_params, self.options.policy, self.options.ratio, self.options.blend
        )
        for complaint in complaints:
            log.warning("request %s: %s; the default is used", request.request_id, complaint)
        state = RequestState(params.policy, params.ratio, params.blend, over=not may_hit(request, self.chunk))
        self._states[request.request_id] = state
        if state.over:
            return state
        state.tokens = array("q", request.prompt_token_ids)
        if self.hot and state.blend:
            self.hot.begin(request, state.tokens)
            state.hot_only = self.hot.promising(request)
        elif self.hot and params.ingest:
            self.hot.ingests(request, state.tokens)
        if not state.hot_only:
            self._ask(request, state)
        return state

    def _ask(self, request: Any, state: RequestState) -> None:
        state.asked = time.perf_counter()
        state.lookup = self.look_up(request)
        if state.lookup is None:
            state.over, state.failure = True, Fallback.NO_SERVER
            self._warn("LMCache does not answer")

    def _found(self, request: Any, state: RequestState) -> bool:
        lookup = state.lookup
        if lookup is None:
            return True
        state.awaited = state.awaited or time.perf_counter()
        ready = lookup.poll(self.options.poll if self.pace.idle else 0.0)
        now = time.perf_counter()
        state.lookup_ms = (now - state.asked) * 1e3
        if ready:
            if self._silent is not None and state.asked > self._silent:
                self._silent = None
            return True
        if now - state.awaited > self.options.lookup_deadline:
            self._warn(f"LMCache did not answer for {self.options.lookup_deadline:g} s")
            self._give_up(state, Fallback.LOOKUP_DEADLINE)
        return False

    def _warn(self, words: str) -> None:
        if self._silent is None:  # once, until it answers something that it is asked from now on
            log.warning("%s: prompts are computed in full until it does", words)
        self._silent = time.perf_counter()

    def _give_up(self, state: RequestState, reason: Fallback) -> None:
        if state.lookup is not None:
            self._abandon(state.lookup)
        state.lookup, state.over, state.failure = None, True, reason

    def _mark(self, request: Any, state: RequestState, first: int) -> None:
        """From `first` on this request's KV is approximate: nobody else may get it."""
        if state.approximate_from is None or first < state.approximate_from:
            self.hide(request, first)
            state.approximate_from = first

    def store_limit(self, request_id: str) -> int | None:
        """LMCache may store this request's KV up to that token; None: all of it."""
        state = self._states.get(request_id)
        return state.approximate_from if state else None

    def claimed(self, request_id: str) -> int:
        """Tokens from the prompt's beginning on that vLLM counts as computed by what was claimed of it."""
        state = self._states.get(request_id)
        return state.claim.end if state and state.claim else 0

    def stored(self, request: Any) -> int:
        """Tokens that LMCache holds of this prompt from its beginning on: they need not be stored again.

        But for a chunk at ingestion (lmcache_rag.protocol.INGEST): LMCache enters into its index
        of chunks what is stored only, not what it loads from a second tier, where an earlier server may have put it.
        """
        state = self._states.get(request.request_id)
        if ingests(request.kv_transfer_params):
            return 0
        return state.lookup.result[0] if state and state.lookup and state.lookup.result else 0

    def allocated(
        self, request: Any, block_ids: list[int], external: int, configs: dict[str, Any] | None, *, salt: str = ""
    ) -> None:
        """Blocks were allocated for a claim of `external` tokens: plan it, and give back what is not needed."""
        state = self._states.get(request.request_id)
        if state is None or state.planned:
            return
        state.planned = True
        if state.lookup is not None and state.lookup.result is not None:
            prefix, _ = state.lookup.result
            load_from = state.local // self.chunk * self.chunk if external > 0 and prefix > state.local else prefix
            state.lookup.release_prefix(0, load_from)
            state.loads = load_from, prefix
        if external <= 0 or state.claim is None:
            if self.hot:
                self.hot.done(request.request_id)
            return
        if self.hot:
            self.hot.keep(request.request_id)
        self._plans.append(
            BlendPlan(
                request.request_id,
                state.tokens,
                state.local,
                state.claim.exact,
                state.claim.matches,
                state.claim.end,
                tuple(block_ids),
                state.policy,
                state.ratio,
                salt,
                configs,
                state.background,
            )
        )
        self.pace.begun(request.request_id)

    def plans(self, scheduled: Mapping[str, int] | None = None) -> tuple[list[BlendPlan], Allowance]:
        """What this step's workers have to do, and how much of what they have begun; the next step begins.

        Args:
            scheduled: The requests that vLLM runs in this step, and how many tokens of each.
        """
        plans, self._plans = self._plans, []
        scheduled = scheduled or {}
        if len(plans) == 1 and dict(scheduled) == {plans[0].request_id: 1}:
            plans = [replace(plan, alone=plan.end + 1 == len(plan.token_ids)) for plan in plans]
        allowance = self.pace.step(scheduled)
        if self.hot:
            self.hot.step_ends()
        if self.filed:
            self.filed.step_ends()
        self._abandoned.hear(time.perf_counter())
        return plans, allowance

    def _abandon(self, lookup: Lookup) -> None:
        self._abandoned.add(lookup, time.perf_counter(), self.options.poll)

    def listens(self, request_id: str) -> bool:
        """Whether a look-up of this request is still to be heard to its end, and its session not to be ended before.

        The server may have taken its locks already, while its answer is on the way. It notes them in the session: were
        that ended now, they could not be given back any more.
        """
        return self._abandoned.has(request_id)

    @property
    def unheard(self) -> bool:
        """Whether look-ups were abandoned a moment ago: an engine without requests should go on for them.

        Not for long: a server that was restarted never answers them.
        """
        return self._abandoned.since(time.perf_counter() - self.options.lookup_deadline)

    def take(self, results: list[BlendResult]) -> None:
        """What the workers did."""
        for result in results:
            self.pace.done(result.request_id)
            if self.hot:
                self.hot.done(result.request_id)
            if state := self._states.get(result.request_id):
                state.result = result
            if result.failure in LOADS:
                # The server did not answer for a whole deadline, in which vLLM may have stood still: what it was asked
                # then has waited as long, though nobody could listen.
                for state in self._states.values():
                    state.awaited = state.asked

    def finished(self, request: Any) -> dict[str, Any] | None:
        """A request ended, in whatever way: its reuse statistics, or None when nothing was looked up."""
        self.pace.ended(request.request_id)
        state = self._states.pop(request.request_id, None)
        if state is None:
            return None
        # vLLM waits for the worker's word of what is loaded in the background: that is not taken back.
        plans = [plan for plan in self._plans if plan.request_id != request.request_id or plan.background]
        if state.lookup is not None and (not state.planned or state.lookup.result is None):
            self._abandon(state.lookup)
        elif state.lookup is not None and len(plans) < len(self._plans):  # no worker is going to load it
            state.lookup.release_prefix(*state.loads)
        if self.hot:
            if not state.planned or len(plans) < len(self._plans):
                self.hot.done(request.request_id)
            self.hot.forget(request.request_id)
        self._plans = plans
        found = statistics(len(request.prompt_token_ids or ()), state)
        if self.count and state.planned:
            self.count(found)
        return found

    @property
    def requests(self) -> int:
        """Requests that are being looked after."""
        return len(self._states)

    @property
    def abandoned(self) -> int:
        """Look-ups that nobody waits for and that have not been heard to their end yet."""
        return len(self._abandoned)
