"""CacheBlendConnector: the vLLM connector for an LMCache blend server.

vllm serve MODEL --kv-transfer-config '{"kv_connector": "CacheBlendConnector",
    "kv_connector_module_path": "lmcache_rag.connector.connector", "kv_role": "kv_both"}'

It only delegates: to BlendScheduler in the scheduler's process, to BlendWorker in a worker's, and to LMCache's own
connector, of which it is a subclass.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from lmcache_rag.connector import cache_salt, lmcache_client, lmcache_transfers, vllm_patches
from lmcache_rag.connector.authorization import IngestKey, RequestValidation
from lmcache_rag.connector.cache_salt import CacheSalts
from lmcache_rag.connector.config import ConnectorOptions
from lmcache_rag.connector.early_lookup import EarlyLookups
from lmcache_rag.connector.gpu_chunks import PrefixCache
from lmcache_rag.connector.identity import facts, identity
from lmcache_rag.connector.lookup import SchedulerClient
from lmcache_rag.connector.metadata import NOT_READY, BlendHandshakeMetadata, BlendWorkerMetadata
from lmcache_rag.connector.metrics import BlendPromMetrics, BlendStats
from lmcache_rag.connector.scheduler import BlendScheduler
from lmcache_rag.connector.second_use import SecondUse
from lmcache_rag.connector.secret import find_secret
from lmcache_rag.connector.transfers import FinishedGate
from lmcache_rag.connector.worker import start_worker
from lmcache_rag.costs import CostModel
from lmcache_rag.protocol import ANSWER

log = logging.getLogger("lmcache_rag")

vllm_patches.patch_detokenizer_start()  # each API server imports this module, and only where the connector is in use
vllm_patches.patch_request_validation(RequestValidation.of)


class CacheBlendConnector(LMCacheMPConnector):  # type: ignore[misc]
    """LMCache's multiprocess connector, and blending on top where the model, the server and the GPU allow it."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        self._options = ConnectorOptions.read(vllm_config.kv_transfer_config.get_from_extra_config)
        secret = find_secret(self._options.secret_file)
        if not secret:  # nothing is blended then, see plugin.py
            log.warning(
                "There is no secret, so KV is not blended: LMCache gets token ids by a mapping that anyone can compute"
            )
        cache_salt.use_secret(secret)
        with lmcache_client.allow_missing_server(self._options.chunk_size) as absent:
            super().__init__(vllm_config, role, kv_cache_config)
        adapter = self.scheduler_adapter if role == KVConnectorRole.SCHEDULER else self.worker_adapter
        if absent:
            log.warning("LMCache does not answer: prompts are computed in full until it does")
            lmcache_client.mark_unhealthy(adapter)
        if not self._enable_kv_events:  # consumers of LMCache's events expect the prompts' own tokens
            lmcache_client.renumber_tokens(adapter)
        self._connector_stats = BlendStats()
        if role == KVConnectorRole.SCHEDULER:
            self._init_scheduler(vllm_config, secret)
        else:
            self._init_worker(vllm_config)

    def _init_scheduler(self, vllm_config: Any, secret: bytes) -> None:
        adapter, options = self.scheduler_adapter, self._options
        for client in adapter.req_clients.values():
            lmcache_client.bound_client(client)
        vllm_patches.patch_update_from_output()
        chunk = lmcache_client.chunk_tokens(adapter)
        if options.chunk_size not in (0, chunk):
            log.warning(
                "Clients pad to %d tokens, LMCache stores %d: set lmcache_rag.chunk_size to LMCache's",
                options.chunk_size,
                chunk,
            )
        self._facts = [facts(vllm_config, chunk, secret, options.prefix_tokens)]
        salts = CacheSalts(identity(vllm_config, chunk), chunk, prefix_tokens=options.prefix_tokens, key=secret)
        block = vllm_config.cache_config.block_size
        second_use = SecondUse(chunk, block) if options.store == "second" else None
        self._client = SchedulerClient(adapter, self.request_trackers, salts, options, second_use=second_use)
        prefix_cache, ingest_key = (
            PrefixCache(vllm_config.cache_config.block_size),
            IngestKey.read(options.ingest_key_file),
        )
        self._scheduler = BlendScheduler(
            options,
            chunk,
            self._client,
            prefix_cache,
            ingest_key=ingest_key,
            alignment=self._hit_alignment_tokens,
            costs=CostModel(vllm_config.scheduler_config.max_num_batched_tokens),
            slots=getattr(vllm_config.lora_config, "max_loras", 0),
        )
        self.early_lookups = EarlyLookups(self._scheduler, self._client, chunk, prefix_cache, ingest_key)
        vllm_patches.patch_preprocess_add_request()
        if vllm_config.lora_config is not None:
            vllm_patches.patch_add_lora()
        lmcache_client.watch_server(adapter, self._scheduler.can_blend)

    def _init_worker(self, vllm_config: Any) -> None:
        adapter = self.worker_adapter
        parallel, get = adapter.parallel_strategy, vllm_config.kv_transfer_config.get_from_extra_config
        address = lmcache_client.server_address(get, parallel.vllm_worker_id, parallel.vllm_world_size)
        registration = lmcache_client.Registration(adapter)
        self._in_flight = lmcache_transfers.InFlightTransfers(
            adapter, partial(lmcache_client.server_has_ended, address), registration.renew
        )
        lmcache_client.bound_memory(adapter)
        self._stores = FinishedGate()
        self._handshake = BlendHandshakeMetadata(NOT_READY)
        self._worker: Any = None

    # -- start --------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Worker: register the caches with LMCache, then find out whether this worker can blend."""
        with lmcache_client.allow_failed_registration(
            self.worker_adapter, may_fail=self._options.chunk_size > 0
        ) as failed:
            super().register_kv_caches(kv_caches)
        found = start_worker(self._vllm_config, self.worker_adapter, self._options, absent=bool(failed))
        self._worker = found.worker
        self._handshake = BlendHandshakeMetadata(
            found.unsupported_reason, found.self_check, found.costs, found.costs_file
        )
        lmcache_client.start_heartbeat(self.worker_adapter)
        if found.unsupported_reason is not None:
            log.warning(
                "KV is not blended: %s. Exact prefixes are reused, everything else is computed.",
                found.unsupported_reason,
            )
        else:
            log.info("KV is blended: policy %s, ratio %s", self._options.policy, self._options.budget)

    def get_handshake_metadata(self) -> BlendHandshakeMetadata:
        """Worker: report to the scheduler whether blending is possible."""
        return self._handshake

    def set_xfer_handshake_metadata(self, metadata: Any) -> None:
        """Scheduler: take what the workers report."""
        self._scheduler.set_handshake_metadata(metadata)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Any) -> None:
        """Scheduler: take what the workers report."""
        self._scheduler.set_handshake_metadata(metadata)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Scheduler: use vLLM's own blocks, for resident chunks."""
        super().bind_gpu_block_pool(gpu_block_pool)
        self._scheduler.bind_gpu_block_pool(gpu_block_pool)

    # -- scheduler ----------------------------------------------------------------------------------------------------

    def _get_or_create_request_tracker(self, request: Any) -> Any:
        name = request.request_id
        before = self.request_trackers.get(name)
        try:
            tracker = super()._get_or_create_request_tracker(request)
        except Exception as error:
            self._scheduler.fail(name, error)
            tracker = self._client.plain_tracker(request)
        if tracker is not before:
            tracker.request_configs, tracker.max_offload_tokens = None, 0  # until all is known
            with self._scheduler.contain_errors(name):
                self._client.configure(tracker, request, store=not self._scheduler.has_failed(name))
        return tracker

    def on_new_request(self, request: Any) -> None:
        """Check a request's parameters, and start its look-up, or take the one that was sent."""
        with self.early_lookups.taken(request.request_id) as sent:
            if self._scheduler.on_new_request(request):
                tracker = self._get_or_create_request_tracker(request)
                if not (same := self._client.offer(sent, tracker)):
                    self.early_lookups.abort(sent)
                self._scheduler.start_early(request, sent=same)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Claim the exact prefix, and after it everything up to the last cached chunk."""
        tracker = self._get_or_create_request_tracker(request)
        with self._scheduler.contain_errors(request.request_id):
            if self._scheduler.uses_stock_connector(request):
                self._client.on_stock_lookup(request.request_id)
                matched: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
                return matched
            return self._scheduler.get_num_new_matched_tokens(request, num_computed_tokens, tracker)
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Make the plan of a claim."""
        own: list[int] = list((blocks.get_block_ids() or ([],))[0])
        with self._scheduler.contain_errors(request.request_id):
            self._client.on_allocated(request.request_id, num_external_tokens)
            super().update_state_after_alloc(request, blocks, num_external_tokens)
            tracker = self._get_request_tracker(request.request_id)
            self._scheduler.update_state_after_alloc(request, own, num_external_tokens, tracker)
        self._scheduler.compute_if_failed(request, own, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """LMCache's metadata of this step, with our plans."""
        scheduled = scheduler_output.num_scheduled_tokens
        loads = [] if self._scheduler.can_blend() else self._client.waiting_loads()
        try:
            meta = super().build_connector_meta(scheduler_output)
        except Exception:
            log.exception("LMCache's metadata of a step could not be made: KV of its requests is not stored")
            meta = self._client.empty_step(scheduled, loads)
        meta.blend_plans, meta.blend_allowance = self._scheduler.build_plans(scheduled)
        self._client.on_step()
        self.early_lookups.abort_lost()
        return meta

    def take_worker_meta(self, meta: Any) -> None:
        """Take the workers' results, before vLLM finishes requests; see vllm_patches.patch_update_from_output.

        Inside another connector, `update_connector_output` alone calls this.
        """
        self._scheduler.take_worker_metadata(meta)

    def update_connector_output(self, connector_output: Any) -> None:
        """Take the workers' results; see lmcache_rag.connector.transfers."""
        meta = connector_output.kv_connector_worker_meta
        self.take_worker_meta(meta)
        if isinstance(meta, BlendWorkerMetadata):  # the rest is for LMCache's connector
            connector_output.kv_connector_worker_meta = meta.lmcache
        super().update_connector_output(connector_output)
        connector_output.finished_sending = self._scheduler.finished_sending(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Add the reuse statistics to the response."""
        name = request.request_id
        statistics = self._scheduler.request_finished(request, self.request_trackers.get(name))
        if statistics is not None:
            statistics |= self._client.used_before(name)
        delayed, params = (
            True,
            None,
        )  # if this fails, vLLM keeps the blocks until the workers report that they no longer read them
        with (
            self._scheduler.contain_errors(name),
            self._client.ending(name, keep_session=self._scheduler.keeps_session(name)),
        ):
            delayed, params = super().request_finished(request, block_ids)
        self.request_trackers.pop(name, None)  # gone, unless something raised
        self._scheduler.remove(name, delayed=delayed)
        if statistics is not None:
            params = {**(params or {}), ANSWER: statistics}
            log.debug("request %s: %s", name, statistics)
        return delayed, params

    def on_adapter_loaded(self, lora_request: Any) -> None:
        """Scheduler: vLLM has loaded a LoRA adapter; see vllm_patches.patch_add_lora."""
        self._client.on_adapter_loaded(lora_request)

    def has_pending_push_work(self) -> bool:
        """Whether the engine must keep stepping without requests: for aborted look-ups and read locks."""
        if self._scheduler.has_recent_aborts or self._client.has_releases:
            return True
        return bool(super().has_pending_push_work())

    # -- metrics ------------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> Any:
        """Observations since the last call."""
        if self.role == KVConnectorRole.SCHEDULER:
            self._connector_stats.records.extend(self._scheduler.take_records())
            options = self._scheduler.options
            figures = self._scheduler.gate.take_figures(options.policy, options.budget)
            self._connector_stats.costs.extend(figures)
            self._connector_stats.facts.extend(self._facts)
            self._facts = []
        return super().get_kv_connector_stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> BlendStats:
        """Statistics for the API server's log, from the data that the engine sends."""
        return BlendStats(
            data={key: list(value) for key, value in (data or {}).items()}
        )  # other readers have `data` too

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> BlendPromMetrics:
        """Our counters on vLLM's /metrics."""
        return BlendPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- worker -------------------------------------------------------------------------------------------------------

    def begin_step(self, meta: Any) -> None:
        """Start this step's blends before vLLM prepares the step; see vllm_patches.patch_execute_model."""
        if self._worker is not None:
            self._worker.begin_step(getattr(meta, "blend_allowance", None))
        plans = getattr(meta, "blend_plans", None)
        # LMCache may still have to read blocks that were taken from a preempted request.
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
            vllm_patches.offer_hidden_state(hidden)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose stores are done, and those whose loads are; see lmcache_rag.connector.transfers."""
        stored, loaded = super().get_finished(finished_req_ids)
        receiving: set[str] = set()
        if self._worker is not None:
            self._worker.cancel(finished_req_ids)
            self._worker.finish()
            loaded, receiving = set(loaded or ()) | self._worker.take_received(), self._worker.receiving
        in_use = lmcache_client.loading_requests(self.worker_adapter) | receiving | self._in_flight.requests_in_use()
        return self._stores.report(stored or (), in_use), loaded

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that vLLM has to compute again; called after get_finished."""
        blocks: set[int] = super().get_block_ids_with_load_errors()
        if self._worker is not None:
            blocks = blocks | self._worker.take_bad_blocks()
        return blocks

    def build_connector_worker_meta(self) -> Any:
        """What this worker did in this step."""
        self._in_flight.defer_receipts()
        meta = BlendWorkerMetadata(lmcache=super().build_connector_worker_meta())
        if self._worker is not None:
            meta.results, (timed_out, meta.ended) = self._worker.take_results(), self._worker.take_timed_out()
            meta.timed_out, meta.steps = list(timed_out.items()), self._worker.take_steps()
        return meta if meta.results or meta.timed_out or meta.ended or meta.lmcache or meta.steps else None
