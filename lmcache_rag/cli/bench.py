"""bench speed: measure a blending server beside a baseline."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmcache_rag.cli.bars import Bars
from lmcache_rag.cli.run import Run
from lmcache_rag.cli.verb import verb

if TYPE_CHECKING:
    from lmcache_rag.bench.speed import Arm, Row

Engine = Annotated[str, typer.Option("--engine", metavar="URL", help="The server that blends.")]
Baseline = Annotated[
    str,
    typer.Option("--baseline", metavar="URL", help="A server to compare with; default: the same one without blending."),
]
Tokens = Annotated[
    list[int], typer.Option("--tokens", metavar="N", min=1200, help="Length of the prompts; repeatable.")
]
Ratios = Annotated[
    list[float], typer.Option("--at", metavar="RATIO", min=0, max=1, help="Recompute ratio; repeatable.")
]
Repeats = Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Requests of each kind that count.")]
Chunks = Annotated[int, typer.Option("--chunks", metavar="N", min=1, help="Different chunks of 1024 tokens.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw the medians into this PNG file.", show_default=False)
]


@verb()
def speed(
    run: Run,
    *,
    engine: Engine = "http://localhost:8000",
    baseline: Baseline = "",
    tokens: Tokens = (8400, 16600),  # type: ignore[assignment]
    at: Ratios = (0.15,),  # type: ignore[assignment]
    repeats: Repeats = 10,
    chunks: Chunks = 40,
    plot: Plot = None,
) -> None:
    """Time to the first token with and without blending, one request at a time.

    Asks prompts of random chunks in random order, each arm in turn. Chunks are
    computed first; "hot" names them to the server, which may still hold them.

    [bold]Examples[/bold]
      lmcache-rag bench speed --engine http://localhost:8000
      lmcache-rag bench speed --baseline http://localhost:8001 --plot ttft.png
    """
    from lmcache_rag.bench.speed import Arm, SpeedBench
    from lmcache_rag.bench.workload import Workload

    off = {"lmcache_rag.blend": "off", "lmcache.max_offload_tokens": 64}
    arms = [Arm("full prefill", baseline or engine, {} if baseline else off)]
    for ratio in at:
        params = {"lmcache_rag.policy": "query", "lmcache_rag.ratio": ratio}
        arms += [Arm(f"query {ratio:g}", engine, params), Arm(f"hot query {ratio:g}", engine, params, hot=True)]
    with Bars(run, main="requests") as bars:
        total = len({arm.url for arm in arms}) * chunks + len(tokens) * len(arms) * (repeats + 2)
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            bars.update("requests", done, total)

        rows = asyncio.run(_measure(SpeedBench(arms, Workload(chunks=chunks), step), arms, tokens, repeats))
    if plot:
        _draw(rows, plot)
    if run.json:
        run.emit([row.as_dict() for row in rows])
    else:
        _show(run, rows)


async def _measure(bench: Any, arms: list[Arm], tokens: list[int], repeats: int) -> list[Row]:
    await bench.open()
    rows: list[Row] = []
    try:
        for url in {arm.url for arm in arms}:
            await bench.ingest(url)
        for length in tokens:
            rows += await bench.latency(length, repeats)
    finally:
        await bench.close()
    return rows


def _show(run: Run, rows: list[Row]) -> None:
    from rich.table import Table

    table = Table(title="Time to the first token")
    for name in ("arm", "tokens", "median ms", "minimum", "sooner", "look-up", "load", "blend"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for row in rows:
        steps = [f"{row.steps[key]:.0f}" if row.steps else "" for key in ("lookup_ms", "load_ms", "blend_ms")]
        sooner = f"{row.sooner:.2f}" if row.sooner else ""
        table.add_row(row.arm, str(row.tokens), f"{row.median:.0f}", f"{min(row.ttft_ms):.0f}", sooner, *steps)
    run.out.print(table)


def _draw(rows: list[Row], path: Path) -> None:
    try:
        import matplotlib as mpl
    except ImportError as problem:
        from lmcache_rag.errors import ConfigError

        raise ConfigError("--plot needs matplotlib.", remedy="pip install matplotlib") from problem
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
