"""When a blend may run: a blend must not make other requests wait for long.

An idle engine blends a request within one step (SYNC), which gives the lowest TTFT. While others run, KV is loaded in
the background and blended in pieces, one in each step, next to their tokens (ASYNC; vLLM calls that an asynchronous
load). What fits neither is asked for again in the next step (DEFER).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum


class Admission(Enum):
    """How a blend may run."""

    SYNC = "within this step"
    ASYNC = "in the background"
    DEFER = "in a later step"


@dataclass(frozen=True)
class Allowance:
    """What a step may blend in the background.

    Attributes:
        tokens: Most tokens to compute; only a selection's pass over the suffix may exceed it a little.
        idle: Whether the step has nothing else to do.
    """

    tokens: int = 0
    idle: bool = False


@dataclass
class BlendBudget:
    """Admits blends. Counts tokens that are computed, not those that are reused.

    Args:
        step_tokens: Most tokens that the blends of a step compute, except for a blend within the step of an idle
            engine.
        idle_tokens: Most tokens of a blend within the step of an idle engine.
        overlap: Whether blends may run in the background at all.
        max_background: Most blends in the background.
    """

    step_tokens: int
    idle_tokens: int
    overlap: bool = True
    max_background: int = 8
    _running: set[str] = field(default_factory=set)  # requests that ran in the last step and have not ended since
    _background: set[str] = field(default_factory=set)  # until a worker is done with them
    _claims: dict[str, tuple[Admission, int]] = field(default_factory=dict)  # of this step

    def admit(self, tokens: int) -> Admission:
        """How a blend that computes so many tokens can run."""
        if not self.overlap:
            fits = not self._sync_tokens or self._sync_tokens + tokens <= self.step_tokens
            return Admission.SYNC if fits else Admission.DEFER
        if self.idle and tokens <= self.idle_tokens:
            return Admission.SYNC
        return Admission.DEFER if self.full else Admission.ASYNC

    @property
    def idle(self) -> bool:
        """Whether nothing runs, as far as is known."""
        return not (self._running or self._background or self._claims)

    @property
    def full(self) -> bool:
        """Whether no more blends can start in the background."""
        claimed = sum(how is Admission.ASYNC for how, _ in self._claims.values())
        return self.overlap and len(self._background) + claimed >= self.max_background

    def claim(self, request_id: str, how: Admission, tokens: int) -> None:
        """A blend is going to run, if vLLM has blocks for it."""
        self._claims[request_id] = (how, tokens)

    def withdraw(self, request_id: str) -> None:
        """A blend that was claimed is not going to run."""
        self._claims.pop(request_id, None)

    def on_allocated(self, request_id: str) -> None:
        """VLLM has allocated blocks for a claim: its blend is going to run."""
        if self._claims.get(request_id, (Admission.SYNC, 0))[0] is Admission.ASYNC:
            self._background.add(request_id)

    def on_step(self, scheduled: Collection[str]) -> Allowance:
        """End the scheduling of a step that runs these requests. Returns what it may blend in the background."""
        allowance = Allowance(max(0, self.step_tokens - self._sync_tokens), not scheduled)
        self._running, self._claims = set(scheduled), {}
        return allowance

    def on_blended(self, request_id: str) -> None:
        """A worker is done with a blend."""
        self._background.discard(request_id)

    def on_finished(self, request_id: str) -> None:
        """A request ended. A blend of it that is under way in a worker continues."""
        self._running.discard(request_id)

    @property
    def background(self) -> int:
        """Blends in the background."""
        return len(self._background)

    @property
    def _sync_tokens(self) -> int:
        return sum(tokens for how, tokens in self._claims.values() if how is Admission.SYNC)
