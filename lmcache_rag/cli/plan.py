"""plan: how large the KV of a corpus is, what keeping it gains, and what is worth keeping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmcache_rag import __version__
from lmcache_rag.cli.console import PARTLY
from lmcache_rag.cli.run import Bars, CommandContext, command
from lmcache_rag.errors import ConfigError

if TYPE_CHECKING:
    from lmcache_rag.plan.economics import Advice, Corpus, Costs, Plan, Tier
    from lmcache_rag.plan.geometry import Geometry
    from lmcache_rag.plan.replay import Replayed
    from lmcache_rag.trace import Retrieval

QUESTIONS = 25_000  # simulated without a trace
WARM_UP = 0.5  # of it, while the cache fills
CHUNK_TOKENS = 1000
PLACEHOLDER = "YOUR_MODEL"  # in the commands, where the model is given by its numbers

Chunks = Annotated[
    int | None,
    typer.Option(
        "--chunks", metavar="N", min=1, help="Chunks of the corpus; default: those of the store.", show_default=False
    ),
]
ChunkTokens = Annotated[
    int | None,
    typer.Option(
        "--chunk-tokens",
        metavar="N",
        min=1,
        help="Mean length of a chunk, with --chunks; default: 1000.",
        show_default=False,
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="A retrieval trace, or questions whose chunks the store retrieves (JSONL; .txt: one in a line).",
        show_default=False,
    ),
]
SaveTrace = Annotated[
    Path | None,
    typer.Option(
        "--save-trace", metavar="FILE", help="Write what was retrieved, for the next run.", show_default=False
    ),
]
Zipf = Annotated[
    float,
    typer.Option(
        "--zipf", metavar="S", min=0, help="Without a trace: exponent of the chunks' popularity; 0: all alike."
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Without a trace: draws other questions.")]
Questions = Annotated[
    int, typer.Option("--questions", metavar="N", min=2, help="Without a trace: how many questions are simulated.")
]
L1 = Annotated[float, typer.Option("--l1-gb", metavar="GB", min=0.001, help="CPU memory for KV, as of serve.")]
Tiers = Annotated[
    list[str] | None,
    typer.Option(
        "--tier", metavar="NAME:GB:GB/s", help="A second tier with its bandwidth; repeatable.", show_default=False
    ),
]
KVDtype = Annotated[
    str,
    typer.Option(
        "--kv-dtype", metavar="NAME", help="bf16, fp16, fp8 or fp32; default: the model's.", show_default=False
    ),
]
Layers = Annotated[
    int | None, typer.Option("--layers", metavar="N", min=1, help="Instead of a model: its layers.", show_default=False)
]
KVHeads = Annotated[
    int | None, typer.Option("--kv-heads", metavar="N", min=1, help="Its KV heads.", show_default=False)
]
HeadSize = Annotated[
    int | None, typer.Option("--head-size", metavar="N", min=1, help="Its head size.", show_default=False)
]
Parameters = Annotated[
    float, typer.Option("--parameters", metavar="BILLIONS", min=0, help="Its active parameters.", show_default=False)
]
Rate = Annotated[
    float,
    typer.Option(
        "--prefill-tokens-per-s",
        metavar="N",
        min=0,
        help="Of the GPU; default: by the server, or by docs/results.",
        show_default=False,
    ),
]
Report = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.html", help="Write one HTML page.", show_default=False)
]
Replay = Annotated[
    str,
    typer.Option(
        "--replay",
        metavar="URL",
        help="Ask this server the trace, with random tokens: predicted and measured hit rate.",
        show_default=False,
    ),
]
ReplayRequests = Annotated[
    int, typer.Option("--replay-requests", metavar="N", min=1, help="Most requests that --replay sends.")
]
ReplayRate = Annotated[
    float,
    typer.Option("--replay-rate", metavar="R", min=0, help="Requests a second of --replay; 0: one after the other."),
]


@command("store", "engine", "model", "embedder", "top_k")
def plan(
    context: CommandContext,
    *,
    chunks: Chunks = None,
    chunk_tokens: ChunkTokens = None,
    trace: Trace = None,
    save_trace: SaveTrace = None,
    zipf: Zipf = 0.9,
    questions: Questions = QUESTIONS,
    seed: Seed = 0,
    l1_gb: L1 = 20.0,
    tier: Tiers = None,
    kv_dtype: KVDtype = "",
    layers: Layers = None,
    kv_heads: KVHeads = None,
    head_size: HeadSize = None,
    parameters: Parameters = 0.0,
    prefill_tokens_per_s: Rate = 0.0,
    report: Report = None,
    replay: Replay = "",
    replay_requests: ReplayRequests = 500,
    replay_rate: ReplayRate = 0.0,
) -> int:
    """Plan which KV is worth keeping, and where.

    Prints how large the KV of a corpus is and how long computing it takes, which
    share of the chunks is found by gigabytes of memory, when answers start with
    and without, from which bandwidth on a second tier pays, and a recommendation.
    The model's config.json suffices, and nothing is downloaded. Without a trace
    the questions are simulated. With --engine URL the times are those that the
    server measured. docs/economics.md explains all of it.

    [bold]Examples[/bold]
      lmcache-rag plan --model Qwen/Qwen3-8B --chunks 2000000 --l1-gb 200
      lmcache-rag plan --trace questions.jsonl --tier disk:2000:6 --report plan.html
      lmcache-rag plan --engine http://localhost:8000 --trace trace.jsonl --replay http://localhost:8000
    """
    from lmcache_rag.plan import economics
    from lmcache_rag.plan.report import write_report

    if report and not report.absolute().parent.is_dir():
        raise ConfigError(f"There is no folder {report.parent}.", remedy="Make it, or name another file.")
    tiers = tuple(map(economics.Tier.parse, tier or ()))
    if len({each.name for each in tiers}) < len(tiers):
        raise ConfigError("Two tiers have the same name.", remedy="Name each --tier once.")
    numbers = (layers, kv_heads, head_size)
    model = _model(context, numbers, parameters, kv_dtype, replay)
    found = _retrievals(context, trace, save_trace)
    corpus, sizes = _corpus(context, chunks, chunk_tokens, found)
    costs = _costs(context, model, prefill_tokens_per_s, replay)
    with context.waiting("Simulating"):
        made = _plan(context, model, costs, tiers, corpus, found, sizes, trace, l1_gb, zipf, questions, seed)
        advice = economics.advise(made, context.settings().model or (PLACEHOLDER if any(numbers) else model.name))
    replayed = None
    if replay:
        replayed = _replay(context, made, found, sizes, replay, replay_requests, replay_rate, zipf, seed)
    facts = _facts(made, advice, replayed)
    if report:
        write_report(report, made, facts, advice, __version__, replayed)
    if context.json:
        context.emit(facts)
    else:
        _show(context, made, facts, advice, replayed)
    return PARTLY if replayed is not None and not replayed.agrees else 0


# The inputs


def _url(context: CommandContext, replay: str) -> str:
    """The server to ask: of --replay, or of --engine; "" without one."""
    engine = context.settings().engine
    return replay or ("" if engine == "embedded" else engine if isinstance(engine, str) else engine[0])


def _model(
    context: CommandContext, numbers: Sequence[int | None], parameters: float, dtype: str, replay: str
) -> Geometry:
    from lmcache_rag.plan import geometry

    if any(numbers):
        if not all(numbers):
            raise ConfigError("--layers, --kv-heads and --head-size belong together.", remedy="Give all three.")
        sizes = [number or 0 for number in numbers]
        return geometry.from_numbers(
            *sizes, parameters=round(parameters * 1e9), dtype=dtype or "bf16", name=_named(context)
        )
    settings = context.settings()
    name = settings.model or ""
    if not name and (url := _url(context, replay)):
        from lmcache_rag.engines.vllm_client import VLLMClient

        with VLLMClient(url) as client:
            name = client.served_model(None).root
    if not name and (settings.store / "store.db").exists():
        from lmcache_rag.store_model import find_store_model

        with context.workspace(models=False) as workspace:
            name = str(find_store_model(workspace.store.registry).path)
    if not name:
        raise ConfigError(
            "No model is named.",
            remedy="Give --model NAME, a folder or a config.json, or --layers, --kv-heads and --head-size.",
        )
    return geometry.read_config(name, dtype=dtype)


def _named(context: CommandContext) -> str:
    return context.settings().model or "model"


def _costs(context: CommandContext, model: Geometry, rate: float, replay: str) -> Costs:
    from lmcache_rag import protocol
    from lmcache_rag.plan.economics import known_costs, server_costs

    if not rate and (url := _url(context, replay)):
        from lmcache_rag.engines.vllm_client import VLLMClient

        with VLLMClient(url) as client:
            measured = server_costs(protocol.costs(client.metrics()), url)
        if measured is not None:
            return measured
        context.message(f"{url} has measured no costs yet; those of docs/results are used.", style="yellow")
    return known_costs(model, rate)


def _retrievals(context: CommandContext, trace: Path | None, save: Path | None) -> list[Retrieval]:
    """The trace; questions without chunks are retrieved from the store."""
    from lmcache_rag.trace import read_trace, write_trace

    if trace is None:
        if save is not None:
            raise ConfigError("--save-trace needs --trace.", remedy="Name a file of questions by --trace.")
        return []
    found = list(read_trace(trace))
    if any(each.question and not each.chunks for each in found):
        found = list(_retrieved(context, found))
    if save is not None:
        write_trace(save, found)
    return found


def _retrieved(context: CommandContext, questions: Sequence[Retrieval]) -> Iterator[Retrieval]:
    from dataclasses import replace

    from lmcache_rag.rag import retrieve
    from lmcache_rag.trace import chunk_name

    with context.workspace() as workspace, Bars(context, "questions") as bars:
        for number, each in enumerate(questions, 1):
            if each.question and not each.chunks:
                hits = retrieve(workspace.store, workspace.embedder, each.question, workspace.settings.top_k)
                names = tuple(chunk_name(hit.text) for hit in hits)
                each = replace(each, chunks=names, tokens=tuple(max(hit.tokens, 1) for hit in hits))
            bars.update("questions", number, len(questions))
            yield each


def _corpus(
    context: CommandContext, chunks: int | None, tokens: int | None, found: Sequence[Retrieval]
) -> tuple[Corpus, Callable[[Retrieval], Sequence[int]]]:
    """The corpus, and what gives the lengths of a retrieval's chunks: the trace, or the mean of the corpus."""
    from lmcache_rag.plan.economics import Corpus

    known: dict[str, int] = {}
    for each in found:
        known.update(zip(each.chunks, each.tokens, strict=False))
    mean = tokens or (round(sum(known.values()) / len(known)) if known else 0)
    if chunks is None:
        if (context.settings().store / "store.db").exists():
            with context.workspace(models=False) as workspace:
                stats = workspace.store.registry.stats()
            if not stats.chunks:
                raise ConfigError("The store is empty.", remedy="Give --chunks N, or ingest something.")
            chunks, mean = stats.chunks, tokens or round(stats.tokens / stats.chunks)
        elif found:
            chunks = len({name for each in found for name in each.names})
        else:
            raise ConfigError("There is no store.", remedy="Name one by --store, or give --chunks N.")
    corpus = Corpus(chunks, mean or CHUNK_TOKENS)
    return corpus, lambda each: each.tokens or [known.get(name, corpus.tokens) for name in each.chunks]


# The plan


def _plan(
    context: CommandContext,
    model: Geometry,
    costs: Costs,
    tiers: tuple[Tier, ...],
    corpus: Corpus,
    found: Sequence[Retrieval],
    sizes: Callable[[Retrieval], Sequence[int]],
    trace: Path | None,
    l1_gb: float,
    zipf: float,
    count: int,
    seed: int,
) -> Plan:
    from lmcache_rag.plan.cache import WATERMARK, Place, Workload, hit_curve, simulate, zipf_workload
    from lmcache_rag.plan.economics import GB, GIB, Plan, Setup
    from lmcache_rag.plan.geometry import objects

    notes = list(model.notes)
    if found:
        rows = [(each.names, [objects(count) for count in sizes(each)]) for each in found if each.chunks]
        if not rows:
            raise ConfigError(f"{trace} holds no chunks.", remedy="Name a store by --store that retrieves them.")
        work, skip = Workload.of(rows), 0
        chained = Workload.of(rows, chained=True)
        words = f"{len(rows):,} questions of {trace}, {len(work.sizes):,} different chunks"
    else:
        top_k = context.settings().top_k
        size = max(objects(corpus.tokens), 1)
        work = zipf_workload(corpus.chunks, count, top_k=top_k, exponent=zipf, size=size, seed=seed)
        skip = round(count * WARM_UP)
        chained = Workload.of(
            [([str(number) for number in each], [size] * len(each)) for each in work.requests], chained=True
        )
        words = (
            f"no trace: {count:,} simulated questions, {top_k} chunks each, Zipf {zipf:g}, seed {seed}, half counted"
        )
        notes.append(
            "The popularity of the chunks is assumed. A trace of real questions (--trace) may give other hit rates."
        )
    uses = sum(map(len, work.requests)) / len(work.requests)
    rest = corpus.tokens - objects(corpus.tokens) * 64
    setup = Setup(model, costs, tiers, round(64 + uses * rest))
    each = model.object_bytes()
    memory, size_of_chunk = int(l1_gb * GIB / each), objects(corpus.tokens)
    places = [Place(one.name, int(one.gigabytes * GB / each) if one.gigabytes else None) for one in tiers]
    curves = {
        "lru": hit_curve(work, skip=skip),
        "second use": hit_curve(work, skip=skip, admission=2),
        "prefixes": hit_curve(chained, skip=skip),
    }
    fits = corpus.chunks * size_of_chunk < WATERMARK * memory  # then all of it is computed at ingestion
    ingested = range(len(work.sizes)) if fits else ()
    if not fits:
        first = 1 - curves["lru"].most
        notes.append(f"{first:.0%} of the uses are the first of their chunk: found by no cache unless it was ingested.")
    alone = simulate(work, memory, ingested=ingested, skip=skip)
    whole = simulate(work, memory, places, retain=True, ingested=ingested, skip=skip) if places else alone
    return Plan(setup, corpus, words, l1_gb, curves, whole, alone, uses, tuple(notes))


def _replay(
    context: CommandContext,
    made: Plan,
    found: Sequence[Retrieval],
    sizes: Callable[[Retrieval], Sequence[int]],
    url: str,
    most: int,
    rate: float,
    zipf: float,
    seed: int,
) -> Replayed:
    from lmcache_rag.credentials import ingest_key_for
    from lmcache_rag.engines.vllm_client import VLLMClient
    from lmcache_rag.plan.cache import Place, zipf_workload
    from lmcache_rag.plan.economics import GB, GIB
    from lmcache_rag.plan.replay import Server, replay

    rows: Sequence[tuple[Sequence[str], Sequence[int]]]
    if found:
        rows = [(each.names, sizes(each)) for each in found if each.chunks][:most]
    else:
        work = zipf_workload(made.corpus.chunks, most, top_k=context.settings().top_k, exponent=zipf, size=1, seed=seed)
        rows = [([str(number) for number in each], [made.corpus.tokens] * len(each)) for each in work.requests]
    each = made.setup.model.object_bytes()
    places = [Place(one.name, int(one.gigabytes * GB / each) if one.gigabytes else None) for one in made.setup.tiers]
    with VLLMClient(url, ingest_key=ingest_key_for(context.settings())) as client, Bars(context, "requests") as bars:
        return replay(
            client,
            Server.of(client),
            rows,
            made.setup.model,
            memory_bytes=int(made.memory_gb * GIB),
            tiers=places,
            per_second=rate,
            on_request=lambda done, total: bars.update("requests", done, total),
        )


# The output


def _facts(made: Plan, advice: Advice, replayed: Replayed | None) -> dict[str, Any]:
    """All of it as one JSON document."""
    from lmcache_rag.plan.cache import USABLE
    from lmcache_rag.plan.economics import GIB, MEASURED, Costs, Setup, by_tier, worth_keeping
    from lmcache_rag.plan.geometry import Geometry

    model, setup = made.setup.model, made.setup
    kv = {}
    for dtype in dict.fromkeys([model.dtype, "bf16", "fp8"]):
        one = model.with_dtype(dtype)
        nbytes = one.chunk_bytes(made.corpus.tokens)
        kv[dtype] = {
            "bytes_per_token": one.bytes_per_token,
            "bytes_per_chunk": nbytes,
            "bytes": nbytes * made.corpus.chunks,
        }
    ttft = {}
    for name, found in (("memory", made.memory_only), ("memory and tiers", made.found)):
        with_ms, without = made.ttft(found)
        if name == "memory" or setup.tiers:
            ttft[name] = {"with": with_ms, "without": without, "shorter_by": made.gain(found)}
    best, without = made.best_ttft()
    ttft["everything in memory"] = {"with": best, "without": without, "shorter_by": 1 - best / without}
    even = [
        {"model": model.name, "source": setup.costs.source, "gb_per_s": _finite(setup.break_even(made.corpus.tokens))}
    ]
    for name, (parameters, nbytes, figures) in MEASURED.items():
        other = Setup(Geometry(name, 1, nbytes // 2, parameters), Costs(figures, name))
        even.append(
            {"model": name, "source": "docs/results", "gb_per_s": _finite(other.break_even(made.corpus.tokens))}
        )
    each = model.object_bytes()
    found_in = {name or "not found": share for name, share in by_tier(made.found, setup.tiers).items() if name != "gpu"}
    return {
        "model": {"name": model.name, "layers": model.layers, "parameters": model.parameters, "kv_dtype": model.dtype},
        "corpus": {"chunks": made.corpus.chunks, "chunk_tokens": made.corpus.tokens},
        "trace": made.trace,
        "kv": kv,
        "gpu_hours": made.gpu_hours,
        "prefill_tokens_per_s": setup.costs.tokens_per_second,
        "times": {"source": setup.costs.source, "measured_by_this_server": setup.costs.measured},
        "l1_gb": made.memory_gb,
        "tiers": [{"name": one.name, "gb": one.gigabytes, "gb_per_s": one.bandwidth} for one in setup.tiers],
        "hit_rate": [{"gb": size, **rates} for size, rates in made.rates()],
        "most_of_it_gb": worth_keeping(made.curves["lru"]) * each / GIB / USABLE,
        "found_in": found_in,
        "not_stored": made.found.refused,
        "ttft_ms": ttft,
        "break_even": even,
        "recommendation": {
            "setup": advice.number,
            "title": advice.title,
            "reasons": list(advice.reasons),
            "commands": list(advice.commands),
        },
        "replay": None
        if replayed is None
        else {
            "requests": replayed.requests,
            "left_out": replayed.left_out,
            "predicted": replayed.predicted,
            "measured": replayed.measured,
            "difference": replayed.difference,
            "agrees": replayed.agrees,
            "blends": replayed.blends,
            "seconds": replayed.seconds,
        },
        "notes": list(made.notes),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _show(
    context: CommandContext, made: Plan, facts: dict[str, Any], advice: Advice, replayed: Replayed | None
) -> None:
    from rich.table import Table

    out = context.out
    table = Table(title=f"KV of {facts['model']['name']}")
    for name in ("dtype", "a token", f"a chunk of {made.corpus.tokens:,} tokens", f"{made.corpus.chunks:,} chunks"):
        table.add_column(name, justify="left" if name == "dtype" else "right")
    for dtype, row in facts["kv"].items():
        table.add_row(dtype, *(_size(row[name]) for name in ("bytes_per_token", "bytes_per_chunk", "bytes")))
    out.print(table)
    out.print(f"Computing it: {made.gpu_time} at {facts['prefill_tokens_per_s']:,.0f} tokens a second.")
    out.print(f"Times: {facts['times']['source']}.", soft_wrap=True)
    out.print(f"Questions: {facts['trace']}.", soft_wrap=True)
    table = Table(title="Hit rate by gigabytes of memory")
    for name in ("GB", "LRU", "", "second use", "exact prefixes"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in facts["hit_rate"]:
        mark = "◂" if row["gb"] == made.memory_gb else ""
        rates = [f"{row[name]:.1%}" for name in ("lru", "second use", "prefixes")]
        table.add_row(f"{row['gb']:,g}", rates[0], "█" * round(20 * row["lru"]) + mark, *rates[1:])
    out.print(table)
    table = Table(title="Time to the first token, without HTTP and scheduling")
    for name in ("KV in", "with, ms", "without, ms", "shorter by"):
        table.add_column(name, justify="left" if name == "KV in" else "right")
    for name, row in facts["ttft_ms"].items():
        table.add_row(name, f"{row['with']:,.0f}", f"{row['without']:,.0f}", f"{row['shorter_by']:.0%}")
    out.print(table)
    shares = ", ".join(f"{share:.1%} {name}" for name, share in facts["found_in"].items())
    out.print(f"Found of the chunks: {shares}.\n")
    table = Table(title=f"A tier pays from so many GB/s on, chunks of {made.corpus.tokens:,} tokens")
    for name in ("model", "GB/s"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in facts["break_even"]:
        table.add_row(row["model"], "never" if row["gb_per_s"] is None else f"{row['gb_per_s']:,.2g}")
    out.print(table)
    for note in facts["notes"]:
        context.message(note, style="yellow")
    out.print(f"{advice.number}. {advice.title}.", style="bold")
    for reason in advice.reasons:
        out.print(f"   {reason}", soft_wrap=True)
    if any(PLACEHOLDER in line.split() for line in advice.commands):
        out.print(f"{PLACEHOLDER} stands for the folder or Hugging Face name of yours.")
    for line in advice.commands:
        out.print(f"   $ {line}", soft_wrap=True, style="green")
    if replayed is not None:
        what = "blended" if replayed.blends else "exact prefixes: the server does not blend"
        out.print(
            f"Replay of {replayed.requests:,} requests ({what}): predicted {replayed.predicted:.1%}, measured "
            f"{replayed.measured:.1%}, difference {100 * replayed.difference:+.1f} points.",
            soft_wrap=True,
        )


def _size(nbytes: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= factor:
            return f"{nbytes / factor:,.1f} {unit}"
    return f"{nbytes / 1e3:,.1f} KB"
