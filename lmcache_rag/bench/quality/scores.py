"""Scores of answers, differences to the full prefill with intervals, the recommendation, and the gate."""

from __future__ import annotations

import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lmcache_rag._utils import needs
from lmcache_rag.bench.quality.arms import CONTEXTPILOT, FULL, UNBLENDING

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lmcache_rag.bench.quality.results import Record

POOLED = "all"  # name of all cells, or of all tasks, together
_DRAWS, _AT_ONCE = 4000, 250  # of the bootstrap
_FEW_RIGHT = 0.1  # of the full prefill's answers: below it a comparison shows little
_MOST_KEPT = 4000  # questions: 128 MB
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
_AS_ASCII = str.maketrans("‘’“”„«»‐‑‒–—−\u202f\xa0", '\'\'"""""------  ')

# One answer


@lru_cache(maxsize=1 << 16)  # an answer is scored again for each group that it is in
def normalize_answer(text: str) -> str:
    """As SQuAD's evaluation does: lower case, no punctuation, no articles, single spaces."""
    lowered = "".join(letter for letter in text.lower().translate(_AS_ASCII) if letter not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", lowered).split())


def hit(answer: str, gold: Sequence[str]) -> float:
    """1 if the answer contains one of the right ones, as whole words; else 0."""
    words = f" {normalize_answer(answer)} "
    return float(any(f" {normalize_answer(each)} " in words for each in gold if normalize_answer(each)))


def f1(answer: str, gold: Sequence[str]) -> float:
    """SQuAD's F1 of the words, against the right answer that fits best."""
    return max((_f1(normalize_answer(answer).split(), normalize_answer(each).split()) for each in gold), default=0.0)


def _f1(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    same = sum((Counter(words) & Counter(wanted)).values())
    return 2 * same / (len(words) + len(wanted))


# Differences


@dataclass(frozen=True)
class Interval:
    """A mean over questions with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval | None:
        """Of these values; None without any."""
        with needs("store"):
            import numpy as np

        if not values:
            return None
        numbers = np.asarray(values, dtype=np.float64)
        means = np.concatenate([weights @ numbers for weights in _resamples(len(numbers))])
        low, high = np.quantile(means, (0.025, 0.975))
        return cls(float(numbers.mean()), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def _resamples(size: int) -> Iterable[NDArray[Any]]:
    """How often each of `size` questions is in each of the bootstrap's samples, divided by `size`; always the same."""
    return _kept_resamples(size) if size <= _MOST_KEPT else _make_resamples(size)


@lru_cache(maxsize=8)
def _kept_resamples(size: int) -> list[NDArray[Any]]:
    return list(_make_resamples(size))


def _make_resamples(size: int) -> Iterator[NDArray[Any]]:
    import numpy as np

    rng = np.random.default_rng(0)
    starts = np.arange(_AT_ONCE)[:, None] * size
    for _ in range(_DRAWS // _AT_ONCE):
        drawn = (rng.integers(0, size, (_AT_ONCE, size)) + starts).ravel()
        yield np.bincount(drawn, minlength=_AT_ONCE * size).reshape(_AT_ONCE, size) / size


@dataclass(frozen=True)
class Score:
    """One arm over the questions of a cell and a task.

    Attributes:
        arm: The arm.
        cell: The cell; "all": of all.
        task: The task; "all": of all.
        questions: How many questions it answered.
        hit: Share of answers that contain a right one.
        f1: Mean F1.
        hit_difference: Hits minus the full prefill's, question by question.
        f1_difference: The same of F1.
        gold_nll_difference: The same of the right answer's negative log-likelihood; more is worse.
        first_kl: KL divergence of the first token from the full prefill's.
        along_kl: Its mean along the answer.
        equal: Share of answers with the same tokens as the full prefill's.
        ttft_ms: Median time to the first token.
        faster: How many times as fast as the full prefill's the first token comes, the median over questions.
        blended: Share of questions for which cached KV was used; None if the engine does not report it.
        recomputed: Mean number of recomputed tokens.
        prompt_tokens: Mean length of the prompts.
        gated: Whether gate and recommendation depend on its questions, or they are only reported.
    """

    arm: str
    cell: str
    task: str
    questions: int
    hit: float
    f1: float
    hit_difference: Interval | None = None
    f1_difference: Interval | None = None
    gold_nll_difference: Interval | None = None
    first_kl: Interval | None = None
    along_kl: Interval | None = None
    equal: float | None = None
    ttft_ms: float | None = None
    faster: float | None = None
    blended: float | None = None
    recomputed: float | None = None
    prompt_tokens: float = 0.0
    gated: bool = True

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def scores(records: Iterable[Record]) -> list[Score]:
    """Each arm: over all questions, over each cell, over each task, and over each task of each cell.

    Questions that are only reported do not count over all tasks, unless there are no others.
    """
    kept = list(records)
    found = []
    for cell, task in _groups(kept):
        own = [r for r in kept if cell in (POOLED, r.cell) and task in (POOLED, r.task)]
        own = [r for r in own if task != POOLED or r.gated] or own
        arms = dict.fromkeys(arm for record in own for arm in record.arms)
        found += [_score(arm, cell, task, [r for r in own if arm in r.arms]) for arm in arms]
    return found


def _groups(records: Sequence[Record]) -> Iterator[tuple[str, str]]:
    cells, tasks = (list(dict.fromkeys(map(key, records))) for key in (lambda r: r.cell, lambda r: r.task))
    yield POOLED, POOLED
    yield from ((cell, POOLED) for cell in cells if len(cells) > 1)
    yield from ((POOLED, task) for task in tasks if len(tasks) > 1)
    if len(cells) > 1:
        pairs = dict.fromkeys((record.cell, record.task) for record in records)
        yield from (pair for pair in pairs if len(tasks) > 1)


def _score(arm: str, cell: str, task: str, records: Sequence[Record]) -> Score:
    pairs = [(record, record.arms[arm], record.arms.get(FULL)) for record in records]

    def paired(value: Callable[[Record, dict[str, Any]], float | None]) -> Interval | None:
        both = [(value(r, own), value(r, full)) for r, own, full in pairs if full is not None]
        return Interval.of([a - b for a, b in both if a is not None and b is not None]) if arm != FULL else None

    def values(key: str) -> list[float]:
        return [own[key] for _, own, _ in pairs if own[key] is not None]

    times = values("ttft_ms")
    ratios = [full["ttft_ms"] / own["ttft_ms"] for _, own, full in pairs if full and full["ttft_ms"] and own["ttft_ms"]]
    recomputed = [own["counts"]["recomputed_tokens"] for _, own, _ in pairs if own["counts"]]
    differs = arm not in (FULL, CONTEXTPILOT)  # another order of the passages is another prompt
    return Score(
        arm,
        cell,
        task,
        len(records),
        statistics.fmean(_hit(r, own) for r, own, _ in pairs),
        statistics.fmean(_f1_of(r, own) for r, own, _ in pairs),
        paired(_hit),
        paired(_f1_of),
        paired(lambda _, own: own["gold_nll"]) if differs else None,
        Interval.of(values("first_kl")) if differs else None,
        Interval.of(values("along_kl")) if differs else None,
        _mean([float(each) for each in values("equal")]) if differs else None,
        statistics.median(times) if times else None,
        statistics.median(ratios) if ratios else None,
        _mean([float(each) for each in values("blended")]) if arm not in UNBLENDING else None,
        _mean(recomputed) if differs else None,
        statistics.fmean(record.prompt_tokens for record in records),
        any(record.gated for record in records),
    )


def _hit(record: Record, own: dict[str, Any]) -> float:
    return hit(own["parsed"], record.gold)


def _f1_of(record: Record, own: dict[str, Any]) -> float:
    return f1(own["parsed"], record.gold)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


# The gate and the recommendation


@dataclass(frozen=True)
class Verdict:
    """Whether an arm is as good as the full prefill.

    Attributes:
        arm: The arm.
        limit: The most that may be lost, for example 0.02 of the hits.
        reasons: Why not; empty if it is.
    """

    arm: str
    limit: float
    reasons: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether it is."""
        return not self.reasons


def verdict(found: Sequence[Score], arm: str, limit: float) -> Verdict:
    """Whether an arm's hits are not worse than the full prefill's by `limit`.

    It is as good if its mean difference over all questions is above minus half the limit, the interval's lower end is
    above minus the limit, and no cell's interval lies wholly below minus the limit. Questions that are only reported
    do not count, unless there are no others.
    """
    own = [score for score in found if score.arm == arm and score.task == POOLED and score.hit_difference]
    own = [score for score in own if score.gated] or own
    reasons = []
    for score in own:
        difference = score.hit_difference
        if difference is None:
            continue
        if score.cell == POOLED and difference.mean <= -limit / 2:
            reasons.append(f"the mean {difference.mean:+.4f} is not above {-limit / 2:+.4f}")
        if score.cell == POOLED and difference.low <= -limit:
            reasons.append(f"the lower end {difference.low:+.4f} is not above {-limit:+.4f}")
        if difference.high < -limit:
            where = "over all questions" if score.cell == POOLED else f"in {score.cell}"
            reasons.append(f"the whole interval {where}, up to {difference.high:+.4f}, is below {-limit:+.4f}")
    return Verdict(arm, limit, tuple(reasons) if own else ("it was not measured against the full prefill",))


def main_arm(arms: Sequence[str]) -> str:
    """The arm that gate and recommendation are about: `auto`, or else the first that blends; "" if none does."""
    blending = [arm for arm in arms if arm not in UNBLENDING]
    return "auto" if "auto" in blending else next(iter(blending), "")


def recommendation(found: Sequence[Score], arm: str, limit: float) -> str:
    """What to use for such questions, in a sentence or two."""
    pooled = {score.arm: score for score in found if (score.cell, score.task) == (POOLED, POOLED)}
    if arm not in pooled or FULL not in pooled:
        return "Nothing was compared: the full prefill and one arm that blends are needed."
    own = pooled[arm]
    first = f"On your {own.questions} questions, {arm} {_cost(own)} and {_speed(own)}"
    if own.blended is not None and own.blended < 1:
        first += f"; {own.blended:.0%} of its answers were blended"
    best = max(_faster_and_good(found, pooled, limit), key=_quickness, default=None)
    few = pooled[FULL].hit
    last = f" A full prefill answers {few:.0%} of them right, so little could be lost." if few < _FEW_RIGHT else ""
    if best is None:
        return f"{first}; no faster arm stays within {limit * 100:g} points: compute such questions in full.{last}"
    if best.arm == arm:
        return f"{first}; no faster arm stays within {limit * 100:g} points.{last}"
    return f"{first}; {best.arm} {_cost(best, would=True)} and {_speed(best, would=True)}.{last}"


def _faster_and_good(found: Sequence[Score], pooled: dict[str, Score], limit: float) -> list[Score]:
    """Arms that pass the gate and begin earlier than the full prefill; where no time was taken, those that blend."""
    good = [score for name, score in pooled.items() if name not in (FULL, CONTEXTPILOT)]
    good = [score for score in good if verdict(found, score.arm, limit).passed]
    return [s for s in good if (s.faster > 1 if s.faster is not None else s.blended and s.recomputed is not None)]


def _quickness(score: Score) -> float:
    """More is faster: as measured, or else by the tokens that need not be computed."""
    return score.faster if score.faster is not None else -(score.recomputed or 0.0)


def _cost(score: Score, *, would: bool = False) -> str:
    difference = score.hit_difference
    if difference is None:
        return "was not compared"
    points = 100 * difference.mean
    interval = f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    if abs(points) < 0.05:
        return f"{'would lose' if would else 'loses'} nothing {interval}"
    verb = ("would lose" if would else "loses") if points < 0 else ("would gain" if would else "gains")
    return f"{verb} {abs(points):.1f} points {interval}"


def _speed(score: Score, *, would: bool = False) -> str:
    if score.faster is not None:
        return f"{'start' if would else 'starts'} {score.faster:.1f} times as fast as a full prefill"
    share = (score.recomputed or 0.0) / score.prompt_tokens if score.prompt_tokens else 0.0
    return f"{'recompute' if would else 'recomputes'} {share:.0%} of the prompt's tokens"
