"""One HTML page about a run, with its pictures in it: it needs no network, and may be sent by mail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_rag.bench.quality.arms import FULL
from lmcache_rag.bench.quality.conversation import Turn, by_turn
from lmcache_rag.bench.quality.scores import POOLED, Interval, Score, Verdict, hit
from lmcache_rag.page import WIDTH, escape, scale, svg, write_page

if TYPE_CHECKING:
    from markupsafe import Markup

    from lmcache_rag.bench.quality.results import Record

_LEFT, _RIGHT, _ROW = 150, 190, 26  # of a picture, in pixels
_LETTER, _LINE = 8, 15  # of its texts, at most


def write_report(
    path: Path,
    records: Sequence[Record],
    found: Sequence[Score],
    facts: Mapping[str, Any],
    advice: str,
    judged: Verdict,
) -> None:
    """Write the page.

    Args:
        path: The file.
        records: The answers.
        found: Their scores.
        facts: The run's settings.
        advice: The recommendation.
        judged: The gate.
    """
    pooled = [score for score in found if (score.cell, score.task) == (POOLED, POOLED)]
    others = [score for score in pooled if score.arm != FULL]
    changed = changes(records)
    write_page(
        path,
        __package__ or "lmcache_rag.bench.quality",
        "report.html",
        facts=facts,
        advice=advice,
        judged=judged,
        pooled=pooled,
        cost=interval_picture(others, lambda s: s.hit_difference, 100, judged.limit),
        groups=_groups(found),
        arms=[score.arm for score in others],
        faster=bar_picture([(s.arm, s.faster, f"{s.faster:.2f} times") for s in others if s.faster is not None]),
        both=scatter_picture(others),
        recomputed=bar_picture(
            [(s.arm, s.recomputed, f"{s.recomputed:.0f} tokens") for s in others if s.recomputed is not None]
        ),
        moved=interval_picture(others, lambda s: s.along_kl, 1),
        gold=interval_picture(others, lambda s: s.gold_nll_difference, 1),
        talks=_talks(records),
        changed=changed,
        total=len(records),
    )


def _groups(found: Sequence[Score]) -> list[tuple[str, dict[str, Score]]]:
    """(cell or task, the scores by arm): cells first."""
    names = dict.fromkeys((score.cell, score.task) for score in found)
    single = [name for name in names if POOLED in name]
    return [
        (
            "all questions" if name == (POOLED, POOLED) else name[0] if name[1] == POOLED else name[1],
            {score.arm: score for score in found if (score.cell, score.task) == name},
        )
        for name in single
    ]


def _talks(records: Sequence[Record]) -> list[dict[str, Any]]:
    """For each cell of conversations: its name, the arms, a row for each turn, and a picture of the times."""
    found = []
    turns = by_turn(records)
    for cell in dict.fromkeys(turn.cell for turn in turns):
        own = [turn for turn in turns if turn.cell == cell]
        arms = list(dict.fromkeys(turn.arm for turn in own))
        numbers = dict.fromkeys(turn.turn for turn in own)
        rows = [(number, {turn.arm: turn for turn in own if turn.turn == number}) for number in numbers]
        found.append({"cell": cell, "arms": arms, "rows": rows, "picture": turns_picture(own)})
    return found


# The answers that changed


@dataclass(frozen=True)
class Change:
    """A question of which an arm's answer is not the full prefill's.

    Attributes:
        record: The question.
        rows: (arm, answer, right or wrong, what changed) of the full prefill and of the arms that differ.
        kinds: What changed in any arm: "lost", "gained" or "words".
    """

    record: Record
    rows: tuple[tuple[str, str, bool, str], ...]
    kinds: tuple[str, ...]

    @property
    def marks(self) -> str:
        """For the page's filters: what changed in which arm."""
        return " ".join(f"{arm}={kind}" for arm, _, _, kind in self.rows if kind)


def changes(records: Sequence[Record]) -> list[Change]:
    """The questions whose answers changed: those that an arm lost first."""
    found = []
    for record in records:
        full = record.arms.get(FULL)
        if full is None:
            continue
        was_right = bool(hit(full["parsed"], record.gold))
        rows = [(FULL, full["text"], was_right, "")]
        for arm, own in record.arms.items():
            right = bool(hit(own["parsed"], record.gold))
            kind = "lost" if was_right and not right else "gained" if right and not was_right else "words"
            if arm != FULL and (kind != "words" or own["text"] != full["text"]):
                rows.append((arm, own["text"], right, kind))
        if len(rows) > 1:
            kinds = tuple(dict.fromkeys(kind for *_, kind in rows if kind))
            found.append(Change(record, tuple(rows), kinds))
    order = {"lost": 0, "gained": 1, "words": 2}
    return sorted(found, key=lambda change: min(order[kind] for kind in change.kinds))


# Pictures, as SVG


def interval_picture(
    found: Sequence[Score], value: Callable[[Score], Interval | None], factor: float, limit: float | None = None
) -> Markup | str:
    """A dot with its interval for each arm, around zero; "" if no arm has the value."""
    rows = [(score.arm, interval) for score in found if (interval := value(score)) is not None]
    if not rows:
        return ""
    low = min(0.0, *(interval.low for _, interval in rows), -(limit or 0.0))
    high = max(0.0, *(interval.high for _, interval in rows))
    x = _scale(low, high)
    lines = [_rule(x(0.0), len(rows), "zero")]
    if limit is not None:
        lines.append(_rule(x(-limit), len(rows), "limit"))
    for row, (arm, interval) in enumerate(rows):
        y = _ROW * row + _ROW // 2
        digits = 2 if factor > 1 else 3
        text = "{:+.{n}f} [{:+.{n}f}, {:+.{n}f}]".format(
            *(factor * each for each in (interval.mean, interval.low, interval.high)), n=digits
        )
        lines += [
            _label(y, arm),
            f'<line class="mark" x1="{x(interval.low):.1f}" x2="{x(interval.high):.1f}" y1="{y}" y2="{y}"/>',
            f'<circle class="mark" cx="{x(interval.mean):.1f}" cy="{y}" r="4"/>',
            _value(y, text),
        ]
    return _svg(lines, len(rows))


def bar_picture(rows: Sequence[tuple[str, float, str]]) -> Markup | str:
    """A bar for each (arm, value, text); "" without any."""
    if not rows:
        return ""
    x = _scale(0.0, max(value for _, value, _ in rows))
    lines = []
    for row, (arm, value, text) in enumerate(rows):
        y = _ROW * row + _ROW // 2
        lines += [
            _label(y, arm),
            f'<rect class="mark" x="{x(0):.1f}" width="{max(1.0, x(value) - x(0)):.1f}" y="{y - 7}" height="14"/>',
            _value(y, text),
        ]
    return _svg(lines, len(rows))


def scatter_picture(found: Sequence[Score]) -> Markup | str:
    """Each arm by its speed (to the right) and its hits minus the full prefill's (up); "" without times."""
    rows = [(s.arm, s.faster, s.hit_difference) for s in found if s.faster is not None and s.hit_difference is not None]
    if not rows:
        return ""
    height = 300
    x = _scale(0.0, max(faster for _, faster, _ in rows))
    low, high = min(0.0, *(d.low for *_, d in rows)), max(0.0, *(d.high for *_, d in rows))

    def y(value: float) -> float:
        return 20 + (high - value) / ((high - low) or 1.0) * (height - 40)

    lines = [
        f'<line class="zero" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>',
        f'<line class="limit" x1="{x(1):.1f}" x2="{x(1):.1f}" y1="10" y2="{height - 10}"/>',
        f'<text x="{_LEFT - 8}" y="{y(0) + 4:.1f}" text-anchor="end">as the full prefill</text>',
    ]
    labels: list[tuple[float, float, int]] = []  # (left, y, letters)
    for arm, faster, difference in sorted(rows, key=lambda row: row[1]):
        left, place = x(faster) + 8, y(difference.mean) + 4
        while any(_overlaps((left, place, len(arm)), other) for other in labels):
            place += _LINE
        labels.append((left, place, len(arm)))
        lines += [
            f'<line class="mark" x1="{x(faster):.1f}" x2="{x(faster):.1f}" y1="{y(difference.low):.1f}" '
            f'y2="{y(difference.high):.1f}"/>',
            f'<circle class="mark" cx="{x(faster):.1f}" cy="{y(difference.mean):.1f}" r="5"/>',
            f'<text x="{left:.1f}" y="{place:.1f}">{escape(arm)}</text>',
        ]
    return _svg(lines, 0, max(height, *(round(place) + _LINE for _, place, _ in labels)))


def _overlaps(one: tuple[float, float, int], other: tuple[float, float, int]) -> bool:
    """Whether two labels do."""
    first, second = sorted((one, other))
    return second[0] < first[0] + _LETTER * first[2] and abs(first[1] - second[1]) < _LINE


def turns_picture(turns: Sequence[Turn]) -> Markup | str:
    """Each arm's time to the first token (up) from turn to turn (to the right); "" without times."""
    lines_of: dict[str, list[tuple[int, float]]] = {}
    for turn in turns:
        if turn.ttft_ms is not None:
            lines_of.setdefault(turn.arm, []).append((turn.turn, turn.ttft_ms))
    if not lines_of:
        return ""
    height, last = 300, max(number for points in lines_of.values() for number, _ in points)
    most = max(ms for points in lines_of.values() for _, ms in points) or 1.0
    x = _scale(1.0, max(2.0, float(last)))

    def y(ms: float) -> float:
        return height - 30 - ms / most * (height - 50)

    lines = [f'<line class="zero" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>']
    lines += [f'<text x="{_LEFT - 8}" y="{y(ms) + 4:.1f}" text-anchor="end">{ms:.0f} ms</text>' for ms in (0, most)]
    lines += [
        f'<text x="{x(number):.1f}" y="{height - 8}" text-anchor="middle">turn {number}</text>'
        for number in range(1, last + 1)
    ]
    ends = sorted((points[-1][1], arm) for arm, points in lines_of.items())
    place = float(height)
    for ms, arm in ends:  # from the bottom up; labels of arms that end alike stand above each other
        place = min(y(ms) + 4, place - _LINE)
        points = " ".join(f"{x(number):.1f},{y(each):.1f}" for number, each in lines_of[arm])
        lines.append(f'<polyline class="line" points="{points}"/>')
        lines.append(f'<text x="{x(lines_of[arm][-1][0]) + 8:.1f}" y="{place:.1f}">{escape(arm)} {ms:.0f}</text>')
    return _svg(lines, 0, height)


def _scale(low: float, high: float) -> Callable[[float], float]:
    return scale(low, high, _LEFT, WIDTH - _RIGHT)


def _rule(x: float, rows: int, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{rows * _ROW}"/>'


def _label(y: int, text: str) -> str:
    return f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(text)}</text>'


def _value(y: int, text: str) -> str:
    return f'<text x="{WIDTH - _RIGHT + 8}" y="{y + 4}">{escape(text)}</text>'


def _svg(lines: Sequence[str], rows: int, height: int = 0) -> Markup:
    return svg(lines, height or rows * _ROW)
