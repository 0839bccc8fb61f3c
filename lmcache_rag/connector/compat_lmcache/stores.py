"""A worker's stores: LMCache reads a request's blocks for them, and nobody else may be given these meanwhile.

Likewise the loads of LMCache's own connector, of exact prefixes: LMCache writes to a request's blocks.

LMCache's adapter keeps one answer for each request, so a prompt that is stored in two parts counts as stored after the
first, and it forgets all answers when a heartbeat fails: vLLM gives the blocks to others, and LMCache stores what these
write there under the first one's name. So each store has a time until which LMCache may begin it (checked in LMCache
itself, see lmcache_rag.connector.server_guard), and it is over when it is answered, or some time after that.

Without device handles (vLLM for CPUs) the worker itself copies, and asks LMCache before and after: it waits for each
answer, and with shared memory an answer that does not come is an error, which would end vLLM.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lmcache_rag.connector.compat_lmcache.server import said
from lmcache_rag.protocol import UNTIL

log = logging.getLogger("lmcache_rag")

STORE_S = 5.0  # LMCache may begin a store, or a load, that long after it was sent
GRACE_S = 1.0  # what it began in time has been read by then
_LOOK_S = 0.5  # between two looks at whether its process has ended
_PAUSE_S = 0.05


@dataclass(eq=False)
class Store:
    """A store, or a load, that was sent. It takes the place of its future in LMCache's adapter.

    Attributes:
        request_id: Whose blocks it reads.
        future: LMCache's answer to come.
        until: When LMCache refuses to begin it, by time.time().
        loads: Whether it is a load, and writes to them.
        failed: Whether it is over and was not answered.
    """

    request_id: str
    future: Any
    until: float
    loads: bool = False
    failed: bool = False
    _answered: bool = field(default=False, repr=False)

    def query(self) -> bool:
        """Whether the blocks are not read any more."""
        if not self._answered and not self.failed:
            try:
                self._answered = bool(self.future.query())
            except Exception:  # an answer that cannot be read says nothing of the copy
                log.debug("The answer to a store of request %s is an error", self.request_id, exc_info=True)
            self.failed = not self._answered and time.time() > self.until + GRACE_S
        return self._answered or self.failed

    def result(self, timeout: float | None = None) -> bool:
        """Whether it was stored; False as well where that is not known."""
        if self.failed:
            return False
        try:
            return bool(self.future.result(timeout))
        except Exception:
            return False

    def wait(self, seconds: float) -> None:
        """Wait for the answer at most that long."""
        raw = getattr(self.future, "raw_future_", self.future)  # its own `wait` waits for the copy as well, for ever
        try:
            answered = bool(raw.wait(seconds))
        except Exception:
            answered = True
        if answered and not self.query():
            time.sleep(seconds)

    @property
    def refused(self) -> bool:
        """Whether LMCache refused it in time: it answers so to a worker that it does not know."""
        raw = getattr(getattr(self.future, "raw_future_", None), "result_", None)
        return self._answered and raw is not None and tuple(raw) == (b"", False) and time.time() < self.until


class Stores:
    """The stores that may still read blocks, and the loads that may still write to them.

    Patches, on LMCache's worker adapter: submit_store_request and submit_retrieve_request (a deadline in the key, the
    future replaced, and errors caught), handle_preemptions (one deadline for all, also while the server is not
    healthy), _send_register_kv_caches_request (the engine-driven context's timeout).

    Args:
        adapter: LMCache's worker adapter.
        ended: Whether the process that was asked has ended, so that nothing is read any more.
        unknown: Called when LMCache does not know this worker.
    """

    def __init__(self, adapter: Any, ended: Callable[[], bool], unknown: Callable[[], None]) -> None:
        self._adapter, self._ended, self._unknown = adapter, ended, unknown
        self._under_way: list[Store] = []
        self._receipts: dict[str, int] = {}
        self._looked = 0.0
        self._warned = False
        self._submit, self._preempted = adapter.submit_store_request, adapter.handle_preemptions
        self._load, self._register = adapter.submit_retrieve_request, adapter._send_register_kv_caches_request
        adapter.submit_store_request = self._submitted
        adapter.submit_retrieve_request = self._loaded
        adapter.handle_preemptions = self._before_reuse
        adapter._send_register_kv_caches_request = self._registered

    def _submitted(
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
            self._submit(request_id, op, event, cache_salt=cache_salt, request_configs=configs)
        except Exception as problem:
            self._raised(request_id, until, problem)
            if self._adapter.lazy_offload:  # LMCache waits for a receipt of each
                self._adapter._completed_store_requests[request_id] = 1
                self._adapter._failed_store_requests.add(request_id)
            return
        future = futures.get(request_id)
        if future is not None and future is not before:
            futures[request_id] = store = Store(request_id, future, until)
            self._under_way.append(store)

    def _loaded(
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
            self._raised(request_id, until, problem)
            self._adapter.error_block_ids.update(op.flat_block_ids)  # as LMCache does where no server answers
            self._adapter._failed_request_ids.add(request_id)
            self._adapter._dropped_retrieves.add(request_id)
            return
        sent = futures.get(request_id)
        if sent is not None and sent is not before:
            load = Store(request_id, sent[0], until, loads=True)
            futures[request_id] = (load, *sent[1:])
            self._under_way.append(load)

    def _raised(self, request_id: str, until: float, problem: Exception) -> None:
        """It may have been sent all the same: no answer will come."""
        from lmcache.v1.multiprocess.futures import MessagingFuture

        log.warning("LMCache could not store or load KV of request %s: %s", request_id, said(problem))
        self._under_way.append(Store(request_id, MessagingFuture(), until))

    def _registered(self, kv_caches: Any) -> None:
        self._register(kv_caches)
        context = getattr(self._adapter.transfer_ctx, "_engine_driven_context", None)
        if context is not None:  # it makes the worker, with all its requests, wait
            context.mq_timeout = min(context.mq_timeout, STORE_S)

    def look(self) -> set[str]:
        """Requests whose blocks LMCache may still read."""
        over = [store for store in self._under_way if store.query()]
        if len(over) < len(self._under_way) and time.monotonic() - self._looked > _LOOK_S:
            self._looked = time.monotonic()
            if self._ended():
                for store in self._under_way:
                    store.failed = store.failed or not store.query()
                over = self._under_way
        self._under_way = [store for store in self._under_way if store not in over]
        self._say(over)
        return {store.request_id for store in self._under_way}

    def _say(self, over: list[Store]) -> None:
        failed = [store for store in over if store.failed]
        if failed and not self._warned:
            log.warning(
                "LMCache did not answer within %.0f s: the KV of %d prompts is not stored or loaded",
                STORE_S,
                len(failed),
            )
        if over:
            self._warned = bool(failed)
        if any(store.refused for store in over if not store.loads):
            self._unknown()

    def _before_reuse(self, need_flush_before_forward: bool) -> None:
        """Blocks were taken from a request and are going to be written to: wait until they are not read any more."""
        if need_flush_before_forward:
            while waited := self._left(self.look()):
                waited[0].wait(_PAUSE_S)
            transfer = self._adapter.transfer_ctx
            if hasattr(transfer, "_inflight_stores") and hasattr(transfer, "_event_backend"):
                transfer._inflight_stores = []  # it would wait for each anew, and for `mq_timeout`
        self._preempted(need_flush_before_forward)

    def _left(self, reading: set[str]) -> list[Store]:
        """Those but the loads that their requests still wait for: such a request has not lost its blocks."""
        loading = {id(future) for future, *_ in self._adapter.retrieve_futures.values()}
        return [each for each in self._under_way if each.request_id in reading and id(each) not in loading]

    def hold_receipts(self) -> None:
        """With lazy offload: keep receipts from LMCache's connector while their request's blocks are read."""
        reading = self.look()
        receipts = Counter(self._receipts) + Counter(self._adapter._completed_store_requests)
        self._receipts = {name: receipts.pop(name) for name in reading & set(receipts)}
        self._adapter._completed_store_requests = dict(receipts)
