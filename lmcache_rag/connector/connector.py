"""CacheBlendConnector: vLLM's side of an LMCache blend server.

vllm serve MODEL --kv-transfer-config '{"kv_connector": "CacheBlendConnector",
    "kv_connector_module_path": "lmcache_rag.connector.connector", "kv_role": "kv_both"}'
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator
from typing import Any

from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from lmcache_rag.connector import compat_lmcache, compat_vllm, metrics, renumbering
from lmcache_rag.connector.abandoned import Lookup
from lmcache_rag.connector.authorization import IngestKey
from lmcache_rag.connector.filed import FiledBlocks
from lmcache_rag.connector.forgetting import Forgetting
from lmcache_rag.connector.hot import HotChunks
from lmcache_rag.connector.hot_side import HotSide
from lmcache_rag.connector.identity import Adapters, identity
from lmcache_rag.connector.namespace import Namespaces
from lmcache_rag.connector.options import ConnectorOptions
from lmcache_rag.connector.request_state import is_embedded, unblended
from lmcache_rag.connector.request_validation import RequestValidation
from lmcache_rag.connector.scheduler_side import SchedulerSide
from lmcache_rag.connector.secret import find_secret
from lmcache_rag.connector.stats import BlendPromMetrics, BlendStats
from lmcache_rag.connector.told import BlendResults, Readiness
from lmcache_rag.connector.transfers import FencedBlocks, FinishedGate, FinishedOnce
from lmcache_rag.connector.worker import start_worker
from lmcache_rag.protocol import (
    ANSWER,
    FORGET,
    FORGOTTEN,
    INGEST,
    MAX_OFFLOAD_TOKENS,
    PREFIX,
    SELF_CHECK,
    SPANS,
    CannotBlend,
    Fallback,
    SelfCheck,
    Unsupported,
    accepted,
    complaints,
    ingests,
    joined,
    named_prefix,
    shown,
)

log = logging.getLogger("lmcache_rag")

compat_vllm.begin_texts_quickly()  # each API server imports this module, and only where the connector is in use
compat_vllm.validate_requests(RequestValidation.of)


class CacheBlendConnector(LMCacheMPConnector):  # type: ignore[misc]
    """LMCache's multiprocess connector, and blending on top where the model, the server and the GPU allow it."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        self._options = ConnectorOptions.read(vllm_config.kv_transfer_config.get_from_extra_config)
        secret = find_secret(self._options.secret_file)
        if not secret:  # nothing is blended then, see plugin.py
            log.warning("There is no secret: LMCache gets tokens by numbers that anybody can compute")
        renumbering.use_secret(secret)
        with compat_lmcache.may_be_absent(self._options.chunk_size) as absent:
            super().__init__(vllm_config, role, kv_cache_config)
        adapter = self.scheduler_adapter if role == KVConnectorRole.SCHEDULER else self.worker_adapter
        if absent:
            log.warning("LMCache does not answer: prompts are computed in full until it does")
            compat_lmcache.is_absent(adapter)
        self._why_not: Unsupported | None = Unsupported(CannotBlend.NOT_READY, "vLLM's workers have not reported yet")
        self._self_check: SelfCheck | None = None
        self._side: SchedulerSide | None = None
        self._worker: Any = None
        self._connector_stats = BlendStats()
        self._freed, self._stores = FinishedOnce(), FinishedGate()
        self._asked: set[str] = set()  # requests whose look-up by LMCache's own connector has no result that was used
        self._left: set[str] = set()  # requests that something raised for: vLLM computes them, nothing of them is kept
        self._taken: Any = None  # the workers' metadata that was taken last
        self._held = FencedBlocks()
        if role == KVConnectorRole.WORKER:
            parallel = adapter.parallel_strategy
            get = vllm_config.kv_transfer_config.get_from_extra_config
            address = compat_lmcache.address(get, parallel.vllm_worker_id, parallel.vllm_world_size)
            registration = compat_lmcache.Registration(adapter)
            self._in_flight = compat_lmcache.Stores(
                adapter, lambda: compat_lmcache.has_ended(address), registration.renew
            )
            compat_lmcache.bound(adapter)
        else:
            for client in adapter.req_clients.values():
                compat_lmcache.bound_client(client)
        if not self._enable_kv_events:  # whoever reads LMCache's events wants to read the prompts' own tokens
            compat_lmcache.renumber_tokens(adapter)
        if role == KVConnectorRole.SCHEDULER:
            compat_vllm.deliver_worker_meta_first()
            self._reports = compat_lmcache.LaterReports(self.scheduler_adapter)
            self._releases = compat_lmcache.LaterReleases(self.scheduler_adapter)
            chunk = compat_lmcache.chunk_tokens(self.scheduler_adapter)
            self._ingest_key = IngestKey.read(self._options.ingest_key_file)
            self._namespaces = Namespaces(
                identity(vllm_config, chunk), chunk, prefix_tokens=self._options.prefix_tokens, key=secret
            )
            self._adapters = Adapters()
            compat_lmcache.watch(self.scheduler_adapter, lambda: self._why_not is None)
            if self._options.chunk_size not in (0, chunk):
                log.warning(
                    "lmcache_rag.chunk_size is %d and LMCache's is %d: clients pad their prompts for the wrong one",
                    self._options.chunk_size,
                    chunk,
                )
            self._side = SchedulerSide(
                self._options,
                chunk,
                self._look_up,
                self._hide,
                count=self._count,
            )
            self._forgetting = Forgetting(
                self._hash_block, self._look_up, self._hide, self._side.abandon, self._options.lookup_deadline
            )

    # -- start ----------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Register the caches with LMCache, then see whether this worker can blend."""
        with compat_lmcache.registering(self.worker_adapter, may_fail=self._options.chunk_size > 0) as failed:
            super().register_kv_caches(kv_caches)
        absent = bool(failed)
        found = start_worker(self._vllm_config, self.worker_adapter, self._options, absent=absent)
        self._worker, self._why_not, self._self_check = found
        compat_lmcache.ensure_heartbeat(self.worker_adapter)
        if self._why_not is not None:
            log.warning("KV is not blended: %s. Exact prefixes are reused, everything else is computed.", self._why_not)
        else:
            log.info("KV is blended: policy %s, ratio %g", self._options.policy, self._options.ratio)

    def get_handshake_metadata(self) -> Readiness | None:
        """Worker: tell the scheduler whether blending is possible."""
        return Readiness(self._why_not, self._self_check)

    def set_xfer_handshake_metadata(self, metadata: Any) -> None:
        """Scheduler: what the workers said."""
        reports = [item for item in metadata.values() if isinstance(item, Readiness)]
        nothing = Unsupported(CannotBlend.NO_WORKER, "no worker of vLLM reported whether it can blend")
        reasons = [item.why_not for item in reports if item.why_not is not None]
        self._why_not = reasons[0] if reasons else None if reports else nothing
        self._self_check = max((item.self_check for item in reports if item.self_check), default=None)  # "skipped"

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Any) -> None:
        """Scheduler: what the workers said."""
        self.set_xfer_handshake_metadata(metadata)

    def _get_or_create_request_tracker(self, request: Any) -> Any:
        before = self.request_trackers.get(request.request_id)
        try:
            tracker = super()._get_or_create_request_tracker(request)
        except Exception as problem:
            self._leave(request.request_id, problem)
            tracker = self.request_trackers[request.request_id] = compat_lmcache.plain_tracker(request)
        if tracker is not before:
            tracker.request_configs, tracker.max_offload_tokens = None, 0
            with self._surviving(request.request_id):
                tracker.cache_salt = self._namespaces.of(
                    request.prompt_token_ids or (),
                    request.cache_salt or "",
                    request.kv_transfer_params,
                    adapter=self._adapters.of(getattr(request, "lora_request", None)),
                )
                if is_embedded(request):
                    compat_lmcache.keep_out(tracker)
                else:
                    tracker.request_configs, tracker.max_offload_tokens = self._settings(request)
        return tracker

    def _settings(self, request: Any) -> tuple[dict[str, Any] | None, int | None]:
        """What LMCache is told with each key of a request, and how many of its tokens are stored at most."""
        params: dict[str, Any] = request.kv_transfer_params or {}
        configs = {MAX_OFFLOAD_TOKENS: params[MAX_OFFLOAD_TOKENS]} if MAX_OFFLOAD_TOKENS in params else {}
        forgets = self._forgetting.asks(request.request_id)
        if forgets:
            configs |= {FORGET: True, PREFIX: named_prefix(params, len(request.prompt_token_ids))}
        elif ingests(params):
            configs[INGEST] = True
        kept = ingests(params) or self._options.store == "all"
        if forgets or not kept or request.request_id in self._left:
            return configs or None, 0
        return configs or None, params.get(MAX_OFFLOAD_TOKENS)

    # -- requests that something raises for ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def _surviving(self, request_id: str) -> Iterator[None]:
        """Whatever is raised in here: the engine and its other requests go on, and so does this one, without us."""
        try:
            yield
        except Exception as problem:
            self._leave(request_id, problem)

    def _leave(self, request_id: str, problem: Exception) -> None:
        if request_id not in self._left:
            self._left.add(request_id)
            where = "".join(
                traceback.format_tb(problem.__traceback__)
            )  # without the message: a client may have made it
            kind, words = type(problem).__name__, shown(str(problem))
            log.error(
                "request %s is computed in full, and its KV is not stored: %s %s\n%s",
                shown(request_id),
                kind,
                words,
                where,
            )
        if tracker := self.request_trackers.get(request_id):
            tracker.max_offload_tokens = 0
        if self._side is not None:
            try:
                self._side.drop(request_id)
            except Exception:
                log.exception("request %s: what it held could not be let go", shown(request_id))

    # -- scheduler ------------------------------------------------------------------------------------------------

    def _look_up(self, request: Any) -> Lookup | None:
        if not self.scheduler_adapter.is_healthy:
            return None
        tracker = self._get_or_create_request_tracker(request)
        return compat_lmcache.BlendLookup(
            self.scheduler_adapter,
            request.request_id,
            list(request.prompt_token_ids),
            tracker.cache_salt,
            tracker.request_configs,
        )

    def _hide(self, request: Any, first_token: int) -> None:
        compat_vllm.hide_from_prefix_cache(request, first_token, self._hash_block())

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Scheduler: vLLM's own blocks, for hot chunks."""
        super().bind_gpu_block_pool(gpu_block_pool)
        self._held.pool = gpu_block_pool
        block = self._hash_block()
        if self._side is None or not getattr(gpu_block_pool, "enable_caching", False):
            return
        pool = compat_vllm.CachedBlocks(gpu_block_pool)
        self._side.filed = FiledBlocks(pool, block)
        self._forgetting.pool = pool
        compat_vllm.watch_filed_blocks(gpu_block_pool, self._side.filed.add)
        if self._options.hot:
            chunks = HotChunks(pool, block, filed=self._side.filed, remembered=len(pool.blocks) * block)
            self._side.hot, self._forgetting.chunks = HotSide(chunks), chunks

    def _hash_block(self) -> int:
        size = getattr(self._gpu_block_pool, "hash_block_size", None) or self._vllm_config.cache_config.block_size
        return int(size)

    def on_new_request(self, request: Any) -> None:
        """See that its parameters are ones that we, LMCache and vLLM's scheduler can read; look it up at once."""
        name, side = request.request_id, self._side
        params, request.kv_transfer_params = request.kv_transfer_params, None
        if side is None:
            return
        with self._surviving(name):
            prompt = request.prompt_token_ids or ()
            if self._ingest_key is not None:
                params = self._ingest_key.permitted(params, request.prompt_token_ids)
            if wrong := complaints(params, len(prompt)):  # the API server refuses what is; this came another way
                log.warning("request %s is neither blended nor stored: %s", shown(name), joined(wrong))
                request.kv_transfer_params = {MAX_OFFLOAD_TOKENS: 0}
                side.leave_out(request, Fallback.REQUEST_ERROR)
                return
            request.kv_transfer_params = accepted(params, len(prompt), self._hash_block()) or None
            if self._forgetting.arrived(request):
                side.leave_out(request)
            elif not self._why_not and not getattr(request, "resumable", False):
                side.arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Claim the exact prefix, and after it everything up to the last cached chunk."""
        if request.request_id not in self._left:
            with self._surviving(request.request_id):
                return self._matched(request, num_computed_tokens)
        self._get_or_create_request_tracker(request)
        return 0, False

    def _matched(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        side, tracker = self._side, self._get_or_create_request_tracker(request)
        forgets = self._forgetting.asks(request.request_id)
        if forgets and not self._forgetting.done(request):
            return None, False
        if not forgets and not is_embedded(request) and (side is None or self._why_not):
            self._asked.add(request.request_id)
            matched: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
            return matched
        align = self._hit_alignment_tokens
        tracker.num_vllm_hit_tokens = num_computed_tokens // align * align
        if side is None or (self._why_not and not forgets) or request.request_id in self._left:
            return 0, False
        more = side.matched(request, num_computed_tokens)
        if more is None:
            return None, False
        tracker.num_stored_tokens = max(tracker.num_stored_tokens, side.stored(request))
        limit = side.store_limit(request.request_id)
        if limit is not None:
            asked = tracker.max_offload_tokens
            tracker.max_offload_tokens = limit if asked is None else min(asked, limit)
        return more, side.in_background(request.request_id) and more > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan what was claimed."""
        own: list[int] = list((blocks.get_block_ids() or ([],))[0])
        with self._surviving(request.request_id):
            if request.request_id in self._asked:
                hits = self._get_request_tracker(request.request_id).num_lmcache_hit_tokens
                if hits or num_external_tokens or self.scheduler_adapter.is_healthy:
                    self._asked.discard(request.request_id)  # else LMCache's connector did not wait for the result
            super().update_state_after_alloc(request, blocks, num_external_tokens)
            if self._side is not None and not self._why_not:
                tracker = self._get_request_tracker(request.request_id)
                if num_external_tokens > 0:  # what is claimed is not scheduled, and is to be stored like what is
                    tracker.num_lmcache_hit_tokens = self._side.claimed(request.request_id)
                self._side.allocated(
                    request, own, num_external_tokens, tracker.request_configs, salt=tracker.cache_salt
                )
        if (
            num_external_tokens > 0
            and self._side is not None
            and request.request_id in self._left
            and not self._why_not
        ):
            self._side.compute(request, own, num_external_tokens)  # vLLM counts it as computed: it has to be

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """LMCache's metadata of this step, with our plans."""
        loads = compat_lmcache.to_be_loaded(self.request_trackers.values()) if self._why_not else []
        try:
            meta = super().build_connector_meta(scheduler_output)
        except Exception:
            log.exception("LMCache's metadata of a step could not be made: KV of its requests is not stored")
            meta = compat_lmcache.empty_step(loads)
            for request_id in scheduler_output.num_scheduled_tokens:
                if tracker := self.request_trackers.get(request_id):  # which blocks it has may not have been noted
                    tracker.max_offload_tokens = 0
        if self._side is not None:
            meta.blend_plans, meta.blend_allowance = self._side.plans(scheduler_output.num_scheduled_tokens)
            self._releases.send()
        return meta

    def take_worker_meta(self, meta: Any) -> None:
        """What the workers did, before vLLM finishes requests; see compat_vllm.deliver_worker_meta_first.

        Taken once: `update_connector_output` brings the same again. Inside another connector it is the only one to.
        """
        if meta is self._taken:
            return
        self._taken = meta
        if isinstance(meta, BlendResults) and self._side is not None:
            for result in meta.results:
                if result.failure and (tracker := self.request_trackers.get(result.request_id)):
                    tracker.num_lmcache_hit_tokens = 0  # vLLM may be going to compute it once more, piece by piece
            self._side.take(meta.results)
            for request_id, blocks in meta.late:
                self._held.add(request_id, blocks)
            for request_id in meta.over:
                self._held.release(request_id)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Hand the reuse statistics to the response."""
        name, statistics = request.request_id, None
        with self._surviving(name):
            statistics = self._statistics(request)
        later, params = True, None  # vLLM keeps the blocks until the workers say that they read them no more
        with self._surviving(name):
            self._reports.tell()
            if name in self._asked:
                self._asked.discard(name)
                self._releases.unused(name, self.request_trackers[name])
            with contextlib.ExitStack() as stack:
                if self._side is not None and self._side.listens(name):
                    stack.enter_context(compat_lmcache.session_goes_on(self.scheduler_adapter, name))
                later, params = super().request_finished(request, block_ids)
        self.request_trackers.pop(name, None)  # gone, unless something raised
        if name in self._left:
            self._left.discard(name)
            with contextlib.suppress(Exception):
                if self._side is not None:
                    self._side.ended(name)
        if later:
            self._freed.ends(name)
        if statistics is not None:
            params = {**(params or {}), ANSWER: statistics}
            log.debug("request %s: %s", name, statistics)
        return later, params

    def _statistics(self, request: Any) -> dict[str, Any] | None:
        statistics = self._side.finished(request) if self._side is not None else None
        if self._why_not:
            statistics = self._count_unblended(request)
        elif statistics is not None and self._self_check is not None:
            statistics[SELF_CHECK] = str(self._self_check)
        if self._forgetting.asks(request.request_id):
            forgotten = self._forgetting.finished(request.request_id)
            statistics = {**statistics, FORGOTTEN: forgotten} if statistics is not None else None
        return statistics

    def update_connector_output(self, connector_output: Any) -> None:
        """Scheduler: what the workers are done with; see lmcache_rag.connector.transfers."""
        meta = connector_output.kv_connector_worker_meta
        self.take_worker_meta(meta)
        if isinstance(meta, BlendResults):  # the rest is for LMCache's connector
            connector_output.kv_connector_worker_meta = meta.lmcache
        super().update_connector_output(connector_output)
        loaded, stored = connector_output.finished_recving or (), connector_output.finished_sending or ()
        connector_output.finished_sending = self._freed.stored(loaded, stored)

    def has_pending_push_work(self) -> bool:
        """Whether the engine has to go on without requests: for look-ups that nobody waits for any more."""
        if self._side is not None and (self._side.unheard or self._releases.waiting):
            return True
        return bool(super().has_pending_push_work())

    def _count(self, statistics: dict[str, Any]) -> None:
        self._connector_stats.records.append(metrics.record(statistics))

    def _count_unblended(self, request: Any) -> dict[str, Any] | None:
        tracker = self.request_trackers.get(request.request_id)
        if self._why_not is None or tracker is None or not tracker.num_scheduled_tokens:
            return None  # it never ran
        prompt = len(request.prompt_token_ids or ())
        cached = max(tracker.num_vllm_hit_tokens, tracker.num_lmcache_hit_tokens)
        self._connector_stats.records.append(metrics.unblended(prompt, cached))
        spans = (request.kv_transfer_params or {}).get(SPANS) is True
        return unblended(prompt, cached, self._options.policy, self._options.ratio, self._why_not, spans=spans)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> BlendStats:
        """What the API server's log makes of the data that we send."""
        return BlendStats(data={key: list(value) for key, value in (data or {}).items()})  # others read `data` too

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> BlendPromMetrics:
        """Our counters on vLLM's /metrics."""
        return BlendPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- worker ---------------------------------------------------------------------------------------------------

    def begin_step(self, meta: Any) -> None:
        """What must be done within this step, before vLLM prepares it; see compat_vllm.begin_before_the_step."""
        plans = getattr(meta, "blend_plans", None)
        # LMCache may have to read blocks first that were taken from a preempted request.
        if self._worker is not None and plans and not getattr(meta, "need_flush_before_forward", False):
            now = [plan for plan in plans if not plan.background]
            meta.blend_plans = [plan for plan in plans if plan.background]
            self._worker.run_now(now)
            self._offer_hidden_state()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """LMCache's own loads, then this step's blends."""
        super().start_load_kv(forward_context, **kwargs)
        meta = self._get_connector_metadata()
        if self._worker is not None and hasattr(meta, "blend_plans"):
            self._worker.run(meta.blend_plans, meta.blend_allowance)
            self._offer_hidden_state()

    def _offer_hidden_state(self) -> None:
        hidden = self._worker.take_hidden()
        if hidden is not None:  # None would take back what was offered earlier in the step
            compat_vllm.offer_hidden_state(hidden)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """What LMCache's transfers are done with; see lmcache_rag.connector.transfers."""
        stored, loaded = super().get_finished(finished_req_ids)
        receiving: set[str] = set()
        if self._worker is not None:
            self._worker.cancel(finished_req_ids)
            self._worker.finish()
            loaded, receiving = set(loaded or ()) | self._worker.take_received(), self._worker.receiving
        in_use = compat_lmcache.loading(self.worker_adapter) | receiving | self._in_flight.look()
        return self._stores.report(stored or (), in_use), loaded

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that vLLM has to compute again; called behind get_finished."""
        blocks: set[int] = super().get_block_ids_with_load_errors()
        if self._worker is not None:
            blocks = blocks | self._worker.take_bad_blocks()
        return blocks

    def build_connector_worker_meta(self) -> Any:
        """What this worker did in this step."""
        self._in_flight.hold_receipts()
        meta = BlendResults(lmcache=super().build_connector_worker_meta())
        if self._worker is not None:
            meta.results, (late, meta.over) = self._worker.take_results(), self._worker.take_timed_out()
            meta.late = list(late.items())
        return meta if meta.results or meta.late or meta.over or meta.lmcache else None
