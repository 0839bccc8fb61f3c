"""Look-ups at LMCache: when they may start, how they are sent, what happens to those that are aborted.

And look-ups that ask for a chunk's KV to be removed (lmcache_rag.protocol.FORGET) or pinned (PIN), of prompts of
prefix + chunk.
"""

from __future__ import annotations

import contextlib
import logging
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from lmcache_rag.connector import lmcache_client, vllm_internals
from lmcache_rag.connector.cache_salt import CacheSalts
from lmcache_rag.connector.config import ConnectorOptions
from lmcache_rag.connector.gpu_chunks import BlockPool, PrefixCache, ResidentChunks
from lmcache_rag.connector.identity import Adapters
from lmcache_rag.connector.request_state import Lookup, RequestState, has_embeddings
from lmcache_rag.connector.second_use import SecondUse
from lmcache_rag.protocol import (
    FORGET,
    FORGOTTEN,
    HELD,
    INGEST,
    KV_HELD,
    MAX_OFFLOAD_TOKENS,
    PIN,
    PINNED,
    PINS,
    PREFIX,
    TENANT,
    USED_BEFORE,
    WORDS,
    chunk_start,
    ingests,
    named_prefix,
    pins,
    removal_start,
)

log = logging.getLogger("lmcache_rag")

# A server that was restarted never answers an old look-up. LMCache's read locks expire after this long.
LOCK_SECONDS = 300.0


IN_FLIGHT = 32  # look-ups at once: LMCache has them in one worker's queue, and locks what they find
STEP_TOKENS = 16_384  # of the prompts whose look-ups start in one step: 16,000 tokens take 6 ms of its time
IN_VLLM = "vLLM"  # name of vLLM's own cache among the tiers
MAX_REMOVALS = 32  # look-ups that remove: LMCache's server does it in the worker that also looks up


@dataclass
class SentLookup:
    """A look-up that was sent before the scheduler got its request; see lmcache_rag.connector.early_lookup.

    Attributes:
        lookup: The look-up.
        at: When it was sent, by time.perf_counter().
        used: Whether the scheduler took it.
    """

    lookup: lmcache_client.BlendLookup
    at: float
    used: bool = False


@dataclass
class AbortedLookups:
    """Aborted look-ups, still polled so that LMCache's read locks are released. Times are in seconds, of one clock."""

    _lookups: list[tuple[float, Lookup]] = field(default_factory=list)  # (when it was aborted, the look-up)

    def add(self, lookup: Lookup, now: float, wait: float) -> None:
        """Take over a look-up. If it has its result within `wait`, it is closed at once."""
        self._lookups.append((now, lookup))
        if _closed(lookup, wait):
            self._lookups.pop()

    def poll(self, now: float) -> None:
        """Close those that have their result, and those that will never have one."""
        left = [(at, lookup) for at, lookup in self._lookups if not _closed(lookup, 0)]
        for at, lookup in left:
            if at <= now - LOCK_SECONDS:
                with contextlib.suppress(Exception):  # its server may be gone
                    lookup.end_session()
        self._lookups = [(at, lookup) for at, lookup in left if at > now - LOCK_SECONDS]

    def has(self, request_id: str) -> bool:
        """Whether one of this request is still in flight."""
        return any(lookup.request_id == request_id for _, lookup in self._lookups)

    def since(self, when: float) -> int:
        """How many were aborted after `when` and are still in flight."""
        return sum(at > when for at, _ in self._lookups)

    def __len__(self) -> int:
        return len(self._lookups)


def _closed(lookup: Lookup, wait: float) -> bool:
    try:
        if not lookup.poll(wait):
            return False
        assert lookup.result is not None  # noqa: S101 - poll returned True
        lookup.release_prefix(0, lookup.result[0])
        lookup.end_session()
    except Exception:  # of the connection: retried until the locks expire
        log.debug("A look-up could not be closed", exc_info=True)
        return False
    return True


class LookupWindow:
    """Which look-ups may start: few are in flight, and those of one step do not hold the step up.

    The queue's order is kept: a request waits until the look-ups of those before it have started. Times are in seconds,
    of one clock.

    Args:
        aborted: Aborted look-ups, which count as in flight.
        deadline: Aborted look-ups count for this long, in seconds: a dead server never answers them.
    """

    def __init__(self, aborted: AbortedLookups, deadline: float) -> None:
        self.aborted, self._deadline = aborted, deadline
        self._in_flight: dict[str, RequestState] = {}  # looked up, and no blocks allocated yet
        self._step_tokens = 0  # of the prompts whose look-ups started in this step
        self._refused = False  # in this step a queued request's look-up could not start: no later one may, either
        self._queued = False  # `_refused` of the step before: a new request may not overtake those in the queue
        self.step = 0

    def may_start_early(self, request: Any, now: float) -> bool:
        """Whether the look-up of a request that has just arrived may start."""
        return not self._queued and not self._refused and self._may_start(request, now)

    def has_place(self, tokens: int, now: float) -> bool:
        """Whether a look-up of so many tokens could start, were its request new. Changes nothing: for other threads."""
        fits = not self._step_tokens or self._step_tokens + tokens <= STEP_TOKENS
        return fits and not self._queued and not self._refused and self._has_room(now)

    def may_start(self, request: Any, now: float) -> bool:
        """Whether the look-up of a request that vLLM asks for may start."""
        if not self._refused and self._may_start(request, now, queued=True):
            return True
        self._refused = True  # nor may those after it: the queue's order is kept
        return False

    def _may_start(self, request: Any, now: float, *, queued: bool = False) -> bool:
        tokens = len(request.prompt_token_ids or ())
        if (self._step_tokens and self._step_tokens + tokens > STEP_TOKENS) or self.aborted.has(request.request_id):
            return False
        if not self._has_room(now) and not (queued and self._make_room(now)):
            return False
        self._step_tokens += tokens
        return True

    def _has_room(self, now: float) -> bool:
        return len(self._in_flight) + self.aborted.since(now - self._deadline) < IN_FLIGHT

    def _make_room(self, now: float) -> bool:
        """Abort a look-up whose request cannot run yet: vLLM did not ask for it in the whole step before.

        It may wait for its grammar, or for a LoRA adapter, and would keep others from being looked up.
        """
        name, state = min(self._in_flight.items(), key=lambda item: item[1].step, default=("", None))
        if state is None or state.step >= self.step - 1:
            return False
        del self._in_flight[name]
        lookup, state.lookup, state.started, state.waiting_since = state.lookup, None, False, 0.0
        if lookup is not None:
            self.aborted.add(lookup, now, 0.0)
        return self._has_room(now)

    def add(self, request_id: str, state: RequestState) -> None:
        """A look-up has started."""
        self._in_flight[request_id] = state

    def remove(self, request_id: str) -> None:
        """A look-up is aborted, or its request has its blocks."""
        self._in_flight.pop(request_id, None)

    def on_step(self) -> None:
        """The next step begins."""
        self.step += 1
        self._step_tokens, self._queued, self._refused = 0, self._refused, False


class LookupClient(Protocol):
    """The calls to LMCache that the scheduler needs; see SchedulerClient."""

    def look_up(self, request: Any) -> Lookup | None:
        """Start a look-up for a request; None when LMCache cannot be reached."""
        ...

    def adapter_changed(self, lora_request: Any) -> bool:
        """Whether the files of a LoRA adapter have changed, so that it is not known which weights vLLM has."""
        ...

    def stop_storing(self, request_id: str) -> None:
        """Store no more KV of this request."""
        ...

    def on_failed_blend(self, request_id: str) -> None:
        """A worker computed this request's claim in full."""
        ...


class SchedulerClient:
    """The scheduler's half of LMCache's connector: its adapter, and what it records of each request (its trackers).

    Patches the adapter: block reports are sent some steps later, and read locks that cannot be released now are
    released later, see lmcache_client.DeferredBlockReports and DeferredReleases.

    Args:
        adapter: LMCache's scheduler adapter.
        trackers: LMCache's tracker of each request, by its id.
        salts: Gives each request its cache_salt.
        options: The connector's settings.
        second_use: Which tokens of a prompt are stored; None: all that the settings allow.
    """

    def __init__(
        self,
        adapter: Any,
        trackers: dict[str, Any],
        salts: CacheSalts,
        options: ConnectorOptions,
        *,
        second_use: SecondUse | None = None,
    ) -> None:
        self._adapter, self._trackers, self._options = adapter, trackers, options
        self._salts = salts
        self._lora_adapters = Adapters(by_path=vllm_internals.blocks_know_adapter_path())
        self._with_adapter: dict[str, Any] = {}  # LoRARequests of the requests that have one
        self._reports = lmcache_client.DeferredBlockReports(adapter)
        self._releases = lmcache_client.DeferredReleases(adapter)
        self._unused: set[str] = set()  # LMCache's own connector looked them up, and has not used the result yet
        self._second_use = second_use
        self._used_before: dict[str, list[int]] = {}  # by request: where its chunks begin that others had, too
        self._sent: SentLookup | None = None  # of the request that has just come, if it is what `look_up` would send

    # -- a request's tracker ------------------------------------------------------------------------------------------

    def plain_tracker(self, request: Any) -> Any:
        """A tracker for a request for which LMCache's own could not be made."""
        tracker = self._trackers[request.request_id] = lmcache_client.plain_tracker(request)
        return tracker

    def configure(self, tracker: Any, request: Any, *, store: bool) -> None:
        """Set what LMCache gets with each key of a request, and how many of its tokens are stored at most.

        Args:
            tracker: The request's new tracker, which stores nothing until this has returned.
            request: vLLM's request.
            store: Whether KV of this request may be stored.
        """
        params: Mapping[str, Any] = request.kv_transfer_params or {}
        prompt, adapter = request.prompt_token_ids or (), getattr(request, "lora_request", None)
        identity = self._lora_adapters.of(adapter)
        if adapter is not None:
            self._with_adapter[request.request_id] = adapter
        tracker.cache_salt = self._salts.of(prompt, request.cache_salt or "", params, adapter=identity)
        if has_embeddings(request) or self.adapter_changed(adapter):
            lmcache_client.bypass_lmcache(tracker)
            return
        forgets = params.get(FORGET) is True or pins(params) is not None
        tracker.request_configs = self._configs(params, request.cache_salt, removal_start(params, len(prompt)))
        stored = ingests(params) or self._options.store != "ingest"
        tracker.max_offload_tokens = 0 if forgets or not stored or not store else params.get(MAX_OFFLOAD_TOKENS)
        if self._second_use is not None and not ingests(params) and not forgets:
            used, limit = self._second_use.admitted(request.block_hashes), tracker.max_offload_tokens
            tracker.max_offload_tokens = used if limit is None else min(used, limit)
            self._used_before[request.request_id] = self._second_use.used_before(tracker.cache_salt, prompt, params)

    def used_before(self, request_id: str) -> dict[str, Any]:
        """For the answer: which chunks of a request were used before; nothing where that is not counted."""
        known = self._used_before.get(request_id)
        return {} if known is None else {USED_BEFORE: known}

    def adapter_changed(self, lora_request: Any) -> bool:
        """See LookupClient."""
        return self._lora_adapters.changed(lora_request)

    def on_adapter_loaded(self, lora_request: Any) -> None:
        """VLLM has loaded a LoRA adapter: requests of one that it replaces store nothing more."""
        self._lora_adapters.on_loaded(lora_request)
        for request_id, other in self._with_adapter.items():
            replaced = lora_request.load_inplace or other.lora_path != lora_request.lora_path
            if other.lora_int_id == lora_request.lora_int_id and replaced:
                self.stop_storing(request_id)

    def _configs(self, params: Mapping[str, Any], salt: str | None, start: int = 0) -> dict[str, Any] | None:
        """What LMCache gets with each key of a request.

        Args:
            params: The request's parameters.
            salt: The cache_salt that its client sent.
            start: From where on KV that is forgotten or pinned is a chunk's own.
        """
        configs: dict[str, Any] = (
            {MAX_OFFLOAD_TOKENS: params[MAX_OFFLOAD_TOKENS]} if MAX_OFFLOAD_TOKENS in params else {}
        )
        if params.get(FORGET) is True:
            configs |= {FORGET: True, PREFIX: start}
            if params.get(HELD) is True:
                configs[HELD] = True
        elif (pinned := pins(params)) is not None:
            configs |= {PIN: pinned, PREFIX: start}
        elif ingests(params):
            configs[INGEST] = True
        if self._options.tenants and (tenant := params.get(TENANT) or (salt or "")[:WORDS]):
            configs[TENANT] = tenant
        return configs or None

    def stop_storing(self, request_id: str) -> None:
        """Store no more KV of this request."""
        if tracker := self._trackers.get(request_id):
            tracker.max_offload_tokens = 0

    def on_failed_blend(self, request_id: str) -> None:
        """A worker computed the claim in full: vLLM may compute it once more, in pieces."""
        if tracker := self._trackers.get(request_id):
            tracker.num_lmcache_hit_tokens = 0

    # -- look-ups -----------------------------------------------------------------------------------------------------

    def look_up(self, request: Any) -> Lookup | None:
        """Start a look-up for a request that has a tracker; None when LMCache does not answer."""
        if not self._adapter.is_healthy:
            return None
        if (sent := self._sent) is not None and sent.lookup.request_id == request.request_id and not sent.used:
            sent.used = True
            return sent.lookup
        tracker = self._trackers[request.request_id]
        return lmcache_client.BlendLookup(
            self._adapter,
            request.request_id,
            list(request.prompt_token_ids),
            tracker.cache_salt,
            tracker.request_configs,
        )

    def look_up_early(self, request: Any, params: Mapping[str, Any]) -> SentLookup | None:
        """Start a look-up for a request that has no tracker yet; any thread may call it.

        Args:
            request: vLLM's EngineCoreRequest, without a LoRA adapter.
            params: The part of its kv_transfer_params that is accepted; it neither ingests nor forgets.
        """
        if not self._adapter.is_healthy:
            return None
        prompt, configs = request.prompt_token_ids, self._configs(params, request.cache_salt)
        salt = self._salts.peek(prompt, request.cache_salt or "", params)
        lookup = lmcache_client.BlendLookup(self._adapter, request.request_id, prompt, salt, configs)
        return SentLookup(lookup, time.perf_counter())

    def offer(self, sent: SentLookup | None, tracker: Any) -> bool:
        """Whether the next `look_up` takes a look-up that was sent early: it does if it would send the same."""
        same = sent is not None and (sent.lookup.salt, sent.lookup.configs) == (
            tracker.cache_salt,
            tracker.request_configs,
        )
        self._sent = sent if same else None
        return same

    def on_stock_lookup(self, request_id: str) -> None:
        """LMCache's own connector looks this request up."""
        self._unused.add(request_id)

    def on_allocated(self, request_id: str, external: int) -> None:
        """Blocks were allocated: LMCache's own connector uses the result of its look-up now, if it waited for one."""
        if request_id in self._unused and (
            external or self._adapter.is_healthy or self._trackers[request_id].num_lmcache_hit_tokens
        ):
            self._unused.discard(request_id)

    # -- steps and the end of requests --------------------------------------------------------------------------------

    def waiting_loads(self) -> list[Any]:
        """Trackers of requests whose loads by LMCache's own connector are submitted in this step."""
        return lmcache_client.waiting_for_load(self._trackers.values())

    def empty_step(self, scheduled: Iterable[str], loads: Iterable[Any]) -> Any:
        """Metadata for a step for which LMCache's connector could make none; `loads` are submitted in the next one."""
        for request_id in scheduled:
            self.stop_storing(request_id)  # its blocks may not have been recorded
        return lmcache_client.empty_metadata(loads)

    def on_step(self) -> None:
        """A step is scheduled: release read locks that could not be released before, send reports that are due."""
        self._releases.send()
        self._reports.on_step()

    @property
    def has_releases(self) -> bool:
        """Whether an engine without requests must keep stepping, to release read locks soon."""
        return self._releases.pending

    @contextlib.contextmanager
    def ending(self, request_id: str, *, keep_session: bool) -> Iterator[None]:
        """A `with` block in which LMCache's connector ends a request.

        Args:
            request_id: The request.
            keep_session: Whether its session stays open, since a look-up is still in flight.
        """
        self._reports.send()
        self._with_adapter.pop(request_id, None)
        self._used_before.pop(request_id, None)
        if request_id in self._unused:
            self._unused.discard(request_id)
            self._releases.release_unused(request_id, self._trackers[request_id])
        with contextlib.ExitStack() as stack:
            if keep_session:
                stack.enter_context(lmcache_client.keep_session_open(self._adapter, request_id))
            yield


# -- removal -----------------------------------------------------------------------------------------------------------


@dataclass
class _RemovalRequest:
    start: int  # from where on KV is removed
    counts: bool = False  # whether the answer has what each tier held
    pins: bool | None = None  # the chunk is pinned, or no longer, and not removed
    in_vllm: int = 0  # blocks of vLLM's prefix cache that were removed
    held: dict[str, int] = field(default_factory=dict)  # objects by tier, of LMCache
    lookup: Lookup | None = None
    asked_at: float | None = None
    closed: bool = False
    forgotten: bool = False  # LMCache has answered


@dataclass
class Forgetting:
    """Requests that ask for a chunk's KV to be removed, or pinned.

    Where it is removed, vLLM's own blocks of the chunk become unreachable at once. LMCache's server is asked by a
    look-up, whose key holds the request, and the request waits for its answer. KV that the request itself computes is
    stored nowhere.

    Args:
        client: Starts look-ups.
        prefix_cache: Hides the request's own blocks.
        aborted: Takes over the look-ups of requests that ended.
        deadline: Longest that a request waits for LMCache, in seconds.
        pool: vLLM's blocks; None without prefix caching.
        resident: Chunks that are known to be in them.
    """

    client: LookupClient
    prefix_cache: PrefixCache
    aborted: AbortedLookups
    deadline: float
    pool: BlockPool | None = None
    resident: ResidentChunks | None = None
    _requests: dict[str, _RemovalRequest] = field(default_factory=dict)

    def on_new_request(self, request: Any) -> bool:
        """Take a new request, if it asks for this; returns whether it does."""
        params = request.kv_transfer_params
        if not params or has_embeddings(request):
            return False
        pinned = pins(params)
        if params.get(FORGET) is not True and pinned is None:
            return False
        prompt = request.prompt_token_ids
        prefix, chunk = named_prefix(params, len(prompt)), chunk_start(params, len(prompt))
        start = removal_start(params, len(prompt))
        known = self._requests[request.request_id] = _RemovalRequest(
            start, counts=params.get(HELD) is True, pins=pinned, closed=not 0 < start < len(prompt)
        )
        if known.closed or pinned is not None:
            return True
        hashes = list(request.block_hashes)
        self.prefix_cache.hide(request, start)  # before anything else: the request must not find its own blocks
        if self.resident is not None:
            self.resident.forget(array("q", prompt), hashes, prefix, chunk)
        if self.pool is not None:
            known.in_vllm = self.pool.remove(hashes[start // self.prefix_cache.block_size :])
        return True

    def has(self, request_id: str) -> bool:
        """Whether a request is one of these."""
        return request_id in self._requests

    def poll(self, request: Any) -> bool:
        """Whether the request can run: LMCache has answered, or its deadline has passed."""
        known = self._requests[request.request_id]
        if known.closed:
            return True
        now = time.perf_counter()
        known.asked_at = now if known.asked_at is None else known.asked_at
        if known.lookup is None:
            if sum(other.lookup is not None for other in self._requests.values()) < MAX_REMOVALS:
                known.lookup = self.client.look_up(request)
                known.closed = known.lookup is None
        elif known.lookup.poll(0.0):
            known.closed = known.forgotten = True
            if known.counts or known.pins is not None:
                known.held = lmcache_client.read_counts(known.lookup.result)
            self._abort(known)
        if not known.closed and now - known.asked_at > self.deadline:
            known.closed = True
            self._abort(known)
        return known.closed

    def on_finished(self, request_id: str) -> dict[str, Any]:
        """The request ended. Returns its statistics: whether the chunk's KV was removed, and what there was of it.

        Of one that pins: whether the chunk is pinned now, and the figures of all pins.
        """
        known = self._requests.pop(request_id)
        self._abort(known)
        if known.pins is not None:
            if not known.forgotten:  # LMCache did not answer
                return {PINNED: False, PINS: {}}
            pinned = known.held.pop(PINNED, None)
            return {} if pinned is None else {PINNED: bool(pinned), PINS: known.held}
        return {FORGOTTEN: known.forgotten} | (
            {KV_HELD: {IN_VLLM: known.in_vllm, **known.held}} if known.counts else {}
        )

    def _abort(self, known: _RemovalRequest) -> None:
        lookup, known.lookup = known.lookup, None
        if lookup is not None:
            self.aborted.add(lookup, time.perf_counter(), 0.0)

    def __len__(self) -> int:
        return len(self._requests)
