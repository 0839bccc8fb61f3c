"""bench speed: compare a blending server with a baseline; its tables and its plot."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmcache_rag.budget import AUTO
from lmcache_rag.cli.run import Bars, CommandContext, command
from lmcache_rag.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from lmcache_rag.bench.speed import Pairs, Row, SpeedResults

Engine = Annotated[str, typer.Option("--engine", metavar="URL", help="The server that blends.")]
Baseline = Annotated[
    str,
    typer.Option("--baseline", metavar="URL", help="A server to compare with; default: the same one without blending."),
]
Tokens = Annotated[
    list[int], typer.Option("--tokens", metavar="N", min=1200, help="Length of the prompts; repeatable.")
]
Policies = Annotated[
    list[str], typer.Option("--policy", metavar="NAME", help="Recompute policy, each at every --at; repeatable.")
]
Ratios = Annotated[
    list[str], typer.Option("--at", metavar="RATIO", help="Recompute ratio: 0 to 1, auto, tokens=N; repeatable.")
]
Repeats = Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Measured requests of each kind.")]
Chunks = Annotated[int, typer.Option("--chunks", metavar="N", min=1, help="Different chunks of 1024 tokens.")]
Throughput = Annotated[bool, typer.Option("--throughput", help="Also requests a second, --in-flight at once.")]
Rate = Annotated[
    float | None,
    typer.Option(
        "--rate",
        metavar="R",
        min=0,
        help="Also at R requests a second, each arm; 0: 0.8 of the baseline's throughput.",
        show_default=False,
    ),
]
Ingestion = Annotated[bool, typer.Option("--ingestion", help="Also tokens a second of computing new chunks.")]
NothingCached = Annotated[bool, typer.Option("--nothing-cached", help="Also prompts without any cached part.")]
Floor = Annotated[bool, typer.Option("--floor", help="Also the time of HTTP and scheduling alone.")]
Requests = Annotated[
    int, typer.Option("--requests", metavar="N", min=1, help="Requests of each arm for --throughput and --rate.")
]
Flight = Annotated[
    int, typer.Option("--in-flight", metavar="N", min=1, help="Requests at a time for --throughput and --ingestion.")
]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw the medians into this PNG file.", show_default=False)
]


@command()
def speed(
    context: CommandContext,
    *,
    engine: Engine = "http://localhost:8000",
    baseline: Baseline = "",
    tokens: Tokens = (8400, 16600),  # type: ignore[assignment]
    policy: Policies = ("query",),  # type: ignore[assignment]
    at: Ratios = (AUTO,),  # type: ignore[assignment]
    repeats: Repeats = 10,
    chunks: Chunks = 40,
    throughput: Throughput = False,
    rate: Rate = None,
    ingestion: Ingestion = False,
    nothing_cached: NothingCached = False,
    floor: Floor = False,
    requests: Requests = 64,
    in_flight: Flight = 16,
    plot: Plot = None,
) -> None:
    """Time to the first token with and without blending, one request at a time.

    Sends prompts of random chunks in random order, to each arm in turn. Chunks are
    computed first; "hot" names them to the server, which may still hold them:
    its cache must have room for --chunks of them.
    The options that begin with "also" measure more: --throughput and --rate
    with prompts of the first --tokens; --ingestion, --nothing-cached and
    --floor of the server as any client finds it ("engine").

    [bold]Examples[/bold]
      lmcache-rag bench speed --engine http://localhost:8000
      lmcache-rag bench speed --baseline http://localhost:8001 --plot ttft.png
      lmcache-rag bench speed --baseline http://localhost:8001 --throughput --rate 0
      lmcache-rag bench speed --policy query --policy hkvd --at 0.1 --at 0.2
    """
    from lmcache_rag import protocol
    from lmcache_rag.bench.client import Workload
    from lmcache_rag.bench.speed import Arm, SpeedConfig, measure
    from lmcache_rag.budget import parse_budget_text
    from lmcache_rag.policies import get_policy

    for name in policy:
        get_policy(name)  # a server would use its default for an unknown name
    if plot:
        _check_plot(plot)
    off = {**protocol.NO_BLEND, protocol.MAX_OFFLOAD_TOKENS: 64}
    arms = [Arm("full prefill", baseline or engine, {} if baseline else off)]
    for name, budget in itertools.product(dict.fromkeys(policy), dict.fromkeys(map(parse_budget_text, at))):
        params = {**protocol.ALWAYS_BLEND, protocol.POLICY: name, protocol.RATIO: budget.wire}
        arms += [Arm(f"{name} {budget}", engine, params), Arm(f"hot {name} {budget}", engine, params, hot=True)]
    config = SpeedConfig(
        tuple(tokens),
        repeats,
        throughput=throughput,
        rate=rate,
        ingestion=ingestion,
        nothing_cached=nothing_cached,
        floor=floor,
        requests=requests,
        in_flight=in_flight,
    )
    # New chunks in each run: KV that a server still has of an earlier run would shorten its full prefills.
    workload = Workload(chunks=chunks, seed=time.time_ns())
    with Bars(context, main="requests") as bars:
        found = asyncio.run(
            measure(
                arms,
                Arm("engine", engine),
                workload,
                config,
                lambda done, total: bars.update("requests", done, total),
            )
        )
    if plot:
        _draw(found.ttft, plot)
    if context.json:
        context.emit(found.as_list())
    else:
        _show(context, found)


def _show(context: CommandContext, found: SpeedResults) -> None:
    context.out.print(_ttft_table(found.ttft))
    if found.throughput:
        context.out.print(_throughput_table(found.throughput))
    if found.rate:
        context.out.print(_rate_table(found.rate))
    if found.ingestion:
        context.out.print(_ingestion_table(found.ingestion))
    if found.nothing_cached:
        context.out.print(_pairs_table("Nothing cached", found.nothing_cached))
    if found.floor:
        context.out.print(_pairs_table("HTTP and scheduling", found.floor))


def _table(title: str, first: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title)
    table.add_column(first)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _ttft_table(rows: Sequence[Row]) -> Table:
    """Every arm at every length, one request at a time."""
    columns = ("tokens", "median ms", "minimum", "sooner", "look-up", "load", "blend")
    table = _table("Time to the first token", "arm", *columns)
    for row in rows:
        steps = [f"{row.steps[key]:.0f}" if row.steps else "" for key in ("lookup_ms", "load_ms", "blend_ms")]
        speedup = f"{row.sooner:.2f}" if row.sooner else ""
        table.add_row(row.arm, str(row.tokens), f"{row.median:.0f}", f"{min(row.ttft_ms):.0f}", speedup, *steps)
    return table


def _throughput_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Throughput with a fixed number in flight; the first arm is the baseline."""
    table = _table(f"Throughput, {rows[0]['at_once']} in flight", "arm", "requests/s", "times", *_LOAD)
    for row in rows:
        times = row["requests_per_second"] / rows[0]["requests_per_second"]
        table.add_row(row["arm"], f"{row['requests_per_second']:.2f}", f"{times:.2f}", *_load(row))
    return table


def _rate_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Latency at a fixed rate of requests."""
    table = _table(f"At {rows[0]['per_second']:.2f} requests a second", "arm", *_LOAD)
    for row in rows:
        table.add_row(row["arm"], *_load(row))
    return table


_LOAD = ("TTFT ms", "p99", "gap ms", "p90", "p99", "longest")


def _load(row: dict[str, Any]) -> list[str]:
    first = [f"{row[key]:.0f}" for key in ("ttft_ms_median", "ttft_ms_p99")]
    return first + [f"{row[key]:.1f}" for key in ("gap_ms_p50", "gap_ms_p90", "gap_ms_p99", "gap_ms_max")]


def _ingestion_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Tokens per second of the chunks' prefill."""
    table = _table(f"Ingestion, {rows[0]['at_once']} in flight", "arm", "tokens/s", "of the baseline")
    for row in rows:
        table.add_row(row["arm"], f"{max(row['tokens_per_second']):,.0f}", f"{row['of_base']:.1%}")
    return table


def _pairs_table(title: str, rows: Sequence[Pairs]) -> Table:
    """Two servers measured in turn."""
    columns = ("tokens", "baseline ms", "engine ms", "of medians", "of pairs")
    table = _table(title, "prompt", *columns)
    for row in rows:
        known = row.as_dict()
        medians = [f"{known[key]:.1f}" for key in ("base_median_ms", "ours_median_ms")]
        table.add_row(row.prompt, str(row.tokens), *medians, f"{row.of_medians:+.1%}", f"{row.of_pairs:+.1%}")
    return table


def _check_plot(path: Path) -> None:
    """Check that a plot can be drawn into this file, before anything is measured.

    Raises:
        ConfigError: There is no matplotlib, or no such folder.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib.", remedy="pip install matplotlib")
    if not path.parent.is_dir():
        raise ConfigError(f"There is no folder {path.parent} for the plot.", remedy="Make it, or name another file.")


def _draw(rows: Sequence[Row], path: Path) -> None:
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
