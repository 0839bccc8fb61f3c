"""Every private part of LMCache's client that we touch; tests/test_connector_contract*.py check each against LMCache.

Written for LMCache 0.5.6 and 0.5.7, which are imported in the functions. The server sends no answer at all when a call
fails, so each wait has a deadline. A worker's loads and stores stand in lmcache_rag.connector.lmcache_transfers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
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

log = logging.getLogger("lmcache_rag")


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
    """Token ids that LMCache's connector gave to its adapter, or that we did."""
    if not isinstance(tokens, bytes):
        ids: Sequence[int] = tokens
        return ids
    return array("I", np.frombuffer(tokens, ">u4").astype("=u4").tobytes())


def without_tokens(key: Any) -> Any:
    """The key with no tokens in it."""
    name = next(name for name in _FIELDS if hasattr(key, name))
    return dataclasses.replace(key, **{name: type(getattr(key, name))()}, end=0)


@functools.cache
def _packed() -> bool:
    from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey

    return _FIELDS[0] in IPCCacheServerKey.__dataclass_fields__


# -- adapters ----------------------------------------------------------------------------------------------------------


REMEMBERED = 4096  # more than vLLM runs at once, and than LMCache answers in a minute


def loading(adapter: Any) -> set[str]:
    """Requests whose exact prefix LMCache's own connector is loading."""
    return set(adapter.retrieve_futures)


def keep_out(tracker: Any) -> None:
    """Have a new request of LMCache's connector neither look anything up nor store anything.

    For prompts of embeddings, whose token ids are all the same. No namespace of another request is like this one's, for
    what looks KV up all the same.
    """
    from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestState

    tracker.state = LMCacheMPRequestState.BYPASS_LMCACHE
    tracker.max_offload_tokens = 0
    tracker.cache_salt = uuid.uuid4().hex


def renumber_tokens(adapter: Any) -> None:
    """Have an adapter of LMCache's name tokens by other numbers, see lmcache_rag.connector.cache_salt."""
    create = adapter._create_key

    def create_key(
        tokens: Any, start: int, end: int, request_id: str, cache_salt: str = "", request_configs: Any = None
    ) -> Any:
        numbers = renumbering().numbers(from_lmcache(tokens), cache_salt)
        return create(to_lmcache(numbers), start, end, request_id, cache_salt, request_configs)

    adapter._create_key = create_key


def bound(adapter: Any) -> None:
    """Bound what a worker adapter and its client remember; in LMCache it only grows.

    Patches: LMCacheMPWorkerAdapter._returned_finished, of each request that ever ended, against reports that vLLM
    repeats within a few steps; MessageQueueClient.pending_futures, of each call that was never answered.
    """
    adapter._returned_finished = _Recent(dict.fromkeys(adapter._returned_finished))
    bound_client(adapter.req_client)


def bound_client(client: Any) -> None:
    """Bound the calls of a client for which an answer is expected; see `bound`."""
    queue = getattr(client, "_message_queue_client", None)  # gRPC's client keeps none
    if queue is not None:
        queue.pending_futures = _Recent(queue.pending_futures)


class _Recent(dict[Any, Any]):
    """The newest entries; also a set's `update` and `in`."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > REMEMBERED:
            try:
                del self[next(iter(self))]
            except (KeyError, RuntimeError):  # another thread was faster
                return

    def update(self, keys: Iterable[Any]) -> None:  # type: ignore[override]
        """As of a set."""
        for key in keys:
            self[key] = None


class LaterReports:
    """Tells LMCache which blocks vLLM gave to which tokens a moment later than its connector does.

    It does so, for metrics, before the workers are given the step: all tokens of a new prompt would be on the wire, and
    be read and counted by the server, before the prompt's KV is asked for.

    Args:
        adapter: LMCache's scheduler adapter.
    """

    def __init__(self, adapter: Any) -> None:
        self._tell: Callable[[list[Any]], None] = adapter.report_block_allocations
        self._kept: list[Any] = []
        adapter.report_block_allocations = self._keep

    def _keep(self, records: list[Any]) -> None:
        self.tell()  # of earlier steps
        self._kept = records

    def tell(self) -> None:
        """Tell what is left; before a request's session ends, or its blocks would count as used for ever."""
        kept, self._kept = self._kept, []
        if kept:
            self._tell(kept)


class LaterReleases:
    """Gives back read locks that LMCache's adapter would leave to their end by time, five minutes later.

    While the server is unhealthy the adapter drops `free_lookup_locks` and `end_session`. A server that was only paused
    goes on with the look-ups it was sent before, and locks what they find. So these calls are kept, in their order, and
    made when the server is healthy again. One that was restarted does not know the sessions, and does nothing.

    Args:
        adapter: LMCache's scheduler adapter.
    """

    SECONDS = 300.0  # older locks have ended by themselves
    KEPT = 65_536  # calls
    AGAIN_S = 1.0

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter
        self._kept: deque[tuple[float, Callable[[], object]]] = deque()
        self._again: deque[tuple[float, str, Callable[[], object]]] = deque()  # when, whose session, what
        for name in ("free_lookup_locks", "end_session"):
            setattr(adapter, name, partial(self._call, getattr(adapter, name)))

    def _call(self, call: Callable[..., object], *args: Any, **named: Any) -> None:
        if self._adapter.is_healthy:
            self.send()
            call(*args, **named)
        elif len(self._kept) < self.KEPT:
            self._kept.append((time.monotonic(), partial(call, *args, **named)))

    def unused(self, request_id: str, tracker: Any) -> None:
        """A request ended, and what LMCache's own connector looked up for it was never asked for.

        The connector forgets the look-up on this side only. The server gives locks back if the look-up has its result.
        So the calls are made twice: now, and a moment later, when the request's session has ended; then they do nothing
        unless the result came meanwhile.
        """
        tokens = tracker.get_token_ids()
        give_back = partial(
            self._adapter.free_lookup_locks,
            tokens,
            0,
            len(tokens) // chunk_tokens(self._adapter) * chunk_tokens(self._adapter),
            request_id,
            tracker.cache_salt,
            tracker.request_configs,
        )
        give_back()
        if len(self._again) < self.KEPT:
            self._again.append((time.monotonic() + self.AGAIN_S, request_id, give_back))

    @property
    def waiting(self) -> bool:
        """Whether an engine without requests should go on, to say something that is due in a moment."""
        return bool(self._again) and bool(self._adapter.is_healthy)

    def send(self) -> None:
        """Make the calls that are due, and those that were kept, if the server is healthy; in every step."""
        while self._again and self._again[0][0] < time.monotonic():
            _, request_id, give_back = self._again.popleft()
            self._safely(give_back)
            self._safely(partial(self._adapter.end_session, request_id))
        while self._kept and self._adapter.is_healthy:
            since, call = self._kept.popleft()
            if since > time.monotonic() - self.SECONDS:
                self._safely(call)

    def _safely(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:  # the connection's; an error here would end vLLM's engine
            log.debug("A read lock is left to its end by time", exc_info=True)


def address(get: Callable[[str, Any], Any], worker: int = 0, workers: int = 1) -> tuple[str, int] | None:
    """(host, port) of the server that a worker's LMCache adapter uses; None where that is no TCP address.

    Args:
        get: vLLM's get_from_extra_config(key, default).
        worker: The worker's rank, which is what LMCache chooses one of several servers by.
        workers: How many there are.
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
    """Tokens in one LMCache chunk."""
    return int(adapter.lmcache_tokens_per_chunk)


# -- what LMCache's connector knows of a request, where a request must not decide it -----------------------------------


def plain_tracker(request: Any) -> Any:
    """A tracker of a request of which nothing is read but its tokens; LMCache's own could not be made."""
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


def to_be_loaded(trackers: Iterable[Any]) -> list[Any]:
    """Trackers of requests whose load is asked for in this step."""
    from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestState

    return [tracker for tracker in trackers if tracker.state == LMCacheMPRequestState.WAITING_FOR_LOAD]


def empty_step(again: Iterable[Any]) -> Any:
    """Metadata of a step in which nothing is stored or loaded; the loads of these trackers are asked for in the next.

    The workers see to stores under way before anything else: a preempted request's blocks may be among the step's.
    """
    from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPConnectorMetadata, LMCacheMPRequestState

    for tracker in again:
        tracker.state = LMCacheMPRequestState.WAITING_FOR_LOAD
    metadata = LMCacheMPConnectorMetadata()
    metadata.need_flush_before_forward = True
    return metadata


# -- the server as a whole: not there yet, gone, back, and whether it is the one that is needed ------------------------


PROTOCOL = 1
FIRST_WAIT_S = 10.0  # vLLM's start waits so long for a server that is not there yet
_ASK_S = 5.0
_SILENT_S = 20.0  # LMCache forgets a worker that it did not hear of for 30 s or more


@contextlib.contextmanager
def may_be_absent(chunk_size: int) -> Iterator[list[Any]]:
    """Have LMCache's adapters made also while no server answers, which they wait for and then give up vLLM's start.

    Args:
        chunk_size: Tokens of an LMCache chunk to go by until it answers; 0: none, and no start.

    Yields:
        The clients that were not answered.
    """
    from lmcache.integration.vllm import vllm_multi_process_adapter as adapters

    ask, experimental = adapters.get_lmcache_chunk_size, adapters.get_experimental
    absent: list[Any] = []

    def size(client: Any, timeout: float = FIRST_WAIT_S, **more: Any) -> int:
        try:
            return int(ask(client, timeout=min(timeout, FIRST_WAIT_S) if chunk_size else timeout, **more))
        except TimeoutError:
            if not chunk_size:
                raise
            absent.append(client)
            return chunk_size

    adapters.get_lmcache_chunk_size = size
    adapters.get_experimental = lambda client, timeout: set() if absent else experimental(client, timeout=timeout)
    try:
        yield absent
    finally:
        adapters.get_lmcache_chunk_size, adapters.get_experimental = ask, experimental


@contextlib.contextmanager
def registering(adapter: Any, *, may_fail: bool) -> Iterator[list[Exception]]:
    """Have the KV caches registered, or else later, when the server comes: LMCache's heartbeat does that.

    Args:
        adapter: LMCache's worker adapter.
        may_fail: Whether to go on without a server.

    Yields:
        What went wrong.
    """
    failed: list[Exception] = []
    wait = adapter._mq_timeout
    if not adapter.is_healthy:
        adapter._mq_timeout = min(wait, FIRST_WAIT_S)
    try:
        yield failed
    except ConnectionError as problem:
        if not may_fail:
            raise
        failed.append(problem)
        is_absent(adapter)
    finally:
        adapter._mq_timeout = wait


def is_absent(adapter: Any) -> None:
    """The adapter is to take its server for dead until a heartbeat is answered."""
    for event in getattr(adapter, "_health_events", {}).values() or [adapter._health_event]:
        event.clear()


def watch(adapter: Any, blends: Callable[[], bool]) -> None:
    """Scheduler side: watch the server from now on; one that comes back as another is not used.

    Args:
        adapter: LMCache's scheduler adapter.
        blends: Whether the workers blend, and a blend server is needed.
    """
    adapter._ensure_heartbeat_started()
    for url, heartbeat in adapter._heartbeats.items():
        client = adapter.req_clients[url]
        heartbeat.register_recover_callback(
            lambda client=client: same_chunks(adapter, client) and (not blends() or not handshake(client, _ASK_S))
        )


def same_chunks(adapter: Any, client: Any) -> bool:
    """Whether a server that is back has the chunk size that the adapter goes by."""
    alignment = getattr(adapter, "_required_chunk_alignment", None)  # since 0.5.7 the chunk size is agreed on
    try:
        asked = client.get_chunk_size() if alignment is None else client.negotiate_chunk_size(alignment)
        found = asked.result(_ASK_S)
    except Exception:  # it is asked again with the next heartbeat
        return False
    if found != adapter.lmcache_tokens_per_chunk:
        log.error(
            "LMCache has chunks of %d tokens now, not %d, and is not used: start it, or vLLM, again with the other's.",
            found,
            adapter.lmcache_tokens_per_chunk,
        )
    return bool(found == adapter.lmcache_tokens_per_chunk)


def handshake(client: Any, seconds: float) -> str:
    """Why the server does not blend with us; empty when it does."""
    try:
        version, agreed = client.cb_protocol_handshake(PROTOCOL).result(seconds)
    except TimeoutError:
        return "the LMCache server did not answer the blend handshake: start it with --engine-type blend"
    except Exception as problem:
        return f"the blend handshake with the LMCache server failed: {said(problem)}"
    return "" if agreed else f"the LMCache server speaks blend protocol {version}, not {PROTOCOL}"


def ensure_heartbeat(adapter: Any) -> None:
    """Watch the server from now on rather than from the first transfer on."""
    adapter._ensure_heartbeat_started()


class Registration:
    """Has a worker registered again when LMCache no longer knows it.

    LMCache forgets a worker that was not heard of for some time (vLLM was paused), or is another process since the last
    heartbeat, and answers heartbeats all the same. It then stores nothing.

    Patches RequestClient.ping of the worker's client: one heartbeat is taken as failed, so that LMCache's adapter
    registers at the next.

    Args:
        adapter: LMCache's worker adapter.
    """

    def __init__(self, adapter: Any) -> None:
        self._ping = adapter.req_client.ping
        self._silent = max(_SILENT_S, 2.5 * adapter._heartbeat_interval)
        self._last: float | None = None
        self._unknown = False
        adapter.req_client.ping = self.ping

    def renew(self) -> None:
        """LMCache answered that it does not know this worker."""
        self._unknown = True

    def ping(self, instance_id: int | None) -> Any:
        """LMCache's heartbeat, which fails once when the worker has to be registered again."""
        from lmcache.v1.multiprocess.futures import MessagingFuture

        now = time.monotonic()
        silent = self._last is not None and now - self._last > self._silent
        self._last = now
        if not silent and not self._unknown:
            return self._ping(instance_id)
        log.warning(
            "This worker is registered with LMCache again: %s",
            "LMCache did not know it" if self._unknown else f"it sent no heartbeat for over {self._silent:.0f} s",
        )
        self._unknown = False
        failed: Any = MessagingFuture()
        failed.set_result(False)
        return failed


def has_ended(address: tuple[str, int] | None) -> bool:
    """Whether no process listens there; False where that cannot be seen."""
    if address is None:
        return False
    try:
        socket.create_connection(address, timeout=0.2).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def said(problem: Exception) -> str:
    """An error in one line."""
    return f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__


# -- looking up where in a prompt cached KV lies, and the session on the server that this opens ------------------------


_PAUSE = 0.0002  # between two questions for a look-up


class BlendLookup:
    """Scheduler side: where in a prompt cached KV lies. Asked again until the server has it in memory.

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
        # The server knows the prompt from the first question on: 30,900 tokens again and again would keep both busy.
        # Had it forgotten them, for it was restarted, it would find nothing, and all is computed.
        self._again = without_tokens(key)
        self._future: Any = None
        self._ask(key)

    def _ask(self, key: Any) -> None:
        try:
            self._future = self._client.cb_unified_lookup(key, self._adapter.tp_size)
        except Exception as problem:
            self._fails(problem)

    def _fails(self, problem: Exception) -> None:
        """An error of LMCache's client: nothing is found. Over gRPC that is how a server that has ended answers."""
        log.warning("LMCache did not look up request %s: %s", self.request_id, said(problem))
        self._found(0, ())

    def _found(self, prefix: int, matches: tuple[Match, ...]) -> None:
        self.result = (prefix, matches)
        self._prefix, self._future = self._prefix[:prefix], None  # the rest of the prompt is not needed any more

    def poll(self, seconds: float) -> bool:
        """Whether the result is there, waiting for it at most that long."""
        until = time.perf_counter() + seconds
        while self.result is None:
            try:
                if not self._future.wait(max(0.0, until - time.perf_counter())):
                    return False
                found = self._future.result(0.001)
            except Exception as problem:
                self._fails(problem)
                return True
            if found is not None:
                matches = (Match(m.cur_st, m.cur_ed, m.old_st, m.old_ed, m) for m in found.non_prefix_segments)
                self._found(int(found.prefix_coverage_tokens), tuple(matches))
                return True
            self._ask(self._again)  # the server is still at it
            if time.perf_counter() >= until:
                return self.result is not None
            time.sleep(_PAUSE)
        return True

    def release_prefix(self, start: int, end: int) -> None:
        """Give back the read locks of exact prefix chunks that are not going to be loaded."""
        if end > start:  # the server hashes up to there: the rest of a prompt would keep it from the load that follows
            tokens = to_lmcache(self._prefix[:end])
            self._adapter.free_lookup_locks(tokens, start, end, self.request_id, self.salt, self.configs)

    def end_session(self) -> None:
        """Give back what was looked up and not loaded."""
        self._adapter.end_session(self.request_id)


@contextlib.contextmanager
def session_goes_on(adapter: Any, request_id: str) -> Iterator[None]:
    """Keep LMCache's connector from ending this request's session: whoever holds its look-up is going to."""
    end = adapter.end_session
    adapter.end_session = lambda name: None if name == request_id else end(name)
    try:
        yield
    finally:
        adapter.end_session = end
