"""Worker side: has chunk KV written to a request's blocks and blends it, before vLLM computes the rest."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lmcache_rag.blend.policies import get_policy
from lmcache_rag.connector.blend_pass import BlendOutcome, BlendPass
from lmcache_rag.connector.paged import PagedSequence
from lmcache_rag.connector.plan import BlendPlan, BlendResult, Match

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache_rag.connector.hot_copy import HotCopy
    from lmcache_rag.connector.model import VLLMModel

log = logging.getLogger("lmcache_rag")


class Link(Protocol):
    """How KV is loaded; see lmcache_rag.connector.compat_lmcache.WorkerLink."""

    @property
    def is_healthy(self) -> bool:
        """Whether the server answers."""
        ...

    def submit_exact(
        self,
        request_id: str,
        token_ids: Sequence[int],
        start: int,
        end: int,
        block_ids: Sequence[int],
        salt: str,
        configs: dict[str, Any] | None,
    ) -> Any:
        """Ask for an exact prefix."""
        ...

    def submit_matches(
        self,
        request_id: str,
        token_ids: Sequence[int],
        matches: Sequence[Match],
        block_ids: Sequence[int],
        salt: str,
        configs: dict[str, Any] | None,
    ) -> Any:
        """Ask for chunk KV at its new positions."""
        ...

    def arrived(self, future: Any) -> bool:
        """Whether it came."""
        ...


@dataclass
class _Pending:
    """A plan whose work is queued on the GPU."""

    plan: BlendPlan
    outcome: BlendOutcome
    clock: _Clock
    failure: str = ""
    evidence: Any = None  # not finite when the KV was damaged


class WorkerSide:
    """Runs plans.

    A plan's work is queued before the model's forward pass; whether the KV was sound is only looked at behind it, so
    that the GPU never waits for the host. Damage found then is reported to vLLM, which computes those blocks again.

    Args:
        model: The model in this worker.
        link: How KV is loaded.
        may_report: Whether vLLM computes blocks again that are reported (kv_load_failure_policy "recompute"). If not,
            damage is looked for before the forward pass.
        hot: Copies what vLLM itself still holds.
    """

    def __init__(self, model: VLLMModel, link: Link, *, may_report: bool = True, hot: HotCopy | None = None) -> None:
        self._model, self._link, self._may_report, self._hot = model, link, may_report, hot
        self._pending: list[_Pending] = []
        self._results: list[BlendResult] = []
        self._bad_blocks: set[int] = set()
        self._warned = ""

    def run(self, plan: BlendPlan) -> None:
        """Make the KV of the plan's claim right, whatever happens: by blending, else by computing all of it."""
        import torch

        with torch.inference_mode():
            clock = _Clock()
            sequence = PagedSequence.of(plan.block_ids, self._model.block, str(self._model.device))
            ids = torch.tensor(plan.token_ids, dtype=torch.int64).to(self._model.device, non_blocking=True)
            blend = BlendPass(self._model, sequence)
            failure = self._load(plan, sequence)
            clock.lap()
            pending = _Pending(plan, BlendOutcome(0, 0), clock, failure)
            if not failure:
                try:
                    if plan.matches:
                        policy = get_policy(plan.policy)
                        pending.outcome = blend.run(
                            ids, plan.spans, plan.exact, policy=policy, ratio=plan.ratio, end=plan.end
                        )
                    pending.evidence = self._evidence(pending.outcome, plan, sequence)
                    if not self._may_report and not self._sound(pending):
                        pending.failure = "damaged KV"
                except torch.OutOfMemoryError:
                    if self._model.ranks > 1:
                        raise  # the others wait for this rank in the middle of the pass: it cannot begin another
                    torch.cuda.empty_cache()
                    pending.failure = "out of memory"
            if pending.failure:
                pending.evidence = None
                blend.compute(ids, torch.arange(plan.local, plan.end, device=ids.device), plan.end)
            clock.lap()
            self._pending.append(pending)

    def finish(self) -> None:
        """Behind the forward pass: see what became of the plans. Waits for the GPU to be done with them."""
        pending, self._pending = self._pending, []
        for item in pending:
            plan, outcome = item.plan, item.outcome
            load_ms, blend_ms = item.clock.stop()
            if item.evidence is not None and not self._sound(item):
                item.failure = "damaged KV"
                first = plan.local // self._model.block
                self._bad_blocks |= set(plan.block_ids[first : -(-plan.end // self._model.block)])
            if item.failure:
                self._warn(item.failure)
                counts = (plan.local, 0, 0, plan.end - plan.local)
            else:
                covered = sum(match.end - match.start for match in plan.matches)
                counts = (plan.exact, covered - outcome.recomputed, outcome.recomputed, outcome.gaps)
            hot = sum(m.end - m.start for m in plan.matches if m.block >= 0) if not item.failure else 0
            self._results.append(BlendResult(plan.request_id, *counts, load_ms, blend_ms, item.failure, hot))

    def take_results(self) -> list[BlendResult]:
        """What was done since the last call."""
        results, self._results = self._results, []
        return results

    def take_bad_blocks(self) -> set[int]:
        """Blocks whose KV must be computed again."""
        blocks, self._bad_blocks = self._bad_blocks, set()
        return blocks

    def _load(self, plan: BlendPlan, sequence: PagedSequence) -> str:
        """Have the KV written to the blocks; returns why that failed, the same on every rank."""
        hot = [match for match in plan.matches if match.block >= 0]
        cold = [match for match in plan.matches if match.block < 0]
        ok = self._link.is_healthy or not (cold or plan.exact > plan.local)
        reason = "" if ok else "no server"
        waiting = []
        asked = plan.request_id, plan.token_ids
        if ok and plan.exact > plan.local:
            waiting.append(
                self._link.submit_exact(*asked, plan.local, plan.exact, plan.block_ids, plan.cache_salt, plan.configs)
            )
        if ok and cold:
            waiting.append(self._link.submit_matches(*asked, cold, plan.block_ids, plan.cache_salt, plan.configs))
        if ok and hot:
            if self._hot is None:
                ok, reason = False, "no copy of hot chunks"
            else:
                self._hot.run(hot, sequence)
        for future in waiting:
            if not self._link.arrived(future):
                ok, reason = False, "load failed"
        return reason if self._model.all_ranks(ok) else (reason or "load failed on another rank")

    def _evidence(self, outcome: BlendOutcome, plan: BlendPlan, sequence: PagedSequence) -> Any:
        """A number on the GPU that is not finite if the KV that came is not: the answer would not be one either.

        The policy's own pass over all of it shows that already, but for the last layer's values.
        """
        import torch

        seen = outcome.watched
        caches = [self._model.cache(layer) for layer in range(self._model.layers)]
        unseen = [cache for pair in caches for cache in pair] if seen is None else [caches[-1][1]]
        total = torch.zeros((), device=self._model.device) if seen is None else seen.clone()
        blocks = sequence.blocks[: -(-plan.end // sequence.block)].long()
        last = plan.end - (len(blocks) - 1) * sequence.block
        for cache in unseen:
            own = cache[blocks]
            # A sum is not finite as soon as one of its terms is not.
            total += own[:-1].sum(dtype=torch.float32) + own[-1, :last].sum(dtype=torch.float32)
        return total

    def _sound(self, item: _Pending) -> bool:
        return self._model.all_ranks(math.isfinite(float(item.evidence)))

    def _warn(self, failure: str) -> None:
        if failure != self._warned:  # once for each kind of trouble
            self._warned = failure
            log.warning("KV could not be blended (%s); prompts are computed instead", failure)


class _Clock:
    """Two laps, on the GPU's clock where there is one."""

    def __init__(self) -> None:
        import time

        import torch

        self._cuda = torch.cuda.is_available()
        self._now = time.perf_counter
        self._marks: list[Any] = []
        self.lap()

    def lap(self) -> None:
        """Note the time."""
        import torch

        if self._cuda:
            mark: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            mark.record()
            self._marks.append(mark)
        else:
            self._marks.append(self._now())

    def stop(self) -> tuple[float, float]:
        """Milliseconds of the first and of the second lap. Waits for the GPU."""
        first, second, third = self._marks
        if not self._cuda:
            return (second - first) * 1e3, (third - second) * 1e3
        third.synchronize()
        return first.elapsed_time(second), second.elapsed_time(third)
