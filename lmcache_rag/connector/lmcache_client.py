"""All private parts of LMCache's client that the connector calls, reads or replaces, except for transfers of KV.

Written for LMCache 0.5.6 and 0.5.7; the tests in tests/contracts check each part against LMCache, which is
imported in the functions. The server sends no answer at all when a call fails, so each wait has a deadline. A worker's
loads and stores are in lmcache_rag.connector.lmcache_transfers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import socket
import time
import uuid
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from lmcache_rag.connector.cache_salt import as_numbers, renumbering
from lmcache_rag.connector.metadata import Match
from lmcache_rag.connector.patching import Patch, patch_object, patched
from lmcache_rag.protocol import read_held

log = logging.getLogger("lmcache_rag")

ADAPTERS = "lmcache.integration.vllm.vllm_multi_process_adapter"
_SCHEDULER, _WORKER = f"{ADAPTERS}:LMCacheMPSchedulerAdapter", f"{ADAPTERS}:LMCacheMPWorkerAdapter"

_START_WHY = "vLLM starts while no LMCache server responds, and waits for one 10 s at most."
_START_UNTIL = "LMCache's adapters can be made without a server"
GET_CHUNK_SIZE = Patch(f"{ADAPTERS}:get_lmcache_chunk_size", _START_WHY, _START_UNTIL)
GET_EXPERIMENTAL = Patch(f"{ADAPTERS}:get_experimental", _START_WHY, _START_UNTIL)
MQ_TIMEOUT = Patch(f"{_WORKER}._mq_timeout", _START_WHY, _START_UNTIL)
_KEY_WHY = "Token ids are renumbered by a secret table, so that no client can store KV that is found for another text."
_KEY_UNTIL = "LMCache matches chunks by a keyed hash"
SCHEDULER_KEY = Patch(f"{_SCHEDULER}._create_key", _KEY_WHY, _KEY_UNTIL)
WORKER_KEY = Patch(f"{_WORKER}._create_key", _KEY_WHY, _KEY_UNTIL)
_BOUND_WHY = "The newest 4,096 entries are kept; LMCache keeps each for good."
_BOUND_UNTIL = "LMCache forgets finished requests and unanswered calls"
RETURNED_FINISHED = Patch(f"{_WORKER}._returned_finished", _BOUND_WHY, _BOUND_UNTIL)
PENDING_FUTURES = Patch(
    "lmcache.v1.multiprocess.transport.zmq_impl.mq:MessageQueueClient.pending_futures", _BOUND_WHY, _BOUND_UNTIL
)
BLOCK_REPORTS = Patch(
    f"{_SCHEDULER}.report_block_allocations",
    "Block reports are sent some steps later: a request's loads and its first token would otherwise wait for them.",
    "LMCache sends block reports after a request's first token",
)
_LOCKS_WHY = "Read locks are released once the server is healthy again; LMCache drops these calls while it is not."
_LOCKS_UNTIL = "LMCache releases the locks of aborted look-ups"
FREE_LOOKUP_LOCKS = Patch(f"{_SCHEDULER}.free_lookup_locks", _LOCKS_WHY, _LOCKS_UNTIL)
END_SESSION = Patch(f"{_SCHEDULER}.end_session", _LOCKS_WHY, _LOCKS_UNTIL)
PING = Patch(
    "lmcache.v1.multiprocess.transport.base:RequestClient.ping",
    "A worker that LMCache does not know any more registers again: one heartbeat is taken as failed.",
    "a heartbeat's answer says whether the worker is registered",
)


# -- token ids: a list until 0.5.6, packed in bytes (big-endian, 32 bits each) from 0.5.7 on ---------------------------


# Of LMCache's keys: the second name is 0.5.6's.
_FIELDS = ("token_bytes", "token_ids")


def to_lmcache(token_ids: Any) -> Any:
    """Token ids, or an array of them, as LMCache's adapters take them."""
    known = isinstance(token_ids, np.ndarray)
    if not _packed():
        return token_ids.tolist() if known else list(token_ids)
    return (token_ids if known else as_numbers(token_ids)).astype(">u4").tobytes()


def from_lmcache(tokens: Any) -> Sequence[int]:
    """Token ids in the form that LMCache's adapters take, as a sequence of integers."""
    if not isinstance(tokens, bytes):
        ids: Sequence[int] = tokens
        return ids
    return array("I", np.frombuffer(tokens, ">u4").astype("=u4").tobytes())


def without_tokens(key: Any) -> Any:
    """A key of LMCache's without its tokens."""
    name = next(name for name in _FIELDS if hasattr(key, name))
    return dataclasses.replace(key, **{name: type(getattr(key, name))()}, end=0)


@functools.cache
def _packed() -> bool:
    from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey

    return _FIELDS[0] in IPCCacheServerKey.__dataclass_fields__


# -- adapters ----------------------------------------------------------------------------------------------------------

REMEMBERED = 4096  # more than vLLM runs at once, and than LMCache answers in a minute


def loading_requests(adapter: Any) -> set[str]:
    """Requests whose exact prefix LMCache's own connector is loading."""
    return set(adapter.retrieve_futures)


def server_address(get: Callable[[str, Any], Any], worker: int = 0, workers: int = 1) -> tuple[str, int] | None:
    """(host, port) of the server that a worker's LMCache adapter uses; None if that is not a TCP address.

    Args:
        get: vLLM's get_from_extra_config(key, default).
        worker: The worker's rank, by which LMCache selects one of several servers.
        workers: Number of workers.
    """
    urls = get("lmcache.mp.server_urls", None)
    if urls:
        listed = urls.split(",") if isinstance(urls, str) else list(urls)
        url = str(listed[worker * len(listed) // workers]).strip()
    else:
        url = f"{get('lmcache.mp.host', 'tcp://localhost')}:{get('lmcache.mp.port', 5555)}"
    host, _, port = url.rpartition("://")[2].rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdigit() else None


def chunk_tokens(adapter: Any) -> int:
    """Number of tokens in an LMCache chunk."""
    return int(adapter.lmcache_tokens_per_chunk)


def renumber_tokens(adapter: Any) -> None:
    """Have an adapter of LMCache's use other token ids; see lmcache_rag.connector.cache_salt."""
    create = adapter._create_key

    def create_key(
        tokens: Any, start: int, end: int, request_id: str, cache_salt: str = "", request_configs: Any = None
    ) -> Any:
        numbers = renumbering().numbers(from_lmcache(tokens), cache_salt)
        return create(to_lmcache(numbers), start, end, request_id, cache_salt, request_configs)

    patch_object(WORKER_KEY if hasattr(adapter, "retrieve_futures") else SCHEDULER_KEY, adapter, create_key)


def bound_memory(adapter: Any) -> None:
    """Bound the memory of a worker adapter and its client, which LMCache lets grow without limit.

    The adapter keeps the id of each request that ever finished, against reports that vLLM repeats within a few steps.
    The client keeps each call that was never answered.
    """
    patch_object(RETURNED_FINISHED, adapter, _Recent(dict.fromkeys(adapter._returned_finished)))
    bound_client(adapter.req_client)


def bound_client(client: Any) -> None:
    """Bound the number of calls for which a client expects an answer; see `bound_memory`."""
    queue = getattr(client, "_message_queue_client", None)  # gRPC's client keeps none
    if queue is not None:
        patch_object(PENDING_FUTURES, queue, _Recent(queue.pending_futures))


class _Recent(dict[Any, Any]):
    """The newest entries; also a set's `update` and `in`."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > REMEMBERED:
            try:
                del self[next(iter(self))]
            except (KeyError, RuntimeError):  # another thread has removed it
                return

    def update(self, keys: Iterable[Any]) -> None:  # type: ignore[override]
        """As of a set."""
        for key in keys:
            self[key] = None


class DeferredBlockReports:
    """Sends LMCache's block reports, for metrics, some steps later than LMCache's connector would.

    LMCache's connector sends them before the workers get the step: all tokens of a new prompt would be on the wire, and
    be read and counted by the server, before the prompt's KV is requested. The thread that serialises them also keeps
    the engine from working. vLLM schedules a request's second step before it has delivered the token of the first.

    Args:
        adapter: LMCache's scheduler adapter.
    """

    STEPS = 4

    def __init__(self, adapter: Any) -> None:
        self._deferred: deque[list[Any]] = deque([[]])  # of each step, the last one is under way
        self._report: Callable[[list[Any]], None] = adapter.report_block_allocations
        patch_object(BLOCK_REPORTS, adapter, self._defer)

    def _defer(self, records: list[Any]) -> None:
        self._deferred[-1].extend(records)

    def on_step(self) -> None:
        """A step is scheduled: send the reports of a step that was STEPS before."""
        self._deferred.append([])
        if len(self._deferred) > self.STEPS + 1 and (records := self._deferred.popleft()):
            self._report(records)

    def send(self) -> None:
        """Send the deferred reports; before a request's session ends, or its blocks would count as used for ever."""
        records = [record for step in self._deferred for record in step]
        self._deferred = deque([[]])
        if records:
            self._report(records)


class DeferredReleases:
    """Releases read locks that LMCache's adapter would leave to expire, five minutes later.

    While the server is unhealthy the adapter drops `free_lookup_locks` and `end_session`. A server that was paused, not
    restarted, still carries out earlier look-ups, and locks what they find. So these calls are deferred, in their
    order, until the server is healthy again. A restarted server does not know the sessions, and ignores the calls.

    Args:
        adapter: LMCache's scheduler adapter.
    """

    EXPIRY_S = 300.0  # older locks have expired
    MAX_CALLS = 65_536
    REPEAT_S = 1.0

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter
        self._deferred: deque[tuple[float, Callable[[], object]]] = deque()
        self._repeated: deque[tuple[float, str, Callable[[], object]]] = deque()  # (when, request, call)
        for patch in (FREE_LOOKUP_LOCKS, END_SESSION):
            patch_object(patch, adapter, partial(self._call, getattr(adapter, patch.name)))

    def _call(self, call: Callable[..., object], *args: Any, **named: Any) -> None:
        if self._adapter.is_healthy:
            self.send()
            call(*args, **named)
        elif len(self._deferred) < self.MAX_CALLS:
            self._deferred.append((time.monotonic(), partial(call, *args, **named)))

    def release_unused(self, request_id: str, tracker: Any) -> None:
        """Release the locks of a request that ended before LMCache's own connector polled its look-up.

        The connector drops the look-up on the client's side only. The server releases the locks if the look-up has its
        result. So the calls are made twice: now, and again after the request's session has ended; then they do
        nothing unless the result has arrived in between.
        """
        tokens = tracker.get_token_ids()
        release = partial(
            self._adapter.free_lookup_locks,
            tokens,
            0,
            len(tokens) // chunk_tokens(self._adapter) * chunk_tokens(self._adapter),
            request_id,
            tracker.cache_salt,
            tracker.request_configs,
        )
        release()
        if len(self._repeated) < self.MAX_CALLS:
            self._repeated.append((time.monotonic() + self.REPEAT_S, request_id, release))

    @property
    def pending(self) -> bool:
        """Whether an engine without requests has to run another step, for a call that is due soon."""
        return bool(self._repeated) and bool(self._adapter.is_healthy)

    def send(self) -> None:
        """Make the calls that are due, and the deferred ones if the server is healthy; called in every step."""
        while self._repeated and self._repeated[0][0] < time.monotonic():
            _, request_id, release = self._repeated.popleft()
            self._safely(release)
            self._safely(partial(self._adapter.end_session, request_id))
        while self._deferred and self._adapter.is_healthy:
            since, call = self._deferred.popleft()
            if since > time.monotonic() - self.EXPIRY_S:
                self._safely(call)

    def _safely(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:  # of the connection; raised here, it would end vLLM's engine
            log.debug("A read lock was not released, and will expire", exc_info=True)


# -- trackers: LMCache's record of each request
# -------------------------------------------------------------------------


def bypass_lmcache(tracker: Any) -> None:
    """Have LMCache's connector neither look up nor store anything of a new request.

    For prompts of embeddings, whose token ids are all the same. Its cache_salt is unique, in case KV is looked up
    nevertheless.
    """
    from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestState

    tracker.state = LMCacheMPRequestState.BYPASS_LMCACHE
    tracker.max_offload_tokens = 0
    tracker.cache_salt = uuid.uuid4().hex


def plain_tracker(request: Any) -> Any:
    """A tracker with only the request's tokens, for a request for which LMCache could not make one."""
    from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestTracker

    return LMCacheMPRequestTracker(
        SimpleNamespace(
            request_id=request.request_id,
            cache_salt=None,
            sampling_params=None,
            all_token_ids=request.all_token_ids,
            num_prompt_tokens=request.num_prompt_tokens,
            mm_features=[],
        )
    )


def waiting_for_load(trackers: Iterable[Any]) -> list[Any]:
    """Trackers of requests whose load is requested in this step."""
    from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestState

    return [tracker for tracker in trackers if tracker.state == LMCacheMPRequestState.WAITING_FOR_LOAD]


def empty_metadata(again: Iterable[Any]) -> Any:
    """Metadata of a step in which nothing is loaded or stored.

    The workers wait for stores in flight before anything else: a preempted request's blocks may be among the step's.

    Args:
        again: Trackers of requests whose loads are requested in the next step.
    """
    from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPConnectorMetadata, LMCacheMPRequestState

    for tracker in again:
        tracker.state = LMCacheMPRequestState.WAITING_FOR_LOAD
    metadata = LMCacheMPConnectorMetadata()
    metadata.need_flush_before_forward = True
    return metadata


# -- server ------------------------------------------------------------------------------------------------------------

PROTOCOL = 1
FIRST_WAIT_S = 10.0  # vLLM's start waits that long for a server that does not respond yet
_CALL_S = 5.0
_SILENT_S = 20.0  # LMCache forgets a worker that sent no heartbeat for 30 s or more


@contextlib.contextmanager
def allow_missing_server(chunk_size: int) -> Iterator[list[Any]]:
    """Have LMCache's adapters made also while no server responds; they would wait for one and then end vLLM's start.

    Args:
        chunk_size: Tokens of an LMCache chunk to assume until the server responds; 0: a server is needed.

    Yields:
        The clients that got no answer.
    """
    from lmcache.integration.vllm import vllm_multi_process_adapter as adapters

    get_chunk_size, get_experimental = adapters.get_lmcache_chunk_size, adapters.get_experimental
    unanswered: list[Any] = []

    def size(client: Any, timeout: float = FIRST_WAIT_S, **more: Any) -> int:
        try:
            wait = min(timeout, FIRST_WAIT_S) if chunk_size else timeout
            return int(get_chunk_size(client, timeout=wait, **more))
        except TimeoutError:
            if not chunk_size:
                raise
            unanswered.append(client)
            return chunk_size

    def experimental(client: Any, timeout: float) -> Any:
        return set() if unanswered else get_experimental(client, timeout=timeout)

    with patched(GET_CHUNK_SIZE, adapters, size), patched(GET_EXPERIMENTAL, adapters, experimental):
        yield unanswered


@contextlib.contextmanager
def allow_failed_registration(adapter: Any, *, may_fail: bool) -> Iterator[list[Exception]]:
    """Have the KV caches registered now, or else by LMCache's heartbeat when the server responds.

    Args:
        adapter: LMCache's worker adapter.
        may_fail: Whether to continue without a server.

    Yields:
        The error, where there was one.
    """
    failed: list[Exception] = []
    wait = adapter._mq_timeout
    with patched(MQ_TIMEOUT, adapter, wait if adapter.is_healthy else min(wait, FIRST_WAIT_S)):
        try:
            yield failed
        except ConnectionError as problem:
            if not may_fail:
                raise
            failed.append(problem)
            mark_unhealthy(adapter)


def mark_unhealthy(adapter: Any) -> None:
    """Mark the server unhealthy until a heartbeat succeeds."""
    for event in getattr(adapter, "_health_events", {}).values() or [adapter._health_event]:
        event.clear()


def watch_server(adapter: Any, blends: Callable[[], bool]) -> None:
    """Scheduler side: start the heartbeat; a server that comes back with another chunk size stays unhealthy.

    Args:
        adapter: LMCache's scheduler adapter.
        blends: Whether the workers blend, and a blend server is needed.
    """
    start_heartbeat(adapter)
    for url, heartbeat in adapter._heartbeats.items():
        client = adapter.req_clients[url]
        heartbeat.register_recover_callback(
            lambda client=client: (
                has_same_chunk_size(adapter, client) and (not blends() or not handshake(client, _CALL_S))
            )
        )


def has_same_chunk_size(adapter: Any, client: Any) -> bool:
    """Whether a server that is back has the chunk size that the adapter uses."""
    alignment = getattr(adapter, "_required_chunk_alignment", None)  # since 0.5.7 the chunk size is negotiated
    try:
        answer = client.get_chunk_size() if alignment is None else client.negotiate_chunk_size(alignment)
        found = answer.result(_CALL_S)
    except Exception:  # retried with the next heartbeat
        return False
    if found != adapter.lmcache_tokens_per_chunk:
        log.error(
            "LMCache restarted with chunk size %d, expected %d: ignoring it. "
            "Restart LMCache or vLLM with matching sizes.",
            found,
            adapter.lmcache_tokens_per_chunk,
        )
    return bool(found == adapter.lmcache_tokens_per_chunk)


def handshake(client: Any, seconds: float) -> str:
    """Negotiate LMCache's blend protocol.

    Returns:
        Why the server does not blend with us; empty when it does.
    """
    try:
        version, agreed = client.cb_protocol_handshake(PROTOCOL).result(seconds)
    except TimeoutError:
        return "the LMCache server did not answer the blend handshake: start it with --engine-type blend"
    except Exception as problem:
        return f"the blend handshake with the LMCache server failed: {format_exception(problem)}"
    return "" if agreed else f"the LMCache server speaks blend protocol {version}, not {PROTOCOL}"


def start_heartbeat(adapter: Any) -> None:
    """Start the heartbeat now; LMCache starts it with the first transfer."""
    adapter._ensure_heartbeat_started()


class Registration:
    """Registers a worker again when LMCache does not know it any more.

    LMCache forgets a worker that sent no heartbeat for some time (vLLM was paused), or was restarted since the last
    heartbeat, but still answers heartbeats. It then stores nothing. So one heartbeat is counted as failed, and
    LMCache's adapter registers at the next.

    Args:
        adapter: LMCache's worker adapter.
    """

    def __init__(self, adapter: Any) -> None:
        self._silent = max(_SILENT_S, 2.5 * adapter._heartbeat_interval)
        self._last: float | None = None
        self._unknown = False
        self._ping = adapter.req_client.ping
        patch_object(PING, adapter.req_client, self.ping)

    def renew(self) -> None:
        """Register again: LMCache answered that it does not know this worker."""
        self._unknown = True

    def ping(self, instance_id: int | None) -> Any:
        """LMCache's heartbeat, which fails once when the worker has to register again."""
        from lmcache.v1.multiprocess.futures import MessagingFuture

        now = time.monotonic()
        silent = self._last is not None and now - self._last > self._silent
        self._last = now
        if not silent and not self._unknown:
            return self._ping(instance_id)
        log.warning(
            "Registering this worker with LMCache again: %s",
            "LMCache does not know it" if self._unknown else f"it sent no heartbeat for over {self._silent:.0f} s",
        )
        self._unknown = False
        failed: Any = MessagingFuture()
        failed.set_result(False)
        return failed


def server_has_ended(address: tuple[str, int] | None) -> bool:
    """Whether no process listens at an address; False where that cannot be seen."""
    if address is None:
        return False
    try:
        socket.create_connection(address, timeout=0.2).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def format_exception(problem: Exception) -> str:
    """An error in one line."""
    return f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__


# -- look-ups ----------------------------------------------------------------------------------------------------------

_POLL_PAUSE_S = 0.0002


class BlendLookup:
    """Scheduler side: looks up where in a prompt there is cached KV, and opens a session on the server.

    The lookup is repeated until the server has the KV in memory.

    Args:
        adapter: LMCache's scheduler adapter.
        request_id: Name of the server's session.
        token_ids: The prompt.
        salt: The request's namespace.
        configs: Settings of the request for LMCache.
    """

    def __init__(
        self, adapter: Any, request_id: str, token_ids: list[int], salt: str, configs: dict[str, Any] | None
    ) -> None:
        self._adapter, self.request_id, self._prefix = adapter, request_id, token_ids
        self.salt, self.configs = salt, configs
        self.result: tuple[int, tuple[Match, ...]] | None = None
        self._client = next(iter(adapter.req_clients.values()))
        tokens = to_lmcache(token_ids)
        key = adapter._create_key(tokens, 0, len(token_ids), request_id, salt, configs).no_worker_id_version()
        # The server knows the prompt from the first call on: sending 30,900 tokens each time would keep both busy.
        # If it was restarted and does not know them, it finds nothing, and the whole prompt is computed.
        self._repeat = without_tokens(key)
        self._future: Any = None
        self._send(key)

    def _send(self, key: Any) -> None:
        try:
            self._future = self._client.cb_unified_lookup(key, self._adapter.tp_size)
        except Exception as problem:
            self._on_error(problem)

    def _on_error(self, problem: Exception) -> None:
        """Treat an error of LMCache's client as "nothing found". With gRPC a server that has ended causes one."""
        log.warning("LMCache did not look up request %s: %s", self.request_id, format_exception(problem))
        self._set_result(0, ())

    def _set_result(self, prefix: int, matches: tuple[Match, ...]) -> None:
        self.result = (prefix, matches)
        self._prefix, self._future = self._prefix[:prefix], None  # the rest of the prompt is no longer needed

    def poll(self, seconds: float) -> bool:
        """Whether the result is there, waiting at most that long."""
        until = time.perf_counter() + seconds
        while self.result is None:
            try:
                if not self._future.wait(max(0.0, until - time.perf_counter())):
                    return False
                found = self._future.result(0.001)
            except Exception as problem:
                self._on_error(problem)
                return True
            if found is not None:
                matches = (Match(m.cur_st, m.cur_ed, m.old_st, m.old_ed, m) for m in found.non_prefix_segments)
                self._set_result(int(found.prefix_coverage_tokens), tuple(matches))
                return True
            self._send(self._repeat)  # the server is not done yet
            if time.perf_counter() >= until:
                return self.result is not None
            time.sleep(_POLL_PAUSE_S)
        return True

    def release_prefix(self, start: int, end: int) -> None:
        """Release the read locks of exact prefix chunks that are not going to be loaded."""
        if end > start:  # the server hashes up to there: the rest of a prompt would delay the load that follows
            tokens = to_lmcache(self._prefix[:end])
            self._adapter.free_lookup_locks(tokens, start, end, self.request_id, self.salt, self.configs)

    def end_session(self) -> None:
        """Release the read locks of KV that was found and not loaded."""
        self._adapter.end_session(self.request_id)


def read_counts(result: tuple[int, tuple[Match, ...]] | None) -> dict[str, int]:
    """Objects by tier, in the result of a look-up that removed KV; empty if it has none (an LMCache without guard)."""
    for match in result[1] if result is not None else ():
        with contextlib.suppress(ValueError, AttributeError):
            return read_held(json.loads(match.native.hash))
    return {}


@contextlib.contextmanager
def keep_session_open(adapter: Any, request_id: str) -> Iterator[None]:
    """Keep LMCache's connector from ending this request's session: the owner of its look-up ends it."""
    end = adapter.end_session
    with patched(END_SESSION, adapter, lambda name: None if name == request_id else end(name)):
        yield
