"""Transfers of KV between a worker and LMCache: loads for blends, and the loads and stores of LMCache's own connector.

Loads are requested and awaited here. The copy into vLLM's blocks is made by LMCache's server: its
`cb_retrieve_pre_computed` for chunk KV, which also rotates the keys, and its `retrieve` for an exact prefix.

LMCache reads a request's blocks for a store and writes to them for a load, and vLLM must not give them to another
request meanwhile. LMCache's adapter keeps one answer for each request, so a prompt that is stored in two parts counts
as stored after the first, and it drops all answers when a heartbeat fails: vLLM gives the blocks to others, and
LMCache stores their KV under the first request's key. So each transfer has a deadline until which LMCache may
begin it (checked in LMCache itself, by lmcache_server.modules), and it ends when it is answered, or
some time after that.

Without device handles (vLLM for CPUs) the worker itself copies, and calls LMCache before and after: it waits for each
answer, and with shared memory an answer that does not come is an error, which would end vLLM.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmcache_rag.connector.lmcache_client import (
    ADAPTERS,
    format_exception,
    handshake,
    has_same_chunk_size,
    mark_unhealthy,
    server_has_ended,
    to_lmcache,
)
from lmcache_rag.connector.metadata import BlendPlan, Match
from lmcache_rag.connector.patching import Patch, patch_object
from lmcache_rag.protocol import UNTIL, CannotBlend, Unsupported

log = logging.getLogger("lmcache_rag")

_WORKER = f"{ADAPTERS}:LMCacheMPWorkerAdapter"
REREGISTER = Patch(
    f"{_WORKER}._reregister_kv_caches_callback",
    "A server that is back gets the model's rotary table too, and is not used with another chunk size.",
    "LMCache registers the rotary table with the KV caches",
)
_DEADLINE_WHY = "Each transfer has a deadline, and counts as in flight until it is answered; errors do not end vLLM."
_DEADLINE_UNTIL = "LMCache tracks each transfer, and refuses those that are late"
SUBMIT_STORE = Patch(f"{_WORKER}.submit_store_request", _DEADLINE_WHY, _DEADLINE_UNTIL)
SUBMIT_RETRIEVE = Patch(f"{_WORKER}.submit_retrieve_request", _DEADLINE_WHY, _DEADLINE_UNTIL)
HANDLE_PREEMPTIONS = Patch(
    f"{_WORKER}.handle_preemptions",
    "A preemption waits once for all transfers of its blocks, also while the server is unhealthy.",
    "LMCache has one deadline for all of them",
)
REGISTER_KV_CACHES = Patch(
    f"{_WORKER}._send_register_kv_caches_request",
    "Engine-driven transfers (vLLM for CPUs) wait 5 s for LMCache at most, instead of 300 s within a step.",
    "LMCache answers without keeping the worker",
)


# -- loads of a blend --------------------------------------------------------------------------------------------------

_BACKLOG_S = 30.0  # a server that is back carries out earlier requests within this time
_HAND_OVER_S = 0.0005
_COPY_POLL_S = 0.0001


class LMCacheLoader:
    """Worker side: registers the rotary table and loads KV.

    LMCache's client raises any error, for instance that the connection is lost. The worker treats each as a failed
    load.

    Args:
        adapter: LMCache's worker adapter, its KV caches registered.
        deadline: Longest wait for an answer, in seconds.
        address: (host, port) of the server, where they are known.
        absent: Whether the server does not respond yet. The handshake, and the table, are sent when it does.
    """

    def __init__(
        self, adapter: Any, deadline: float, address: tuple[str, int] | None = None, *, absent: bool = False
    ) -> None:
        self._adapter, self._deadline, self._address = adapter, deadline, address
        self._handshake_done, self._refusal = not absent, ""
        self._table: Any = None
        self._recovered: float | None = None
        self._warned = False  # whether an error was logged since the last load that succeeded

    def unsupported_reason(self) -> Unsupported | None:
        """Why the server cannot blend; None when it can."""
        transfer = self._adapter.transfer_ctx
        devices = {cache.device.type for cache in self._adapter.kv_caches.values()}
        ready = getattr(transfer, "_event_backend", None) is not None
        if not ready and (self._handshake_done or devices != {"cuda"} or not hasattr(transfer, "_event_backend")):
            detail = "blending needs CUDA: this transfer mode has no device events"
            return Unsupported(CannotBlend.NEEDS_CUDA, detail)
        reason = handshake(self._adapter.req_client, self._deadline) if self._handshake_done else ""
        if not reason or self._server_unresponsive():
            return None
        return Unsupported(CannotBlend.LMCACHE_HANDSHAKE, reason)

    def _server_unresponsive(self) -> bool:
        """Whether the server does not respond at all: then the handshake is made when it responds again."""
        if has_same_chunk_size(self._adapter, self._adapter.req_client):
            return False
        self._handshake_done = False
        mark_unhealthy(self._adapter)
        return True

    def register_rope(self, table: Any, head_size: int, is_neox: bool, quantised: str = "") -> str:
        """Send the model's rotary table to the server, and again whenever the server comes back.

        Args:
            table: The model's cos_sin_cache, [positions, rotary size].
            head_size: Size of a head.
            is_neox: Whether halves, rather than neighbours, are rotated together.
            quantised: LMCache's name of the cache's type if that is FP8, which it cannot tell from bytes; else "".

        Returns:
            Why it did not take the table; empty when it did.
        """
        self._table = table.detach().contiguous().clone()  # the model may replace its own; the server maps this one
        self._rope = (head_size, is_neox, quantised)
        try:
            if self._handshake_done:
                self._send_rope()
        except Exception as problem:
            if not self._server_unresponsive():
                return f"the LMCache server did not take the rotary table: {format_exception(problem)}"
        reregister = self._adapter._reregister_kv_caches_callback

        def reregister_both() -> bool:
            if not has_same_chunk_size(self._adapter, self._adapter.req_client) or not reregister():
                return False
            if not self._handshake_done:
                refusal = handshake(self._adapter.req_client, self._deadline)
                if refusal and not has_same_chunk_size(self._adapter, self._adapter.req_client):
                    return False
                self._handshake_done, self._refusal = True, refusal
            if self._refusal:
                log.warning("KV is not blended: %s", self._refusal)
                return True  # it has exact prefixes
            try:
                self._send_rope()
            except Exception as problem:
                log.warning(
                    "The LMCache server is back but did not take the rotary table: %s", format_exception(problem)
                )
                return False
            self._recovered = time.monotonic()
            return True

        patch_object(REREGISTER, self._adapter, reregister_both)
        return ""

    def _send_rope(self) -> None:
        from lmcache.v1.platform.kv_wrap import wrap_one_kv_cache

        head_size, is_neox, quantised = self._rope
        self._adapter.req_client.cb_register_rope(
            self._adapter.instance_id, [wrap_one_kv_cache(self._table)], head_size, is_neox, [], [], [], quantised
        ).result(self._deadline)

    @property
    def is_healthy(self) -> bool:
        """Whether the server answers its heartbeat, and blends."""
        return bool(self._adapter.is_healthy) and not self._refusal

    def lost(self, since: float) -> bool:
        """Whether a request sent at `since` (time.monotonic()) and not answered yet will never be carried out.

        Either the server's process has ended: nothing listens at its port. Or a server has been responding again for so
        long that requests from before would have been carried out.
        """
        if self._recovered is not None and self._recovered > since:
            return time.monotonic() - self._recovered > _BACKLOG_S
        return server_has_ended(self._address)

    def submit_exact(self, plan: BlendPlan) -> Any:
        """Request the exact prefix [plan.local, plan.exact); the blocks before it in its chunk are not written.

        The server only knows whole chunks: a prefix that was cut short by a token is loaded to its chunk's end.

        Returns:
            A future for `answered`, `there` and `arrived`; None when the request could not be sent.
        """
        return self._send(lambda: self._submit_exact(plan))

    def give_back(self, plan: BlendPlan) -> None:
        """Have the server release the read locks of an exact prefix that is not going to be loaded.

        It is sent a load without blocks, after its deadline: it rejects that, and unlocks what it would have read.
        """
        self._send(lambda: self._submit_exact(plan, refused=True))

    def _submit_exact(self, plan: BlendPlan, *, refused: bool = False) -> Any:
        chunk = self._adapter.lmcache_tokens_per_chunk
        begin = plan.local // chunk * chunk
        end = -(-plan.exact // chunk) * chunk
        # The server hashes up to there. It compares the tokens with the look-up's only if it no longer knows this
        # worker: then the locks expire.
        key = self._key(plan, plan.token_ids[:end], begin, end, until=0.0 if refused else None)
        transfer = self._adapter.transfer_ctx
        block = chunk // self._adapter.blocks_in_chunk
        blocks = [] if refused else list(plan.block_ids[begin // block : -(-end // block)])
        return transfer.submit_retrieve(
            plan.request_id,
            key,
            self._adapter.kv_caches,
            [blocks],
            transfer.create_recorded_event(),
            self._adapter.blocks_in_chunk,
            skip_first_n_tokens=plan.local - begin,
        )

    def submit_matches(self, plan: BlendPlan, matches: Sequence[Match]) -> Any:
        """Request chunk KV for the plan's blocks, keys rotated to their new positions; see submit_exact."""
        return self._send(lambda: self._submit_matches(plan, matches))

    def _submit_matches(self, plan: BlendPlan, matches: Sequence[Match]) -> Any:
        transfer = self._adapter.transfer_ctx
        event = transfer._event_backend.export_event(transfer.create_recorded_event(), transfer._device)
        future = self._adapter.req_client.cb_retrieve_pre_computed(
            self._key(plan, (), 0, 0),  # the matches name all KV that it reads
            [m.native for m in matches],
            [list(plan.block_ids)],
            self._adapter.instance_id,
            event,
        )
        return future.to_device_future(device=transfer._device, event_backend=transfer._event_backend)

    def _key(self, plan: BlendPlan, tokens: Sequence[int], start: int, end: int, *, until: float | None = None) -> Any:
        configs = {**(plan.configs or {}), UNTIL: time.time() + self._deadline if until is None else until}
        return self._adapter._create_key(to_lmcache(tokens), start, end, plan.request_id, plan.cache_salt, configs)

    @property
    def deadline(self) -> float:
        """Longest wait for an answer, in seconds."""
        return self._deadline

    def answered(self, future: Any, seconds: float) -> bool:
        """Whether the server has answered, waiting at most that long: the copy is queued on the GPU, or has failed.

        Not `future.wait`, which then waits for the copy too.
        """
        return future is None or bool(future.raw_future_.wait(seconds))

    def there(self, future: Any) -> bool:
        """Whether the copy is complete, or has failed."""
        try:
            return future is None or bool(future.query())
        except Exception as problem:
            self._warn(problem)
            return True

    def arrived(self, future: Any, seconds: float) -> bool:
        """Whether the KV was loaded, waiting at most that long.

        The CPU waits for the copy. If the stream did (`wait_on_stream`), a server that is killed in the middle of a
        copy would never signal its event, and the stream, with vLLM's work on it, would stand still.
        """
        until = time.perf_counter() + seconds
        if future is None or not self.answered(future, seconds):
            return False
        try:
            while not future.query():
                if time.perf_counter() >= until:
                    return False
                time.sleep(_COPY_POLL_S)
            loaded = bool(future.result(0.0))
        except Exception as problem:
            self._warn(problem)
            return False
        self._warned = self._warned and not loaded
        return loaded

    def _send(self, submit: Callable[[], Any]) -> Any:
        try:
            future = submit()
        except Exception as problem:
            self._warn(problem)
            return None
        # A thread of LMCache's client sends it, and needs the GIL for that. This thread, which runs Python until it
        # waits for the KV, would keep the GIL for up to 5 ms (sys.getswitchinterval) with each message.
        time.sleep(_HAND_OVER_S)
        return future

    def _warn(self, problem: Exception) -> None:
        if not self._warned:
            self._warned = True
            log.warning("KV could not be loaded from LMCache: %s", format_exception(problem), exc_info=problem)


# -- transfers of LMCache's own connector ------------------------------------------------------------------------------

STORE_S = 5.0  # LMCache may begin a transfer up to this long after it was sent
GRACE_S = 1.0  # a transfer that began in time is complete after this
_ENDED_POLL_S = 0.5  # between two checks whether its process has ended
_PAUSE_S = 0.05


@dataclass(eq=False)
class Transfer:
    """A store or a load that was sent. It takes the place of its future in LMCache's adapter.

    Attributes:
        request_id: The request whose blocks are read, or written to.
        future: LMCache's answer to come.
        until: When LMCache refuses to begin it, by time.time().
        loads: Whether it is a load, and writes to the blocks.
        failed: Whether it ended without an answer.
    """

    request_id: str
    future: Any
    until: float
    loads: bool = False
    failed: bool = False
    _answered: bool = field(default=False, repr=False)

    def query(self) -> bool:
        """Whether the blocks are no longer in use."""
        if not self._answered and not self.failed:
            try:
                self._answered = bool(self.future.query())
            except Exception:  # an unreadable answer does not show whether the copy is done
                log.debug("The answer to a store of request %s is an error", self.request_id, exc_info=True)
            self.failed = not self._answered and time.time() > self.until + GRACE_S
        return self._answered or self.failed

    def result(self, timeout: float | None = None) -> bool:
        """Whether it succeeded; False also if that is unknown."""
        if self.failed:
            return False
        try:
            return bool(self.future.result(timeout))
        except Exception:
            return False

    def wait(self, seconds: float) -> None:
        """Wait for the answer at most that long."""
        raw = getattr(self.future, "raw_future_", self.future)  # its own `wait` waits for the copy too, for ever
        try:
            answered = bool(raw.wait(seconds))
        except Exception:
            answered = True
        if answered and not self.query():
            time.sleep(seconds)

    @property
    def refused(self) -> bool:
        """Whether LMCache refused it before its deadline, as it does for a worker that it does not know."""
        raw = getattr(getattr(self.future, "raw_future_", None), "result_", None)
        return self._answered and raw is not None and tuple(raw) == (b"", False) and time.time() < self.until


class InFlightTransfers:
    """The stores that may still read blocks, and the loads that may still write to them.

    Args:
        adapter: LMCache's worker adapter.
        ended: Whether the server's process has ended, so that no block is in use any more.
        unknown: Called when LMCache does not know this worker.
    """

    def __init__(self, adapter: Any, ended: Callable[[], bool], unknown: Callable[[], None]) -> None:
        self._adapter, self._ended, self._unknown = adapter, ended, unknown
        self._transfers: list[Transfer] = []
        self._receipts: dict[str, int] = {}
        self._checked = 0.0
        self._warned = False
        self._store, self._preempt = adapter.submit_store_request, adapter.handle_preemptions
        self._load, self._register = adapter.submit_retrieve_request, adapter._send_register_kv_caches_request
        patch_object(SUBMIT_STORE, adapter, self._submit_store)
        patch_object(SUBMIT_RETRIEVE, adapter, self._submit_load)
        patch_object(HANDLE_PREEMPTIONS, adapter, self._wait_before_reuse)
        patch_object(REGISTER_KV_CACHES, adapter, self._register_kv_caches)

    def _submit_store(
        self,
        request_id: str,
        op: Any,
        event: Any,
        cache_salt: str = "",
        request_configs: dict[str, Any] | None = None,
    ) -> None:
        until = time.time() + STORE_S
        configs = {**(request_configs or {}), UNTIL: until}
        futures = self._adapter.store_futures
        before = futures.get(request_id)
        try:
            self._store(request_id, op, event, cache_salt=cache_salt, request_configs=configs)
        except Exception as problem:
            self._on_error(request_id, until, problem)
            if self._adapter.lazy_offload:  # LMCache waits for a receipt of each
                self._adapter._completed_store_requests[request_id] = 1
                self._adapter._failed_store_requests.add(request_id)
            return
        future = futures.get(request_id)
        if future is not None and future is not before:
            futures[request_id] = store = Transfer(request_id, future, until)
            self._transfers.append(store)

    def _submit_load(
        self,
        request_id: str,
        op: Any,
        event: Any,
        cache_salt: str = "",
        request_configs: dict[str, Any] | None = None,
    ) -> None:
        until = time.time() + STORE_S
        configs = {**(request_configs or {}), UNTIL: until}
        futures = self._adapter.retrieve_futures
        before = futures.get(request_id)
        try:
            self._load(request_id, op, event, cache_salt=cache_salt, request_configs=configs)
        except Exception as problem:
            self._on_error(request_id, until, problem)
            self._adapter.error_block_ids.update(op.flat_block_ids)  # as LMCache does where no server answers
            self._adapter._failed_request_ids.add(request_id)
            self._adapter._dropped_retrieves.add(request_id)
            return
        sent = futures.get(request_id)
        if sent is not None and sent is not before:
            load = Transfer(request_id, sent[0], until, loads=True)
            futures[request_id] = (load, *sent[1:])
            self._transfers.append(load)

    def _on_error(self, request_id: str, until: float, problem: Exception) -> None:
        """Count a transfer that raised an error as in flight: it may have been sent, and no answer will come."""
        from lmcache.v1.multiprocess.futures import MessagingFuture

        log.warning("LMCache could not store or load KV of request %s: %s", request_id, format_exception(problem))
        self._transfers.append(Transfer(request_id, MessagingFuture(), until))

    def _register_kv_caches(self, kv_caches: Any) -> None:
        self._register(kv_caches)
        context = getattr(self._adapter.transfer_ctx, "_engine_driven_context", None)
        if context is not None:  # it would keep the worker, and all its requests, waiting
            context.mq_timeout = min(context.mq_timeout, STORE_S)

    def requests_in_use(self) -> set[str]:
        """Requests whose blocks LMCache may still read, or write to."""
        over = [transfer for transfer in self._transfers if transfer.query()]
        if len(over) < len(self._transfers) and time.monotonic() - self._checked > _ENDED_POLL_S:
            self._checked = time.monotonic()
            if self._ended():
                for transfer in self._transfers:
                    transfer.failed = transfer.failed or not transfer.query()
                over = self._transfers
        self._transfers = [transfer for transfer in self._transfers if transfer not in over]
        self._report(over)
        return {transfer.request_id for transfer in self._transfers}

    def _report(self, over: list[Transfer]) -> None:
        failed = [transfer for transfer in over if transfer.failed]
        if failed and not self._warned:
            log.warning(
                "LMCache did not answer within %.0f s: %d transfers of KV (stores or loads) failed",
                STORE_S,
                len(failed),
            )
        if over:
            self._warned = bool(failed)
        if any(transfer.refused for transfer in over if not transfer.loads):
            self._unknown()

    def _wait_before_reuse(self, need_flush_before_forward: bool) -> None:
        """Wait until no block of a preempted request is in use: the step is going to write to them."""
        if need_flush_before_forward:
            while waited := self._of_preempted(self.requests_in_use()):
                waited[0].wait(_PAUSE_S)
            transfer = self._adapter.transfer_ctx
            if hasattr(transfer, "_inflight_stores") and hasattr(transfer, "_event_backend"):
                transfer._inflight_stores = []  # LMCache would wait for each again, up to `mq_timeout`
        self._preempt(need_flush_before_forward)

    def _of_preempted(self, in_use: set[str]) -> list[Transfer]:
        """All transfers except loads whose requests still wait for them: such a request keeps its blocks."""
        loading = {id(future) for future, *_ in self._adapter.retrieve_futures.values()}
        return [each for each in self._transfers if each.request_id in in_use and id(each) not in loading]

    def defer_receipts(self) -> None:
        """With lazy offload: keep receipts from LMCache's connector while their request's blocks are in use."""
        in_use = self.requests_in_use()
        receipts = Counter(self._receipts) + Counter(self._adapter._completed_store_requests)
        self._receipts = {name: receipts.pop(name) for name in in_use & set(receipts)}
        self._adapter._completed_store_requests = dict(receipts)
