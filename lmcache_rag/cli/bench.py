"""bench speed: measure a blending server beside a baseline."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmcache_rag.cli.bars import Bars
from lmcache_rag.cli.run import Run
from lmcache_rag.cli.verb import verb

if TYPE_CHECKING:
    from lmcache_rag.bench.session import Found

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
    list[float], typer.Option("--at", metavar="RATIO", min=0, max=1, help="Recompute ratio; repeatable.")
]
Repeats = Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Requests of each kind that count.")]
Chunks = Annotated[int, typer.Option("--chunks", metavar="N", min=1, help="Different chunks of 1024 tokens.")]
Throughput = Annotated[bool, typer.Option("--throughput", help="Also requests a second, --in-flight at once.")]
Rate = Annotated[
    float | None,
    typer.Option(
        "--rate",
        metavar="R",
        min=0,
        help="Also at R requests a second, each arm; 0: 0.8 of the baseline's most.",
        show_default=False,
    ),
]
Ingestion = Annotated[bool, typer.Option("--ingestion", help="Also tokens a second of computing new chunks.")]
NothingCached = Annotated[bool, typer.Option("--nothing-cached", help="Also prompts of which nothing is cached.")]
Floor = Annotated[bool, typer.Option("--floor", help="Also what HTTP and scheduling alone take.")]
Requests = Annotated[
    int, typer.Option("--requests", metavar="N", min=1, help="Requests of each arm for --throughput and --rate.")
]
Flight = Annotated[
    int, typer.Option("--in-flight", metavar="N", min=1, help="Requests at a time for --throughput and --ingestion.")
]
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
    policy: Policies = ("query",),  # type: ignore[assignment]
    at: Ratios = (0.15,),  # type: ignore[assignment]
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

    Asks prompts of random chunks in random order, each arm in turn. Chunks are
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
    from lmcache_rag.bench.session import SpeedSession, Wanted
    from lmcache_rag.bench.speed import Arm
    from lmcache_rag.bench.workload import Workload
    from lmcache_rag.cli.bench_speed_view import check_plot, draw
    from lmcache_rag.policies import get_policy

    for name in policy:
        get_policy(name)  # a server would take its own for one that it does not know
    if plot:
        check_plot(plot)
    off = {**protocol.NO_BLEND, protocol.MAX_OFFLOAD_TOKENS: 64}
    arms = [Arm("full prefill", baseline or engine, {} if baseline else off)]
    for name, ratio in itertools.product(dict.fromkeys(policy), dict.fromkeys(at)):
        params = {protocol.POLICY: name, protocol.RATIO: ratio}
        arms += [Arm(f"{name} {ratio:g}", engine, params), Arm(f"hot {name} {ratio:g}", engine, params, hot=True)]
    wanted = Wanted(
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
    # New chunks in each run: what a server still has of an earlier one would make its full prefills short.
    workload = Workload(chunks=chunks, seed=time.time_ns())
    with Bars(run, main="requests") as bars:
        session = SpeedSession(
            arms, Arm("engine", engine), workload, wanted, lambda done, total: bars.update("requests", done, total)
        )
        found = asyncio.run(session.run())
    if plot:
        draw(found.ttft, plot)
    if run.json:
        run.emit(found.as_list())
    else:
        _show(run, found)


def _show(run: Run, found: Found) -> None:
    from lmcache_rag.cli import bench_speed_view as view

    run.out.print(view.first_tokens(found.ttft))
    if found.throughput:
        run.out.print(view.throughput(found.throughput))
    if found.rate:
        run.out.print(view.at_rate(found.rate))
    if found.ingestion:
        run.out.print(view.ingestion(found.ingestion))
    if found.nothing_cached:
        run.out.print(view.pairs("Nothing cached", found.nothing_cached))
    if found.floor:
        run.out.print(view.pairs("HTTP and scheduling", found.floor))
