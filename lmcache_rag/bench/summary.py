"""What many timed requests amount to."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lmcache_rag.bench.client import Timed

STEPS = (
    "prefix_tokens",
    "hot_tokens",
    "reused_tokens",
    "recomputed_tokens",
    "computed_tokens",
    "lookup_ms",
    "load_ms",
    "blend_ms",
)


def steps(done: Iterable[Timed]) -> dict[str, float]:
    """Medians of what the server said of itself; empty where it said nothing."""
    found = [timed.statistics for timed in done if timed.statistics]
    return {step: statistics.median(each.get(step, 0) for each in found) for step in STEPS} if found else {}


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of the values lies, one of them; 0 where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def under_load(done: Sequence[Timed]) -> dict[str, Any]:
    """Times to the first token and gaps between tokens of requests that ran beside each other, in milliseconds."""
    first = [timed.ttft_ms for timed in done]
    gaps = [gap for timed in done for gap in timed.gaps_ms]
    return {
        "ttft_ms_median": statistics.median(first),
        "ttft_ms_p99": percentile(first, 0.99),
        "gap_ms_p50": percentile(gaps, 0.5),
        "gap_ms_p90": percentile(gaps, 0.9),
        "gap_ms_p99": percentile(gaps, 0.99),
        "gap_ms_max": max(gaps, default=0.0),
        "steps": steps(done),
        "ttft_ms": [round(each, 2) for each in first],
        "gaps_ms": [round(each, 2) for each in gaps],
    }


@dataclass(frozen=True)
class Pairs:
    """The same kind of prompt asked of two servers in turn.

    Attributes:
        prompt: Which kind.
        tokens: Its length.
        base_ms: The baseline's times to the first token.
        ours_ms: The other's, in the same order: each stands beside the baseline's at that moment.
    """

    prompt: str
    tokens: int
    base_ms: tuple[float, ...]
    ours_ms: tuple[float, ...]

    @property
    def of_medians(self) -> float:
        """How much more the other's median is, as a share of the baseline's: 0.03 is 3% more."""
        return statistics.median(self.ours_ms) / statistics.median(self.base_ms) - 1

    @property
    def of_pairs(self) -> float:
        """The median of the same share taken pair by pair: what drifts over minutes cancels out."""
        return statistics.median(ours / base for base, ours in zip(self.base_ms, self.ours_ms, strict=True)) - 1

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        medians = {
            "base_median_ms": statistics.median(self.base_ms),
            "ours_median_ms": statistics.median(self.ours_ms),
        }
        return {**asdict(self), **medians, "of_medians": self.of_medians, "of_pairs": self.of_pairs}
