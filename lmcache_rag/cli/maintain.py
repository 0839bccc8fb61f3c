"""status, list, warm, verify, remove, forget, prune, settings: maintain the store."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from lmcache_rag._utils import clean
from lmcache_rag.cli.console import PARTLY
from lmcache_rag.cli.render import count, facts, place, plain, show, show_documents, show_status, size
from lmcache_rag.cli.run import (
    AGE,
    ANSWER,
    EMBED,
    INGEST,
    PLACE,
    SPLIT,
    Bars,
    CommandContext,
    command,
    described,
    makes_new_kv,
    variable,
)
from lmcache_rag.documents.finding import glob_regex, is_glob, named_by
from lmcache_rag.errors import ConfigError, LMCacheRAGError
from lmcache_rag.kv_manager import KVTotals, gone_documents
from lmcache_rag.settings import FILE, Settings

if TYPE_CHECKING:
    from lmcache_rag.engines.base import PrecomputeResult, VerifyResult
    from lmcache_rag.kv_manager import Maintainer, StoredKV
    from lmcache_rag.store import KVPurge, Registry, RemoveResult, Store
    from lmcache_rag.workspace import Workspace

Sample = Annotated[int, typer.Option("--sample", metavar="N", min=1, help="Chunks to check, chosen at random.")]
AllChunks = Annotated[bool, typer.Option("--all", help="Check every chunk.")]
NoRepair = Annotated[bool, typer.Option("--no-repair", help="Only report what is wrong.")]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Makes the sample repeatable.", show_default=False)
]
Documents = Annotated[
    list[str] | None,
    typer.Argument(metavar="DOC...", help="Documents by name, path, folder, glob or id.", show_default=False),
]
AllDocuments = Annotated[bool, typer.Option("--all", help="Remove every document; asks first.")]
Top = Annotated[
    int | None,
    typer.Option("--top", metavar="N", min=1, help="Only the N chunks that the log uses most.", show_default=False),
]
FromLog = Annotated[
    Path | None,
    typer.Option(
        "--from-log", metavar="FILE", help="Retrieval trace or questions; only their chunks.", show_default=False
    ),
]
Verify = Annotated[bool, typer.Option("--verify", help="List what each tier holds of the KV, before and after.")]
Missing = Annotated[bool, typer.Option("--missing", help="Documents whose files are gone.")]


@command(*PLACE)
def status(context: CommandContext) -> None:
    """Show what is in the store, what is missing and what is stale.

    Loads no weights and writes nothing.

    [bold]Examples[/bold]
      lmcache-rag status
      lmcache-rag status --store wiki --json
    """
    with context.workspace(models=False) as workspace:
        with context.waiting("Looking"):
            kv, known = workspace.stored_kv, workspace.identity
            if kv is not None and known is not None:
                found = kv.status(known)
            else:
                found = context.with_models(workspace).maintainer.status()
        path, read_only = workspace.store.path.absolute(), workspace.store.read_only
    if context.json:
        context.emit({"path": str(path), "read_only": read_only, **plain(found)})
    else:
        show_status(context.out, path, found, read_only=read_only)


@command(*PLACE, "pin", *AGE, *INGEST)
def warm(context: CommandContext, top: Top = None, from_log: FromLog = None) -> None:
    """Compute missing KV, of all chunks or of those that questions use most.

    KV is missing after ingest --kv lazy, if the KV budget was too small, or with
    another model. --from-log names a retrieval trace or a question log (JSONL);
    of questions without chunks these are retrieved now. Can be interrupted; the
    same command continues. --pin also keeps a server from evicting these chunks
    from its memory, until LMCache is started again; --no-pin ends that.

    [bold]Examples[/bold]
      lmcache-rag warm
      lmcache-rag warm --top 500 --from-log questions.jsonl
      lmcache-rag warm --top 50 --from-log questions.jsonl --pin --engine http://localhost:8000
      lmcache-rag warm --engine http://localhost:8000 --rate 2000 --in-flight 2
    """
    if top is not None and from_log is None:
        raise ConfigError("--top needs to know which chunks are used.", remedy="Name a log with --from-log.")
    with context.workspace(models=False) as workspace:
        kv, known = workspace.stored_kv, workspace.identity
        pin, pinned = workspace.settings.pin, 0
        if pin is None and kv is not None and known is not None and kv.is_complete(known.fingerprint):
            totals = KVTotals()
        else:
            context.load(context.with_models(workspace), embedder=False)
            wanted = None if from_log is None else workspace.most_used(from_log, top)
            with Bars(context, "KV") as bars:

                def tick(done: int, total: int, result: PrecomputeResult) -> None:
                    bars.update("KV", done, total, tokens=result.tokens)

                if pin is not None:
                    pinned = workspace.maintainer.pin(
                        wanted, pin=pin, on_chunk=lambda done, total: bars.update("pins", done, total)
                    )
                totals = workspace.maintainer.warm(wanted, on_chunk=tick)
    if pin is not None and not context.json:
        context.out.print(f"{count(pinned, 'chunk')} {'pinned' if pin else 'no longer pinned'}.")
    if context.json:
        context.emit(plain(totals) | ({"pinned" if pin else "unpinned": pinned} if pin is not None else {}))
    elif totals.computed or totals.existed:
        context.out.print(
            f"{totals.computed:,} computed, {totals.existed:,} found ({count(totals.tokens, 'token')}, "
            f"{size(totals.nbytes)})."
        )
    else:
        context.out.print("Nothing was missing.")


@command(*PLACE)
def verify(
    context: CommandContext,
    sample: Sample = 20,
    all_chunks: AllChunks = False,
    no_repair: NoRepair = False,
    seed: Seed = None,
) -> int:
    """Compute stored KV again, compare, and repair what differs.

    Finds KV that is missing, damaged or different. The exit status is 1 if
    something is still wrong at the end.

    [bold]Examples[/bold]
      lmcache-rag verify --sample 100
      lmcache-rag verify --all --no-repair
    """
    with context.workspace() as workspace:
        context.load(workspace, embedder=False)
        with Bars(context, "chunks") as bars:

            def tick(done: int, total: int, result: VerifyResult) -> None:
                bars.update("chunks", done, total)

            report = workspace.maintainer.verify(
                sample=None if all_chunks else sample, repair=not no_repair, seed=seed, on_chunk=tick
            )
    if context.json:
        context.emit(plain(report))
    else:
        kinds = [result.status for result in report.bad]
        found = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "all right"
        rows = [("Checked", count(report.checked, "chunk")), ("Found", found)]
        show(context.out, facts([*rows, ("Repaired", f"{report.repaired:,}")] if report.bad else rows))
        for result in report.bad:
            worst = "" if result.max_abs_diff is None else f", largest difference {result.max_abs_diff:.2g}"
            context.out.print(f"  {result.key[:16]}… {result.status}{worst}")
    return PARTLY if report.repaired < len(report.bad) else 0


@command("store")
def list_documents(context: CommandContext, documents: Documents = None, missing: Missing = False) -> int:
    """List the documents of the store, or those that are named.

    Loads no model.

    [bold]Examples[/bold]
      lmcache-rag list
      lmcache-rag list 'papers/*.pdf'
      lmcache-rag list --missing --json
    """
    with context.workspace(models=False) as workspace:
        registry = workspace.store.registry
        found = _named(workspace.store, documents, missing=missing)
        records = list(registry.documents(found.ids if documents or missing else None))
        gone = {record.doc_id for record in gone_documents(registry)}
    if context.json:
        rows = [{**plain(record), "missing": record.doc_id in gone} for record in records]
        context.emit({"documents": rows, "unknown": list(found.unknown)})
    else:
        show_documents(context.out, records, gone)
    _show_unknown(context, found.unknown.values())
    return PARTLY if found.unknown else 0


@command(*PLACE)
def remove(
    context: CommandContext,
    documents: Documents = None,
    all_documents: AllDocuments = False,
    missing: Missing = False,
    verify_removal: Verify = False,
) -> int:
    """Remove documents; chunks that other documents hold stay.

    A chunk and its KV are removed with the last document that holds them, on
    servers too: from vLLM's cache, LMCache's memory and every tier. If a server
    cannot be reached, its KV waits for the next command that reaches it. A folder
    means all documents below it, a name without folders the document with that
    name. An unknown document does not stop the command. The exit status is 1 if a
    document is unknown, or KV is left.

    [bold]Examples[/bold]
      lmcache-rag remove notes.md old-docs/ 'papers/*-draft.pdf'
      lmcache-rag remove contract.pdf --engine http://localhost:8000 --verify
      lmcache-rag remove --missing
    """
    if bool(documents or missing) == all_documents:
        raise ConfigError("Name documents, or give --missing or --all.", remedy="See lmcache-rag remove --help.")
    with context.workspace(models=False) as workspace:
        found = _named(workspace.store, documents, all_documents=all_documents, missing=missing)
        remover, why = _remover(context, workspace)
        with context.waiting("Removing"):
            result = remover.remove(found.ids, count=verify_removal)
    if context.json:
        context.emit({**plain(result), "unknown": [*found.unknown, *result.unknown]})
    elif found.ids or not found.unknown:
        _show_removed(context, result)
    if verify_removal and not context.json:
        _show_tiers(context, result.kv)
    if result.kv.waiting:
        context.message(
            f"KV of {count(result.kv.waiting, 'removed chunk')} is still on a server. The next command that reaches it "
            f"removes it: {clean(why or result.kv.why)}",
            style="bold red",
        )
    _show_unknown(context, found.unknown.values())
    return PARTLY if found.unknown or result.unknown or not result.kv.is_complete else 0


def _remover(context: CommandContext, workspace: Workspace) -> tuple[StoredKV | Maintainer, str]:
    """What removes documents, and why it does not reach the server, if it does not.

    No model and no server is needed if the store has no KV on a server.
    """
    kv = workspace.stored_kv
    if kv is not None and (
        workspace.settings.engine == "embedded" or not workspace.store.registry.server_fingerprints()
    ):
        return kv, ""
    try:
        context.find(context.with_models(workspace), embedder=False)
        return workspace.maintainer, ""
    except LMCacheRAGError as problem:
        if kv is None:
            raise
        return kv, problem.message


def _show_tiers(context: CommandContext, kv: KVPurge) -> None:
    """What each tier held of removed KV, and holds now."""
    if not kv.before:
        context.out.print("No tier held KV of what was removed." if kv.is_complete else "No tier could be listed.")
    for tier, held in kv.before.items():
        left = kv.left.get(tier, 0)
        line = f"  {tier}: {held:,} before, {left:,} left" if held >= 0 and left >= 0 else f"  {tier}: cannot be listed"
        context.out.print(line, style="bold red" if left else "")


@command(*PLACE)
def forget(context: CommandContext, documents: Documents = None, all_documents: AllDocuments = False) -> int:
    """Remove documents, but only once their KV is deleted on the server.

    Like remove; but the KV goes first: if the server cannot be reached, the
    documents stay. Chunks that other documents hold stay, with their KV. The exit
    status is 1 if a document is unknown or KV stays on the server.

    [bold]Examples[/bold]
      lmcache-rag forget contract.pdf --engine http://localhost:8000
      lmcache-rag forget --all
    """
    if bool(documents) == all_documents:
        raise ConfigError("Name documents, or give --all.", remedy="See lmcache-rag forget --help.")
    with context.workspace() as workspace:
        found = _named(workspace.store, documents, all_documents=all_documents)
        context.find(workspace, embedder=False)
        with Bars(context, "chunks") as bars:
            report = workspace.maintainer.forget(
                found.ids, on_chunk=lambda done, total: bars.update("chunks", done, total)
            )
    result = report.removed
    unknown = [*found.unknown, *result.unknown]
    if context.json:
        context.emit({**plain(report), "unknown": unknown})
    elif found.ids:
        _show_removed(context, result)
        if report.deleted:
            context.out.print(f"The KV of {count(report.deleted, 'chunk')} was deleted on the server.")
    if report.staying:
        context.message(
            f"The KV of {count(report.staying, 'chunk')} stays on the server until it is evicted there: "
            f"{clean(report.why)}",
            style="bold red",
        )
    _show_unknown(context, found.unknown.values())
    return PARTLY if unknown or report.staying else 0


@command(*PLACE, *AGE)
def prune(context: CommandContext) -> None:
    """Drop KV of another model, prefix or tenant, and KV that is too old.

    This frees what status calls stale, and with --kv-ttl what was computed longer
    ago. To use the other model on this store again, run warm with it.

    [bold]Examples[/bold]
      lmcache-rag prune
      lmcache-rag prune --kv-ttl 30d
    """
    with context.workspace() as workspace:
        context.find(workspace, embedder=False)
        with context.waiting("Dropping"):
            dropped = workspace.maintainer.prune()
    if context.json:
        context.emit({"dropped": dropped})
    else:
        context.out.print(f"KV of {count(dropped, 'chunk')} dropped.")


@dataclass(frozen=True)
class Found:
    """Documents that a command names.

    Attributes:
        ids: Their ids.
        unknown: Names that mean no document, or more than one, and why.
    """

    ids: list[str]
    unknown: dict[str, str]


def _named(store: Store, names: Sequence[str] | None, *, all_documents: bool = False, missing: bool = False) -> Found:
    """The documents that a command names; asks before it takes all."""
    if all_documents:
        known = [record.doc_id for record in store.registry.documents()]
        typer.confirm(f"Remove all {count(len(known), 'document')} from {store.path}?", abort=True, err=True)
        return Found(known, {})
    found = find_documents(store.registry, names or [])
    if missing:
        gone = [record.doc_id for record in gone_documents(store.registry)]
        found = Found(list(dict.fromkeys([*found.ids, *gone])), found.unknown)
    return found


def _show_removed(context: CommandContext, result: RemoveResult) -> None:
    context.out.print(
        f"{count(result.documents, 'document')} removed, with {count(result.removed_chunks, 'chunk')}; "
        f"{count(result.kept_chunks, 'chunk')} stay in other documents."
    )


def _show_unknown(context: CommandContext, unknown: Iterable[str]) -> None:
    for reason in unknown:
        context.message(reason, style="bold red")


def find_documents(registry: Registry, names: Sequence[str]) -> Found:
    """Documents by id, path, a folder above them, a glob, or the end of their path, such as a bare file name."""
    ids: dict[str, None] = {}
    unknown: dict[str, str] = {}
    every: list[str] | None = None
    for name in names:
        path = str(Path(name).expanduser().absolute())
        exact = dict.fromkeys((name, path, str(Path(path).resolve())))
        found = [record.doc_id for record in registry.documents(exact)]
        if not found:
            every = registry.doc_ids() if every is None else every
            below = named_by(name)
            found = [doc_id for doc_id in every if below(doc_id)]
        if not found and every:
            found = [doc_id for doc_id in every if f"/{doc_id}".endswith(f"/{name}")]
            if len(found) > 1:
                unknown[name] = f"{name!r} is the name of {len(found)} documents: {_some(found)}. Give the path of one."
                continue
            if not found and is_glob(name):
                found = [doc_id for doc_id in every if re.fullmatch(f"(?s:(?:.*/)?){glob_regex(name)}", doc_id)]
        if found:
            ids.update(dict.fromkeys(found))
        else:
            unknown[name] = f"There is no document {name!r} in the store.{_did_you_mean(name, every or [])}"
    return Found(list(ids), {name: clean(reason) for name, reason in unknown.items()})


def _did_you_mean(name: str, doc_ids: Sequence[str]) -> str:
    """The ids that a wrong name may mean, as a sentence; "" if none is near."""
    places = {place(doc_id): None for doc_id in doc_ids} | {Path(doc_id).name: None for doc_id in doc_ids}
    near = get_close_matches(name, places, n=3, cutoff=0.7)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _some(doc_ids: Sequence[str]) -> str:
    more = f" and {len(doc_ids) - 5:,} more" if len(doc_ids) > 5 else ""
    return ", ".join(repr(place(doc_id)) for doc_id in doc_ids[:5]) + more


@command(*PLACE, "kv", *AGE, *INGEST, *EMBED, *SPLIT, *ANSWER)
def settings(context: CommandContext) -> None:
    """List every setting: its value, the source of the value, and a description.

    An option overrides the environment, which overrides settings.toml in the
    store, which overrides the default. A change of a setting marked with *
    needs new KV; existing KV is kept, but not used for it.

    [bold]Examples[/bold]
      lmcache-rag settings
      echo 'top_k = 6' >> lmcache-rag-store/settings.toml
      LMCACHE_RAG_RATIO=0.3 lmcache-rag settings --json
    """
    values = context.settings()
    file = Path(values.store) / FILE
    rows = [_row(name, getattr(values, name), _origin(name, context.options, file)) for name in Settings.model_fields]
    if context.json:
        context.emit({"file": str(file), "settings": rows})
        return
    for row in rows:
        value = "not set" if row["value"] in (None, "") else str(row["value"])
        line = Text(f"{row['name']}{' *' if row['makes_new_kv'] else ''} = ", style="bold")
        line.append(value, style="not bold" if row["source"] == "default" else "not bold green")
        line.append(f"  ({row['source']}; {row['variable']})", style="not bold dim")
        context.out.print(line, soft_wrap=True)
        context.out.print(f"    {row['description']}", style="dim", soft_wrap=True)
    context.out.print(f"\n* A change needs new KV.\nSettings of this store: {file}", soft_wrap=True)
    known = {variable(name) for name in Settings.model_fields}
    for name in sorted(os.environ):
        if name.upper() not in known and (meant := get_close_matches(name.upper(), known, n=1, cutoff=0.9)):
            context.message(f"The environment variable {name} has no effect: did you mean {meant[0]}?", style="yellow")


def _row(name: str, value: Any, source: str) -> dict[str, Any]:
    return {
        "name": name,
        "variable": variable(name),
        "value": plain(value),
        "source": source,
        "makes_new_kv": makes_new_kv(name),
        "description": described(name),
    }


def _origin(name: str, options: dict[str, Any], file: Path) -> str:
    """Which source a value comes from, in the order in which Settings reads them."""
    if options.get(name) is not None:
        return "argument"
    if any(known.upper() == variable(name) and value for known, value in os.environ.items()):
        return "environment"
    if file.exists() and name in tomllib.loads(file.read_text(encoding="utf-8")):
        return FILE
    return "default"
