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
from lmcache_rag.connector.admission import Allowance, Pace
from lmcache_rag.connector.config import ConnectorOptions
from lmcache_rag.connector.filed import FiledBlocks
from lmcache_rag.connector.hot_side import HotSide, without_overlap
from lmcache_rag.connector.metadata import BlendPlan, BlendResult, Claim, Match, claim
from lmcache_rag.connector.request_state import RequestState, may_hit, statistics
from lmcache_rag.protocol import LOADS, Fallback, ingests, joined, read_params, shown

log = logging.getLogger("lmcache_rag")

IN_FLIGHT = 32  # look-ups at once: LMCache has them in one worker's queue, and locks what they find
STEP_TOKENS = 16_384  # of the prompts whose look-ups begin in one step: 16,000 tokens take 6 ms of its time


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
    _holders: dict[str, RequestState] = field(default_factory=dict)  # looked up, and no blocks allocated yet
    _step: int = 0
    _begun: int = 0  # tokens of the prompts whose look-ups began in this step
    _refused: bool = False  # a request of the queue has to wait until its look-up may begin
    _queued: bool = False  # likewise in the step before
    _patience: float = 0.0  # seconds that this step may still wait for look-ups

    def __post_init__(self) -> None:
        self.pace = Pace(self.options.step_tokens, self.options.idle_tokens, self.options.overlap)
        self._patience = self.options.poll

    def arrived(self, request: Any) -> None:
        """A request is new: look it up while it waits, unless those before it wait for their look-ups to begin."""
        state = self._register(request)
        if not state.over and not self._queued and not self._refused and self._may_begin(request):
            self._begin(request, state)

    def matched(self, request: Any, local: int) -> int | None:
        """How many tokens behind the `local` first ones are there; None: ask again in the next step."""
        state = self._states.get(request.request_id) or self._register(request)
        if state.planned:
            # Planned and asked again means preempted: the request goes on from vLLM's own blocks and is not blended
            # again. LMCache's share was loaded and its locks are gone; the statistics tell of the first run.
            return 0
        state.local, state.step = local, self._step
        if not state.over and not state.begun and not self._admitted(request, state):
            return None if not state.over else 0
        if state.over:
            return 0
        if not self._found(request, state):
            return None if not state.over else 0
        prefix, matches = (state.lookup.result if state.lookup else None) or (0, ())
        if self.pace.full and (state.hot_only or prefix > local or (matches and state.blend)):
            return None  # its turn is yet to come; what is found now may be gone by then
        hot = self.hot.find(request) if self.hot and state.blend else []
        if state.hot_only and not (self.hot and self.hot.enough(request, hot)):
            state.hot_only, state.claim, state.begun = False, None, False  # evicted while the request waited
            if not self._admitted(request, state) or state.over or not self._found(request, state):
                return None if not state.over else 0
            prefix, matches = (state.lookup.result if state.lookup else None) or (0, ())
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

    # -- when look-ups begin ------------------------------------------------------------------------------------------

    def _admitted(self, request: Any, state: RequestState) -> bool:
        """Whether a request that vLLM asks for was looked up just now, or needs no look-up any more."""
        now = time.perf_counter()
        state.awaited = state.awaited or now
        if not self._refused and self._may_begin(request, queued=True):
            state.awaited = 0.0
            self._begin(request, state)
            return True
        self._refused = True  # nor may those behind it: the queue's order is kept
        if self._silent is not None and now - state.awaited > self.options.lookup_deadline:
            state.over, state.failure = True, Fallback.LOOKUP_DEADLINE
        return False

    def _may_begin(self, request: Any, *, queued: bool = False) -> bool:
        """Whether a look-up may begin: few are in flight, and a step is not held up by the work that they are."""
        tokens = len(request.prompt_token_ids or ())
        if (self._begun and self._begun + tokens > STEP_TOKENS) or self._abandoned.has(request.request_id):
            return False
        if not self._room and not (queued and self._take_place()):
            return False
        self._begun += tokens
        return True

    @property
    def _room(self) -> bool:
        """Whether fewer look-ups are in flight than may be. Those that a dead server never answers do not count."""
        since = time.perf_counter() - self.options.lookup_deadline
        return len(self._holders) + self._abandoned.since(since) < IN_FLIGHT

    def _take_place(self) -> bool:
        """Abandon a look-up whose request cannot run yet: vLLM did not ask for it in the whole step before.

        It may wait for its grammar, or for a LoRA adapter, and would keep others from being looked up.
        """
        name, state = min(self._holders.items(), key=lambda item: item[1].step, default=("", None))
        if state is None or state.step >= self._step - 1:
            return False
        del self._holders[name]
        lookup, state.lookup, state.begun, state.awaited = state.lookup, None, False, 0.0
        if lookup is not None:
            self.abandon(lookup, wait=False)
        return self._room

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

    def _register(self, request: Any) -> RequestState:
        params, complaints = read_params(
            request.kv_transfer_params, self.options.policy, self.options.ratio, self.options.blend
        )
        if complaints:
            log.warning("request %s: %s; the default is used", shown(request.request_id), joined(complaints))
        state = RequestState(params.policy, params.ratio, params.blend, over=not may_hit(request, self.chunk))
        state.spans, state.ingest, state.step = [] if params.spans else None, params.ingest, self._step
        self._states[request.request_id] = state
        return state

    def _begin(self, request: Any, state: RequestState) -> None:
        state.begun = True
        if not state.tokens:
            state.tokens = array("q", request.prompt_token_ids)
            if self.hot and state.blend:
                self.hot.begin(request, state.tokens)
                state.hot_only = self.hot.promising(request)
        if not state.hot_only:
            self._ask(request, state)

    def _ask(self, request: Any, state: RequestState) -> None:
        state.asked = time.perf_counter()
        state.lookup = self.look_up(request)
        if state.lookup is None:
            state.over, state.failure = True, Fallback.NO_SERVER
            self._warn("LMCache does not answer")
        else:
            self._holders[request.request_id] = state

    def _found(self, request: Any, state: RequestState) -> bool:
        lookup = state.lookup
        if lookup is None:
            return True
        state.awaited = state.awaited or time.perf_counter()
        ready = self._poll(lookup.poll)
        now = time.perf_counter()
        state.lookup_ms = (now - state.asked) * 1e3
        if ready:
            state.prefix = lookup.result[0] if lookup.result else 0
            if self._silent is not None and state.asked > self._silent:
                self._silent = None
            return True
        if now - state.awaited > self.options.lookup_deadline:
            self._warn(f"LMCache did not answer for {self.options.lookup_deadline:g} s")
            self._give_up(request.request_id, state, Fallback.LOOKUP_DEADLINE)
        return False

    def _poll(self, poll: Callable[[float], Any]) -> Any:
        """Ask for a result; an idle engine waits a little for it, for all look-ups of a step together."""
        began = time.perf_counter()
        found = poll(self._patience if self.pace.idle else 0.0)
        self._patience = max(0.0, self._patience - (time.perf_counter() - began))
        return found

    def _warn(self, words: str) -> None:
        if self._silent is None:  # once, until it answers something that it is asked from now on
            log.warning("%s: prompts are computed in full until it does", words)
        self._silent = time.perf_counter()

    def _give_up(self, request_id: str, state: RequestState, reason: Fallback) -> None:
        self._holders.pop(request_id, None)
        lookup, state.lookup, state.over, state.failure = state.lookup, None, True, reason
        if lookup is not None:
            self.abandon(lookup)

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
        return state.prefix if state else 0

    def allocated(
        self, request: Any, block_ids: list[int], external: int, configs: dict[str, Any] | None, *, salt: str = ""
    ) -> None:
        """Blocks were allocated for a claim of `external` tokens: plan it, and give back what is not needed."""
        state = self._states.get(request.request_id)
        if state is None or state.planned:
            return
        state.planned = True
        self._holders.pop(request.request_id, None)
        claimed = state.claim if external > 0 else None
        if state.lookup is not None and state.lookup.result is not None:
            prefix = state.prefix
            load_from = state.local // self.chunk * self.chunk if claimed and prefix > state.local else prefix
            state.locked, state.loads = (0, load_from), (load_from, prefix)
        if claimed is None:
            if self.hot:
                self.hot.done(request.request_id)
        else:
            if self.hot:
                self.hot.keep(request.request_id)
            self._plan(request.request_id, state, claimed, block_ids, configs, salt)
        self._release(state)
        if claimed is None:
            state.handed_over()

    def _plan(
        self,
        request_id: str,
        state: RequestState,
        claimed: Claim,
        block_ids: list[int],
        configs: dict[str, Any] | None,
        salt: str,
    ) -> None:
        self.pace.begun(request_id)
        self._plans.append(
            BlendPlan(
                request_id,
                state.tokens,
                state.local,
                claimed.exact,
                claimed.matches,
                claimed.end,
                tuple(block_ids),
                state.policy,
                state.ratio,
                salt,
                configs,
                state.background,
                failure=state.failure,
            )
        )

    def _release(self, state: RequestState) -> None:
        """Give back locks of exact prefix chunks that no worker is going to load."""
        if state.lookup is not None and state.locked[1]:
            state.lookup.release_prefix(*state.locked)
        state.locked = (0, 0)

    def _withdraw(self, state: RequestState) -> None:
        """No worker is going to load what was planned."""
        first, end = 0 if state.locked[1] else state.loads[0], state.loads[1]
        state.locked, state.loads = (first, end), (end, end)
        self._release(state)

    def leave_out(self, request: Any, failure: str = "") -> None:
        """Neither look up nor blend this request; the statistics say what it computed, and why."""
        state = self._register(request)
        state.over, state.failure = True, failure

    def drop(self, request_id: str) -> None:
        """Something raised: the request is not blended, and holds nothing here but what a worker has its plan for."""
        state = self._states.get(request_id)
        if state is None:
            state = RequestState(self.options.policy, self.options.ratio, blend=False)
            self._states[request_id] = state
        if any(plan.request_id == request_id for plan in self._plans):
            return
        if self.hot:
            self.hot.done(request_id)
            self.hot.forget(request_id)
        state.over, state.failure = True, Fallback.REQUEST_ERROR
        if not state.planned:
            state.claim = None
            self.pace.give_back(request_id)
            self._give_up(request_id, state, Fallback.REQUEST_ERROR)
        elif state.claim is not None:  # no worker has a plan, which would give back the locks of what it loads
            state.claim = None
            self._withdraw(state)
        else:
            self._release(state)

    def ended(self, request_id: str) -> None:
        """A request that was dropped has ended; what `finished` could not do, since something raised, is done."""
        self.drop(request_id)
        self._states.pop(request_id, None)

    def compute(self, request: Any, block_ids: list[int], external: int) -> None:
        """Plan to compute what vLLM counts as computed, and allocated blocks for, though it could not be planned."""
        name = request.request_id
        if any(plan.request_id == name for plan in self._plans):
            return
        state = self._states[name]
        state.planned, state.tokens = True, array("q", request.prompt_token_ids)
        if state.background:
            self.pace.claim(name, "beside", external)
        self._plan(name, state, Claim(state.local, (), state.local + external), block_ids, None, "")

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
        for plan in plans:
            if state := self._states.get(plan.request_id):
                state.handed_over()
        self._step += 1
        self._begun, self._queued, self._refused, self._patience = 0, self._refused, False, self.options.poll
        if self.hot:
            self.hot.step_ends()
        if self.filed:
            self.filed.step_ends()
        self._abandoned.hear(time.perf_counter())
        return plans, allowance

    def abandon(self, lookup: Lookup, *, wait: bool = True) -> None:
        """See to a look-up that is not waited for any more."""
        now = time.perf_counter()
        if wait:
            self._poll(lambda seconds: self._abandoned.add(lookup, now, seconds))
        else:
            self._abandoned.add(lookup, now, 0.0)

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
        return self._abandoned.since(time.perf_counter() - self.options.lookup_deadline) > 0

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
        state = self._states.get(request.request_id)
        if state is None:
            return None
        self._holders.pop(request.request_id, None)
        self.pace.give_back(request.request_id)
        # vLLM waits for the worker's word of what is loaded in the background: that is not taken back.
        plans = [plan for plan in self._plans if plan.request_id != request.request_id or plan.background]
        withdrawn = len(plans) < len(self._plans)
        self._plans = plans
        if self.hot:
            if not state.planned or withdrawn:
                self.hot.done(request.request_id)
            self.hot.forget(request.request_id)
        lookup = state.lookup
        if lookup is not None and (not state.planned or lookup.result is None):
            self.abandon(lookup)
        elif lookup is not None:
            if withdrawn:
                self._withdraw(state)
            self._release(state)
        del self._states[request.request_id]
        found = statistics(len(request.prompt_token_ids or ()), state)
        if self.count and state.planned:
            self.count(found)
        if self.hot and state.ingest and state.approximate_from is None:
            self.hot.ingested(request)
        return found

    @property
    def requests(self) -> int:
        """Requests that are being looked after."""
        return len(self._states)

    @property
    def abandoned(self) -> int:
        """Look-ups that nobody waits for and that have not been heard to their end yet."""
        return len(self._abandoned)
