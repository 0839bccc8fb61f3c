"""How much of a step blends may take: a blend must not make other requests wait for long.

An idle engine blends a request within one step, which is soonest. While others run, KV is loaded in the background and
blended a piece in each step, beside their tokens; vLLM calls that an asynchronous load.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

Way = Literal["now", "beside", "later"]


@dataclass(frozen=True)
class Allowance:
    """What a step may blend in the background.

    Attributes:
        tokens: Most tokens to compute; only the pass of a selection may take it a little further.
        idle: Whether the step has nothing else to do.
    """

    tokens: int = 0
    idle: bool = False


@dataclass
class Pace:
    """Decides when blends run. Counts tokens that are computed, not those that are reused.

    Args:
        step_tokens: Most tokens that the blends of a step compute, but for one within the step of an idle engine.
        idle_tokens: Most tokens of that one.
        overlap: Whether blends may run in the background at all.
        at_once: Most blends in the background.
    """

    step_tokens: int
    idle_tokens: int
    overlap: bool = True
    at_once: int = 8
    _others: set[str] = field(default_factory=set)  # ran in the last step, and did not end since
    _beside: set[str] = field(default_factory=set)  # in the background; until a worker is done with them
    _claims: dict[str, tuple[Way, int]] = field(default_factory=dict)  # of this step

    def way(self, tokens: int) -> Way:
        """How a blend that computes so many tokens can run: within this step, in the background, or not yet."""
        if not self.overlap:
            return "now" if not self._now or self._now + tokens <= self.step_tokens else "later"
        if self.idle and tokens <= self.idle_tokens:
            return "now"
        return "later" if self.full else "beside"

    @property
    def idle(self) -> bool:
        """Whether nothing runs, as far as is known."""
        return not (self._others or self._beside or self._claims)

    @property
    def full(self) -> bool:
        """Whether no more blends can begin in the background."""
        return (
            self.overlap
            and len(self._beside) + sum(way == "beside" for way, _ in self._claims.values()) >= self.at_once
        )

    def claim(self, request_id: str, way: Way, tokens: int) -> None:
        """A blend is going to run so, if vLLM has blocks for it."""
        self._claims[request_id] = (way, tokens)

    def give_back(self, request_id: str) -> None:
        """A blend that was claimed is not going to run."""
        self._claims.pop(request_id, None)

    def begun(self, request_id: str) -> None:
        """It has."""
        if self._claims.get(request_id, ("now", 0))[0] == "beside":
            self._beside.add(request_id)

    def step(self, scheduled: Collection[str]) -> Allowance:
        """These requests run in this step; the next one begins."""
        allowance = Allowance(max(0, self.step_tokens - self._now), not scheduled)
        self._others, self._claims = set(scheduled), {}
        return allowance

    def done(self, request_id: str) -> None:
        """A worker is done with a blend."""
        self._beside.discard(request_id)

    def ended(self, request_id: str) -> None:
        """A request ended. What a worker does for it goes on."""
        self._others.discard(request_id)

    @property
    def beside(self) -> int:
        """Blends in the background."""
        return len(self._beside)

    @property
    def _now(self) -> int:
        return sum(tokens for way, tokens in self._claims.values() if way == "now")
