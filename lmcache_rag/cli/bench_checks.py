"""bench exact and bench soak: are blended answers correct, and does a server survive every kind of request?"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmcache_rag.budget import AUTO
from lmcache_rag.cli.bench import Engine
from lmcache_rag.cli.console import PARTLY
from lmcache_rag.cli.render import count, plain
from lmcache_rag.cli.run import Bars, CommandContext, command
from lmcache_rag.errors import ConfigError

if TYPE_CHECKING:
    from lmcache_rag.bench.exact import Exactness, TracedEngine
    from lmcache_rag.bench.soak import SoakReport
    from lmcache_rag.engines.base import BlendOptions
    from lmcache_rag.engines.vllm import VLLMEngine
    from lmcache_rag.prompt import PromptBuilder

Documents = Annotated[list[str], typer.Argument(metavar="PATH...", help="Documents to take the chunks from.")]
Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Folder or name of its model.", show_default=False)
]
Prompts = Annotated[int, typer.Option("--prompts", metavar="N", min=1, help="Questions over 4 to 8 chunks each.")]
Orders = Annotated[int, typer.Option("--orders", metavar="N", min=0, help="Orders of the same ten chunks.")]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="Greedy tokens that are compared.")]
Chunk = Annotated[int, typer.Option("--chunk-tokens", metavar="N", min=32, help="Most tokens of a chunk.")]
Ratio = Annotated[
    str, typer.Option("--at", metavar="RATIO", help="Recompute ratio of the policies: 0 to 1, auto, tokens=N.")
]
Embedded = Annotated[
    bool, typer.Option("--embedded", help="Measure the embedded engine on the same prompts too; needs --model.")
]
Cold = Annotated[
    bool,
    typer.Option("--cold", help="Do not send the chunks' spans to the server: all their KV comes from LMCache."),
]

Seconds = Annotated[float, typer.Option("--seconds", metavar="S", min=1, help="How long.")]
Flight = Annotated[int, typer.Option("--in-flight", metavar="N", min=1, help="Requests at a time.")]
Disturb = Annotated[
    list[str],
    typer.Option(
        "--disturb", metavar="COMMAND", help="Command to run during the test; repeatable.", show_default=False
    ),
]
Watch = Annotated[
    list[int],
    typer.Option(
        "--watch",
        metavar="PID",
        help="Process whose memory is recorded; it must keep running. Repeatable.",
        show_default=False,
    ),
]
MayGrow = Annotated[float, typer.Option("--may-grow", metavar="MB", min=0, help="Allowed growth of a watched process.")]
LMCacheURL = Annotated[str, typer.Option("--lmcache-url", metavar="URL", help="HTTP address of the LMCache server.")]
AnswerTokens = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="Length of the answers.")]
HostileShare = Annotated[
    float, typer.Option("--hostile", metavar="SHARE", min=0, max=1, help="Share of hostile requests.")
]
Pause = Annotated[int, typer.Option("--pause", metavar="N", min=0, help="Stop LMCache for a while, N times.")]
PauseFor = Annotated[float, typer.Option("--pause-for", metavar="S", min=0, help="How long each time.")]


@command()
def exact(
    context: CommandContext,
    documents: Documents,
    *,
    engine: Engine = "http://localhost:8000",
    model: Model = None,
    prompts: Prompts = 50,
    orders: Orders = 20,
    tokens: Tokens = 64,
    chunk_tokens: Chunk = 256,
    at: Ratio = AUTO,
    embedded: Embedded = False,
    cold: Cold = False,
) -> None:
    """Compare blended answers with those of a full prefill.

    Cuts the documents into chunks, has their KV computed, and asks questions
    over random chunks in random order: without reuse, with everything computed
    again (ratio 1, which must be the same but for near ties of rounding), with
    each policy, and without reuse once more ("again, exact": what differs there
    is the server's own rounding). Then the same ten chunks in many orders: how
    much of them comes from the cache. Whole blocks of LMCache are 100%; what
    the server still holds itself is in smaller blocks, and may make it more.

    [bold]Example[/bold]
      lmcache-rag bench exact docs/ --engine http://localhost:8000
    """
    from lmcache_rag.bench import exact as bench
    from lmcache_rag.budget import parse_budget_text
    from lmcache_rag.engines.base import BlendOptions
    from lmcache_rag.engines.vllm import VLLMEngine
    from lmcache_rag.prompt import PromptBuilder

    if embedded and not model:
        raise ConfigError("--embedded needs the model's folder or name.", remedy="Give it with --model.")
    budget = parse_budget_text(at)
    server = VLLMEngine(engine, model)
    builder = PromptBuilder(server.tokenizer, server.info)
    chunks = read_chunks(documents, builder, chunk_tokens)
    most = max_chunks(server, builder, tokens, chunk_tokens)
    queries = bench.questions(chunks, prompts, least=min(4, most), most=most)
    arms = {
        "query 1": BlendOptions("query", 1.0, always=True),
        f"query {budget}": BlendOptions("query", budget.wire, always=True),
        f"hkvd {budget}": BlendOptions("hkvd", budget.wire, always=True),
        "none": BlendOptions("none", 0.0, always=True),
    }
    found: dict[str, list[Exactness]] = {}
    with Bars(context, main="questions") as bars, tempfile.TemporaryDirectory() as folder:
        total, done = (prompts * (2 if embedded else 1)) + orders, 0

        def step() -> None:
            nonlocal done
            done += 1
            bars.update("questions", done, total)

        def measure(name: str, source: TracedEngine, kinds: dict[str, BlendOptions]) -> None:
            source.keep(chunks)
            found[name] = bench.compare(source, queries, kinds, tokens=tokens, again=True, on_step=step)

        source = bench.TracedServer(server, builder, named=not cold)
        measure("server", source, arms)
        if orders:
            turned = bench.permutations(chunks[: 10 if most == 8 else most], orders)
            only = {f"query {budget}": arms[f"query {budget}"]}
            found["orders"] = bench.compare(source, turned, only, tokens=1, on_step=step)
        if embedded:
            from lmcache_rag.engines.embedded import EmbeddedEngine

            own = EmbeddedEngine(model, kv_dir=Path(folder))
            try:
                measure("embedded", bench.TracedEmbeddedEngine(own, PromptBuilder(own.tokenizer, own.info)), arms)
            finally:
                own.close()
    server.close()
    if context.json:
        context.emit({name: [plain(each.as_dict()) for each in rows] for name, rows in found.items()})
    else:
        _show_exact(context, found, prompts)


def max_chunks(server: VLLMEngine, builder: PromptBuilder, tokens: int, chunk_tokens: int) -> int:
    """How many chunks the longest prompt can have so that it fits the server's context; at most 8.

    Raises:
        ConfigError: Not even two fit.
    """
    most = min(8, (server.info.context_length - len(builder.prefix_ids) - tokens - 128) // (chunk_tokens + 4))
    if most < 2:
        raise ConfigError("The server's context does not hold two chunks.", remedy="Lower --chunk-tokens.")
    return most


def read_chunks(documents: list[str], builder: PromptBuilder, size: int) -> list[str]:
    """The chunks of all documents that can be read.

    Raises:
        ConfigError: There are too few to measure with.
    """
    from lmcache_rag.documents import Document, Splitter
    from lmcache_rag.ingest import expand

    splitter = Splitter(builder.encode, chunk_tokens=size)
    read = [item for item in expand(documents) if isinstance(item, Document)]
    texts = dict.fromkeys(chunk.text for document in read for chunk in splitter.split_document(document))
    # LMCache keeps whole blocks: a chunk shorter than one is never found.
    long = [text for text in texts if len(builder.chunk_ids(text)) >= builder.info.kv_block]
    if len(long) < 10:
        raise ConfigError(
            f"There are {count(len(long), 'chunk')} of {builder.info.kv_block} tokens and more; 10 are needed.",
            remedy="Name more documents.",
        )
    return long


def _show_exact(context: CommandContext, found: dict[str, list[Exactness]], prompts: int) -> None:
    from rich.table import Table

    table = Table(title=f"{count(prompts, 'question')}: blended against a full prefill")
    for name in ("engine", "arm", "equal", "near ties", "other", "KL of the first token", "least cover"):
        table.add_column(name, justify="left" if name in ("engine", "arm") else "right")
    for engine, rows in found.items():
        for row in rows:
            low, high = row.kl_interval
            differing = len(row.differences) - row.equal - row.unexplained
            covered = "" if row.least_cover is None else f"{row.least_cover:.1%}"
            kl = f"{row.kl:.4f} [{low:.4f}, {high:.4f}]"
            table.add_row(engine, row.arm, str(row.equal), str(differing), str(row.unexplained), kl, covered)
    context.out.print(table)


@command()
def soak(
    context: CommandContext,
    documents: Documents,
    *,
    engine: Engine = "http://localhost:8000",
    lmcache_url: LMCacheURL = "http://127.0.0.1:8089",
    model: Model = None,
    seconds: Seconds = 360.0,
    in_flight: Flight = 8,
    tokens: AnswerTokens = 16,
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
    LMCache with one of them. --pause stops the LMCache of this machine for --pause-for
    seconds, in between. --hostile sends wrong, huge and forged requests and
    hangs up on some. The exit status is 1 if any other request failed, any
    answer differed by more than a near tie, the server failed at a hostile
    request, EngineCore below a watched process ended, vLLM or LMCache held
    anything at the end or did not report it, or a watched process grew by more
    than --may-grow from a tenth of the time to the end.

    [bold]Example[/bold]
      lmcache-rag bench soak docs/ --disturb 'pkill -9 -f "\[l]mcache.cli.main server"'
    """
    from lmcache_rag.bench.exact import TracedServer
    from lmcache_rag.bench.soak import Soak
    from lmcache_rag.engines.vllm import VLLMEngine
    from lmcache_rag.prompt import PromptBuilder

    server = VLLMEngine(engine, model)
    builder = PromptBuilder(server.tokenizer, server.info)
    chunks = read_chunks(documents, builder, chunk_tokens)[:40]
    source = TracedServer(server, builder)
    source.keep(chunks)
    with Bars(context, main="seconds") as bars:
        test = Soak(
            source,
            chunks,
            tokens=tokens,
            concurrency=in_flight,
            lmcache_url=lmcache_url.rstrip("/"),
            watch=watch,
            may_grow_mb=may_grow,
            most=max_chunks(server, builder, tokens, chunk_tokens),
            hostile=hostile,
            on_step=lambda gone: bars.update("seconds", min(int(gone), int(seconds)), int(seconds)),
        )
        commands = [partial(_disturb, command) for command in disturb]
        pauses = [partial(test.pause, pause_for)] * pause
        mixed = [each for pair in zip_longest(commands, pauses) for each in pair if each is not None]
        report = test.run(seconds, mixed)
    server.close()
    if context.json:
        context.emit(report.as_dict())
    else:
        _show_soak(context, report)
    return 0 if report.sound else PARTLY


def _disturb(command: str) -> None:
    subprocess.run(shlex.split(command), check=False)  # its effect shows in the requests that follow


def _show_soak(context: CommandContext, report: SoakReport) -> None:
    parts = ", ".join(f"{number} {kind}" for kind, number in sorted(report.requests.items()))
    context.out.print(f"{count(sum(report.requests.values()), 'request')}: {parts}; {report.reused} reused chunk KV")
    context.out.print(
        f"Failed: {len(report.failed)}", *(f"  {each}" for each in dict.fromkeys(report.failed)), sep="\n"
    )
    if report.hostile or report.hostile_failed:
        parts = ", ".join(f"{report.hostile[outcome]} {outcome}" for outcome in ("400", "200", "aborted", "other"))
        context.out.print(f"Hostile requests: {parts}; the server failed at {len(report.hostile_failed)}")
        context.out.print(*(f"  {each}" for each in dict.fromkeys(report.hostile_failed)), sep="\n", end="")
    ties = ", ".join(f"{number} {kind}" for kind, number in sorted(report.near_ties.items())) or "none"
    context.out.print(f"Answers that differ from the full prefill's: {len(report.differing)}; at near ties: {ties}")
    for each in report.differing:
        context.out.print(f"  {each['kind']}, token {each['place']}, by {each['gap']} nats")
    if report.differing:
        context.out.print(f"Without blending up to {report.noise:g} nats; not explained by that: {len(report.wrong)}")
    context.out.print(f"Slowest request: {report.slowest_s:.1f} s")
    for reason, number in report.fallbacks.most_common():
        context.out.print(f"Computed in full, {number}: {reason}")
    for name, value in report.gauges.items():
        context.out.print(f"{name} at the end: {'not reported' if value is None else f'{value:g}'}")
    if report.pauses[1]:
        context.out.print(f"LMCache was paused {report.pauses[0]} times of {report.pauses[1]}")
    if any(report.engine_cores):
        before, after = (", ".join(map(str, ids)) or "none" for ids in report.engine_cores[:2])
        context.out.print(f"EngineCore: process {before} at the beginning, {after} at the end")
    for process, sizes in report.memory_mb.items():
        words = ", which is too much growth, or it ended" if process in report.grown else ""
        context.out.print(f"Process {process}: {' then '.join(f'{size:.0f}' for size in sizes)} MB{words}")
