"""Formats results: numbers, answers and their reuse, the status of a store, and dictionaries for JSON.

Sentences of codes come from lmcache_rag.protocol (`fallback_sentence`, `budget_words`, `decision_sentence`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from lmcache_rag._utils import clean
from lmcache_rag.documents.types import place_words
from lmcache_rag.protocol import budget_words, decision_sentence

if TYPE_CHECKING:
    from rich.console import Console

    from lmcache_rag.engines.base import ReuseStats
    from lmcache_rag.kv_manager import Status
    from lmcache_rag.rag import Answer, Comparison
    from lmcache_rag.store import DocumentRecord, FingerprintStats, Hit

_NAMED = 10  # documents whose files are gone, by name
_SHORTEST_TITLE = 12  # characters; less is not worth showing


def one_line(text: str, limit: int | None = None) -> str:
    """Text on one line, cut at so many characters."""
    line = clean(" ".join(text.split()))
    return line if limit is None or len(line) <= limit else f"{line[: limit - 1].rstrip()}…"


def place(source: str) -> str:
    """A path, relative to the current folder if it is below it; control characters visible."""
    path = Path(source)
    here = Path.cwd()
    name = str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else source
    return clean(name.replace("\n", "\\n").replace("\t", "\\t"))


def count(number: int, thing: str) -> str:
    """For example "1 chunk", "1,204 chunks"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def size(nbytes: int) -> str:
    """For example "4.5 GB"."""
    return decimal(nbytes)


def duration(seconds: float) -> str:
    """For example "0.8 s", "1 min 12 s", "2 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def milliseconds(number: float) -> str:
    """For example "8.3 ms", "182 ms", "1,210 ms"."""
    return f"{number:.1f} ms" if number < 9.95 else f"{number:,.0f} ms"


def facts(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Names on the left, values on the right."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def show(console: Console, table: Table) -> None:
    """Print a table without the blanks at the ends of its lines, which would stay in a file."""
    with console.capture() as captured:
        console.print(table)
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))
    console.file.flush()


def plain(value: Any) -> Any:
    """Dataclasses as dictionaries, to any depth, ready for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


# Answers


def answer_as_dict(answer: Answer) -> dict[str, Any]:
    """An answer for JSON."""
    return {
        "question": answer.question,
        "text": answer.text,
        "finish_reason": answer.completion.finish_reason,
        "sources": plain(answer.sources),
        "dropped": plain(answer.dropped),
        "stats": answer.stats.as_dict(),
        "warnings": list(answer.completion.warnings),
        "cited": [int(label) for label in answer.cited],
    }


def comparison_as_dict(comparison: Comparison) -> dict[str, Any]:
    """A comparison for JSON."""
    return {
        "blended": answer_as_dict(comparison.blended),
        "full": answer_as_dict(comparison.full),
        "speedup": comparison.speedup,
        "first_difference": comparison.first_difference,
    }


def show_answer_end(out: Console, answer: Answer) -> None:
    """Show sources, reuse statistics and notes after the text of an answer."""
    out.print()
    show_sources(out, answer)
    show(out, stats_table(answer.stats))
    show_notes(out, answer)


def show_notes(out: Console, answer: Answer) -> None:
    """Show the warnings of an answer, except for the one about dropped chunks, which is with the sources."""
    notes = answer.completion.warnings[:-1] if answer.dropped else answer.completion.warnings
    for note in notes:
        out.print(f"Note: {clean(note)}", style="yellow")
    if answer.completion.finish_reason == "length":
        out.print("Note: the answer was cut at its longest; --max-tokens allows more.", style="yellow")


def show_sources(out: Console, answer: Answer, *, passages: bool = False) -> None:
    """The chunks that the answer comes from, with or without their text."""
    if not answer.sources and not answer.dropped:  # a search finds something unless the store is empty
        out.print("No sources: the store is empty. Fill it with: lmcache-rag ingest", style="bold")
    elif not answer.sources:
        out.print("No sources.", style="bold")
    else:
        out.print("Sources", style="bold")
    show_hits(out, answer.sources, labels=answer.labels, passages=passages)
    if answer.dropped:
        out.print(f"   {count(len(answer.dropped), 'more chunk')} did not fit the context.", style="yellow")


def show_hits(out: Console, hits: Sequence[Hit], *, labels: Sequence[str] = (), passages: bool = False) -> None:
    """One line for each chunk: its rank or label, its score, its place and title; with or without its text."""
    places = [hit_place(hit) for hit in hits]
    widest = max(map(cell_len, places), default=0)
    names = [f"[{label}]" for label in labels] or [f"{rank:>2}" for rank in range(1, len(hits) + 1)]
    wide = max(map(len, names), default=0)
    for name, hit, spot in zip(names, hits, places, strict=True):
        line = Text(f"{name:>{wide}}  {hit.score:5.2f}  {spot}")
        # The title gets the rest of the line; after a long path there is none.
        budget = min(out.width, 120) - len("  -0.99    ") - wide - widest
        if budget >= _SHORTEST_TITLE:
            line.append(f"{' ' * (widest - cell_len(spot))}  {hit_title(hit, budget)}", style="dim")
        out.print(line, soft_wrap=True)
        if passages:
            out.print(f"{clean(hit.text)}\n", style="dim", soft_wrap=True)


def show_answer_line(out: Console, answer: Answer) -> None:
    """Sources, reuse and TTFT in two lines, for an answer in a conversation."""
    spots = [hit_place(hit) for hit in answer.sources]
    if answer.labels:
        spots = [f"[{label}] {spot}" for label, spot in zip(answer.labels, spots, strict=True)]
    stats = answer.stats
    taken = stats.prefix_tokens + stats.reused_tokens
    out.print(f"Sources: {'; '.join(dict.fromkeys(spots)) or 'none'}", style="dim")
    out.print(
        f"TTFT {milliseconds(stats.ttft_ms)}; KV of {taken:,} of {count(stats.prompt_tokens, 'prompt token')} reused",
        style="dim",
        soft_wrap=True,
    )
    show_notes(out, answer)


class WordWrap:
    """Breaks a text that comes in pieces between words, at a width in cells.

    Args:
        width: Cells of a line.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._blanks, self._word = "", ""

    def feed(self, text: str) -> str:
        """The lines so far, up to the last whole word."""
        done = []
        for character in text:
            if character == "\n":
                done.append(f"{self._taken()}\n")
                self._column, self._blanks = 0, ""
            elif character == " ":
                done.append(self._taken())
                self._blanks += character
            else:
                self._word += character
                if cell_len(self._word) >= self._width - 1:  # longer than a line: broken anywhere
                    done.append(self._taken())
        return "".join(done)

    def end(self) -> str:
        """The rest."""
        return self._taken()

    def _taken(self) -> str:
        word, blanks, self._word = self._word, self._blanks, ""
        if not word:
            return ""
        self._blanks = ""
        size = cell_len(blanks) + cell_len(word)
        if self._column and self._column + size > self._width:
            self._column = cell_len(word)
            return f"\n{word}"
        self._column += size
        return blanks + word


def hit_place(hit: Hit) -> str:
    """Place of a chunk, for example "notes.md, part 3, and 2 more"."""
    if not hit.documents:
        return f"chunk {hit.chunk_id}"
    first, others = hit.documents[0], len({d.doc_id for d in hit.documents}) - 1
    more = f", and {others} more" if others else ""
    return f"{place(first.source)}{one_line(place_words(first.metadata), 60)}, part {first.ordinal + 1}{more}"


def hit_title(hit: Hit, limit: int) -> str:
    """The title of the chunk's document, or how the chunk begins, cut to so many characters."""
    known = str(hit.documents[0].metadata.get("title", "")) if hit.documents else ""
    return one_line(known or hit.text, limit)


def stats_table(stats: ReuseStats) -> Table:
    """Reuse statistics and TTFT."""
    tokens = (
        f"{count(stats.prompt_tokens, 'prompt token')}: {stats.prefix_tokens:,} prefix, {stats.reused_tokens:,} "
        f"reused, {stats.recomputed_tokens:,} recomputed, {stats.computed_tokens:,} computed"
    )
    if words := budget_words(stats.budget_reason):
        tokens += f" ({words})"
    chunks = stats.chunks_hit + stats.chunks_missed
    # A server reports tokens; which chunks they belong to is not always known.
    reused = f"{stats.chunks_hit} of {count(chunks, 'chunk')} from the store" if chunks else "reused in part"
    parts = [("lookup", stats.lookup_ms), ("load", stats.load_ms), ("blend", stats.blend_ms)]
    inside = ", ".join(f"{name} {milliseconds(ms)}" for name, ms in parts if ms)
    return facts(
        [
            ("Tokens", tokens),
            (
                "KV",
                reused if stats.blended else "found, and all recomputed" if stats.recomputed_tokens else "not reused",
            ),
            *([("Decision", decision_sentence(stats.as_dict()))] if stats.decision else []),
            *([("Order", "stable, so that prompts begin alike and share KV")] if stats.order == "stable" else []),
            ("TTFT", milliseconds(stats.ttft_ms) + (f" ({inside})" if inside else "")),
        ]
    )


def show_comparison(out: Console, comparison: Comparison) -> None:
    """Show both times to the first token, and where the answers differ."""
    blended, full = comparison.blended, comparison.full
    out.print()
    # Else the second answer's prompt is in the prefix cache, and its TTFT says nothing.
    if not blended.stats.blended and not blended.stats.recomputed_tokens:
        out.print("Nothing was reused, so there is nothing to compare: the prompt was computed in full.")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("", "blended", "full prefill"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("TTFT", milliseconds(blended.stats.ttft_ms), milliseconds(full.stats.ttft_ms))
    for name in ("prefix", "reused", "recomputed", "computed"):
        table.add_row(f"{name} tokens", *(f"{getattr(a.stats, f'{name}_tokens'):,}" for a in (blended, full)))
    show(out, table)
    if blended.stats.blended:
        out.print(f"The first token came {comparison.speedup:.1f} times as fast.")
    else:
        out.print("All tokens were recomputed: both are full prefills.")
    if comparison.first_difference is None:
        out.print(f"The answers are equal ({count(len(full.completion.token_ids), 'token')}).")
        return
    from lmcache_rag.rag import first_difference

    same = first_difference(*(list(map(ord, a.text)) for a in (blended, full))) or 0
    start = blended.text.rfind(" ", 0, same) + 1
    out.print(f"The answers differ from token {comparison.first_difference + 1} on:")
    show(
        out,
        facts(
            [(f"  {name}", f"…{one_line(a.text[start:], 120)}") for name, a in (("blended", blended), ("full", full))]
        ),
    )


# The status of a store


def show_status(out: Console, path: Path, status: Status, *, read_only: bool) -> None:
    """Show the status of a store, with remedies."""
    store = status.store
    current = next((part for part in store.kv if part.fingerprint == status.fingerprint), None)
    stale = [part for part in store.kv if part.stale]
    embedder = f"{store.embedder}, {store.dimension} dimensions" if store.embedder else "none yet"
    rows = [
        ("Store", place(str(path)) + (" (read-only)" if read_only else "")),
        ("Documents", f"{store.documents:,}"),
        ("Chunks", f"{store.chunks:,} ({count(store.tokens, 'token')})"),
        ("Database", size(store.database_bytes)),
        ("Embedder", embedder),
        ("Model", status.model + ("" if status.can_blend else f"; cannot be blended: {status.why_not}")),
        ("Fingerprint", f"{status.fingerprint[:16]}…"),
        ("KV", f"{count(current.keys if current else 0, 'chunk')}, {size(current.nbytes if current else 0)}"),
    ]
    if servers := status.usage.details.get("servers"):
        rows.append(("Servers", ", ".join(servers)))  # no API reports what they hold
    else:
        rows.append(("KV files", f"{status.usage.chunks:,}, {size(status.usage.disk_bytes)}"))
    rows += [("Stale KV", _stale_kv(part)) for part in stale]
    if store.trash:
        rows.append(("To drop", count(store.trash, "chunk")))
    show(out, facts(rows))
    if store.chunks_without_kv:
        out.print(
            f"{count(store.chunks_without_kv, 'chunk')} without KV. To compute it: lmcache-rag warm", style="yellow"
        )
    if stale:
        out.print(
            f"{size(store.stale_bytes)} of KV are stale, or of other prompts than the command line's, as LangChain and "
            "LlamaIndex programs have them. To drop them: lmcache-rag prune",
            style="yellow",
        )
    if store.chunks_without_embedding:
        out.print(
            f"{count(store.chunks_without_embedding, 'chunk')} without embedding: no search finds them.", style="red"
        )
    show_gone(out, status.gone)
    _show_outdated(out, status.outdated)


def _show_outdated(out: Console, outdated: Sequence[str]) -> None:
    """Name documents that an earlier version read, with the command that reads them again."""
    if not outdated:
        return
    were = "1 document was" if len(outdated) == 1 else f"{len(outdated):,} documents were"
    out.print(
        f"{were} read by an earlier version; questions find them as before. To see which would change: "
        "lmcache-rag ingest --reparse --dry-run",
        style="yellow",
    )
    for doc_id in outdated[:_NAMED]:
        out.print(f"  {place(doc_id)}", soft_wrap=True)
    if len(outdated) > _NAMED:
        out.print(f"  and {len(outdated) - _NAMED:,} more: lmcache-rag status --json")


def show_documents(out: Console, records: Sequence[DocumentRecord], gone: Collection[str]) -> None:
    """One line for each document: its chunks, when it was ingested, where it is."""
    widest = max((len(f"{record.chunks:,}") for record in records), default=0)
    for record in records:
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.updated_at))
        line = Text(f"{record.chunks:>{widest},} {'chunk ' if record.chunks == 1 else 'chunks'}  {day}  ")
        line.append(place(record.doc_id))
        if record.doc_id in gone:
            line.append("  (its file is gone)", style="yellow")
        out.print(line, soft_wrap=True)
    out.print(f"{count(len(records), 'document')}.", style="bold")


def show_gone(out: Console, gone: Sequence[str]) -> None:
    """Name documents whose files are gone, with the remedy."""
    if not gone:
        return
    files = "The file of 1 document is" if len(gone) == 1 else f"The files of {len(gone):,} documents are"
    out.print(f"{files} gone; questions still find them. To remove them: lmcache-rag remove --missing", style="yellow")
    for doc_id in gone[:_NAMED]:
        out.print(f"  {place(doc_id)}", soft_wrap=True)
    if len(gone) > _NAMED:
        out.print(f"  and {len(gone) - _NAMED:,} more: lmcache-rag list --missing")


def _stale_kv(part: FingerprintStats) -> str:
    model, dtype = part.facts.get("model", "unknown"), part.facts.get("dtype", "")
    age = duration(max(time.time() - part.created_at, 0))
    return f"{part.fingerprint[:16]}… {model} {dtype}: {count(part.keys, 'chunk')}, {size(part.nbytes)}, {age} old"
