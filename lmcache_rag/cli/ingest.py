"""ingest: fill the store."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from lmcache_rag._utils import clean
from lmcache_rag.cli.console import PARTLY
from lmcache_rag.cli.render import count, duration, facts, place, plain, show, show_gone, size
from lmcache_rag.cli.run import EMBED, PLACE, SPLIT, CommandContext, IngestBars, command

if TYPE_CHECKING:
    from lmcache_rag.ingest import Failure, IngestPlan, IngestReport

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH...",
        help="Files, folders and globs; - reads such a list from stdin, one a line.",
        show_default=False,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would be done. Writes nothing.")]
Prune = Annotated[
    bool,
    typer.Option(
        "--prune", help="Remove documents whose files are gone: those below PATH, and those that moved elsewhere."
    ),
]
NoKV = Annotated[bool, typer.Option("--no-kv", help="Only index now; KV is computed with the first use, or by warm.")]


@command(*PLACE, *EMBED, *SPLIT)
def ingest(
    context: CommandContext, paths: Paths, dry_run: DryRun = False, no_kv: NoKV = False, prune: Prune = False
) -> int:
    """Put documents into the store, and compute each chunk's KV once.

    Unchanged documents in the store are skipped, so the same command
    continues after an interruption. A document that cannot be read never stops
    the others; the exit status is then 1.

    [bold]Examples[/bold]
      lmcache-rag ingest docs/ notes.md 'papers/**/*.pdf'
      lmcache-rag ingest docs/ --dry-run
      git ls-files '*.md' | lmcache-rag ingest -
    """
    sources = _listed(paths)
    if dry_run:
        plan = _plan(context, list(sources))
        context.emit(plain(plan)) if context.json else _show_plan(context, plan, prune=prune)
        return PARTLY if plan.failed else 0
    with context.workspace(create=True) as workspace:
        context.find(workspace, embedder=True)
        ingestor = workspace.ingestor
        with IngestBars(context, with_kv=not no_kv) as bars:
            ingestor.on_progress = bars.step
            report = ingestor.ingest(sources, kv=not no_kv, prune=prune)
    context.emit(plain(report)) if context.json else _show_report(context, report, with_kv=not no_kv)
    return PARTLY if report.failed else 0


def _listed(paths: list[str]) -> Iterator[str]:
    for path in paths:
        if path == "-":
            yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        else:
            yield path


def _plan(context: CommandContext, sources: list[str]) -> IngestPlan:
    settings = context.settings()
    with tempfile.TemporaryDirectory(prefix="lmcache-rag-") as nowhere:
        if not (Path(settings.store) / "store.db").exists():  # a dry run must not even create an empty store
            settings = settings.model_copy(update={"store": Path(nowhere) / "store"})
        with context.workspace(create=True, settings=settings) as workspace, context.waiting("Reading"):
            return workspace.ingestor.plan(sources)


def _show_plan(context: CommandContext, plan: IngestPlan, *, prune: bool) -> None:
    show(
        context.out,
        facts(
            [
                ("To ingest", count(plan.documents, "document")),
                ("Unchanged", count(plan.unchanged, "document")),
                ("Failed", _failed(plan.failed)),
                ("Chunks", f"{plan.chunks:,} new ({count(plan.tokens, 'token')})"),
                ("KV", f"{size(plan.kv_bytes)} to come"),
                *([("To prune", count(len(plan.gone), "document"))] if prune else []),
            ]
        ),
    )
    _show_failures(context, plan.failed)


def _show_report(context: CommandContext, report: IngestReport, *, with_kv: bool) -> None:
    kv = report.kv
    computed = f"{kv.computed:,} computed, {kv.existed:,} found ({count(kv.tokens, 'token')}, {size(kv.nbytes)})"
    show(
        context.out,
        facts(
            [
                ("Added", count(len(report.added), "document")),
                ("Updated", count(len(report.updated), "document")),
                ("Unchanged", count(report.unchanged, "document")),
                ("Failed", _failed(report.failed)),
                *(
                    [("Pruned", f"{count(len(report.pruned), 'document')}, since their files are gone")]
                    if report.pruned
                    else []
                ),
                ("Chunks", f"{report.chunks_added:,} added, {report.chunks_removed:,} removed"),
                ("KV", computed if with_kv else "left for later: lmcache-rag warm, or the first use"),
                ("Time", duration(report.seconds)),
            ]
        ),
    )
    _show_failures(context, report.failed)
    show_gone(context.out, report.gone)


def _failed(failed: tuple[Failure, ...]) -> Text:
    return Text(count(len(failed), "document"), style="bold red" if failed else "")


def _show_failures(context: CommandContext, failed: tuple[Failure, ...]) -> None:
    for failure in failed:
        named = repr(failure.source) in failure.reason  # most reasons name the file themselves
        context.out.print(f"  {'' if named else f'{place(failure.source)}: '}{clean(failure.reason)}", soft_wrap=True)
