"""vLLM's real scheduler with the scheduler side of our connector, stepped by hand.

The scheduler, its block pool, the connector and the LMCache server are real. The worker is simulated, and what the
look-ups find is made up: blending needs CUDA.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from contract_kit import BLOCK, CHUNK
from models import tiny_config
from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm_cpu_kit import Process, answers, free_port

from lmcache_rag.connector.metadata import BlendHandshakeMetadata, BlendPlan, BlendResult, BlendWorkerMetadata, Match
from lmcache_rag.connector.transfers import FinishedGate
from lmcache_rag.protocol import SelfCheck

BLOCKS = 90


@contextlib.contextmanager
def lmcache_server(folder: Path) -> Iterator[int]:
    """The port of an LMCache server."""
    port, http = free_port(), free_port()
    options = f"--engine-type blend --supported-transfer-mode auto --chunk-size {CHUNK} --l1-size-gb 1 --host localhost"
    more = f"--eviction-policy LRU --port {port} --http-host 127.0.0.1 --http-port {http}"
    server = Process(["lmcache", "server", *options.split(), *more.split()], folder / "lmcache.log")
    try:
        server.wait_for(lambda: answers(f"http://127.0.0.1:{http}/healthcheck"), 120)
        yield port
    finally:
        server.kill()


@contextlib.contextmanager
def without_server() -> Iterator[int]:
    """A port that nobody listens at, where LMCache's adapters are content with that for a while."""
    from lmcache.integration.vllm import vllm_multi_process_adapter as adapters

    real = adapters.get_lmcache_chunk_size, adapters.get_experimental
    adapters.get_lmcache_chunk_size = lambda client, timeout=0.0, **more: CHUNK
    adapters.get_experimental = lambda client, timeout=0.0: set()
    try:
        yield free_port()
    finally:
        adapters.get_lmcache_chunk_size, adapters.get_experimental = real


class Lookup:
    """What a look-up finds, after some polls."""

    def __init__(self, request: Any, polls: int, found: tuple[int, tuple[Match, ...]]) -> None:
        self.request_id, self._left, self._found = request.request_id, polls, found
        self.result: tuple[int, tuple[Match, ...]] | None = None
        self.ended = False
        self.locked: set[int] = set()

    def poll(self, seconds: float) -> bool:
        self._left -= 1
        if self._left < 0 and self.result is None:
            self.result = self._found
            self.locked = set(range(self._found[0] // CHUNK))
        return self.result is not None

    def release_prefix(self, start: int, end: int) -> None:
        self.give_back(start, end)

    def give_back(self, start: int, end: int) -> None:
        chunks = set(range(start // CHUNK, end // CHUNK))
        assert chunks <= self.locked, "a lock was given back twice"
        self.locked -= chunks

    def end_session(self) -> None:
        self.ended = True


class Worker:
    """Does plans: those of a step at once, those in the background some steps later."""

    def __init__(self, lookups: dict[str, Lookup]) -> None:
        self._lookups = lookups
        self.background: list[list[Any]] = []
        self.stores = FinishedGate()
        self.done: Counter[str] = Counter()

    def step(self, plans: list[BlendPlan], finished: set[str], slow: int) -> KVConnectorOutput:
        for plan in plans:
            if plan.exact > plan.local and not plan.failure:
                lookup = self._lookups[plan.request_id]
                assert lookup.result is not None
                lookup.give_back(plan.local // CHUNK * CHUNK, lookup.result[0])
        results = [self.result(plan) for plan in plans if not plan.background]
        self.background += [[plan, slow] for plan in plans if plan.background]
        received = set()
        for one in list(self.background):
            one[1] -= 1
            if one[1] < 0:
                self.background.remove(one)
                received.add(one[0].request_id)
                results.append(self.result(one[0]))
        under_way = {plan.request_id for plan, _ in self.background}
        stored = self.stores.report(finished, under_way)
        meta = BlendWorkerMetadata(results) if results else None
        return KVConnectorOutput(finished_sending=stored, finished_recving=received, kv_connector_worker_meta=meta)

    def result(self, plan: BlendPlan) -> BlendResult:
        self.done[plan.request_id] += 1
        if plan.failure:
            computed = plan.end - plan.local
            return BlendResult(plan.request_id, plan.local, 0, 0, computed, 1.0, 1.0, plan.failure)
        covered = sum(match.end - match.start for match in plan.matches)
        again = covered // 8
        rest = plan.end - plan.exact - covered
        hot = sum(match.end - match.start for match in plan.matches if match.block >= 0)
        return BlendResult(plan.request_id, plan.exact, covered - again, again, rest, 1.0, 1.0, "", hot)


class Engine:
    """vLLM's scheduler, stepped by hand."""

    def __init__(
        self, port: int, folder: Path, *, lora: Any = None, policy: Any = "fcfs", seqs: int = 8, **options: Any
    ) -> None:
        tiny_config("llama").save_pretrained(folder)
        extra = {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": port, "lmcache.mp.mq_timeout": 20}
        model = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=2048)
        config = VllmConfig(
            model_config=model,
            cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=512,
                max_num_seqs=seqs,
                policy=policy,
                max_model_len=2048,
                is_encoder_decoder=False,
                async_scheduling=False,
            ),
            lora_config=lora,
            kv_transfer_config=KVTransferConfig(
                kv_connector="CacheBlendConnector",
                kv_connector_module_path="lmcache_rag.connector.connector",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config=extra | {f"lmcache_rag.{name}": value for name, value in options.items()},
            ),
        )
        config.cache_config.num_gpu_blocks = BLOCKS
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=16, dtype=torch.float32)
        groups = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)])
        self.scheduler = Scheduler(config, groups, StructuredOutputManager(config), BLOCK, log_stats=True)
        self.connector: Any = self.scheduler.connector
        self.connector.set_xfer_handshake_metadata({0: BlendHandshakeMetadata(None, SelfCheck.PASSED)})
        function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(function)
        self._hasher = get_request_block_hasher(BLOCK, function)
        self.found: dict[str, tuple[int, tuple[int, tuple[Match, ...]]]] = {}
        self.lookups: dict[str, Lookup] = {}
        self.worker = Worker(self.lookups)
        self.use(self.look_up)
        self.told: dict[str, Any] = {}
        self.beside: Counter[str] = Counter()
        self.preempted = 0
        self.adapters: list[set[int]] = []  # of each step

    def use(self, look_up: Any) -> None:
        """Have look-ups started by this."""
        self.connector._scheduler.client.look_up = look_up

    def look_up(self, request: Any) -> Lookup:
        assert request.request_id not in self.lookups, "asked twice"
        self.lookups[request.request_id] = Lookup(request, *self.found[request.request_id])
        return self.lookups[request.request_id]

    def add(
        self,
        name: str,
        prompt: int,
        matches: int,
        *,
        polls: int = 0,
        outputs: int = 4,
        exact: int = 0,
        adapter: Any = None,
    ) -> None:
        """A request, with an adapter (LoRARequest), of which LMCache holds so many chunks behind `exact` tokens."""
        tokens = [random.Random(name).randrange(5, 40000) for _ in range(prompt)]
        found, here = [], exact + 8
        for number in range(matches):
            if here + CHUNK <= prompt - 1:
                found.append(Match(here, here + CHUNK, 64 + number * CHUNK, 64 + (number + 1) * CHUNK))
                here += CHUNK + (8 if number % 3 == 0 else 0)
        self.found[name] = polls, (exact, tuple(found))
        sampling = SamplingParams(max_tokens=outputs, ignore_eos=True)
        made = Request(name, tokens, sampling, None, lora_request=adapter, block_hasher=self._hasher)
        self.scheduler.add_request(made)

    def add_tokens(self, name: str, tokens: list[int], params: Any = None, *, outputs: int = 4, **more: Any) -> Request:
        """A request of those tokens, with these kv_transfer_params; LMCache holds nothing of it unless it was said."""
        self.found.setdefault(name, (0, (0, ())))
        extra = None if params is None else {"kv_transfer_params": params}
        sampling = SamplingParams(max_tokens=outputs, ignore_eos=True, extra_args=extra)
        request = Request(name, tokens, sampling, None, block_hasher=self._hasher, **more)
        self.scheduler.add_request(request)
        return request

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self, slow: int = 0) -> Any:
        """One step; the simulated worker is done with what begins in it `slow` steps later."""
        out = self.scheduler.schedule()
        meta = out.kv_connector_metadata
        self.check_blocks(out)
        self.preempted += len(out.preempted_req_ids or ())
        for plan in meta.blend_plans:
            self.beside[plan.request_id] += plan.background
        names = list(out.num_scheduled_tokens)
        tokens = []
        self.adapters.append(self.in_use(names, meta.blend_plans))
        for name in names:
            request = self.scheduler.requests[name]
            tokens.append([7] if request.num_computed_tokens >= request.num_tokens else [])
        self.scheduler.update_from_output(
            out,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=tokens,
                kv_connector_output=self.worker.step(meta.blend_plans, set(out.finished_req_ids), slow),
            ),
        )
        return out

    def in_use(self, names: list[str], plans: list[BlendPlan]) -> set[int]:
        """Adapters that this step and the blends beside it need at once."""
        blends = [*plans, *(plan for plan, _ in self.worker.background)]
        requests = [self.scheduler.requests[name].lora_request for name in names]
        return {adapter.lora_int_id for adapter in (*requests, *(plan.adapter for plan in blends)) if adapter}

    def check_blocks(self, out: Any) -> None:
        """No request that runs was given blocks that are still being written to for another."""
        for plan, _ in self.worker.background:
            for name in out.num_scheduled_tokens:
                (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(name)
                written = set(plan.block_ids[plan.local // BLOCK :])  # those before may be shared
                assert name == plan.request_id or not set(blocks) & written, "written to by two"

    def to_the_end(self, steps: int = 200) -> None:
        for _ in range(steps):
            if not self.scheduler.has_requests():
                break
            self.step()
        assert not self.scheduler.has_requests()
        assert not self.scheduler.requests
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == BLOCKS - 1, "blocks leak"
        side = self.connector._scheduler
        assert (side.requests, side.budget.background, side.aborted_lookups) == (0, 0, 0)
        assert not self.worker.background
        assert len(side._freed) == 0
        assert side.gpu_chunks is None or side.gpu_chunks.resident.pinned == 0
        assert not self.connector.request_trackers
        assert len(side.forgetting) == len(side._failed) == 0
        assert not any(lookup.locked for lookup in self.lookups.values()), "locks leak"
