"""bench quality: what blending costs in answers and gains in time, on generated tasks or the user's own questions."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmcache_rag import __version__
from lmcache_rag.cli.console import PARTLY
from lmcache_rag.cli.run import EMBED, PLACE, Bars, CommandContext, command
from lmcache_rag.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from lmcache_rag.bench.quality.arms import AnswerSource, Arm
    from lmcache_rag.bench.quality.conversation import Turn
    from lmcache_rag.bench.quality.runner import QualityRun
    from lmcache_rag.bench.quality.scores import Interval, Score, Verdict
    from lmcache_rag.engines.vllm import VLLMEngine
    from lmcache_rag.workspace import Workspace

Data = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[FILE]...",
        help="Questions with answers; without passages your store retrieves them. No file: generated ones.",
        show_default=False,
    ),
]
Cells = Annotated[
    str,
    typer.Option(
        "--cells",
        metavar="NxT,...",
        help="Generated questions over N passages of T tokens; 8x160:tags names a style, 8x160:russian or "
        "8x160:conversation a task.",
    ),
]
Tasks = Annotated[
    str,
    typer.Option(
        "--tasks",
        metavar="NAME,...",
        help="Of generated questions: fact, needle, two-hop, reference, documents, russian; default: all but russian.",
        show_default=False,
    ),
]
Items = Annotated[
    int, typer.Option("--items", metavar="N", min=1, help="Questions (or conversations) of a cell or file, at most.")
]
Turns = Annotated[int, typer.Option("--turns", metavar="N", min=1, max=8, help="Questions of a conversation.")]
StyleName = Annotated[
    str,
    typer.Option(
        "--style",
        metavar="NAME",
        help="plain, after (instruction after the question), around (question before and after), tags, reason.",
    ),
]
Arms = Annotated[
    str,
    typer.Option(
        "--arms",
        metavar="ARM,...",
        help="Ways to answer, beside a full prefill: prefix, none, all, auto, POLICY:RATIO, POLICY:tokens=N.",
        show_default=False,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", metavar="N", min=1, help="Most tokens of an answer; default: by the style.", show_default=False
    ),
]
Concurrency = Annotated[
    int, typer.Option("--concurrency", metavar="N", min=1, help="Questions at once; above 1 no TTFT is quoted.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Makes other generated questions.")]
Out = Annotated[
    Path, typer.Option("--out", metavar="FILE", help="Results, a line a question; another run continues it.")
]
Report = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.html", help="Write one HTML page.", show_default=False)
]
Gate = Annotated[
    float | None,
    typer.Option(
        "--gate",
        metavar="LOSS",
        min=0,
        help="Exit status 1 if auto, or else the first arm that blends, loses so many of the hits.",
        show_default=False,
    ),
]
Baseline = Annotated[
    str,
    typer.Option(
        "--baseline",
        metavar="URL",
        help="A server without blending for the same model: adds the arm stock.",
        show_default=False,
    ),
]
ContextPilot = Annotated[
    str,
    typer.Option(
        "--contextpilot",
        metavar="PYTHON",
        help="Python with the package contextpilot: adds an arm.",
        show_default=False,
    ),
]

LIMIT = 0.02  # of the recommendation, without --gate
POOLED = "all"  # lmcache_rag.bench.quality.scores imports more than the help needs


@command(*PLACE, *EMBED, "top_k")
def quality(
    context: CommandContext,
    data: Data = None,
    *,
    cells: Cells = "",
    tasks: Tasks = "",
    items: Items = 200,
    style: StyleName = "plain",
    arms: Arms = "",
    max_tokens: MaxTokens = None,
    concurrency: Concurrency = 1,
    seed: Seed = 0,
    turns: Turns = 6,
    out: Out = Path("bench-quality.jsonl"),
    report: Report = None,
    gate: Gate = None,
    baseline: Baseline = "",
    contextpilot: ContextPilot = "",
) -> int:
    """What blending costs in answers, and what it gains in time.

    Asks questions whose answers are known, each by a full prefill and in every
    arm, with the same token ids: your own questions against your store, files
    with passages, or generated ones (--cells, default 8x160). Compared are hits,
    F1, how likely the right answer is, how far the model's distributions move,
    and the time to the first token, question by question, with 95% intervals.
    It ends with a recommendation. With --gate the exit status is 1 if the mean
    loss is half of it or more, if its interval reaches it, or if a cell's
    interval lies wholly beyond it. docs/quality.md explains all of it.

    [bold]Examples[/bold]
      lmcache-rag bench quality questions.jsonl --report quality.html
      lmcache-rag bench quality --engine http://localhost:8000 --cells 6x512,8x160
      lmcache-rag bench quality --engine http://localhost:8000 --concurrency 16 --gate 0.02
    """
    from lmcache_rag.bench.quality import tasks as generated
    from lmcache_rag.bench.quality.arms import CONTEXTPILOT, DEFAULT, STOCK, parse_arms
    from lmcache_rag.bench.quality.conversation import by_turn
    from lmcache_rag.bench.quality.data import read_samples
    from lmcache_rag.bench.quality.results import ResultFile, digest
    from lmcache_rag.bench.quality.scores import main_arm, recommendation, scores, verdict

    chosen = parse_arms(arms or DEFAULT)
    for name, place, remedy in (
        (CONTEXTPILOT, contextpilot, "Name the Python program of its environment by --contextpilot."),
        (STOCK, baseline, "Name the URL of a server without blending by --baseline."),
    ):
        if place and not any(arm.name == name for arm in chosen):
            chosen += parse_arms(name)[1:]
        if not place and any(arm.name == name for arm in chosen):
            raise ConfigError(f"The arm {name} needs one more option.", remedy=remedy)
    names = generated.parse_tasks(tasks)
    wanted = generated.parse_cells(cells or ("" if data else "8x160"), generated.get_style(style).name)
    samples = [sample for path in data or () for sample in read_samples(path, style, items)]
    own_store = any(not sample.passages for sample in samples)
    _check_folders(out, report)
    with _workspace(context, own_store=own_store) as workspace, _stock(workspace, baseline) as stock:
        source = _source(workspace, stock, timed=concurrency == 1)
        if source.kind == "embedded":
            concurrency = 1
        chosen = _supported(context, source, chosen)
        for cell in wanted:
            encode = workspace.prompts.encode
            samples += generated.make_samples(cell, items, encode, tasks=names, seed=seed, turns=turns)
        if gate is not None and not any(sample.gated for sample in samples):
            raise ConfigError("These questions are only reported.", remedy="Leave out --gate, or add other cells.")
        run = _run(workspace, source, chosen, own_store=own_store)
        run = _with(run, max_tokens=max_tokens, concurrency=concurrency, contextpilot=contextpilot)
        facts = {
            "version": __version__,
            "engine": source.kind,
            "model": workspace.engine.info.model,
            "dtype": workspace.engine.info.dtype,
            "arms": [arm.name for arm in chosen],
            "questions": digest(samples),
            "system": run.format.system,
            "instruction": run.format.instruction,
            "max_tokens": max_tokens,
            "top_k": workspace.settings.top_k if own_store else None,
            "timed": concurrency == 1,
            "seed": seed,
        }
        with ResultFile(out, facts) as results, Bars(context, main="questions") as bars:
            run.run(samples, results, lambda done, total: bars.update("questions", done, total))
            records = [r for s in samples if (r := results.records.get((s.cell, s.sample_id)))]
    found = scores(records)
    arm, limit = main_arm([arm.name for arm in chosen]), LIMIT if gate is None else gate
    advice, judged = recommendation(found, arm, limit), verdict(found, arm, limit)
    if report:
        from lmcache_rag.bench.quality.report import write_report

        write_report(report, records, found, facts, advice, judged)
    talks = by_turn(records)
    if context.json:
        context.emit(
            {
                "settings": facts,
                "scores": [score.as_dict() for score in found],
                "turns": [turn.as_dict() for turn in talks],
                "recommendation": advice,
                "gate": {"arm": arm, "limit": limit, "passed": judged.passed, "reasons": judged.reasons},
            }
        )
    else:
        _show(context, found, talks, facts, advice, judged, gated=gate is not None)
    return PARTLY if gate is not None and not judged.passed else 0


def _check_folders(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"There is no folder {path.parent}.", remedy="Make it, or name another file.")


@contextmanager
def _workspace(context: CommandContext, *, own_store: bool) -> Iterator[Workspace]:
    """The user's workspace; a store in a temporary folder where all passages come with their questions."""
    settings = context.settings()
    if own_store:
        with context.workspace(settings=settings) as workspace:
            context.load(workspace, embedder=True)
            yield workspace
        return
    with tempfile.TemporaryDirectory(prefix="lmcache-rag-") as folder:
        temporary = settings.model_copy(update={"store": Path(folder, "store")})
        with context.workspace(create=True, settings=temporary) as workspace:
            context.load(workspace, embedder=False)
            yield workspace


@contextmanager
def _stock(workspace: Workspace, baseline: str) -> Iterator[VLLMEngine | None]:
    """The client of a server without blending; None without one, and beside the embedded engine."""
    from lmcache_rag.engines.vllm import VLLMEngine

    if not baseline or not isinstance(workspace.engine, VLLMEngine):
        yield None
        return
    stock = VLLMEngine(baseline, tokenizer=workspace.engine.tokenizer)
    try:
        yield stock
    finally:
        stock.close()


def _source(workspace: Workspace, stock: VLLMEngine | None, *, timed: bool) -> AnswerSource:
    from lmcache_rag.bench.quality.arms import EmbeddedAnswers, ServerAnswers
    from lmcache_rag.engines.embedded import EmbeddedEngine
    from lmcache_rag.engines.vllm import VLLMEngine

    engine = workspace.engine
    if isinstance(engine, VLLMEngine):
        return ServerAnswers(engine, f"{time.time_ns():x}", timed=timed, stock=stock)
    if isinstance(engine, EmbeddedEngine):
        return EmbeddedAnswers(engine)
    raise ConfigError(f"{type(engine).__name__} cannot be measured.", remedy="Use embedded, or a vLLM server's URL.")


def _supported(context: CommandContext, source: AnswerSource, arms: Sequence[Arm]) -> list[Arm]:
    """The arms that the engine has; each is checked before anything is asked."""
    left_out = [arm.name for arm in arms if not source.supports(arm)]
    if left_out:
        context.message(f"Left out, since they need a server: {', '.join(left_out)}.")
    kept = [arm for arm in arms if source.supports(arm)]
    for arm in kept:
        arm.options()
    return kept


def _run(workspace: Workspace, source: AnswerSource, arms: Sequence[Arm], *, own_store: bool) -> QualityRun:
    from lmcache_rag.bench.quality.runner import QualityRun
    from lmcache_rag.kv_manager import KVManager

    def retrieve(question: str) -> list[str]:
        return [hit.text for hit in workspace.rag.retrieve(question)]

    manager = KVManager(workspace.store, workspace.engine, workspace.prompts) if own_store else None
    return QualityRun(
        workspace.engine,
        source,
        workspace.prompts.format,
        workspace.settings.tenant,
        tuple(arms),
        retrieve=retrieve if own_store else None,
        keep=manager.keep if manager else None,
        forget=not own_store,
    )


def _with(run: QualityRun, **changes: Any) -> QualityRun:
    from dataclasses import replace

    return replace(run, **changes)


# The tables

# Measures by their importance, for terminals that have no room for all.
_IMPORTANCE = (
    *("hits", "minus full", "times as fast", "TTFT ms", "recomputed", "blended", "F1", "equal", "along"),
    *("minus full ", "gold NLL minus full", "KL first"),
)
_LEFT_OUT = "A wider terminal shows more measures; --json has all."


def _show(
    context: CommandContext,
    found: Sequence[Score],
    talks: Sequence[Turn],
    facts: dict[str, Any],
    advice: str,
    judged: Verdict,
    *,
    gated: bool,
) -> None:
    width = context.out.width
    pooled = [score for score in found if (score.cell, score.task) == (POOLED, POOLED)]
    context.out.print(score_table(f"{facts['model']}, {pooled[0].questions if pooled else 0} questions", pooled, width))
    parts = [score for score in found if score.arm == judged.arm and (score.cell == POOLED) != (score.task == POOLED)]
    if parts:
        context.out.print(score_table(f"{judged.arm}, by cell and by task", parts, width, first="", arm=False))
    for cell in dict.fromkeys(turn.cell for turn in talks):
        context.out.print(_turns(cell, [turn for turn in talks if turn.cell == cell]))
    context.out.print(advice)
    if gated:
        words = "passed" if judged.passed else f"failed: {'; '.join(judged.reasons)}"
        context.out.print(f"Gate {judged.limit:g}, {judged.arm}: {words}")


def score_table(title: str, rows: Sequence[Score], width: int, *, first: str = "arm", arm: bool = True) -> Table:
    """A row for each score; the measures that none has are left out, and those for which the terminal has no room."""
    from rich.table import Table

    columns: dict[str, Callable[[Score], str]] = {
        "hits": lambda s: f"{s.hit:.3f}",
        "minus full": lambda s: _interval(s.hit_difference),
        "F1": lambda s: f"{s.f1:.3f}",
        "minus full ": lambda s: _interval(s.f1_difference),
        "gold NLL minus full": lambda s: _interval(s.gold_nll_difference),
        "KL first": lambda s: _mean(s.first_kl),
        "along": lambda s: _mean(s.along_kl),
        "equal": lambda s: _share(s.equal),
        "blended": lambda s: _share(s.blended),
        "recomputed": lambda s: "" if s.recomputed is None else f"{s.recomputed:.0f}",
        "TTFT ms": lambda s: "" if s.ttft_ms is None else f"{s.ttft_ms:.0f}",
        "times as fast": lambda s: "" if s.faster is None else f"{s.faster:.2f}",
    }
    texts = {name: [text(score) for score in rows] for name, text in columns.items()}
    names = [score.arm if arm else score.task if score.cell == POOLED else score.cell for score in rows]
    room = width - 4 - max(len(text) for text in (first, *names))
    fitting = set()
    for name in sorted((name for name, own in texts.items() if any(own)), key=_IMPORTANCE.index):
        room -= 3 + max(len(text) for text in (name, *texts[name]))
        if room >= 0:
            fitting.add(name)
    shown = [name for name in columns if name in fitting]
    left_out = "" if all(name in fitting for name, own in texts.items() if any(own)) else _LEFT_OUT
    table = Table(title=title, caption=left_out)
    table.add_column(first, no_wrap=True)
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for row, name in enumerate(names):
        table.add_row(name, *(texts[column][row] for column in shown))
    return table


def _turns(cell: str, talks: Sequence[Turn]) -> Table:
    """Hits and times of each arm, a column for each turn of a conversation."""
    from rich.table import Table

    table = Table(title=f"{cell}: hits, and TTFT in ms, by turn")
    table.add_column("arm", no_wrap=True)
    for number, tokens in {turn.turn: turn.prompt_tokens for turn in talks}.items():
        table.add_column(f"{number}:\n{tokens:.0f}\ntokens", justify="right", no_wrap=True)
    for arm in dict.fromkeys(turn.arm for turn in talks):
        table.add_row(arm, *(_hits_and_time(turn) for turn in talks if turn.arm == arm))
    return table


def _hits_and_time(turn: Turn) -> str:
    return f"{turn.hit:.3f}" + ("" if turn.ttft_ms is None else f"\n{turn.ttft_ms:.0f}")


def _interval(value: Interval | None) -> str:
    return "" if value is None else str(value)


def _mean(value: Interval | None) -> str:
    return "" if value is None else f"{value.mean:.4f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
