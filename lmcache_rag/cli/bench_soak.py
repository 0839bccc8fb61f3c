"""bench soak: requests of every kind, for minutes, while something is done to the servers."""

from __future__ import annotations

import shlex
import subprocess
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated

import typer

from lmcache_rag.cli.bars import Bars
from lmcache_rag.cli.bench_checks import Chunk, Documents, Engine, Model, read_chunks, room_for_chunks
from lmcache_rag.cli.render import count
from lmcache_rag.cli.run import Run
from lmcache_rag.cli.verb import verb

if TYPE_CHECKING:
    from lmcache_rag.bench.soak import SoakReport

Seconds = Annotated[float, typer.Option("--seconds", metavar="S", min=1, help="How long.")]
Flight = Annotated[int, typer.Option("--in-flight", metavar="N", min=1, help="Requests at a time.")]
Disturb = Annotated[
    list[str], typer.Option("--disturb", metavar="COMMAND", help="Run on the way; repeatable.", show_default=False)
]
Watch = Annotated[
    list[int],
    typer.Option("--watch", metavar="PID", help="Note its memory; it must live on. Repeatable.", show_default=False),
]
MayGrow = Annotated[float, typer.Option("--may-grow", metavar="MB", min=0, help="Growth of a watched process.")]
LMCacheURL = Annotated[str, typer.Option("--lmcache-url", metavar="URL", help="HTTP address of the LMCache server.")]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="Length of the answers.")]
HostileShare = Annotated[
    float, typer.Option("--hostile", metavar="SHARE", min=0, max=1, help="Share of hostile requests.")
]
Pause = Annotated[int, typer.Option("--pause", metavar="N", min=0, help="Stop LMCache for a while, N times.")]
PauseFor = Annotated[float, typer.Option("--pause-for", metavar="S", min=0, help="How long each time.")]
FAILED = 1


@verb()
def soak(
    run: Run,
    documents: Documents,
    *,
    engine: Engine = "http://localhost:8000",
    lmcache_url: LMCacheURL = "http://127.0.0.1:8089",
    model: Model = None,
    seconds: Seconds = 360.0,
    in_flight: Flight = 8,
    tokens: Tokens = 16,
    chunk_tokens: Chunk = 256,
    disturb: Disturb = (),  # type: ignore[assignment]
    watch: Watch = (),  # type: ignore[assignment]
    may_grow: MayGrow = 64.0,
    hostile: HostileShare = 0.0,
    pause: Pause = 0,
    pause_for: PauseFor = 5.0,
) -> int:
    r"""Blended, unblended, exact and aborted requests, for minutes.

    Answers without blending and at ratio 1 are compared with those of a full
    prefill. Commands given by --disturb are run at equal distances; kill
    LMCache with one. --pause stops the LMCache of this machine for --pause-for
    seconds, in between. --hostile sends wrong, huge and forged requests and
    hangs up on some. The exit status is 1 if any other request failed, any
    answer differed by more than a near tie, the server failed at a hostile
    request, EngineCore below a watched process ended, vLLM or LMCache held
    anything at the end or did not say so, or a watched process grew by more
    than --may-grow from a tenth of the time to the end.

    [bold]Example[/bold]
      lmcache-rag bench soak docs/ --disturb 'pkill -9 -f "\[l]mcache.cli.main server"'
    """
    from lmcache_rag.bench.soak import Soak
    from lmcache_rag.bench.traces import ServerSource
    from lmcache_rag.engines.vllm import VLLMEngine
    from lmcache_rag.prompt import PromptBuilder

    server = VLLMEngine(engine, model)
    builder = PromptBuilder(server.tokenizer, server.info)
    chunks = read_chunks(documents, builder, chunk_tokens)[:40]
    source = ServerSource(server, builder)
    source.keep(chunks)
    with Bars(run, main="seconds") as bars:
        test = Soak(
            source,
            chunks,
            tokens=tokens,
            concurrency=in_flight,
            lmcache_url=lmcache_url.rstrip("/"),
            watch=watch,
            may_grow_mb=may_grow,
            most=room_for_chunks(server, builder, tokens, chunk_tokens),
            hostile=hostile,
            on_step=lambda gone: bars.update("seconds", min(int(gone), int(seconds)), int(seconds)),
        )
        commands = [partial(_disturb, command) for command in disturb]
        pauses = [partial(test.pause, pause_for)] * pause
        mixed = [each for pair in zip_longest(commands, pauses) for each in pair if each is not None]
        report = test.run(seconds, mixed)
    server.close()
    if run.json:
        run.emit(report.as_dict())
    else:
        _show(run, report)
    return 0 if report.sound else FAILED


def _disturb(command: str) -> None:
    subprocess.run(shlex.split(command), check=False)  # whether it found anything to kill shows in what follows


def _show(run: Run, report: SoakReport) -> None:
    parts = ", ".join(f"{number} {kind}" for kind, number in sorted(report.requests.items()))
    run.out.print(f"{count(sum(report.requests.values()), 'request')}: {parts}; {report.reused} reused chunk KV")
    run.out.print(f"Failed: {len(report.failed)}", *(f"  {each}" for each in dict.fromkeys(report.failed)), sep="\n")
    if report.hostile or report.hostile_failed:
        parts = ", ".join(f"{report.hostile[outcome]} {outcome}" for outcome in ("400", "200", "aborted", "other"))
        run.out.print(f"Hostile requests: {parts}; the server failed at {len(report.hostile_failed)}")
        run.out.print(*(f"  {each}" for each in dict.fromkeys(report.hostile_failed)), sep="\n", end="")
    ties = ", ".join(f"{number} {kind}" for kind, number in sorted(report.near_ties.items())) or "none"
    run.out.print(f"Answers that differ from the full prefill's: {len(report.differing)}; at near ties: {ties}")
    for each in report.differing:
        run.out.print(f"  {each['kind']}, token {each['place']}, by {each['gap']} nats")
    if report.differing:
        run.out.print(f"Without blending up to {report.noise:g} nats; not explained by that: {len(report.wrong)}")
    run.out.print(f"Slowest request: {report.slowest_s:.1f} s")
    for reason, number in report.fallbacks.most_common():
        run.out.print(f"Computed in full, {number}: {reason}")
    for name, value in report.gauges.items():
        run.out.print(f"{name} at the end: {'not said' if value is None else f'{value:g}'}")
    if report.pauses[1]:
        run.out.print(f"LMCache was paused {report.pauses[0]} times of {report.pauses[1]}")
    if any(report.engine_cores):
        before, after = (", ".join(map(str, ids)) or "none" for ids in report.engine_cores[:2])
        run.out.print(f"EngineCore: process {before} at the beginning, {after} at the end")
    for process, sizes in report.memory_mb.items():
        words = ", which is too much growth, or it ended" if process in report.grown else ""
        run.out.print(f"Process {process}: {' then '.join(f'{size:.0f}' for size in sizes)} MB{words}")
