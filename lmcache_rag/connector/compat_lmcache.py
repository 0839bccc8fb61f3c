"""Every private part of LMCache that we touch; tests/test_connector_contract.py checks each against LMCache.

Written for LMCache 0.5.6. An LMCache server sends no answer at all when a call fails, so each wait has a deadline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lmcache_rag.connector.namespace import renumbered
from lmcache_rag.connector.plan import BlendPlan, Match
from lmcache_rag.connector.server_guard import UNTIL

log = logging.getLogger("lmcache_rag")

PROTOCOL = 1
FIRST_WAIT_S = 10.0  # vLLM's start waits so long for a server that is not there yet
_ASK_S = 5.0
_PAUSE = 0.0002  # between two questions for a look-up
_BACKLOG_S = 30.0  # a server that is back does what was asked before within so long


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
        self._adapter, self.request_id, self.token_ids = adapter, request_id, token_ids
        self.salt, self.configs = salt, configs
        self._key = adapter._create_key(token_ids, 0, len(token_ids), request_id, salt, configs).no_worker_id_version()
        self._client = next(iter(adapter.req_clients.values()))
        self._future = self._ask(self._key)
        # The server knows the prompt from the first question on: 30,900 tokens again and again would keep both busy.
        # Had it forgotten them, for it was restarted, it would find nothing, and all is computed.
        self._again = dataclasses.replace(self._key, token_ids=(), end=0)
        self.result: tuple[int, tuple[Match, ...]] | None = None

    def _ask(self, key: Any) -> Any:
        return self._client.cb_unified_lookup(key, self._adapter.tp_size)

    def poll(self, seconds: float) -> bool:
        """Whether the result is there, waiting for it at most that long."""
        until = time.perf_counter() + seconds
        while self.result is None:
            if not self._future.wait(max(0.0, until - time.perf_counter())):
                return False
            found = self._future.result(0.001)
            if found is not None:
                self.result = (
                    int(found.prefix_coverage_tokens),
                    tuple(Match(m.cur_st, m.cur_ed, m.old_st, m.old_ed, m) for m in found.non_prefix_segments),
                )
                return True
            self._future = self._ask(self._again)  # the server is still at it
            if time.perf_counter() >= until:
                return False
            time.sleep(_PAUSE)
        return True

    def release_prefix(self, start: int, end: int) -> None:
        """Give back the read locks of exact prefix chunks that are not going to be loaded."""
        if end > start:
            self._adapter.free_lookup_locks(self.token_ids, start, end, self.request_id, self.salt, self.configs)

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
        del adapter.end_session


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

    def size(client: Any, timeout: float = FIRST_WAIT_S) -> int:
        try:
            return int(ask(client, timeout=min(timeout, FIRST_WAIT_S) if chunk_size else timeout))
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
    try:
        found = client.get_chunk_size().result(_ASK_S)
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
        return f"the blend handshake with the LMCache server failed: {_said(problem)}"
    return "" if agreed else f"the LMCache server speaks blend protocol {version}, not {PROTOCOL}"


def ensure_heartbeat(adapter: Any) -> None:
    """Watch the server from now on rather than from the first transfer on."""
    adapter._ensure_heartbeat_started()


def loading(adapter: Any) -> set[str]:
    """Requests whose exact prefix LMCache's own connector is loading."""
    return set(adapter.retrieve_futures)


def renumber_tokens(adapter: Any) -> None:
    """Have an adapter of LMCache's name tokens by other numbers in each namespace; see namespace.renumbered."""
    create = adapter._create_key

    def create_key(
        token_ids: Sequence[int],
        start: int,
        end: int,
        request_id: str,
        cache_salt: str = "",
        request_configs: dict[str, Any] | None = None,
    ) -> Any:
        return create(renumbered(token_ids, cache_salt), start, end, request_id, cache_salt, request_configs)

    adapter._create_key = create_key


def address(get: Callable[[str, Any], Any]) -> tuple[str, int] | None:
    """(host, port) of the server that LMCache's connector is told to use; None where it is one of several.

    Args:
        get: vLLM's get_from_extra_config(key, default).
    """
    if get("lmcache.mp.server_urls", None):
        return None
    host, port = str(get("lmcache.mp.host", "tcp://localhost")), str(get("lmcache.mp.port", 5555))
    return (host.rpartition("://")[2], int(port)) if port.isdigit() else None


def chunk_tokens(adapter: Any) -> int:
    """Tokens in one LMCache chunk."""
    return int(adapter.lmcache_tokens_per_chunk)


class WorkerLink:
    """Worker side: registers the rotary table and asks for KV.

    LMCache's client answers with whatever error it met, for instance that the connection is lost. To a worker that is
    KV which did not come.

    Args:
        adapter: LMCache's worker adapter, its KV caches registered.
        deadline: Longest wait for an answer, in seconds.
        address: (host, port) of the server, where they are known.
        absent: Whether it does not answer yet. It is asked, and given the table, when it does.
    """

    def __init__(
        self, adapter: Any, deadline: float, address: tuple[str, int] | None = None, *, absent: bool = False
    ) -> None:
        self._adapter, self._deadline, self._address = adapter, deadline, address
        self._asked, self._lacks = not absent, ""
        self._table: Any = None
        self._recovered: float | None = None
        self._told = False  # of an error, since the last load that came

    def why_not(self) -> str:
        """Why the server cannot blend; empty when it can."""
        transfer = self._adapter.transfer_ctx
        devices = {cache.device.type for cache in self._adapter.kv_caches.values()}
        ready = getattr(transfer, "_event_backend", None) is not None
        if not ready and (self._asked or devices != {"cuda"} or not hasattr(transfer, "_event_backend")):
            return "blending needs CUDA: this transfer mode has no device events"
        return handshake(self._adapter.req_client, self._deadline) if self._asked else ""

    def register_rope(self, table: Any, head_size: int, is_neox: bool) -> str:
        """Give the server the model's table of angles, and again whenever it comes back.

        Args:
            table: The model's cos_sin_cache, [positions, rotary size].
            head_size: Size of a head.
            is_neox: Whether halves rather than neighbours are turned together.

        Returns:
            Why it did not take the table; empty when it did.
        """
        self._table = table.detach().contiguous().clone()  # the model may replace its own; the server maps this one
        self._rope = (head_size, is_neox)
        try:
            if self._asked:
                self._send_rope()
        except Exception as problem:
            return f"the LMCache server did not take the rotary table: {_said(problem)}"
        again = self._adapter._reregister_kv_caches_callback

        def both() -> bool:
            if not same_chunks(self._adapter, self._adapter.req_client) or not again():
                return False
            if not self._asked:
                self._asked, self._lacks = True, handshake(self._adapter.req_client, self._deadline)
            if self._lacks:
                log.warning("KV is not blended: %s", self._lacks)
                return True  # it has exact prefixes
            try:
                self._send_rope()
            except Exception as problem:
                log.warning("The LMCache server is back but did not take the rotary table: %s", _said(problem))
                return False
            self._recovered = time.monotonic()
            return True

        self._adapter._reregister_kv_caches_callback = both
        return ""

    def _send_rope(self) -> None:
        from lmcache.v1.platform.kv_wrap import wrap_one_kv_cache

        head_size, is_neox = self._rope
        self._adapter.req_client.cb_register_rope(
            self._adapter.instance_id, [wrap_one_kv_cache(self._table)], head_size, is_neox, [], [], [], ""
        ).result(self._deadline)

    @property
    def is_healthy(self) -> bool:
        """Whether the server answers its heartbeat."""
        return bool(self._adapter.is_healthy) and not self._lacks

    def lost(self, since: float) -> bool:
        """Whether what was asked then, by time.monotonic(), and is not answered yet, is surely not going to be done.

        The process that was asked has ended: nobody listens at its port. Or somebody has been answering again for so
        long that what was asked before would have been done.
        """
        if self._recovered is not None and self._recovered > since:
            return time.monotonic() - self._recovered > _BACKLOG_S
        if self._address is None:
            return False
        try:
            socket.create_connection(self._address, timeout=0.2).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False

    def submit_exact(self, plan: BlendPlan) -> Any:
        """Ask for the exact prefix [plan.local, plan.exact); what lies before it in its chunk is left alone.

        The server only knows whole chunks: a prefix that was cut short by a token is loaded to its chunk's end.

        Returns:
            What `answered`, `there` and `arrived` ask; None when it could not even be sent.
        """
        return self._sent(lambda: self._submit_exact(plan))

    def _submit_exact(self, plan: BlendPlan) -> Any:
        chunk = self._adapter.lmcache_tokens_per_chunk
        begin = plan.local // chunk * chunk
        end = -(-plan.exact // chunk) * chunk
        key = self._key(plan, plan.token_ids, begin, end)
        transfer = self._adapter.transfer_ctx
        block = chunk // self._adapter.blocks_in_chunk
        return transfer.submit_retrieve(
            plan.request_id,
            key,
            self._adapter.kv_caches,
            [list(plan.block_ids[begin // block : -(-end // block)])],
            transfer.create_recorded_event(),
            self._adapter.blocks_in_chunk,
            skip_first_n_tokens=plan.local - begin,
        )

    def submit_matches(self, plan: BlendPlan, matches: Sequence[Match]) -> Any:
        """Ask for chunk KV to be written to the plan's blocks, keys turned to their new positions; see submit_exact."""
        return self._sent(lambda: self._submit_matches(plan, matches))

    def _submit_matches(self, plan: BlendPlan, matches: Sequence[Match]) -> Any:
        transfer = self._adapter.transfer_ctx
        event = transfer._event_backend.export_event(transfer.create_recorded_event(), transfer._device)
        future = self._adapter.req_client.cb_retrieve_pre_computed(
            self._key(plan, (), 0, 0),  # the matches name all that it reads
            [m.native for m in matches],
            [list(plan.block_ids)],
            self._adapter.instance_id,
            event,
        )
        return future.to_device_future(device=transfer._device, event_backend=transfer._event_backend)

    def _key(self, plan: BlendPlan, tokens: Sequence[int], start: int, end: int) -> Any:
        configs = {**(plan.configs or {}), UNTIL: time.time() + self._deadline}
        return self._adapter._create_key(tokens, start, end, plan.request_id, plan.cache_salt, configs)

    @property
    def deadline(self) -> float:
        """Longest wait for an answer, in seconds."""
        return self._deadline

    def answered(self, future: Any, seconds: float) -> bool:
        """Whether the server has answered, waiting for it at most that long: the copy is queued on the GPU, or failed.

        Not `future.wait`, which then waits for the copy too.
        """
        return future is None or bool(future.raw_future_.wait(seconds))

    def there(self, future: Any) -> bool:
        """Whether the copy is done, or failed."""
        try:
            return future is None or bool(future.query())
        except Exception as problem:
            self._tell(problem)
            return True

    def arrived(self, future: Any, seconds: float) -> bool:
        """Whether the KV came; later work of the current stream waits for it, the host for the answer only."""
        import torch

        if future is None:
            return False
        try:
            came = bool(future.wait_on_stream(torch.cuda.current_stream(), seconds))
        except TimeoutError:
            return False
        except Exception as problem:
            self._tell(problem)
            return False
        self._told = self._told and not came
        return came

    def _sent(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except Exception as problem:
            self._tell(problem)
            return None

    def _tell(self, problem: Exception) -> None:
        if not self._told:
            self._told = True
            log.warning("KV could not be loaded from LMCache: %s", _said(problem), exc_info=problem)


def _said(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__
