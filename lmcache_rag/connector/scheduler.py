"""Scheduler side: looks up what of a prompt is cached, claims it, admits the blend and sends plans to the workers.

It reads few attributes of vLLM's requests, and calls LMCache by LookupClient, so that it can be tested without either.
"""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from lmcache_rag.connector import metrics, vllm_internals, vllm_patches
from lmcache_rag.connector.admission import Admission, Allowance, BlendBudget, BlendGate
from lmcache_rag.connector.authorization import IngestKey, checked
from lmcache_rag.connector.config import ConnectorOptions
from lmcache_rag.connector.gpu_chunks import GpuChunks, PrefixCache, ResidentChunks, UncomputedBlocks, without_overlap
from lmcache_rag.connector.lookup import AbortedLookups, Forgetting, LookupClient, LookupWindow
from lmcache_rag.connector.metadata import (
    NOT_READY,
    BlendHandshakeMetadata,
    BlendPlan,
    BlendResult,
    BlendWorkerMetadata,
    Claim,
    Match,
    claim,
)
from lmcache_rag.connector.request_state import Lookup, RequestState, can_hit, has_embeddings, is_text, take_step
from lmcache_rag.connector.transfers import FencedBlocks, FinishedOnce
from lmcache_rag.costs import CostModel
from lmcache_rag.protocol import (
    LOADS,
    MAX_OFFLOAD_TOKENS,
    SELF_CHECK,
    SPANS,
    CannotBlend,
    Fallback,
    SelfCheck,
    Unsupported,
    ingests,
    joined,
    read_params,
    shown,
)

log = logging.getLogger("lmcache_rag")


class BlendScheduler:
    """Takes each request from its look-up to its claim, its admission, its plan and its statistics.

    What a request holds, and which call releases it: see lmcache_rag.connector.request_state.

    Args:
        options: Settings.
        chunk: Tokens of an LMCache chunk.
        client: Starts look-ups at LMCache.
        prefix_cache: Hides requests' KV from vLLM's prefix cache.
        ingest_key: What ingesting and forgetting need; None: nothing.
        alignment: LMCache's connector counts vLLM's own hits in multiples of so many tokens.
        costs: What the engine's work takes.
        slots: LoRA adapters that can run in one step.
    """

    def __init__(
        self,
        options: ConnectorOptions,
        chunk: int,
        client: LookupClient,
        prefix_cache: PrefixCache,
        *,
        ingest_key: IngestKey | None = None,
        alignment: int = 1,
        costs: CostModel | None = None,
        slots: int = 0,
    ) -> None:
        self.options, self.client = options, client
        self.gate = BlendGate(costs or CostModel(), options.min_gain, options.least_tokens)
        self.budget = BlendBudget(options.step_tokens, options.idle_tokens, options.overlap, slots=slots)
        self.gpu_chunks: GpuChunks | None = None  # None without prefix caching
        self.uncomputed: UncomputedBlocks | None = None  # likewise
        self.fenced = FencedBlocks()
        self.unsupported: Unsupported | None = NOT_READY
        self.self_check: SelfCheck | None = None
        self._chunk, self._alignment, self._prefix_cache, self._ingest_key = chunk, alignment, prefix_cache, ingest_key
        self._aborted = AbortedLookups()
        self.window = LookupWindow(self._aborted, options.lookup_deadline)
        self.forgetting = Forgetting(client, prefix_cache, self._aborted, options.lookup_deadline)
        self._states: dict[str, RequestState] = {}
        self._failed: set[str] = set()  # an error was raised: vLLM computes them, and nothing of them is stored
        self._plans: list[BlendPlan] = []
        self._silent_since: float | None = None  # when LMCache last failed to answer; None: it answers
        self._patience = options.poll  # seconds that this step may still wait for look-ups
        self._taken: Any = None  # the workers' metadata that was taken last
        self._freed = FinishedOnce()
        self._records: list[dict[str, Any]] = []

    # -- start --------------------------------------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Use vLLM's own blocks."""
        block = getattr(gpu_block_pool, "hash_block_size", None) or self._prefix_cache.block_size
        self._prefix_cache.block_size = block
        self.fenced.pool = gpu_block_pool
        if not getattr(gpu_block_pool, "enable_caching", False):
            return
        self.forgetting.pool = pool = vllm_internals.CachedBlocks(gpu_block_pool)
        self.uncomputed = UncomputedBlocks(pool, block)
        vllm_patches.patch_cache_full_blocks(gpu_block_pool, self.uncomputed.add, self.store_limit)
        if self.options.hot:
            most = len(pool.blocks) * block
            resident = ResidentChunks(pool, block, uncomputed=self.uncomputed, max_tokens=most)
            self.gpu_chunks, self.forgetting.resident = GpuChunks(resident), resident

    def set_handshake_metadata(self, metadata: Mapping[int, Any]) -> None:
        """Take what the workers report at start."""
        reports = [item for item in metadata.values() if isinstance(item, BlendHandshakeMetadata)]
        nothing = Unsupported(CannotBlend.NO_WORKER, "no worker of vLLM reported whether it can blend")
        reasons = [item.unsupported for item in reports if item.unsupported is not None]
        self.unsupported = reasons[0] if reasons else None if reports else nothing
        # The worst: one rank that skipped counts for all.
        self.self_check = max((item.self_check for item in reports if item.self_check), default=None)
        if reports:
            self.gate.take(reports[0].costs, reports[0].costs_file)

    def can_blend(self) -> bool:
        """Whether the workers blend."""
        return self.unsupported is None

    # -- requests that an error is raised for -------------------------------------------------------------------------

    @contextlib.contextmanager
    def contain_errors(self, request_id: str) -> Iterator[None]:
        """A `with` block in which an error affects this request only: it is computed in full, the engine continues."""
        try:
            yield
        except Exception as error:
            self.fail(request_id, error)

    def fail(self, request_id: str, error: Exception) -> None:
        """Neither blend nor store this request any more."""
        if request_id not in self._failed:
            self._failed.add(request_id)
            where = "".join(traceback.format_tb(error.__traceback__))  # without the message: a client may have made it
            log.error(
                "request %s is computed in full, and its KV is not stored: %s %s\n%s",
                shown(request_id),
                type(error).__name__,
                shown(str(error)),
                where,
            )
        self.client.stop_storing(request_id)
        try:
            self.drop(request_id)
        except Exception:
            log.exception("request %s: what it held could not be released", shown(request_id))

    def has_failed(self, request_id: str) -> bool:
        """Whether an error was raised for this request."""
        return request_id in self._failed

    def drop(self, request_id: str) -> None:
        """Do not blend a request, and release what it holds, except for what a worker's plan uses."""
        state = self._states.setdefault(request_id, RequestState(self.options.policy, self.options.budget, blend=False))
        if any(plan.request_id == request_id for plan in self._plans):
            return
        if self.gpu_chunks:
            self.gpu_chunks.unpin(request_id)
            self.gpu_chunks.on_finished(request_id)
        state.closed, state.failure = True, Fallback.REQUEST_ERROR
        if not state.planned:
            state.claim = None
            self.budget.withdraw(request_id)
            self._give_up(request_id, state, Fallback.REQUEST_ERROR)
        elif state.claim is not None:  # no worker has a plan, which would release the locks of what it loads
            state.claim = None
            self._withdraw(state)
        else:
            self._release(state)

    # -- a new request ------------------------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> bool:
        """Check a new request's parameters. Keep only valid ones: nothing after this checks them again.

        Returns:
            Whether it can be looked up at once.
        """
        params, request.kv_transfer_params = request.kv_transfer_params, None
        with self.contain_errors(request.request_id):
            params, wrong = checked(params, request.prompt_token_ids, self._prefix_cache.block_size, self._ingest_key)
            if wrong:  # the API server rejects these: this request bypassed it
                log.warning("request %s is neither blended nor stored: %s", shown(request.request_id), joined(wrong))
            if wrong or (self.can_blend() and not is_text(request)):  # KV of text after a picture depends on it
                request.kv_transfer_params = {MAX_OFFLOAD_TOKENS: 0}
                self._exclude(request, Fallback.REQUEST_ERROR if wrong else Fallback.NOT_TEXT)
                return False
            request.kv_transfer_params = params
            if self.forgetting.on_new_request(request):
                self._exclude(request)
                return False
            return self.can_blend() and not getattr(request, "resumable", False)
        return False

    def start_early(self, request: Any, *, sent: bool = False) -> None:
        """Start a new request's look-up while it waits, unless earlier requests wait for theirs to start.

        If the client has `sent` it already, that one is taken.
        """
        if request.request_id in self._failed:
            return
        with self.contain_errors(request.request_id):
            state = self._register(request)
            if not state.closed and (sent or self.window.may_start_early(request, time.perf_counter())):
                self._start(request, state)

    def _exclude(self, request: Any, failure: str = "") -> None:
        """Neither look up nor blend this request; its statistics report what it computed, and why."""
        state = self._register(request)
        state.closed, state.failure = True, failure

    def _register(self, request: Any) -> RequestState:
        params, wrong = read_params(
            request.kv_transfer_params, self.options.policy, self.options.ratio, self.options.blend
        )
        if wrong:
            log.warning("request %s: %s; the default is used", shown(request.request_id), joined(wrong))
        state = RequestState(params.policy, params.budget, params.blend, closed=not can_hit(request, self._chunk))
        state.spans, state.ingest, state.step = [] if params.spans else None, params.ingest, self.window.step
        state.always, state.prompt = params.always, len(request.prompt_token_ids or ())
        state.adapter = getattr(request, "lora_request", None)
        if state.adapter is not None and self.client.adapter_changed(state.adapter):
            state.closed, state.failure = True, Fallback.ADAPTER_CHANGED
        self._states[request.request_id] = state
        return state

    # -- look-up, claim, admission ------------------------------------------------------------------------------------

    def uses_stock_connector(self, request: Any) -> bool:
        """Whether LMCache's own connector looks this request up: where the workers cannot blend."""
        name = request.request_id
        excluded = self.forgetting.has(name) or name in self._failed or has_embeddings(request)
        return self.unsupported is not None and not excluded

    def get_num_new_matched_tokens(self, request: Any, local: int, tracker: Any) -> tuple[int | None, bool]:
        """Claim the exact prefix, and after it everything up to the last cached chunk.

        Args:
            request: vLLM's request.
            local: Tokens that vLLM holds itself.
            tracker: LMCache's tracker of the request.

        Returns:
            (tokens after the local ones, or None to ask again in the next step; whether they come in the background).
        """
        name = request.request_id
        if name in self._failed:
            return 0, False
        forgets = self.forgetting.has(name)
        if (forgets and not self.forgetting.poll(request)) or not self.budget.has_slot(request):
            return None, False
        tracker.num_vllm_hit_tokens = local // self._alignment * self._alignment
        if self.unsupported is not None and not forgets:
            return 0, False
        more = self.match(request, local)
        if more is None:
            return None, False
        tracker.num_stored_tokens = max(tracker.num_stored_tokens, self.stored(request))
        limit = self.store_limit(name)
        if limit is not None:
            asked = tracker.max_offload_tokens
            tracker.max_offload_tokens = limit if asked is None else min(asked, limit)
        return more, self.in_background(name) and more > 0

    def match(self, request: Any, local: int) -> int | None:
        """Look up, claim, admit: how many tokens after the `local` first ones are claimed; None: ask again."""
        state = self._states.get(request.request_id) or self._register(request)
        state.done = local
        if state.planned:
            # A request with a plan that vLLM asks for again was preempted: it continues from vLLM's blocks, and is not
            # blended again. LMCache's share was loaded and its locks are gone; the statistics are those of the first
            # run.
            return 0
        state.local, state.step = local, self.window.step
        if state.lookup is not None and state.lookup.result is None:
            self._skip_lookup(request, state)  # what vLLM itself holds was not known when it was sent
        if not self._looked_up(request, state):
            return None if not state.closed else 0
        prefix, matches = state.found
        if self.budget.full and (state.resident_only or prefix > local or (matches and state.blend)):
            return None  # it cannot be admitted yet; matches found now may be evicted until then
        resident = self.gpu_chunks.find(request) if self.gpu_chunks and state.blend else []
        if state.resident_only and not (self.gpu_chunks and self.gpu_chunks.is_enough(request, resident)):
            state.resident_only, state.claim, state.started = False, None, False  # evicted while the request waited
            if not self._looked_up(request, state):
                return None if not state.closed else 0
        prompt = len(request.prompt_token_ids or ())
        wanted = self._find_claim(state, prompt, local, resident)
        if wanted.end <= local:
            state.claim = wanted
            return 0
        if self.uncomputed and self.uncomputed.pending(request.block_hashes, local):
            # Shared blocks are filled by this step's forward pass, and a blend would read them before: ask again in the
            # next step.
            return None
        tokens = wanted.computed(state.policy, state.budget, state.free)
        how = self.budget.admit(tokens)
        if how is Admission.DEFER:
            return None
        state.background = how is Admission.ASYNC
        if state.background and wanted.matches:
            # A waiting request gets blocks only for claimed tokens. The suffix needs blocks too, so it is claimed.
            wanted = claim(prompt, local, wanted.exact, wanted.matches, least=0, tail=prompt)
        state.claim = wanted
        self.budget.claim(request.request_id, how, tokens)
        if wanted.matches:
            self._hide(request, state, wanted.matches[0].start)
            if self.gpu_chunks:
                self.gpu_chunks.claim(request.request_id, wanted.matches)
        return wanted.end - local

    def _find_claim(self, state: RequestState, prompt: int, local: int, resident: list[Match]) -> Claim:
        prefix, matches = state.found
        found = without_overlap(matches, resident, prompt) if state.blend else ()
        least = self.options.least_tokens
        wanted = claim(prompt, local, prefix, found, least=least, tail=self.options.tail_tokens)
        if wanted.matches and not self.gate.blends(state, wanted, prompt, busy=not self.budget.idle):
            wanted = claim(prompt, local, prefix, ())
        few = wanted.end - local < least
        if not wanted.matches and (few or not self.gate.loads(state, wanted.end, prompt, busy=not self.budget.idle)):
            return Claim(local, (), local)  # computing it with the rest of the prompt is faster than loading it
        return wanted

    def _hide(self, request: Any, state: RequestState, first: int) -> None:
        """From `first` on this request's KV is approximate: no other request may get it."""
        if state.approximate_from is None or first < state.approximate_from:
            self._prefix_cache.hide(request, first)
            state.approximate_from = first

    def in_background(self, request_id: str) -> bool:
        """Whether the claim is loaded while the request waits."""
        state = self._states.get(request_id)
        return state is not None and state.background

    def store_limit(self, request_id: str) -> int | None:
        """Up to that token this request's KV is exact, and may be stored or cached; None: all of it."""
        state = self._states.get(request_id)
        return state.approximate_from if state else None

    def stored(self, request: Any) -> int:
        """Tokens that LMCache holds of this prompt from its beginning on: they need not be stored again.

        0 when ingesting (lmcache_rag.protocol.INGEST): the chunk must be stored again, since LMCache indexes only what
        is stored, not what it loads from a second tier, where an earlier server may have put it.
        """
        state = self._states.get(request.request_id)
        if ingests(request.kv_transfer_params):
            return 0
        return state.prefix if state else 0

    # -- when look-ups start, and how long a request waits for them ----------------------------------------------------

    def _looked_up(self, request: Any, state: RequestState) -> bool:
        """Whether a request's look-up has its result; if not, the request waits for it, or nothing is claimed."""
        if not state.started and not state.closed:
            self._start_queued(request, state)
        return state.started and not state.closed and self._has_result(request, state)

    def _start_queued(self, request: Any, state: RequestState) -> None:
        """Start the look-up of a queued request, if it may start now."""
        now = time.perf_counter()
        state.waiting_since = state.waiting_since or now
        if self.window.may_start(request, now):
            state.waiting_since = 0.0  # the wait for its turn ends; that for the answer counts from the next poll
            self._start(request, state)
        elif self._silent_since is not None and now - state.waiting_since > self.options.lookup_deadline:
            state.closed, state.failure = True, Fallback.LOOKUP_DEADLINE

    def _start(self, request: Any, state: RequestState) -> None:
        state.started = True
        if not state.tokens:
            state.tokens = array("q", request.prompt_token_ids)
            if self.gpu_chunks and state.blend:
                self.gpu_chunks.on_new_request(request, state.tokens)
                state.resident_only = self.gpu_chunks.seems_enough(request)
        if self._skip_lookup(request, state) or state.resident_only:
            return
        state.asked_at = time.perf_counter()
        state.lookup = self.client.look_up(request)
        if state.lookup is None:
            state.closed, state.failure = True, Fallback.NO_SERVER
            self._warn("LMCache does not answer")
        else:
            self.window.add(request.request_id, state)

    def _skip_lookup(self, request: Any, state: RequestState) -> bool:
        """Compute a request without its look-up, or without waiting for it, if that is faster."""
        if not self.gate.skips_lookup(request, state, busy=not self.budget.idle):
            return False
        self.window.remove(request.request_id)
        lookup, state.lookup, state.closed = state.lookup, None, True
        if lookup is not None:
            self._aborted.add(lookup, time.perf_counter(), 0.0)
        return True

    def _has_result(self, request: Any, state: RequestState) -> bool:
        lookup = state.lookup
        if lookup is None:
            return True
        state.waiting_since, first = state.waiting_since or time.perf_counter(), lookup.result is None
        ready = self._poll(lookup.poll)
        now = time.perf_counter()
        state.lookup_ms = (now - state.asked_at) * 1e3
        if ready:
            state.prefix = lookup.result[0] if lookup.result else 0
            if first:
                self.gate.on_found(state, idle=self.budget.idle)
            if self._silent_since is not None and state.asked_at > self._silent_since:
                self._silent_since = None
            return True
        if now - state.waiting_since > self.options.lookup_deadline:
            self._warn(f"LMCache did not answer for {self.options.lookup_deadline:g} s")
            self._give_up(request.request_id, state, Fallback.LOOKUP_DEADLINE)
        return False

    def _poll(self, poll: Callable[[float], Any]) -> Any:
        """Poll for a result; an idle engine waits briefly, once for all look-ups of a step."""
        began = time.perf_counter()
        found = poll(self._patience if self.budget.idle else 0.0)
        self._patience = max(0.0, self._patience - (time.perf_counter() - began))
        return found

    def _warn(self, message: str) -> None:
        if self._silent_since is None:  # logged once, until LMCache answers a later request
            log.warning("%s: prompts are computed in full until it does", message)
        self._silent_since = time.perf_counter()

    def _give_up(self, request_id: str, state: RequestState, reason: Fallback) -> None:
        self.window.remove(request_id)
        lookup, state.lookup, state.closed, state.failure = state.lookup, None, True, reason
        if lookup is not None:
            self._abort(lookup)

    def _abort(self, lookup: Lookup) -> None:
        now = time.perf_counter()
        self._poll(lambda seconds: self._aborted.add(lookup, now, seconds))

    def keeps_session(self, request_id: str) -> bool:
        """Whether an aborted look-up of this request is still in flight, and its session must not be ended before.

        The server may have locked KV already, while its answer is on the way. It records the locks in the session: if
        that ended now, they could no longer be released.
        """
        return self._aborted.has(request_id)

    @property
    def has_recent_aborts(self) -> bool:
        """Whether look-ups were aborted recently: an engine without requests must keep stepping for them.

        Not for long: a server that was restarted never answers them.
        """
        return self._aborted.since(time.perf_counter() - self.options.lookup_deadline) > 0

    # -- plans --------------------------------------------------------------------------------------------------------

    def update_state_after_alloc(self, request: Any, block_ids: list[int], external: int, tracker: Any) -> None:
        """Make the plan of a claim.

        Args:
            request: vLLM's request.
            block_ids: Its blocks.
            external: Tokens that were claimed, and that vLLM allocated blocks for.
            tracker: LMCache's tracker of the request.
        """
        if self.unsupported is not None:
            return
        if external > 0:  # claimed tokens are not scheduled, but must be stored like scheduled ones
            state = self._states.get(request.request_id)
            tracker.num_lmcache_hit_tokens = state.claim.end if state and state.claim else 0
        self.on_allocated(request, block_ids, external, tracker.request_configs, salt=tracker.cache_salt)

    def on_allocated(
        self, request: Any, block_ids: list[int], external: int, configs: dict[str, Any] | None, *, salt: str = ""
    ) -> None:
        """Blocks were allocated for a claim of `external` tokens: make its plan, release unneeded locks and pins."""
        state = self._states.get(request.request_id)
        if state is None or state.planned:
            return
        state.planned, state.done = True, state.local + external
        self.window.remove(request.request_id)
        claimed = state.claim if external > 0 else None
        if state.lookup is not None and state.lookup.result is not None:
            prefix = state.prefix
            load_from = state.local // self._chunk * self._chunk if claimed and prefix > state.local else prefix
            state.unused, state.loads = (0, load_from), (load_from, prefix)
        if claimed is None:
            if self.gpu_chunks:
                self.gpu_chunks.unpin(request.request_id)
        else:
            if self.gpu_chunks:
                self.gpu_chunks.on_allocated(request.request_id)
            self._plan(state.plan(request.request_id, claimed, block_ids, configs, salt))
        self._release(state)
        if claimed is None:
            state.on_plan_sent()

    def compute_if_failed(self, request: Any, block_ids: list[int], external: int) -> None:
        """If planning failed, plan to compute the tokens that vLLM counts as computed and allocated blocks for."""
        name = request.request_id
        if external <= 0 or name not in self._failed or self.unsupported is not None:
            return
        if any(plan.request_id == name for plan in self._plans):
            return
        state = self._states[name]
        state.planned, state.tokens = True, array("q", request.prompt_token_ids)
        if state.background:
            self.budget.claim(name, Admission.ASYNC, external)
        self._plan(state.plan(name, Claim(state.local, (), state.local + external), block_ids, None, ""))

    def _plan(self, plan: BlendPlan) -> None:
        self.budget.on_allocated(plan.request_id)
        self._plans.append(plan)

    def _release(self, state: RequestState) -> None:
        """Release locks of exact prefix chunks that no worker is going to load."""
        if state.lookup is not None and state.unused[1]:
            state.lookup.release_prefix(*state.unused)
        state.unused = (0, 0)

    def _withdraw(self, state: RequestState) -> None:
        """Withdraw a plan that no worker has: release what it would have loaded."""
        first, end = 0 if state.unused[1] else state.loads[0], state.loads[1]
        state.unused, state.loads = (first, end), (end, end)
        self._release(state)

    def build_plans(self, scheduled: Mapping[str, int] | None = None) -> tuple[list[BlendPlan], Allowance]:
        """Return the plans of this step, and how much its workers may blend in the background; end its scheduling.

        Args:
            scheduled: The requests that vLLM runs in this step, and how many tokens of each.
        """
        plans, self._plans = self._plans, []
        scheduled = scheduled or {}
        if len(plans) == 1 and dict(scheduled) == {plans[0].request_id: 1}:
            plans = [replace(plan, alone=plan.end + 1 == len(plan.token_ids)) for plan in plans]
        timed = take_step(self._states, plans, scheduled)
        allowance = self.budget.on_step(scheduled, timed)
        for plan in plans:
            if state := self._states.get(plan.request_id):
                state.on_plan_sent()
        self.window.on_step()
        self._patience = self.options.poll
        if self.gpu_chunks:
            self.gpu_chunks.on_step()
        if self.uncomputed:
            self.uncomputed.on_step()
        self._aborted.poll(time.perf_counter())
        return plans, allowance

    # -- what workers report ------------------------------------------------------------------------------------------

    def take_worker_metadata(self, meta: Any) -> None:
        """Take the workers' metadata of a step. vLLM may deliver the same metadata twice: it is taken once."""
        if meta is self._taken:
            return
        self._taken = meta
        if not isinstance(meta, BlendWorkerMetadata):
            return
        for result in meta.results:
            if result.failure:
                self.client.on_failed_blend(result.request_id)
        self.on_results(meta.results)
        self.gate.on_steps(meta.steps)
        for request_id, blocks in meta.timed_out:
            self.fenced.add(request_id, blocks)
        for request_id in meta.ended:
            self.fenced.release(request_id)

    def on_results(self, results: list[BlendResult]) -> None:
        """Plans were carried out."""
        for result in results:
            self.budget.on_blended(result.request_id)
            if self.gpu_chunks:
                self.gpu_chunks.unpin(result.request_id)
            if state := self._states.get(result.request_id):
                state.result = result
                self.gate.on_result(state, result)
            if result.failure in LOADS:
                # The server did not answer for a whole deadline, during which vLLM may have been blocked: look-ups that
                # were sent then have waited as long, though nothing could poll them.
                for other in self._states.values():
                    other.waiting_since = other.asked_at  # the whole wait counts; 0: not sent yet, it begins later

    def finished_sending(self, connector_output: Any) -> set[str]:
        """Requests whose blocks vLLM may free, as their stores are done. See lmcache_rag.connector.transfers."""
        loaded, stored = connector_output.finished_recving or (), connector_output.finished_sending or ()
        return self._freed.stored(loaded, stored)

    # -- the end of a request -----------------------------------------------------------------------------------------

    def request_finished(self, request: Any, tracker: Any) -> dict[str, Any] | None:
        """Its reuse statistics for the answer; None when there is nothing to report.

        Args:
            request: vLLM's request.
            tracker: LMCache's tracker of the request, if there is one.
        """
        with self.contain_errors(request.request_id):
            return self._finish(request, tracker)
        return None

    def _finish(self, request: Any, tracker: Any) -> dict[str, Any] | None:
        statistics = self.finish(request)
        if self.unsupported is not None:
            statistics = self.count_unblended(request, tracker)
        elif statistics is not None and self.self_check is not None:
            statistics[SELF_CHECK] = str(self.self_check)
        if self.forgetting.has(request.request_id):
            removal = self.forgetting.on_finished(request.request_id)
            statistics = {**statistics, **removal} if statistics is not None else None
        return statistics

    def finish(self, request: Any) -> dict[str, Any] | None:
        """A request ended or was aborted: its reuse statistics, or None when nothing was looked up."""
        self.budget.on_finished(request.request_id)
        state = self._states.get(request.request_id)
        if state is None:
            return None
        self.window.remove(request.request_id)
        self.budget.withdraw(request.request_id)
        # vLLM waits until a worker reports a background load as done: that one is not withdrawn.
        plans = [plan for plan in self._plans if plan.request_id != request.request_id or plan.background]
        withdrawn = len(plans) < len(self._plans)
        self._plans = plans
        if self.gpu_chunks:
            if not state.planned or withdrawn:
                self.gpu_chunks.unpin(request.request_id)
            self.gpu_chunks.on_finished(request.request_id)
        lookup = state.lookup
        if lookup is not None and (not state.planned or lookup.result is None):
            self._abort(lookup)
        elif lookup is not None:
            if withdrawn:
                self._withdraw(state)
            self._release(state)
        del self._states[request.request_id]
        statistics = state.statistics(len(request.prompt_token_ids or ()))
        if state.planned:
            self._records.append(metrics.record(statistics))
        if self.gpu_chunks and state.ingest and state.approximate_from is None:
            self.gpu_chunks.on_ingested(request)
        return statistics

    def count_unblended(self, request: Any, tracker: Any) -> dict[str, Any] | None:
        """The statistics of a request where the workers cannot blend; None where it never ran."""
        if self.unsupported is None or tracker is None or not tracker.num_scheduled_tokens:
            return None
        prompt = len(request.prompt_token_ids or ())
        cached = max(tracker.num_vllm_hit_tokens, tracker.num_lmcache_hit_tokens)
        self._records.append(metrics.unblended_record(prompt, cached))
        spans = (request.kv_transfer_params or {}).get(SPANS) is True
        policy, budget = self.options.policy, self.options.budget
        return metrics.unblended_statistics(prompt, cached, policy, budget, self.unsupported, spans=spans)

    def remove(self, request_id: str, *, delayed: bool) -> None:
        """LMCache's connector has ended a request, too.

        Args:
            request_id: The request.
            delayed: Whether vLLM keeps its blocks until the workers report that they do not read them any more.
        """
        if request_id in self._failed:
            self._failed.discard(request_id)
            with contextlib.suppress(Exception):
                self.drop(request_id)  # if an error kept `finish` from doing it
                self._states.pop(request_id, None)
        if delayed:
            self._freed.ends(request_id)

    def take_records(self) -> list[dict[str, Any]]:
        """Records of the requests that ended since the last call, see metrics.record."""
        records, self._records = self._records, []
        return records

    @property
    def requests(self) -> int:
        """Requests that the scheduler side keeps a state of."""
        return len(self._states)

    @property
    def aborted_lookups(self) -> int:
        """Aborted look-ups that are still in flight."""
        return len(self._aborted)
