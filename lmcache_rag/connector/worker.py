"""The worker half of the connector."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lmcache_rag.connector import compat_lmcache, compat_vllm
from lmcache_rag.connector.attention import PagedSequence, on_device
from lmcache_rag.connector.blend_pass import BlendPass
from lmcache_rag.connector.job import LEAST, Clock, Job, Throttle, Work
from lmcache_rag.connector.model_runner import HotCopy, VLLMModel, rotary_of, takes_reports, why_not
from lmcache_rag.connector.pace import Allowance
from lmcache_rag.connector.plan import BlendPlan, BlendResult
from lmcache_rag.connector.self_check import self_checked
from lmcache_rag.connector.transfers import Late, LateLoads
from lmcache_rag.protocol import SERVER_FAULTS, CannotBlend, Fallback, SelfCheck, Unsupported, fallback_sentence

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from lmcache_rag.connector.options import ConnectorOptions
    from lmcache_rag.connector.transfers import Link

    Parts = tuple[VLLMModel, compat_lmcache.WorkerLink, HotCopy | None]


log = logging.getLogger("lmcache_rag")

T = TypeVar("T")

NULL_BLOCK = 0  # vLLM's BlockPool.null_block
_POLL = 0.001  # an idle step waits so long for a load rather than to spin


class WorkerSide:
    """Runs plans.

    A plan's work is queued on the GPU. Whether the KV was sound is looked at behind the model's forward pass where vLLM
    takes back what came of it: damage is reported to vLLM, which computes those blocks again. Elsewhere it is looked at
    right before that pass, when vLLM has prepared it, and repaired here: the host waits for the end of the selection,
    and goes on while the GPU recomputes. In the background nobody waits, and damage is always repaired here.

    Args:
        model: The model in this worker.
        link: How KV is loaded.
        may_report: Whether vLLM computes blocks again that are reported, and drops what came of the step; see
            lmcache_rag.connector.model_runner.takes_reports.
        hot: Copies what vLLM itself still holds.
        piece: Most tokens in one forward pass of a plan in the background.
    """

    def __init__(
        self, model: VLLMModel, link: Link, *, may_report: bool = True, hot: HotCopy | None = None, piece: int = 2048
    ) -> None:
        self._model, self._link, self._may_report, self._hot, self._piece = model, link, may_report, hot, piece
        self._work = Work(model, may_report=may_report)
        self._queued: list[Job] = []  # this step's, done but for the look at their evidence
        self._background: list[Job] = []
        self._results: list[BlendResult] = []
        self._received: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._warned = ""
        self._throttle = Throttle()
        self._idle = False  # this step has nothing else to do
        self._hidden: Any = None
        self._late = LateLoads(link)

    def run(self, plans: Sequence[BlendPlan], allowance: Allowance) -> None:
        """Make the KV of the plans' claims right, whatever happens: by blending, else by computing all of it.

        What is not in the background is queued at once; of what is, as much as is allowed.
        """
        import torch

        self._idle = allowance.idle
        with torch.inference_mode():
            ready = [job for job in self._background if not job.over]
            # All loads are asked for first, so that they go on beside the work.
            now = [self._begin(plan) for plan in plans if not plan.background]
            self._background += [self._begin(plan) for plan in plans if plan.background]
            self._queue(now)
            if self._model.ranks == 1:
                ready = [job for job in self._background if not job.over]
            self._advance(ready, allowance)
            if not self._may_report:  # last, so that the GPU has all of its work while the host waits for a part
                self._settle()

    def run_now(self, plans: Sequence[BlendPlan]) -> None:
        """As `run`, of plans that are not in the background, before it: vLLM has not prepared the step yet.

        Where damage may not be reported, `run` looks for it: it has to be called before the forward pass too.
        """
        import torch

        with torch.inference_mode():
            self._queue([self._begin(plan) for plan in plans])

    def _queue(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._load(job)
            self._complete(job)
            if self._may_report:
                self._offer(job)
            self._queued.append(job)

    def _complete(self, job: Job) -> None:
        while not job.over:
            job.advance(1 << 30)

    def _offer(self, job: Job) -> None:
        if job.outcome.hidden is not None and not job.failure:
            self._hidden = job.outcome.hidden

    def _settle(self) -> None:
        """Make what is queued for this step right before vLLM's forward pass; waits for what the selection has seen."""
        for job in self._queued:
            if not self._work.proven(job):
                job.steps, job.over = self._work.everything(job), False
                self._complete(job)
            self._offer(job)

    def _advance(self, jobs: list[Job], allowance: Allowance) -> None:
        left, idle = allowance.tokens, allowance.idle
        for job in jobs:
            if left <= 0 or left < min(LEAST, allowance.tokens):
                return
            if job.steps is None:
                if not self._loaded(job, idle=idle):
                    continue
                self._load(job)
            if job.cancelled:
                job.over = True
                continue
            self._throttle.before()
            left -= job.advance(left)
            self._throttle.after()
            idle = False

    def cancel(self, request_ids: Collection[str]) -> None:
        """Requests that ended: no more work for them. Their blocks are free when what is being loaded has come."""
        for job in self._background:
            job.cancelled |= job.plan.request_id in request_ids

    def finish(self) -> None:
        """Behind the forward pass: see what became of the plans.

        Waits for the GPU to be done with this step's; with those in the background only where nothing else is to do.
        """
        queued, self._queued = self._queued, []
        for job in queued:
            if not self._work.proven(job) or job.lost:
                self._report(job)
            self._tell(job)
        for job in [job for job in self._background if job.over]:
            # Each rank would see its own end first, and all must say so in the same step.
            if not (self._idle or self._model.ranks > 1 or job.clock.is_over):
                continue
            if not job.cancelled and not self._work.proven(job):
                job.steps, job.over = self._work.everything(job), False
                continue
            if job.lost:
                self._report(job)
            self._background.remove(job)
            self._received.add(job.plan.request_id)
            self._tell(job)

    def _report(self, job: Job) -> None:
        first = job.plan.local // self._model.block
        self._bad_blocks |= set(job.plan.block_ids[first : -(-job.plan.end // self._model.block)])

    def _tell(self, job: Job) -> None:
        plan, outcome = job.plan, job.outcome
        if job.failure:
            self._warn(job.failure)
            counts = (plan.local, 0, 0, plan.end - plan.local)
        else:
            covered = sum(match.end - match.start for match in plan.matches)
            counts = (plan.exact, covered - outcome.recomputed, outcome.recomputed, outcome.gaps)
            if job.waiting or self._warned not in SERVER_FAULTS:
                self._warned = ""  # it is over: the next time is another one
        hot = sum(m.end - m.start for m in plan.matches if m.block >= 0) if not job.failure else 0
        self._results.append(BlendResult(plan.request_id, *counts, *job.clock.read(), job.failure, hot))
        if log.isEnabledFor(logging.DEBUG):  # how to see that tensor-parallel ranks agree
            what = job.failure or f"{outcome.recomputed} tokens selected, digest {outcome.digest()}"
            log.debug("request %s on rank %d: %s", plan.request_id, self._model.rank, what)

    def take_results(self) -> list[BlendResult]:
        """What was done since the last call."""
        results, self._results = self._results, []
        return results

    def take_bad_blocks(self) -> set[int]:
        """Blocks whose KV must be computed again."""
        blocks, self._bad_blocks = self._bad_blocks, set()
        return blocks

    def take_received(self) -> set[str]:
        """Requests whose plans in the background are done."""
        received, self._received = self._received, set()
        return received

    def take_hidden(self) -> Any:
        """The hidden state [1, width] of what vLLM is going to compute in this step, where a blend computed it already.

        Where damage is reported it is not known yet whether the KV was sound: what comes of this is taken back like
        what vLLM computes itself. Elsewhere there is none before that is known.
        """
        hidden, self._hidden = self._hidden, None
        return hidden

    @property
    def receiving(self) -> set[str]:
        """Requests whose blocks are still being written to in the background, or may be."""
        return {job.plan.request_id for job in self._background} | self._late.request_ids

    def take_late(self) -> tuple[dict[str, tuple[int, ...]], list[str]]:
        """Loads that were given up, since the last call: (their requests' blocks, requests that are over)."""
        return self._late.take()

    def _begin(self, plan: BlendPlan) -> Job:
        """Ask for the plan's KV."""
        import torch

        hot = [match for match in plan.matches if match.block >= 0]
        cold = [match for match in plan.matches if match.block < 0]
        clock = Clock()
        reason: str | None = plan.failure or None
        waiting: list[Any] = []
        if not self._link.is_healthy and (cold or plan.exact > plan.local):
            reason = Fallback.NO_SERVER
            if plan.exact > plan.local:
                self._link.give_back(plan)
        else:  # before anything else: the server needs some milliseconds until the first byte is on its way
            if cold:  # the larger part first: the server prepares the other while this one is on the bus
                waiting.append(self._link.submit_matches(plan, cold))
            if plan.exact > plan.local:
                waiting.append(self._link.submit_exact(plan))
        device = self._model.device
        blocks = plan.block_ids
        if plan.background and len(blocks) * self._model.block < len(plan.token_ids):
            # The last token has no block yet, and the selection looks through its eyes: vLLM's null block, which
            # nobody reads, holds its KV meanwhile.
            blocks = (*blocks, NULL_BLOCK)
        sequence = PagedSequence.of(blocks, self._model.block, str(device))
        if hot and self._hot is None:
            reason = reason or Fallback.NO_HOT_COPY
        elif hot and not reason and self._hot is not None:
            self._hot.run(hot, sequence)
        ids = on_device(plan.token_ids, torch.int64, device)
        blend = BlendPass(self._model, sequence, piece=self._piece if plan.background else 0)
        return Job(plan, sequence, ids, blend, waiting=waiting, clock=clock, reason=reason or "")

    def _left(self, job: Job) -> float:
        """Seconds to its deadline."""
        return max(0.0, job.clock.asked + self._link.deadline - time.perf_counter())

    def _loaded(self, job: Job, *, idle: bool) -> bool:
        """Whether its work may begin: it would make the whole step wait for KV that is still under way."""
        if self._model.ranks > 1:  # each would see its own KV first, and all must begin at the same point: they wait
            return True
        if not self._left(job):
            return True
        if idle:  # nobody else waits
            return all(self._link.answered(future, _POLL) and self._link.there(future) for future in job.waiting)
        return all(self._link.there(future) for future in job.waiting)

    def _load(self, job: Job) -> None:
        """Wait for the KV, on the stream; all ranks agree whether it comes and whether there is memory for the work."""
        reason, plan = job.reason, job.plan
        for future in job.waiting:
            if not self._link.arrived(future, self._left(job)):
                reason = reason or Fallback.LOAD_FAILED
        late = tuple(each for each in job.waiting if not (self._link.answered(each, 0.0) and self._link.there(each)))
        if late:
            blocks = plan.block_ids[plan.local // self._model.block :]
            since = time.monotonic() - (time.perf_counter() - job.clock.asked)
            self._late.add(Late(plan.request_id, tuple(blocks), late, since))
        ready = not reason and self._work.fits(job)
        if not self._model.all_ranks(ready):
            loaded = self._model.all_ranks(not reason)
            job.failure = reason or (Fallback.OUT_OF_MEMORY if loaded else Fallback.LOAD_FAILED_ELSEWHERE)
        job.clock.loaded()
        job.steps = self._work.steps(job)

    def _warn(self, failure: str) -> None:
        if failure != self._warned:  # once for each kind of trouble, until it is over
            self._warned = failure
            log.warning(
                "KV could not be blended: %s. Prompts are computed in full instead.", fallback_sentence(failure)
            )


class Prepared(NamedTuple):
    """What came of it.

    Attributes:
        side: The worker side; None where it cannot blend.
        why_not: Why it cannot; None where it can.
        self_check: Whether a blend was compared with a full prefill; None where it cannot blend.
    """

    side: WorkerSide | None
    why_not: Unsupported | None
    self_check: SelfCheck | None = None


class _Cannot(Exception):  # noqa: N818 - no error: a reason that is known
    """Blending is not possible here."""

    def __init__(self, reason: Unsupported) -> None:
        super().__init__(str(reason))
        self.reason = reason


def prepared(vllm_config: Any, adapter: Any, options: ConnectorOptions, *, absent: bool = False) -> Prepared:
    """A worker that blends, or why it does not. All tensor-parallel ranks do or none does.

    Args:
        vllm_config: vLLM's configuration.
        adapter: LMCache's worker adapter, its KV caches registered.
        options: The connector's.
        absent: Whether LMCache's server does not answer yet: it is asked, and told, when it does.
    """
    worker = compat_vllm.worker()
    if worker is None:
        detail = "the lmcache_rag plugin is not loaded in this process (VLLM_PLUGINS leaves it out?)"
        return Prepared(None, Unsupported(CannotBlend.NO_PLUGIN, detail))
    parts, reason = _tried(lambda: _parts(vllm_config, worker.model_runner, adapter, options, absent))
    # What comes next is done by all ranks together: who did without would keep the others waiting.
    if not compat_vllm.true_on_all_ranks(parts is not None) or parts is None:
        return Prepared(None, reason or Unsupported(CannotBlend.OTHER_RANK, "another rank cannot blend"))
    side, reason = _tried(lambda: _side(vllm_config, parts, options))
    if side is None:
        return Prepared(None, reason)
    return Prepared(side, None, SelfCheck.PASSED if options.self_check else SelfCheck.SKIPPED)


def _tried(work: Callable[[], T]) -> tuple[T | None, Unsupported | None]:
    try:
        return work(), None
    except _Cannot as known:
        return None, known.reason
    except Exception as problem:
        log.warning("Getting ready to blend failed", exc_info=True)
        detail = f"getting ready failed: {type(problem).__name__}: {problem}"
        return None, Unsupported(CannotBlend.ERROR, detail)


def _parts(vllm_config: Any, runner: Any, adapter: Any, options: ConnectorOptions, absent: bool) -> Parts:
    """What one rank does by itself."""
    model = runner.get_model()
    get = vllm_config.kv_transfer_config.get_from_extra_config
    parallel = adapter.parallel_strategy
    address = compat_lmcache.address(get, parallel.vllm_worker_id, parallel.vllm_world_size)
    link = compat_lmcache.WorkerLink(adapter, options.deadline, address, absent=absent)
    if reason := link.why_not() or why_not(vllm_config, model):
        raise _Cannot(reason)
    rotary = rotary_of(model)
    if detail := link.register_rope(rotary.cos_sin_cache, rotary.head_size, rotary.is_neox_style):
        raise _Cannot(Unsupported(CannotBlend.LMCACHE_ROPE, detail))
    blendable = VLLMModel(vllm_config, runner)
    blendable.warm_up()
    hot = blendable.hot_copy() if options.hot else None
    if hot is not None:
        hot.warm_up()
    return blendable, link, hot


def _side(vllm_config: Any, parts: Parts, options: ConnectorOptions) -> WorkerSide:
    """What all ranks do together."""
    blendable, link, hot = parts
    blendable.capture()
    if options.self_check:
        if reason := self_checked(vllm_config, blendable, compat_vllm.true_on_all_ranks):
            raise _Cannot(reason)
    else:
        log.warning("Blends are not compared with a full prefill: lmcache_rag.self_check is off")
    compat_vllm.begin_before_the_step()
    compat_vllm.take_hidden_states()
    return WorkerSide(blendable, link, may_report=takes_reports(vllm_config), hot=hot, piece=options.step_tokens)
