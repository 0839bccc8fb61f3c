"""A blend under way."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmcache_rag.blend.policies import get_policy
from lmcache_rag.connector.attention import Number, PagedSequence
from lmcache_rag.connector.blend_pass import BlendOutcome, BlendPass, Steps
from lmcache_rag.connector.plan import BlendPlan
from lmcache_rag.protocol import Fallback

if TYPE_CHECKING:
    from torch import Tensor

    from lmcache_rag.connector.model_runner import VLLMModel


LEAST = 64  # a pass over fewer tokens takes hardly less time: it reads the same weights


class Clock:
    """Time of the load and of the work, on the GPU's clock where there is one."""

    def __init__(self) -> None:
        import torch

        self.asked = time.perf_counter()
        self._cuda = torch.cuda.is_available()
        self._load = [self._mark()]
        self._work: list[tuple[Any, Any]] = []

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        import torch

        mark: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        mark.record()
        return mark

    def loaded(self) -> None:
        """The load is done, or behind us on the stream."""
        self._load.append(self._mark())

    def begin(self) -> None:
        """A piece of the work begins."""
        self._work.append((self._mark(), None))

    def end(self) -> None:
        """It ends."""
        self._work[-1] = (self._work[-1][0], self._mark())

    @property
    def is_over(self) -> bool:
        """Whether `read` would not wait: all of the work that was queued is done."""
        return not self._cuda or all(mark.query() for mark in (self._load[-1], *(end for _, end in self._work[-1:])))

    def read(self) -> tuple[float, float]:
        """Milliseconds of load and work. Waits for the GPU."""
        return self._between(*self._load), sum(self._between(*marks) for marks in self._work)

    def _between(self, first: Any, last: Any) -> float:
        if not self._cuda:
            return float(last - first) * 1e3
        last.synchronize()
        return float(first.elapsed_time(last))


class Throttle:
    """Keeps the host no more than a piece ahead of the GPU: who comes now would wait for all that is queued."""

    def __init__(self) -> None:
        self._queued: list[Any] = []

    def before(self) -> None:
        """Wait until at most one piece is under way."""
        while len(self._queued) > 1:
            self._queued.pop(0).synchronize()

    def after(self) -> None:
        """A piece was queued."""
        import torch

        if torch.cuda.is_available():
            mark: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            mark.record()
            self._queued.append(mark)


@dataclass
class Job:
    """A plan under way.

    Attributes:
        plan: The plan.
        sequence: The request's blocks.
        ids: The prompt, int64 [n], where the cache lies.
        blend: Runs its passes.
        waiting: What is being loaded.
        reason: Why it cannot be loaded; empty when it can.
        clock: Time it took.
        steps: Its work; None until the load is done.
        over: Whether all of its work is queued.
        cancelled: Whether nobody wants its result any more.
        outcome: What the blend did.
        failure: Why everything is computed instead.
        evidence: Not finite when the KV was damaged; None when there is nothing to look at, or no longer.
        lost: Whether not even computing everything was possible.
    """

    plan: BlendPlan
    sequence: PagedSequence
    ids: Tensor
    blend: BlendPass
    waiting: list[Any] = field(default_factory=list)
    reason: str = ""
    clock: Clock = field(default_factory=Clock)
    steps: Steps[None] | None = None
    over: bool = False
    cancelled: bool = False
    outcome: BlendOutcome = field(default_factory=lambda: BlendOutcome(0, 0))
    failure: str = ""
    evidence: Number | None = None
    lost: bool = False

    def advance(self, tokens: int) -> int:
        """Queue more of the work, at most so many tokens; returns how many were computed.

        Only the pass of a selection may take it further, since that is not cut. A pass that would have room for few
        tokens is left to the next call, unless it is this one's first.
        """
        assert self.steps is not None  # noqa: S101 - it was loaded
        done = 0
        self.clock.begin()
        try:
            while True:
                left = tokens - done
                self.blend.room = max(left, 1) if not done or left >= LEAST else 0
                took = next(self.steps)
                if not took:
                    break
                done += took
        except StopIteration:
            self.over = True
        finally:
            self.clock.end()
        return done


SMALL, SMALLEST = 512, 16  # tokens of a pass where memory ran out before, and where there is none at all


class Work:
    """Does what plans say.

    A pass for which there is no memory is done without, and everything computed in small pieces. Tensor-parallel ranks
    ask for the memory beforehand, and take pieces of the same size. One whose pass fails all the same ends the engine:
    the others are in the middle of that pass, which they cannot leave.

    Args:
        model: The model in this worker.
        may_report: Whether vLLM computes blocks again that are reported.
    """

    def __init__(self, model: VLLMModel, *, may_report: bool) -> None:
        self._model, self._may_report = model, may_report

    def steps(self, job: Job) -> Steps[None]:
        """Blend; or compute everything, where the job has failed or fails.

        Raises:
            torch.OutOfMemoryError: As `everything`; or in a pass of several ranks.
        """
        import torch

        plan = job.plan
        if not job.failure:
            try:
                if plan.matches:
                    job.outcome = yield from job.blend.steps(
                        job.ids,
                        plan.spans,
                        plan.exact,
                        policy=get_policy(plan.policy),
                        ratio=plan.ratio,
                        end=plan.end,
                        last_too=plan.alone and plan.end < job.sequence.capacity,
                        look=functools.partial(self._look, job),
                    )
                else:
                    self._look(job, job.ids[:0], None)
            except torch.OutOfMemoryError:
                if self._model.ranks > 1:
                    raise  # the others wait for this rank in the middle of the pass: it cannot begin another
                job.failure = Fallback.OUT_OF_MEMORY
            # Not above: while an exception is handled, it keeps all that the pass had allocated.
            if job.failure:
                self._take_less(job)
        if job.failure:
            yield from self.everything(job)

    def everything(self, job: Job) -> Steps[None]:
        """Compute everything that was claimed, in ever smaller pieces where memory runs out.

        Raises:
            torch.OutOfMemoryError: There is none for the smallest piece, and vLLM may not be told; or in a pass of
                several ranks.
        """
        import torch

        plan, done, job.evidence = job.plan, job.plan.local, None
        if not self._smaller(job):
            job.lost, job.failure = True, Fallback.OUT_OF_MEMORY
            if not self._may_report:
                raise torch.OutOfMemoryError("There is no GPU memory to compute even a few tokens.")
        while done < plan.end and not job.lost:
            positions = torch.arange(done, plan.end, device=job.ids.device)
            try:
                for count in job.blend.compute(job.ids, positions, plan.end):
                    done += count
                    yield count
            except torch.OutOfMemoryError:
                smallest = job.blend.piece <= SMALLEST
                if self._model.ranks > 1 or (smallest and not self._may_report):
                    raise
                job.lost = smallest
                job.failure = Fallback.OUT_OF_MEMORY if smallest else job.failure
            if done < plan.end:
                self._take_less(job)

    def fits(self, job: Job) -> bool:
        """Whether this rank has memory for the job's blend, its passes as large as may be; see VLLMModel.has_memory."""
        plan, tokens = job.plan, job.blend.piece
        layer = getattr(get_policy(plan.policy), "check_layer", None)
        if layer is not None:  # a check that is cut in pieces takes more tokens through fewer layers
            tokens = tokens * self._model.layers // (layer + 1)
        prompt = len(plan.token_ids)
        return self._model.has_memory(min(tokens, self._model.most_tokens, prompt), prompt)

    def _smaller(self, job: Job) -> bool:
        """Make the job's pieces small enough for every rank's memory; whether any is."""
        # Nothing is selected nor looked at here, so that the prompt's length takes no memory.
        while not self._model.all_ranks(self._model.has_memory(min(job.blend.piece, len(job.plan.token_ids)), 0)):
            if job.blend.piece <= SMALLEST:
                return False
            self._take_less(job)
        return True

    def _take_less(self, job: Job) -> None:
        """Memory ran out in a pass of this job: the next ones are smaller."""
        import torch

        torch.cuda.empty_cache()
        job.blend.piece = max(min(SMALL, job.blend.piece // 2), SMALLEST)

    def _look(self, job: Job, cached: Tensor, watched: Tensor | None) -> None:
        """Have a number on its way from the GPU that is not finite if the KV that came is not.

        The policy's own pass over all of it shows that already (`watched`), but for the last layer's values.
        """
        import torch

        plan, sequence, device = job.plan, job.sequence, self._model.device
        if plan.exact <= plan.local and not len(cached):
            return  # nothing came that stays
        caches = [self._model.cache(layer) for layer in range(self._model.layers)]
        unseen = [cache for pair in caches for cache in pair] if watched is None else [caches[-1][1]]
        came = torch.cat([torch.arange(plan.local, plan.exact, device=device), cached])
        slots = sequence.slots(came)
        blocks, within = slots // sequence.block, slots % sequence.block
        total = torch.zeros((), device=device) if watched is None else watched.clone()
        for cache in unseen:  # a sum is not finite as soon as one of its terms is not
            total += cache[blocks, within].sum(dtype=torch.float32)
        job.evidence = Number(total)

    def proven(self, job: Job) -> bool:
        """Whether the KV that came was sound, on all ranks; waits for the GPU to be done with the selection."""
        evidence, job.evidence = job.evidence, None
        if evidence is None:
            return True
        if not self._model.all_ranks(math.isfinite(evidence.read())):
            job.failure = Fallback.DAMAGED_KV
        return not job.failure
