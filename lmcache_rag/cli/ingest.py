"""ingest: fill the store."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from lmcache_rag._utils import clean
from lmcache_rag.cli.console import PARTLY
from lmcache_rag.cli.render import count, duration, facts, place, plain, show, show_gone, size
from lmcache_rag.cli.run import AGE, EMBED, INGEST, PLACE, READ, SPLIT, CommandContext, IngestBars, command
from lmcache_rag.documents.finding import find_files
from lmcache_rag.errors import ConfigError

if TYPE_CHECKING:
    from lmcache_rag.ingest import Failure, IngestPlan, IngestReport
    from lmcache_rag.workspace import Workspace

GB = 1_000_000_000
ASK_BYTES, ASK_SECONDS = 5 * GB, 600.0  # above, a person is asked first
Paths = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PATH...",
        help="Files, folders and globs; - reads such a list from stdin, one a line. With --reparse none is needed.",
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
Reparse = Annotated[
    bool,
    typer.Option(
        "--reparse", help="Read files again that an earlier version read: those below PATH, or all of the store."
    ),
]
MaxGB = Annotated[
    float | None,
    typer.Option("--max-gb", metavar="GB", min=0, help="Refuse to compute more KV than this.", show_default=False),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, however much is to be computed.")]
NoKV = Annotated[bool, typer.Option("--no-kv", help="The same as --kv lazy.")]


@command(*PLACE, "kv", "pin", *AGE, *INGEST, *EMBED, *SPLIT, *READ)
def ingest(
    context: CommandContext,
    paths: Paths = None,
    dry_run: DryRun = False,
    no_kv: NoKV = False,
    prune: Prune = False,
    reparse: Reparse = False,
    max_gb: MaxGB = None,
    yes: Yes = False,
) -> int:
    """Put documents into the store, and compute each chunk's KV once.

    Unchanged documents in the store are skipped, so the same command
    continues after an interruption. A document that cannot be read never stops
    the others; the exit status is then 1. Stores, Git's own folder and virtual
    environments are left out. Before KV is computed, its size and time are
    shown; in a terminal you are asked if that is much. With --kv lazy it is
    computed after questions that use a chunk, with --kv none only by warm.
    --pin keeps a server from evicting it.

    [bold]Examples[/bold]
      lmcache-rag ingest docs/ notes.md 'papers/**/*.pdf'
      lmcache-rag ingest docs/ --dry-run
      lmcache-rag ingest --reparse --dry-run
      git ls-files '*.md' | lmcache-rag ingest -
    """
    settings = context.settings()
    no_kv = no_kv or settings.kv != "now"
    if not paths and not reparse:
        raise ConfigError("No PATH is named.", remedy="Name files or folders, or use --reparse.")
    sources = list(_listed(paths)) if paths else _outdated(context)
    if not sources and not paths:
        return _nothing_outdated(context)
    found = [item for item in find_files(sources) if isinstance(item, Path)]
    if not found and not (settings.store / "store.db").exists():
        return _nothing(context, sources)
    with context.workspace(create=True, settings=settings) as workspace:
        context.find(workspace, embedder=False)
        with context.waiting("Reading"):
            preview = workspace.preview(sources, reparse=reparse)
        plan = preview.plan
        if dry_run:
            context.emit(plain(plan)) if context.json else _show_plan(context, plan, prune=prune, reparse=reparse)
            return PARTLY if plan.failed else 0
        if not preview.found and not workspace.has_store:
            return _nothing(context, sources)
        if not no_kv:
            _announce(context, workspace, plan, max_gb=max_gb, yes=yes)
        context.find(workspace, embedder=True)
        ingestor = workspace.ingestor
        with IngestBars(context, with_kv=not no_kv) as bars:
            ingestor.on_progress = bars.step
            report = ingestor.ingest(preview, kv=not no_kv, prune=prune)
    context.emit(plain(report)) if context.json else _show_report(context, report, with_kv=not no_kv)
    return PARTLY if report.failed else 0


def _outdated(context: CommandContext) -> list[str]:
    """The files that an earlier version read."""
    from lmcache_rag.kv_manager import outdated_documents

    with context.workspace(models=False) as workspace:
        return [record.doc_id for record in outdated_documents(workspace.store.registry)]


def _nothing_outdated(context: CommandContext) -> int:
    from lmcache_rag.ingest import IngestReport

    if context.json:
        context.emit(plain(IngestReport()))
    else:
        context.message("Every file was read by today's parsers.")
    return 0


def _nothing(context: CommandContext, sources: list[str]) -> int:
    """Report that there is no document, without making a store."""
    from lmcache_rag.ingest import Failure, IngestReport, expand

    failed = tuple(item for item in expand(sources) if isinstance(item, Failure))
    if context.json:
        context.emit(plain(IngestReport(failed=failed)))
        return PARTLY
    _show_failures(context, failed)
    context.message("There is nothing to ingest; no store was made.", style="bold red")
    return PARTLY


def _announce(
    context: CommandContext, workspace: Workspace, plan: IngestPlan, *, max_gb: float | None, yes: bool
) -> None:
    """Say what is going to be computed; refuse it above --max-gb, and ask or warn where it is much.

    Raises:
        ConfigError: It is more than --max-gb.
        typer.Abort: The user does not want it.
    """
    if not plan.kv_chunks:
        return
    work = f"{count(plan.kv_chunks, 'chunk')} ({count(plan.kv_tokens, 'token')}), {size(plan.kv_bytes)} of KV"
    if max_gb is not None and plan.kv_bytes > max_gb * GB:
        raise ConfigError(
            f"{work} would be computed, more than --max-gb {max_gb:g}. Nothing was changed.",
            remedy="Raise --max-gb, ingest fewer documents, or index them without KV: --kv lazy.",
        )
    with context.waiting("Measuring how fast KV is computed"):
        rate = workspace.ingest_rate()
    seconds = plan.kv_tokens / rate if rate else 0.0
    context.message(f"To compute: {work}" + (f", about {duration(seconds)}." if rate else "."))
    reasons = list(_much(workspace, plan, seconds))
    for reason in reasons:
        context.message(reason, style="yellow")
    if reasons and not yes and not context.json and is_interactive():
        typer.confirm("Compute it now?", abort=True, err=True)


def _much(workspace: Workspace, plan: IngestPlan, seconds: float) -> Iterator[str]:
    """Why an ingestion may be more than the user expects, in sentences."""
    advice = "--kv lazy only indexes now and computes KV of what questions use; --max-gb sets a limit."
    if plan.kv_bytes > ASK_BYTES or seconds > ASK_SECONDS:
        yield f"This is much. {advice}"
    if workspace.settings.engine != "embedded":
        return  # the KV is not kept here
    budget = int(workspace.settings.kv_budget_gb * GB)
    if plan.kv_bytes > budget:
        yield f"It is more than the budget of {size(budget)}: the least recently used would be dropped (--kv-budget)."
    store = workspace.settings.store.absolute()
    place = next(folder for folder in (store, *store.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if min(plan.kv_bytes, budget) > free:
        yield f"The disk has only {size(free)} free."


def is_interactive() -> bool:
    """Whether a person can answer a question."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr is not None and sys.stderr.isatty()


def _listed(paths: list[str]) -> Iterator[str]:
    for path in paths:
        if path == "-":
            yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        else:
            yield path


def _show_plan(context: CommandContext, plan: IngestPlan, *, prune: bool, reparse: bool) -> None:
    show(
        context.out,
        facts(
            [
                ("To ingest", count(plan.documents, "document")),
                ("Unchanged", count(plan.unchanged, "document")),
                ("Failed", _failed(plan.failed)),
                ("Chunks", f"{plan.chunks:,} new ({count(plan.tokens, 'token')})"),
                ("KV", f"{size(plan.kv_bytes)} to come, of {count(plan.kv_chunks, 'chunk')}"),
                *([("To prune", count(len(plan.gone), "document"))] if prune else []),
            ]
        ),
    )
    _show_failures(context, plan.failed)
    for doc_id in plan.changed if reparse else ():
        context.out.print(f"  {place(doc_id)} would change", soft_wrap=True)


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
                ("KV", computed if with_kv else "left for later: lmcache-rag warm, or with --kv lazy the second use"),
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
