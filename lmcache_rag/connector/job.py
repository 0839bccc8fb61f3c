"""A plan that a worker is carrying out, and its clock."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmcache_rag.connector.blend_pass import BlendOutcome, BlendPass, Steps
from lmcache_rag.connector.paged import PagedSequence
from lmcache_rag.connector.pinned import Number
from lmcache_rag.connector.plan import BlendPlan

if TYPE_CHECKING:
    from torch import Tensor

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
