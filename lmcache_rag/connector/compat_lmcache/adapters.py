"""What is read of LMCache's adapters, and how they name what they ask for."""

from __future__ import annotations

import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from lmcache_rag.connector.cache_salt import renumbering
from lmcache_rag.connector.compat_lmcache.tokens import from_lmcache, to_lmcache

log = logging.getLogger("lmcache_rag")

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
