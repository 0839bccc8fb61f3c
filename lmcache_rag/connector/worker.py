"""The worker half of the connector: loads and blends a step's plans before vLLM computes the rest.

`start_worker` runs before the first request, so that no request waits for it: it finds out whether this worker can
blend, and prepares that. On any error there vLLM starts without blending.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lmcache_rag.connector import kv_quant, lmcache_client, lmcache_transfers, vllm_internals, vllm_patches
from lmcache_rag.connector.admission import Allowance
from lmcache_rag.connector.job import MIN_PASS_TOKENS, BlendJob, JobResources, StepTimer, Throttle
from lmcache_rag.connector.metadata import BlendPlan, BlendResult, StepTime
from lmcache_rag.connector.model_runner import VLLMModel, recomputes_reported_blocks
from lmcache_rag.connector.model_support import unsupported_reason
from lmcache_rag.connector.rotary import rotary_of
from lmcache_rag.connector.self_check import run_self_check
from lmcache_rag.connector.start_costs import costs_file, measure_costs
from lmcache_rag.connector.transfers import TimedOutLoads
from lmcache_rag.protocol import SERVER_FAULTS, CannotBlend, SelfCheck, Unsupported, fallback_sentence

if TYPE_CHECKING:
    from lmcache_rag.connector.config import ConnectorOptions
    from lmcache_rag.connector.model_runner import GpuCopy
    from lmcache_rag.connector.transfers import KVLoader

    Parts = tuple[VLLMModel, lmcache_transfers.LMCacheLoader, GpuCopy | None]

log = logging.getLogger("lmcache_rag")

T = TypeVar("T")


class BlendWorker:
    """Runs blend plans.

    A plan's work is queued on the GPU. If vLLM recomputes blocks that are reported as failed, the KV is verified after
    the model's forward pass, and damage is reported. Otherwise it is verified right before that pass, once vLLM has
    prepared it, and repaired here: the CPU waits for the end of the selection, and continues while the GPU recomputes.
    In the background no request of the step waits, and damage is always repaired here.

    Args:
        model: The model in this worker.
        loader: Loads KV from LMCache.
        vllm_recomputes_bad_blocks: Whether vLLM recomputes blocks that are reported as failed, and discards the step's
            output for them; see lmcache_rag.connector.model_runner.recomputes_reported_blocks.
        gpu_copy: Copies resident chunks.
        chunk_size: Most tokens in one forward pass of a plan in the background.
    """

    def __init__(
        self,
        model: VLLMModel,
        loader: KVLoader,
        *,
        vllm_recomputes_bad_blocks: bool = True,
        gpu_copy: GpuCopy | None = None,
        chunk_size: int = 2048,
    ) -> None:
        self._model, self._vllm_recomputes_bad_blocks, self._chunk_size = model, vllm_recomputes_bad_blocks, chunk_size
        self._timed_out = TimedOutLoads(loader)
        self._resources = JobResources(model, loader, self._timed_out, gpu_copy, vllm_recomputes_bad_blocks)
        self._queued: list[BlendJob] = []  # of this step; all work is queued, the KV is not verified yet
        self._background: list[BlendJob] = []
        self._results: list[BlendResult] = []
        self._received: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._warned = ""  # the last failure that was logged
        self._throttle = Throttle()
        self._idle = False  # whether this step has no other work
        self._hidden: Any = None
        self._steps = StepTimer()

    # -- a step, in the order of the calls ----------------------------------------------------------------------------

    def begin_step(self, allowance: Allowance | None) -> None:
        """A step begins, before vLLM prepares its inputs."""
        self._steps.begin(allowance.timed if allowance is not None else None)

    def run_now(self, plans: Sequence[BlendPlan]) -> None:
        """Start the plans that are not in the background, before vLLM has prepared the step; `run` does the rest.

        If damage may not be reported, `run` verifies the KV: it must be called too, before the forward pass. vLLM sets
        the LoRA adapters of its step after this.
        """
        import torch

        with torch.inference_mode():
            self._queue([self._start(plan) for plan in plans])

    def run(self, plans: Sequence[BlendPlan], allowance: Allowance) -> None:
        """Compute the KV that the plans claim: by blending or, if that fails, by computing all of it.

        All work of plans that are not in the background is queued now; of background plans, as much as the step allows.
        """
        import torch

        self._idle = allowance.idle
        if not (plans or self._background or self._queued):
            return
        with torch.inference_mode(), self._model.step_adapters():
            # Several ranks wait for a load when its job begins (BlendJob.is_loaded): what is requested in this step
            # begins in the next one, so that its KV has a step's time to arrive. One rank skips what is not there yet.
            ready = [job for job in self._background if not job.queued_all]
            # All loads are requested first, so that they run during the work.
            now = [self._start(plan) for plan in plans if not plan.background]
            self._background += [self._start(plan) for plan in plans if plan.background]
            self._queue(now)
            if self._model.ranks == 1:
                ready = [job for job in self._background if not job.queued_all]
            self._advance(ready, allowance)
            # Last, so that the GPU has all of its work queued while the CPU waits for a part.
            if not self._vllm_recomputes_bad_blocks:
                self._verify_before_forward()

    def _start(self, plan: BlendPlan) -> BlendJob:
        return BlendJob(plan, self._resources, chunk_size=self._chunk_size if plan.background else 0)

    def _queue(self, jobs: Sequence[BlendJob]) -> None:
        for job in jobs:
            job.load()
            job.advance_to_end()
            if self._vllm_recomputes_bad_blocks:
                self._offer_hidden_state(job)
            self._queued.append(job)

    def _advance(self, jobs: list[BlendJob], allowance: Allowance) -> None:
        left, idle = allowance.tokens, allowance.idle
        for job in jobs:
            if left <= 0 or left < min(MIN_PASS_TOKENS, allowance.tokens):
                return
            # The scheduler keeps a slot for its adapter (BlendBudget.has_slot); a preempted request may have taken it.
            if not (allowance.idle or self._model.has_slot(job.plan.adapter)):
                continue
            if not job.is_started:
                if not job.is_loaded(idle=idle):
                    continue
                job.load()
            if job.cancelled:
                job.queued_all = True
                continue
            self._throttle.before()
            left -= job.advance(left)
            self._throttle.after()
            idle = False

    def _verify_before_forward(self) -> None:
        """Verify this step's KV, and repair it, before vLLM's forward pass. Waits for the end of the selection."""
        for job in self._queued:
            if not job.verify():
                job.recompute_all()
                job.advance_to_end()
            self._offer_hidden_state(job)

    def _offer_hidden_state(self, job: BlendJob) -> None:
        if job.outcome.hidden is not None and not job.failure:
            self._hidden = job.outcome.hidden

    def take_hidden(self) -> Any:
        """The hidden state [1, width] of the token that vLLM would compute in this step, if a blend has computed it.

        If damage is reported, the KV is not verified yet: vLLM discards the output as it does its own. Otherwise there
        is no hidden state before the KV is verified.
        """
        hidden, self._hidden = self._hidden, None
        return hidden

    def cancel(self, request_ids: Collection[str]) -> None:
        """Stop work for requests that ended. Their blocks are free once their loads have ended."""
        for job in self._background:
            job.cancelled |= job.plan.request_id in request_ids

    def finish(self) -> None:
        """After the forward pass: verify and report the plans.

        Waits for the GPU to finish this step's plans; for those in the background only if the step has no other work.
        """
        self._steps.mark_end()
        queued, self._queued = self._queued, []
        for job in queued:
            if not job.verify() or job.lost:
                self._bad_blocks |= job.claimed_blocks()
            self._report(job)
        self._steps.end(self._results[len(self._results) - len(queued) :])
        for job in [job for job in self._background if job.queued_all]:
            # Ranks see the end at different times, and must all report it in the same step: they wait.
            if not (self._idle or self._model.ranks > 1 or job.timer.is_done):
                continue
            if not job.cancelled and not job.verify():
                job.recompute_all()
                continue
            if job.lost:
                self._bad_blocks |= job.claimed_blocks()
            self._background.remove(job)
            self._received.add(job.plan.request_id)
            self._report(job)

    def _report(self, job: BlendJob) -> None:
        if job.failure:
            self._warn(job.failure)
        elif job.uses_server or self._warned not in SERVER_FAULTS:
            self._warned = ""  # it works again: the next failure is logged
        self._results.append(job.result())

    def _warn(self, failure: str) -> None:
        if failure != self._warned:  # once for each kind of failure, until it works again
            self._warned = failure
            log.warning(
                "KV could not be blended: %s. Prompts are computed in full instead.", fallback_sentence(failure)
            )

    def take_results(self) -> list[BlendResult]:
        """Results since the last call."""
        results, self._results = self._results, []
        return results

    def take_steps(self) -> list[StepTime]:
        """Times of steps since the last call."""
        return self._steps.take()

    def take_bad_blocks(self) -> set[int]:
        """Blocks whose KV vLLM must recompute, since the last call."""
        blocks, self._bad_blocks = self._bad_blocks, set()
        return blocks

    def take_received(self) -> set[str]:
        """Requests whose plans in the background are done, since the last call (finished_recving)."""
        received, self._received = self._received, set()
        return received

    @property
    def receiving(self) -> set[str]:
        """Requests whose blocks are, or may be, written to in the background."""
        return {job.plan.request_id for job in self._background} | self._timed_out.request_ids

    def take_timed_out(self) -> tuple[dict[str, tuple[int, ...]], list[str]]:
        """Since the last call: (blocks of requests with a new timed-out load, requests whose loads have ended)."""
        return self._timed_out.take()


# -- start ------------------------------------------------------------------------------------------------------------


class WorkerStart(NamedTuple):
    """The result of `start_worker`.

    Attributes:
        worker: Runs plans; None if this worker cannot blend.
        unsupported_reason: Why it cannot; None if it can.
        self_check: Whether a blend was compared with a full prefill; None if it cannot blend.
        costs: What its passes take, see lmcache_rag.connector.start_costs; None: unknown.
        costs_file: Where costs are kept; "": nowhere.
    """

    worker: BlendWorker | None
    unsupported_reason: Unsupported | None
    self_check: SelfCheck | None = None
    costs: dict[str, Any] | None = None
    costs_file: str = ""


class _NotSupported(Exception):  # noqa: N818 - not an error: an expected reason
    """Blending is not supported here."""

    def __init__(self, reason: Unsupported) -> None:
        super().__init__(str(reason))
        self.reason = reason


def start_worker(vllm_config: Any, adapter: Any, options: ConnectorOptions, *, absent: bool = False) -> WorkerStart:
    """Prepare blending in this worker. Either all tensor-parallel ranks blend or none does.

    Args:
        vllm_config: vLLM's configuration.
        adapter: LMCache's worker adapter; its KV caches are registered.
        options: The connector's options.
        absent: Whether LMCache's server does not respond yet: handshake and configuration then wait until it does.
    """
    vllm_worker = vllm_patches.worker()
    if vllm_worker is None:
        detail = "the lmcache_rag plugin is not loaded in this process (VLLM_PLUGINS leaves it out?)"
        return WorkerStart(None, Unsupported(CannotBlend.NO_PLUGIN, detail))
    parts, reason = _attempt(lambda: _rank_parts(vllm_config, vllm_worker.model_runner, adapter, options, absent))
    # All ranks do the rest together: a rank that did not take part would keep the others waiting.
    if not vllm_internals.true_on_all_ranks(parts is not None) or parts is None:
        return WorkerStart(None, reason or Unsupported(CannotBlend.OTHER_RANK, "another rank cannot blend"))
    worker, reason = _attempt(lambda: _joint_start(vllm_config, parts, options))
    if worker is None:
        return WorkerStart(None, reason)
    file = costs_file(vllm_config)
    costs = measure_costs(vllm_config, parts[0], file, vllm_internals.true_on_all_ranks) if options.blend else None
    self_check = SelfCheck.PASSED if options.self_check else SelfCheck.SKIPPED
    return WorkerStart(worker, None, self_check, costs, str(file or ""))


def _attempt(work: Callable[[], T]) -> tuple[T | None, Unsupported | None]:
    try:
        return work(), None
    except _NotSupported as known:
        return None, known.reason
    except Exception as problem:
        log.warning("Blend initialisation failed", exc_info=True)
        detail = f"blend initialisation failed: {type(problem).__name__}: {problem}"
        return None, Unsupported(CannotBlend.ERROR, detail)


def _rank_parts(vllm_config: Any, runner: Any, adapter: Any, options: ConnectorOptions, absent: bool) -> Parts:
    """The part of the start that each rank does alone."""
    loaded = runner.get_model()
    get = vllm_config.kv_transfer_config.get_from_extra_config
    parallel = adapter.parallel_strategy
    address = lmcache_client.server_address(get, parallel.vllm_worker_id, parallel.vllm_world_size)
    loader = lmcache_transfers.LMCacheLoader(adapter, options.deadline, address, absent=absent)
    if reason := loader.unsupported_reason() or unsupported_reason(vllm_config, loaded):
        raise _NotSupported(reason)
    rotary = rotary_of(loaded)
    quantised = kv_quant.lmcache_name(next(iter(vllm_internals.attention_layers(vllm_config).values())))
    if detail := loader.register_rope(rotary.cos_sin_cache, rotary.head_size, rotary.is_neox_style, quantised):
        raise _NotSupported(Unsupported(CannotBlend.LMCACHE_ROPE, detail))
    model = VLLMModel(vllm_config, runner)
    model.warm_up()
    gpu_copy = model.gpu_copy() if options.hot else None
    if gpu_copy is not None:
        gpu_copy.warm_up()
    return model, loader, gpu_copy


def _joint_start(vllm_config: Any, parts: Parts, options: ConnectorOptions) -> BlendWorker:
    """The part of the start that all ranks do together."""
    model, loader, gpu_copy = parts
    model.capture()
    if options.self_check:
        if reason := run_self_check(vllm_config, model, vllm_internals.true_on_all_ranks):
            raise _NotSupported(reason)
    else:
        log.warning("Blends are not compared with a full prefill: lmcache_rag.self_check is off")
    vllm_patches.patch_execute_model()
    vllm_patches.patch_run_fullgraph()
    vllm_recomputes_bad_blocks = recomputes_reported_blocks(vllm_config)
    return BlendWorker(
        model,
        loader,
        vllm_recomputes_bad_blocks=vllm_recomputes_bad_blocks,
        gpu_copy=gpu_copy,
        chunk_size=options.step_tokens,
    )
