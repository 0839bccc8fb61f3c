"""One HTML page about a plan: hit rate by gigabytes, times, break-even bandwidths, the recommendation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_rag.page import WIDTH, escape, scale, svg, write_page
from lmcache_rag.plan.economics import Advice, Plan

if TYPE_CHECKING:
    from markupsafe import Markup

    from lmcache_rag.plan.replay import Replayed

_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 60, 150, 30, 40, 340  # of the picture, in pixels
_LINE = 15  # height of a text
NAMES = {"lru": "LRU", "second use": "second use", "prefixes": "exact prefixes"}
DASHES = {"lru": "none", "second use": "9 5", "prefixes": "2 4"}


def write_report(
    path: Path, plan: Plan, facts: dict[str, Any], advice: Advice, version: str, replayed: Replayed | None = None
) -> None:
    """Write the page.

    Args:
        path: The file.
        plan: The plan.
        facts: What `lmcache-rag plan --json` writes.
        advice: The recommendation.
        version: Of this package.
        replayed: A comparison with a real server.
    """
    write_page(
        path,
        __package__ or "lmcache_rag.plan",
        "report.html",
        plan=plan,
        facts=facts,
        advice=advice,
        version=version,
        replayed=replayed,
        names=NAMES,
        curve=curve_picture(plan),
    )


def curve_picture(plan: Plan) -> Markup:
    """Hit rate (up) by gigabytes of memory (to the right, each step ten times the last), a line for each policy."""
    rows = plan.rates()
    low, high = math.log10(rows[0][0]), math.log10(rows[-1][0])
    across = scale(low, high, _LEFT, WIDTH - _RIGHT)
    y = scale(0.0, 1.0, _HEIGHT - _BOTTOM, _TOP)

    def x(gigabytes: float) -> float:
        return across(math.log10(gigabytes))

    right = WIDTH - _RIGHT
    lines = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        lines.append(f'<line class="zero" x1="{_LEFT}" x2="{right}" y1="{y(share):.1f}" y2="{y(share):.1f}"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    powers = range(math.ceil(low), math.floor(high) + 1)
    marks = [10.0**power for power in powers] if len(powers) > 1 else [rows[0][0], rows[-1][0]]
    lines += [
        f'<text x="{x(mark):.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{mark:,.10g} GB</text>'
        for mark in marks
    ]
    at = x(plan.memory_gb)
    lines.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
    anchor = "end" if at > (_LEFT + right) / 2 else "start"
    lines.append(f'<text x="{at:.1f}" y="{_TOP - 10}" text-anchor="{anchor}">--l1-gb {plan.memory_gb:g}</text>')
    place = math.inf
    for rate, name in sorted((rows[-1][1][name], name) for name in plan.curves):  # from the bottom up
        points = " ".join(f"{x(size):.1f},{y(rates[name]):.1f}" for size, rates in rows)
        place = min(y(rate) + 4, place - _LINE)
        lines.append(f'<polyline class="line" points="{points}" stroke-dasharray="{DASHES[name]}"/>')
        lines.append(f'<text x="{right + 8}" y="{place:.1f}">{escape(NAMES[name])} {rate:.0%}</text>')
    return svg(lines, _HEIGHT)
