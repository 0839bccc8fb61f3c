"""A blend in a worker, from its plan to its result: load -> blend -> verify -> report.

`BlendJob` is written in that order. A job whose load or blend fails computes everything that was claimed instead. What
it does on the GPU is only queued; the CPU waits for the GPU as late as possible.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmcache_rag.connector import kv_quant
from lmcache_rag.connector.attention import AsyncScalar, PagedSequence, to_device_async
from lmcache_rag.connector.blend_pass import BlendOutcome, BlendPass, StepIterator
from lmcache_rag.connector.metadata import BlendPlan, BlendResult, StepShape, StepTime
from lmcache_rag.connector.transfers import TimedOutLoad
from lmcache_rag.policies import get_policy
from lmcache_rag.protocol import Fallback

if TYPE_CHECKING:
    from torch import Tensor

    from lmcache_rag.connector.model_runner import GpuCopy, VLLMModel
    from lmcache_rag.connector.transfers import KVLoader, TimedOutLoads

log = logging.getLogger("lmcache_rag")

NULL_BLOCK = 0  # vLLM's BlockPool.null_block
MIN_PASS_TOKENS = 64  # a pass over fewer tokens takes hardly less time: it reads the same weights
SMALL, SMALLEST = 512, 16  # chunk sizes: after memory ran out once, and the smallest that is tried
_POLL_S = 0.001  # an idle step waits this long for a load instead of spinning


class CudaTimer:
    """Times of a job's load and work; on the GPU's clock if there is one."""

    def __init__(self) -> None:
        import torch

        self.started = time.perf_counter()
        self._cuda = torch.cuda.is_available()
        self._load = [self._mark()]
        self._work: list[tuple[Any, Any]] = []
        self._selected: tuple[int, Any] | None = None  # the part in which the selection ended, and when

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        import torch

        mark: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        mark.record()
        return mark

    def loaded(self) -> None:
        """The load is complete, or has timed out."""
        self._load.append(self._mark())

    def begin(self) -> None:
        """A part of the work begins."""
        self._work.append((self._mark(), None))

    def end(self) -> None:
        """The part ends."""
        self._work[-1] = (self._work[-1][0], self._mark())

    def selected(self) -> None:
        """The selection ends, within a part."""
        self._selected = len(self._work) - 1, self._mark()

    @property
    def is_done(self) -> bool:
        """Whether the GPU has done all of the queued work, so that `read` does not wait."""
        return not self._cuda or all(mark.query() for mark in (self._load[-1], *(end for _, end in self._work[-1:])))

    def read(self) -> tuple[float, float]:
        """Milliseconds of the load and of the work. Waits for the GPU."""
        return self._between(*self._load), sum(self._between(*marks) for marks in self._work)

    def read_selection(self) -> float:
        """Milliseconds of the work up to the end of the selection; 0.0 without one. Waits for the GPU."""
        if self._selected is None:
            return 0.0
        last, mark = self._selected
        return sum(self._between(*marks) for marks in self._work[:last]) + self._between(self._work[last][0], mark)

    def _between(self, first: Any, last: Any) -> float:
        if not self._cuda:
            return float(last - first) * 1e3
        last.synchronize()
        return float(first.elapsed_time(last))


class StepTimer:
    """Times of a worker's steps. They are read when the GPU is done with them, so that nothing waits for it."""

    def __init__(self) -> None:
        self._now: tuple[StepShape, CudaTimer] | None = None
        self._ended: list[tuple[StepShape, CudaTimer, float]] = []

    def begin(self, shape: StepShape | None) -> None:
        """A step begins, before vLLM prepares it; None: its time is not to be measured."""
        self._now = None
        if shape is not None:
            timer = CudaTimer()
            timer.loaded()
            timer.begin()
            self._now = shape, timer

    def mark_end(self) -> None:
        """All of the step's work is queued."""
        if self._now is not None:
            self._now[1].end()

    def end(self, blends: Sequence[BlendResult]) -> None:
        """The step has ended, and with it these blends."""
        if self._now is not None and not any(result.failure for result in blends):
            self._ended.append((*self._now, sum(result.load_ms + result.blend_ms for result in blends)))
        self._now = None

    def take(self) -> list[StepTime]:
        """Steps that the GPU is done with, since the last call."""
        done = [step for step in self._ended if step[1].is_done]
        self._ended = [step for step in self._ended if step not in done]
        return [StepTime(shape, max(timer.read()[1] - blended, 0.0)) for shape, timer, blended in done]


class Throttle:
    """Limits the CPU to one queued part of background work, so that new requests do not wait behind a long queue."""

    def __init__(self) -> None:
        self._queued: list[Any] = []

    def before(self) -> None:
        """Wait until at most one part is queued."""
        while len(self._queued) > 1:
            self._queued.pop(0).synchronize()

    def after(self) -> None:
        """A part was queued."""
        import torch

        if torch.cuda.is_available():
            mark: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            mark.record()
            self._queued.append(mark)


@dataclass(frozen=True)
class JobResources:
    """What the jobs of a worker share.

    Attributes:
        model: The model in this worker.
        loader: Loads KV from LMCache.
        timed_out: Loads that timed out.
        gpu_copy: Copies resident chunks; None if they are not in use.
        vllm_recomputes_bad_blocks: Whether vLLM recomputes blocks that are reported as failed; see
            lmcache_rag.connector.model_runner.recomputes_reported_blocks.
    """

    model: VLLMModel
    loader: KVLoader
    timed_out: TimedOutLoads
    gpu_copy: GpuCopy | None
    vllm_recomputes_bad_blocks: bool


class BlendJob:
    """One plan under way. Creating it requests the plan's KV.

    A pass that runs out of memory is aborted, and everything is computed in small chunks instead. Tensor-parallel ranks
    cannot leave a pass, since the others would wait for this rank in the middle of it: they reserve the memory before,
    and use chunks of the same size. A rank that runs out of memory nevertheless ends the engine.

    Args:
        plan: The plan.
        resources: What the jobs of the worker share.
        chunk_size: Most tokens in one forward pass; 0: as many as the model takes.

    Attributes:
        plan: The plan.
        blend: Runs its passes.
        timer: Its times.
        outcome: The result of the blend.
        failure: Why everything is computed instead; empty if it is blended.
        queued_all: Whether all of its work is queued.
        cancelled: Whether its request ended, so that its result is not needed.
        lost: Whether GPU memory was too small even to compute everything in small chunks.
    """

    def __init__(self, plan: BlendPlan, resources: JobResources, *, chunk_size: int = 0) -> None:
        import torch

        self.plan, self._resources = plan, resources
        self.outcome, self.failure = BlendOutcome(0, 0), ""
        self.queued_all = self.cancelled = self.lost = False
        self._steps: StepIterator[None] | None = None  # its work, once the KV is loaded
        self._finite_check: AsyncScalar | None = None  # not finite if the KV is damaged; None if nothing is to check

        model, loader = resources.model, resources.loader
        resident = [match for match in plan.matches if match.block >= 0]
        remote = [match for match in plan.matches if match.block < 0]
        self.timer = CudaTimer()
        failure: str = plan.failure
        self._futures: list[Any] = []
        if not loader.is_healthy and (remote or plan.exact > plan.local):
            failure = Fallback.NO_SERVER
            if plan.exact > plan.local:
                loader.give_back(plan)
        else:  # before anything else: the server needs some milliseconds before it sends the first byte
            if remote:  # the larger part first: the server prepares the other while this one is transferred
                self._futures.append(loader.submit_matches(plan, remote))
            if plan.exact > plan.local:
                self._futures.append(loader.submit_exact(plan))
        blocks = plan.block_ids
        if plan.background and len(blocks) * model.block_size < len(plan.token_ids):
            # The last token has no block yet, but its query drives the selection: its KV goes to vLLM's null block,
            # which is never read.
            blocks = (*blocks, NULL_BLOCK)
        self._sequence = PagedSequence.of(blocks, model.block_size, str(model.device))
        if resident and resources.gpu_copy is None:
            failure = failure or Fallback.NO_HOT_COPY
        elif resident and not failure and resources.gpu_copy is not None:
            resources.gpu_copy.run(resident, self._sequence)
        self._load_failure = failure
        self._ids = to_device_async(plan.token_ids, torch.int64, model.device)
        self.blend = BlendPass(model, self._sequence, chunk_size=chunk_size)

    # -- load ---------------------------------------------------------------------------------------------------------

    @property
    def is_started(self) -> bool:
        """Whether `load` was called, so that its work can be queued."""
        return self._steps is not None

    @property
    def uses_server(self) -> bool:
        """Whether it requested KV from LMCache."""
        return bool(self._futures)

    def is_loaded(self, *, idle: bool) -> bool:
        """Whether its work may begin; before the KV is there, it would make the whole step wait for the load.

        Args:
            idle: Whether the step has no other work, so that it may wait a moment.
        """
        loader = self._resources.loader
        if self._resources.model.ranks > 1:  # ranks see their own KV at different times, and must begin together
            return True
        if not self._seconds_left():
            return True
        if idle:
            return all(loader.answered(future, _POLL_S) and loader.there(future) for future in self._futures)
        return all(loader.there(future) for future in self._futures)

    def load(self) -> None:
        """Wait on the CPU until the KV is there, or the deadline.

        Ranks agree on whether it was loaded and there is memory for the work.
        """
        failure, plan, model, loader = self._load_failure, self.plan, self._resources.model, self._resources.loader
        for future in self._futures:
            if not loader.arrived(future, self._seconds_left()):
                failure = failure or Fallback.LOAD_FAILED
        unanswered = tuple(each for each in self._futures if not (loader.answered(each, 0.0) and loader.there(each)))
        if unanswered:
            blocks = plan.block_ids[plan.local // model.block_size :]
            since = time.monotonic() - (time.perf_counter() - self.timer.started)
            self._resources.timed_out.add(TimedOutLoad(plan.request_id, tuple(blocks), unanswered, since))
        ready = not failure and self.has_memory()
        if not model.all_ranks(ready):
            loaded = model.all_ranks(not failure)
            self.failure = failure or (Fallback.OUT_OF_MEMORY if loaded else Fallback.LOAD_FAILED_ELSEWHERE)
        self.timer.loaded()
        self._steps = self._blend_or_recompute()

    def has_memory(self) -> bool:
        """Whether this rank has memory for its blend, at the largest passes; see VLLMModel.has_memory."""
        plan, model, tokens = self.plan, self._resources.model, self.blend.chunk_size
        layer = get_policy(plan.policy).check_layer
        if layer is not None:  # a check that is cut in chunks takes more tokens through fewer layers
            tokens = max(tokens, tokens * model.layers // (layer + 1))
        prompt = len(plan.token_ids)
        return model.has_memory(min(tokens, model.max_tokens, prompt), prompt)

    def _seconds_left(self) -> float:
        """Seconds until the load times out."""
        return max(0.0, self.timer.started + self._resources.loader.deadline - time.perf_counter())

    # -- blend --------------------------------------------------------------------------------------------------------

    def advance(self, tokens: int) -> int:
        """Queue more of the work, at most that many tokens; returns how many were computed.

        Only a selection's pass over the suffix may exceed that, since it is not cut. A pass with a budget of few tokens
        is left to the next call, unless it is the first of this one.
        """
        assert self._steps is not None  # noqa: S101 - it was loaded
        done = 0
        self.timer.begin()
        try:
            with self._resources.model.using(self.plan.adapter):
                while True:
                    left = tokens - done
                    self.blend.budget = max(left, 1) if not done or left >= MIN_PASS_TOKENS else 0
                    took = next(self._steps)
                    if not took:
                        break
                    done += took
        except StopIteration:
            self.queued_all = True
        finally:
            self.timer.end()
        return done

    def advance_to_end(self) -> None:
        """Queue all of the work."""
        while not self.queued_all:
            self.advance(1 << 30)

    def _blend_or_recompute(self) -> StepIterator[None]:
        """Blend; or compute everything, if the job has failed or fails.

        Raises:
            torch.OutOfMemoryError: As `_recompute_all`; or in a pass of several ranks.
            Exception: Any other fault in a pass of several ranks, or one that computing everything meets, too.
        """
        import torch

        if not self.failure:
            try:
                if self.plan.matches:
                    yield from self._blend()
                else:
                    self._queue_finite_check(self._ids[:0], None)
            except torch.OutOfMemoryError:
                if self._resources.model.ranks > 1:
                    raise  # the others wait for this rank in the middle of the pass: it cannot begin another
                self.failure = Fallback.OUT_OF_MEMORY
            except Exception:  # a fault of ours costs this request its blend, and no other request anything
                if self._resources.model.ranks > 1:
                    raise
                log.exception("A blend failed; request %s is computed in full", self.plan.request_id)
                self.failure = Fallback.OTHER
            # Outside `except`: the traceback holds the pass's tensors, so memory would not be freed.
            if self.failure:
                self._shrink_chunks()
        if self.failure:
            yield from self._recompute_all()

    def _blend(self) -> StepIterator[None]:
        plan, policy = self.plan, get_policy(self.plan.policy)
        selection = yield from self.blend.select(
            self._ids, plan.spans, plan.exact, policy=policy, budget=plan.budget, free=plan.free
        )
        self.timer.selected()
        # Before the recomputation, which takes most of the time: reading the check does not wait for that.
        self._queue_finite_check(selection.checked, selection.observed_sum)
        with_last_token = plan.alone and plan.end < self._sequence.capacity
        self.outcome = yield from self.blend.recompute(
            self._ids, selection, end=plan.end, with_last_token=with_last_token
        )

    def recompute_all(self) -> None:
        """Replace its work: compute everything that was claimed. See `advance`."""
        self._steps, self.queued_all = self._recompute_all(), False

    def _recompute_all(self) -> StepIterator[None]:
        """Compute everything that was claimed, in ever smaller chunks if memory runs out.

        Raises:
            torch.OutOfMemoryError: There is no memory for the smallest chunk, and blocks may not be reported to vLLM;
                or in a pass of several ranks.
        """
        import torch

        plan, done, self._finite_check = self.plan, self.plan.local, None
        ranks, vllm_recomputes_bad_blocks = self._resources.model.ranks, self._resources.vllm_recomputes_bad_blocks
        if not self._shrink_to_memory():
            self.lost, self.failure = True, Fallback.OUT_OF_MEMORY
            if not vllm_recomputes_bad_blocks:
                raise torch.OutOfMemoryError("There is no GPU memory to compute even a few tokens.")
        while done < plan.end and not self.lost:
            positions = torch.arange(done, plan.end, device=self._ids.device)
            try:
                for count in self.blend.compute(self._ids, positions, plan.end):
                    done += count
                    yield count
            except torch.OutOfMemoryError:
                smallest = self.blend.chunk_size <= SMALLEST
                if ranks > 1 or (smallest and not vllm_recomputes_bad_blocks):
                    raise
                self.lost = smallest
                self.failure = Fallback.OUT_OF_MEMORY if smallest else self.failure
            if done < plan.end:
                self._shrink_chunks()

    def _shrink_to_memory(self) -> bool:
        """Shrink the chunks until they fit every rank's memory. Returns False if even the smallest does not fit."""
        # Nothing is selected or checked here, so that no memory depends on the prompt's length.
        model, prompt = self._resources.model, len(self.plan.token_ids)
        while not model.all_ranks(model.has_memory(min(self.blend.chunk_size, prompt), 0)):
            if self.blend.chunk_size <= SMALLEST:
                return False
            self._shrink_chunks()
        return True

    def _shrink_chunks(self) -> None:
        """Memory ran out in a pass: make the next ones smaller."""
        import torch

        torch.cuda.empty_cache()
        self.blend.chunk_size = max(min(SMALL, self.blend.chunk_size // 2), SMALLEST)

    # -- verify -------------------------------------------------------------------------------------------------------

    def _queue_finite_check(self, cached: Tensor, observed_sum: Tensor | None) -> None:
        """Queue a sum that is not finite if the loaded KV is not, and its copy to the host.

        The policy's own pass over all of it (`observed_sum`) covers everything but the last layer's values.

        Args:
            cached: Positions of the cached chunk KV that stays, int64.
            observed_sum: See BlendOutcome.
        """
        import torch

        plan, sequence, model = self.plan, self._sequence, self._resources.model
        if plan.exact <= plan.local and not len(cached):
            return  # nothing was loaded that stays
        caches = [model.cache(layer) for layer in range(model.layers)]
        unchecked = [cache for pair in caches for cache in pair] if observed_sum is None else [caches[-1][1]]
        loaded = torch.cat([torch.arange(plan.local, plan.exact, device=model.device), cached])
        slots = sequence.slots(loaded)
        blocks, within = slots // sequence.block_size, slots % sequence.block_size
        total = torch.zeros((), device=model.device) if observed_sum is None else observed_sum.clone()
        for cache in unchecked:  # a sum is not finite as soon as one of its terms is not
            total += kv_quant.take(cache, blocks, within).sum(dtype=torch.float32)
        self._finite_check = AsyncScalar(total)

    def verify(self) -> bool:
        """Whether the loaded KV is finite, on all ranks; if not, the job fails.

        Waits for the GPU up to the end of the selection.
        """
        check, self._finite_check = self._finite_check, None
        if check is None:
            return True
        if not self._resources.model.all_ranks(math.isfinite(check.read())):
            self.failure = Fallback.DAMAGED_KV
        return not self.failure

    # -- report -------------------------------------------------------------------------------------------------------

    def claimed_blocks(self) -> set[int]:
        """The blocks that vLLM has to recompute if the job failed."""
        block_size = self._resources.model.block_size
        first = self.plan.local // block_size
        return set(self.plan.block_ids[first : -(-self.plan.end // block_size)])

    def result(self) -> BlendResult:
        """The counts and times of the job. Waits for the GPU."""
        plan, outcome = self.plan, self.outcome
        select_ms = 0.0
        if self.failure:
            counts, resident, reason = (plan.local, 0, 0, plan.end - plan.local), 0, ""
        else:
            select_ms = self.timer.read_selection()
            covered = sum(match.end - match.start for match in plan.matches)
            counts = (plan.exact, covered - outcome.recomputed, outcome.recomputed, outcome.gaps)
            resident = sum(match.end - match.start for match in plan.matches if match.block >= 0)
            reason = outcome.reason
        times = self.timer.read()
        result = BlendResult(plan.request_id, *counts, *times, self.failure, resident, reason, select_ms)
        if log.isEnabledFor(logging.DEBUG):  # to compare tensor-parallel ranks
            what = self.failure or f"{outcome.recomputed} tokens selected, digest {outcome.digest()}"
            log.debug("request %s on rank %d: %s", plan.request_id, self._resources.model.rank, what)
        return result
