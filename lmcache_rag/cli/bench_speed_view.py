"""The tables and the plot of bench speed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_rag.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from lmcache_rag.bench.speed import Row
    from lmcache_rag.bench.summary import Pairs


def _table(title: str, first: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title)
    table.add_column(first)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def first_tokens(rows: Sequence[Row]) -> Table:
    """Every arm at every length, one request at a time."""
    columns = ("tokens", "median ms", "minimum", "sooner", "look-up", "load", "blend")
    table = _table("Time to the first token", "arm", *columns)
    for row in rows:
        steps = [f"{row.steps[key]:.0f}" if row.steps else "" for key in ("lookup_ms", "load_ms", "blend_ms")]
        sooner = f"{row.sooner:.2f}" if row.sooner else ""
        table.add_row(row.arm, str(row.tokens), f"{row.median:.0f}", f"{min(row.ttft_ms):.0f}", sooner, *steps)
    return table


def throughput(rows: Sequence[dict[str, Any]]) -> Table:
    """So many in flight; the first arm is the baseline."""
    table = _table(f"Throughput, {rows[0]['at_once']} in flight", "arm", "requests/s", "times", *_LOAD)
    for row in rows:
        times = row["requests_per_second"] / rows[0]["requests_per_second"]
        table.add_row(row["arm"], f"{row['requests_per_second']:.2f}", f"{times:.2f}", *_load(row))
    return table


def at_rate(rows: Sequence[dict[str, Any]]) -> Table:
    """So many requests a second."""
    table = _table(f"At {rows[0]['per_second']:.2f} requests a second", "arm", *_LOAD)
    for row in rows:
        table.add_row(row["arm"], *_load(row))
    return table


_LOAD = ("TTFT ms", "p99", "gap ms", "p90", "p99", "longest")


def _load(row: dict[str, Any]) -> list[str]:
    first = [f"{row[key]:.0f}" for key in ("ttft_ms_median", "ttft_ms_p99")]
    return first + [f"{row[key]:.1f}" for key in ("gap_ms_p50", "gap_ms_p90", "gap_ms_p99", "gap_ms_max")]


def ingestion(rows: Sequence[dict[str, Any]]) -> Table:
    """Tokens per second of the chunks' prefill."""
    table = _table(f"Ingestion, {rows[0]['at_once']} in flight", "arm", "tokens/s", "of the baseline")
    for row in rows:
        table.add_row(row["arm"], f"{max(row['tokens_per_second']):,.0f}", f"{row['of_base']:.1%}")
    return table


def pairs(title: str, rows: Sequence[Pairs]) -> Table:
    """Two servers asked in turn."""
    columns = ("tokens", "baseline ms", "engine ms", "of medians", "of pairs")
    table = _table(title, "prompt", *columns)
    for row in rows:
        known = row.as_dict()
        medians = [f"{known[key]:.1f}" for key in ("base_median_ms", "ours_median_ms")]
        table.add_row(row.prompt, str(row.tokens), *medians, f"{row.of_medians:+.1%}", f"{row.of_pairs:+.1%}")
    return table


def check_plot(path: Path) -> None:
    """See that a plot can be drawn into this file: better before anything is measured than after.

    Raises:
        ConfigError: There is no matplotlib, or no such folder.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib.", remedy="pip install matplotlib")
    if not path.parent.is_dir():
        raise ConfigError(f"There is no folder {path.parent} for the plot.", remedy="Make it, or name another file.")


def draw(rows: Sequence[Row], path: Path) -> None:
    """The medians over the prompts' length, as a PNG file."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=130)
    for arm in dict.fromkeys(row.arm for row in rows):
        own = [row for row in rows if row.arm == arm]
        axes.plot([row.tokens for row in own], [row.median for row in own], marker="o", label=arm)
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("time to the first token, ms (median)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, bbox_inches="tight")
