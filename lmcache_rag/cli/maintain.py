"""status, warm, verify, remove, prune: look after the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmcache_rag.cli import options
from lmcache_rag.cli.bars import Bars
from lmcache_rag.cli.failures import PARTLY
from lmcache_rag.cli.render import clean, count, facts, plain, show, size
from lmcache_rag.cli.run import Run
from lmcache_rag.cli.status_view import show_status
from lmcache_rag.cli.verb import verb
from lmcache_rag.errors import ConfigError

if TYPE_CHECKING:
    from lmcache_rag.engines.base import PrecomputeResult, VerifyResult
    from lmcache_rag.store import Registry, RemoveResult, Store

Sample = Annotated[int, typer.Option("--sample", metavar="N", min=1, help="Chunks to check, chosen at random.")]
AllChunks = Annotated[bool, typer.Option("--all", help="Check every chunk.")]
NoRepair = Annotated[bool, typer.Option("--no-repair", help="Only report what is wrong.")]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Makes the sample repeatable.", show_default=False)
]
Documents = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="DOC...", help="Ids of documents, or files and folders as at ingestion.", show_default=False
    ),
]
AllDocuments = Annotated[bool, typer.Option("--all", help="Remove every document; asks first.")]


@verb(*options.PLACE)
def status(run: Run) -> None:
    """Say what is in the store, what is missing and what is stale.

    Loads no weights and writes nothing.

    [bold]Examples[/bold]
      lmcache-rag status
      lmcache-rag status --store wiki --json
    """
    with run.workspace() as workspace:
        run.find(workspace, embedder=False)
        with run.waiting("Looking"):
            found = workspace.maintainer.status()
        path, read_only = workspace.store.path.absolute(), workspace.store.read_only
    if run.json:
        run.emit({"path": str(path), "read_only": read_only, **plain(found)})
    else:
        show_status(run.out, path, found, read_only=read_only)


@verb(*options.PLACE)
def warm(run: Run) -> None:
    """Compute the KV that should exist and does not.

    That is so after ingest --no-kv, when the KV budget was too small, or with
    another model. Can be interrupted; the same command goes on.

    [bold]Examples[/bold]
      lmcache-rag warm
      lmcache-rag warm --model Qwen/Qwen3-0.6B
    """
    with run.workspace() as workspace:
        run.load(workspace, embedder=False)
        with Bars(run, "KV") as bars:

            def tick(done: int, total: int, result: PrecomputeResult) -> None:
                bars.update("KV", done, total, tokens=result.tokens)

            totals = workspace.maintainer.warm(on_chunk=tick)
    if run.json:
        run.emit(plain(totals))
    elif totals.computed or totals.existed:
        run.out.print(
            f"{totals.computed:,} computed, {totals.existed:,} found ({count(totals.tokens, 'token')}, "
            f"{size(totals.nbytes)})."
        )
    else:
        run.out.print("Nothing was missing.")


@verb(*options.PLACE)
def verify(
    run: Run, sample: Sample = 20, all_chunks: AllChunks = False, no_repair: NoRepair = False, seed: Seed = None
) -> int:
    """Compute stored KV again, compare, and repair what differs.

    Finds KV that is missing, damaged or different. The exit status is 1 if
    something is still wrong at the end.

    [bold]Examples[/bold]
      lmcache-rag verify --sample 100
      lmcache-rag verify --all --no-repair
    """
    with run.workspace() as workspace:
        run.load(workspace, embedder=False)
        with Bars(run, "chunks") as bars:

            def tick(done: int, total: int, result: VerifyResult) -> None:
                bars.update("chunks", done, total)

            report = workspace.maintainer.verify(
                sample=None if all_chunks else sample, repair=not no_repair, seed=seed, on_chunk=tick
            )
    if run.json:
        run.emit(plain(report))
    else:
        kinds = [result.status for result in report.bad]
        found = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "all right"
        rows = [("Checked", count(report.checked, "chunk")), ("Found", found)]
        show(run.out, facts([*rows, ("Repaired", f"{report.repaired:,}")] if report.bad else rows))
        for result in report.bad:
            worst = "" if result.max_abs_diff is None else f", largest difference {result.max_abs_diff:.2g}"
            run.out.print(f"  {result.key[:16]}… {result.status}{worst}")
    return PARTLY if report.repaired < len(report.bad) else 0


@verb(*options.PLACE)
def remove(run: Run, documents: Documents = None, all_documents: AllDocuments = False) -> int:
    """Remove documents; chunks that other documents hold stay.

    A chunk and its KV leave with the last document that holds them. A folder
    means all documents below it. An unknown document stops nothing; the exit
    status is then 1.

    [bold]Examples[/bold]
      lmcache-rag remove notes.md old-docs/
      lmcache-rag remove --all
    """
    if bool(documents) == all_documents:
        raise ConfigError("Name documents, or give --all.", remedy="See lmcache-rag remove --help.")
    with run.workspace() as workspace:
        known, unknown = _named(workspace.store, documents, all_documents=all_documents)
        run.find(workspace, embedder=False)
        with run.waiting("Removing"):
            result = workspace.maintainer.remove(known)
    unknown += result.unknown
    if run.json:
        run.emit({**plain(result), "unknown": unknown})
    elif known:
        _show_removed(run, result)
    _show_unknown(run, unknown)
    return PARTLY if unknown else 0


@verb(*options.PLACE)
def forget(run: Run, documents: Documents = None, all_documents: AllDocuments = False) -> int:
    """Remove documents, and delete their KV on the server at once.

    Like remove; but remove leaves it to the server when KV is evicted there.
    Chunks that other documents hold stay, with their KV. The exit status is 1
    if a document is unknown or KV stays on the server.

    [bold]Examples[/bold]
      lmcache-rag forget contract.pdf --engine http://localhost:8000
      lmcache-rag forget --all
    """
    if bool(documents) == all_documents:
        raise ConfigError("Name documents, or give --all.", remedy="See lmcache-rag forget --help.")
    with run.workspace() as workspace:
        known, unknown = _named(workspace.store, documents, all_documents=all_documents)
        run.find(workspace, embedder=False)
        with Bars(run, "chunks") as bars:
            report = workspace.maintainer.forget(known, on_chunk=lambda done, total: bars.update("chunks", done, total))
    result = report.removed
    unknown += result.unknown
    if run.json:
        run.emit({**plain(report), "unknown": unknown})
    elif known:
        _show_removed(run, result)
        if report.deleted:
            run.out.print(f"The KV of {count(report.deleted, 'chunk')} was deleted on the server.")
    if report.staying:
        run.tell(
            f"The KV of {count(report.staying, 'chunk')} stays on the server until it is evicted there: "
            f"{clean(report.why)}",
            style="bold red",
        )
    _show_unknown(run, unknown)
    return PARTLY if unknown or report.staying else 0


@verb(*options.PLACE)
def prune(run: Run) -> None:
    """Drop KV of another model, prefix or tenant.

    This frees what status calls stale. Whoever still uses the other model on
    this store must warm it again.

    [bold]Examples[/bold]
      lmcache-rag prune
    """
    with run.workspace() as workspace:
        run.find(workspace, embedder=False)
        with run.waiting("Dropping"):
            dropped = workspace.maintainer.prune()
    if run.json:
        run.emit({"dropped": dropped})
    else:
        run.out.print(f"KV of {count(dropped, 'chunk')} dropped.")


def _named(store: Store, documents: Sequence[str] | None, *, all_documents: bool) -> tuple[list[str], list[str]]:
    """(ids, unknown names) of the documents that a command names; asks before it takes all."""
    if not all_documents:
        return find_documents(store.registry, documents or [])
    known = [record.doc_id for record in store.registry.documents()]
    typer.confirm(f"Remove all {count(len(known), 'document')} from {store.path}?", abort=True, err=True)
    return known, []


def _show_removed(run: Run, result: RemoveResult) -> None:
    run.out.print(
        f"{count(result.documents, 'document')} removed, with {count(result.removed_chunks, 'chunk')}; "
        f"{count(result.kept_chunks, 'chunk')} stay in other documents."
    )


def _show_unknown(run: Run, unknown: Sequence[str]) -> None:
    for name in unknown:
        run.tell(f"There is no document {clean(repr(name))} in the store.", style="bold red")


def find_documents(registry: Registry, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(ids, unknown names) of documents given by id, by path, or by a folder above them."""
    ids: dict[str, None] = {}
    unknown: list[str] = []
    for name in names:
        path = str(Path(name).expanduser().absolute())
        candidates = dict.fromkeys((name, path, str(Path(path).resolve())))
        found = [record.doc_id for record in registry.documents(candidates)]
        if not found:
            below = tuple(f"{folder.rstrip('/')}/" for folder in candidates if Path(folder).is_absolute())
            found = [record.doc_id for record in registry.documents() if record.doc_id.startswith(below)]
        if found:
            ids.update(dict.fromkeys(found))
        else:
            unknown.append(name)
    return list(ids), unknown
