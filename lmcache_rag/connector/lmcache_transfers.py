"""A worker's loads and stores.

A worker's stores: LMCache reads a request's blocks for them, and nobody else may be given these meanwhile.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmcache_rag.connector.lmcache_client import handshake, has_ended, is_absent, said, same_chunks, to_lmcache
from lmcache_rag.connector.metadata import BlendPlan, Match
from lmcache_rag.protocol import UNTIL, CannotBlend, Unsupported

log = logging.getLogger("lmcache_rag")


# -- loads -------------------------------------------------------------------------------------------------------------


_BACKLOG_S = 30.0  # a server that is back does what was asked before within so long
_HAND_OVER_S = 0.0005
_COPY_POLL_S = 0.0001  # between two looks at whether a copy is done


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

    def why_not(self) -> Unsupported | None:
        """Why the server cannot blend; None when it can."""
        transfer = self._adapter.transfer_ctx
        devices = {cache.device.type for cache in self._adapter.kv_caches.values()}
        ready = getattr(transfer, "_event_backend", None) is not None
        if not ready and (self._asked or devices != {"cuda"} or not hasattr(transfer, "_event_backend")):
            detail = "blending needs CUDA: this transfer mode has no device events"
            return Unsupported(CannotBlend.NEEDS_CUDA, detail)
        reason = handshake(self._adapter.req_client, self._deadline) if self._asked else ""
        if not reason or self._hangs():
            return None
        return Unsupported(CannotBlend.LMCACHE_HANDSHAKE, reason)

    def _hangs(self) -> bool:
        """Whether it does not answer anything: then it is asked again when it does."""
        if same_chunks(self._adapter, self._adapter.req_client):
            return False
        self._asked = False
        is_absent(self._adapter)
        return True

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
            if not self._hangs():
                return f"the LMCache server did not take the rotary table: {said(problem)}"
        again = self._adapter._reregister_kv_caches_callback

        def both() -> bool:
            if not same_chunks(self._adapter, self._adapter.req_client) or not again():
                return False
            if not self._asked:
                lacks = handshake(self._adapter.req_client, self._deadline)
                if lacks and not same_chunks(self._adapter, self._adapter.req_client):
                    return False
                self._asked, self._lacks = True, lacks
            if self._lacks:
                log.warning("KV is not blended: %s", self._lacks)
                return True  # it has exact prefixes
            try:
                self._send_rope()
            except Exception as problem:
                log.warning("The LMCache server is back but did not take the rotary table: %s", said(problem))
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
        return has_ended(self._address)

    def submit_exact(self, plan: BlendPlan) -> Any:
        """Ask for the exact prefix [plan.local, plan.exact); what lies before it in its chunk is left alone.

        The server only knows whole chunks: a prefix that was cut short by a token is loaded to its chunk's end.

        Returns:
            What `answered`, `there` and `arrived` ask; None when it could not even be sent.
        """
        return self._sent(lambda: self._submit_exact(plan))

    def give_back(self, plan: BlendPlan) -> None:
        """Have the server give back the read locks of an exact prefix that is not loaded, when it answers again.

        A load without blocks, after its deadline: the server refuses it, and unlocks what it would have read.
        """
        self._sent(lambda: self._submit_exact(plan, refused=True))

    def _submit_exact(self, plan: BlendPlan, *, refused: bool = False) -> Any:
        chunk = self._adapter.lmcache_tokens_per_chunk
        begin = plan.local // chunk * chunk
        end = -(-plan.exact // chunk) * chunk
        # The server hashes up to there. It compares the tokens with the look-up's only where it does not know this
        # worker any more: then the locks end by themselves.
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

    def _key(self, plan: BlendPlan, tokens: Sequence[int], start: int, end: int, *, until: float | None = None) -> Any:
        configs = {**(plan.configs or {}), UNTIL: time.time() + self._deadline if until is None else until}
        return self._adapter._create_key(to_lmcache(tokens), start, end, plan.request_id, plan.cache_salt, configs)

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
        """Whether the KV came, waiting at most that long.

        The host waits for the copy. Were it left to the stream (`wait_on_stream`), a server that is killed in the
        middle of a copy would never signal its event, and the stream, with vLLM's work on it, would stand still.
        """
        until = time.perf_counter() + seconds
        if future is None or not self.answered(future, seconds):
            return False
        try:
            while not future.query():
                if time.perf_counter() >= until:
                    return False
                time.sleep(_COPY_POLL_S)
            came = bool(future.result(0.0))
        except Exception as problem:
            self._tell(problem)
            return False
        self._told = self._told and not came
        return came

    def _sent(self, ask: Callable[[], Any]) -> Any:
        try:
            future = ask()
        except Exception as problem:
            self._tell(problem)
            return None
        # A thread of LMCache's client sends it, and for that needs the GIL. This one, with Python to run until it waits
        # for the KV, would keep it for up to 5 ms (sys.getswitchinterval) with each message.
        time.sleep(_HAND_OVER_S)
        return future

    def _tell(self, problem: Exception) -> None:
        if not self._told:
            self._told = True
            log.warning("KV could not be loaded from LMCache: %s", said(problem), exc_info=problem)


# -- stores ------------------------------------------------------------------------------------------------------------


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
