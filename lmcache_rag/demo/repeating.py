"""Both arms many times, the passages and the arms in random order: medians, and how many answers differ."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lmcache_rag.demo.record import ARMS, ArmName, Problem

if TYPE_CHECKING:
    from lmcache_rag.demo.arms import Arm, Request


@dataclass(frozen=True, slots=True)
class Pair:
    """One repetition: both times to the first token in milliseconds, what was reused, whether the answers differ.

    `alone` says whether nothing else was computed before the first tokens.
    """

    order: tuple[int, ...]
    first: ArmName
    blended_ms: float
    baseline_ms: float
    reused_tokens: int
    prefix_tokens: int
    baseline_prefix_tokens: int
    differ: bool
    alone: bool = True


@dataclass
class Repeats:
    """A run of repetitions.

    Attributes:
        question: The question.
        wanted: How many repetitions.
        passages: The chunks, in the page's order.
        pairs: Those done so far.
        problem: Why it ended early.
        finished: Whether it has ended.
    """

    question: str
    wanted: int
    passages: list[int]
    pairs: list[Pair] = field(default_factory=list)
    problem: Problem | None = None
    finished: bool = False

    @property
    def medians(self) -> tuple[float, float] | None:
        """Median times to the first token, blended and baseline, in milliseconds, of what was computed alone."""
        alone = [pair for pair in self.pairs if pair.alone]
        if not alone:
            return None
        return (
            statistics.median(pair.blended_ms for pair in alone),
            statistics.median(pair.baseline_ms for pair in alone),
        )

    @property
    def disturbed(self) -> int:
        """How many pairs are no part of the medians, since something else was computed at the same time."""
        return sum(not pair.alone for pair in self.pairs)

    @property
    def speedup(self) -> float | None:
        """Baseline's median by the blended one; None before the first pair, and where nothing was reused."""
        if self.medians is None or not any(pair.reused_tokens for pair in self.pairs):
            return None
        blended, baseline = self.medians
        return baseline / blended if blended > 0 else None

    @property
    def differing(self) -> int:
        """How many of the answers differ."""
        return sum(pair.differ for pair in self.pairs)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        medians = self.medians
        return {
            "question": self.question,
            "wanted": self.wanted,
            "passages": self.passages,
            "pairs": [asdict(pair) for pair in self.pairs],
            "median_blended_ms": medians[0] if medians else None,
            "median_baseline_ms": medians[1] if medians else None,
            "speedup": self.speedup,
            "differing": self.differing,
            "disturbed": self.disturbed,
            "error": asdict(self.problem) if self.problem else None,
        }


async def repeat(
    run: Repeats, arms: Mapping[ArmName, Arm], requests: Mapping[ArmName, Request], on_change: Callable[[], None]
) -> None:
    """Fill a run, one request at a time; each pair of requests has one order of passages.

    Args:
        run: Is filled.
        arms: The arms.
        requests: What each is asked.
        on_change: Called after each pair.

    Raises:
        CancelledError: It was stopped; the pairs so far stay.
    """
    try:
        for _ in range(run.wanted):
            hits = list(requests["blended"].hits)
            random.shuffle(hits)
            names = list(ARMS)
            random.shuffle(names)
            turns, alone = {}, True
            for name in names:
                turn = await arms[name].answer(replace(requests[name], hits=tuple(hits)))
                if turn.stopped:
                    raise asyncio.CancelledError
                if turn.problem or turn.completion is None:
                    run.problem = turn.problem
                    return
                turns[name], alone = turn.completion, alone and turn.alone
            blended, baseline = turns["blended"], turns["baseline"]
            run.pairs.append(
                Pair(
                    tuple(hit.chunk_id for hit in hits),
                    names[0],
                    blended.stats.ttft_ms,
                    baseline.stats.ttft_ms,
                    blended.stats.reused_tokens,
                    blended.stats.prefix_tokens,
                    baseline.stats.prefix_tokens,
                    blended.text != baseline.text,
                    alone,
                )
            )
            on_change()
    finally:
        run.finished = True
        on_change()
