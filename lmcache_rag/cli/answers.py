"""How answers look: the sources, what was reused, and a comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from lmcache_rag.cli.render import clean, count, facts, milliseconds, one_line, place, plain, show

if TYPE_CHECKING:
    from rich.console import Console

    from lmcache_rag.engines.base import ReuseStats
    from lmcache_rag.rag import Answer, Comparison
    from lmcache_rag.store import Hit

_SHORTEST_TITLE = 12  # characters; a shorter rest of a line says nothing


def as_dict(answer: Answer) -> dict[str, Any]:
    """An answer for JSON."""
    return {
        "question": answer.question,
        "text": answer.text,
        "finish_reason": answer.completion.finish_reason,
        "sources": plain(answer.sources),
        "dropped": plain(answer.dropped),
        "stats": answer.stats.as_dict(),
        "warnings": list(answer.completion.warnings),
    }


def comparison_as_dict(comparison: Comparison) -> dict[str, Any]:
    """A comparison for JSON."""
    return {
        "blended": as_dict(comparison.blended),
        "full": as_dict(comparison.full),
        "speedup": comparison.speedup,
        "first_difference": comparison.first_difference,
    }


def show_end(out: Console, answer: Answer) -> None:
    """What follows the text of an answer: sources, reuse statistics, notes."""
    out.print()
    show_sources(out, answer)
    show(out, stats_table(answer.stats))
    show_notes(out, answer)


def show_notes(out: Console, answer: Answer) -> None:
    """The warnings of an answer; the one about dropped chunks stands with the sources already."""
    notes = answer.completion.warnings[:-1] if answer.dropped else answer.completion.warnings
    for note in notes:
        out.print(f"Note: {clean(note)}", style="yellow")
    if answer.completion.finish_reason == "length":
        out.print("Note: the answer was cut at its longest; --max-tokens allows more.", style="yellow")


def show_sources(out: Console, answer: Answer, *, passages: bool = False) -> None:
    """The chunks that the answer comes from, with or without their text."""
    if not answer.sources and not answer.dropped:  # a search of a store that holds anything finds something
        out.print("No sources: the store is empty. Fill it with: lmcache-rag ingest", style="bold")
    elif not answer.sources:
        out.print("No sources.", style="bold")
    else:
        out.print("Sources", style="bold")
    places = [where(hit) for hit in answer.sources]
    widest = max(map(cell_len, places), default=0)
    for rank, (hit, spot) in enumerate(zip(answer.sources, places, strict=True), start=1):
        line = Text(f"{rank:>2}  {hit.score:5.2f}  {spot}")
        # The title takes what is left of the line; a long path goes without.
        room = min(out.width, 120) - len("99  -0.99    ") - widest
        if room >= _SHORTEST_TITLE:
            line.append(f"{' ' * (widest - cell_len(spot))}  {title(hit, room)}", style="dim")
        out.print(line, soft_wrap=True)
        if passages:
            out.print(f"{clean(hit.text)}\n", style="dim", soft_wrap=True)
    if answer.dropped:
        out.print(f"   {count(len(answer.dropped), 'more chunk')} did not fit the context.", style="yellow")


def where(hit: Hit) -> str:
    """Where a chunk stands, for example "notes.md, part 3, and 2 more"."""
    if not hit.documents:
        return f"chunk {hit.chunk_id}"
    first, others = hit.documents[0], len({d.doc_id for d in hit.documents}) - 1
    more = f", and {others} more" if others else ""
    return f"{place(first.source)}, part {first.ordinal + 1}{more}"


def title(hit: Hit, limit: int) -> str:
    """The title of the chunk's document, or how the chunk begins, cut to so many characters."""
    known = str(hit.documents[0].metadata.get("title", "")) if hit.documents else ""
    return one_line(known or hit.text, limit)


def stats_table(stats: ReuseStats) -> Table:
    """What was reused, and how long the first token took."""
    tokens = (
        f"{count(stats.prompt_tokens, 'prompt token')}: {stats.prefix_tokens:,} prefix, {stats.reused_tokens:,} "
        f"reused, {stats.recomputed_tokens:,} recomputed, {stats.computed_tokens:,} computed"
    )
    chunks = stats.chunks_hit + stats.chunks_missed
    # A server tells tokens; which chunks they are of does not always follow.
    reused = f"{stats.chunks_hit} of {count(chunks, 'chunk')} from the store" if chunks else "reused in part"
    parts = [("lookup", stats.lookup_ms), ("load", stats.load_ms), ("blend", stats.blend_ms)]
    inside = ", ".join(f"{name} {milliseconds(ms)}" for name, ms in parts if ms)
    return facts(
        [
            ("Tokens", tokens),
            ("KV", reused if stats.blended else "not reused"),
            ("TTFT", milliseconds(stats.ttft_ms) + (f" ({inside})" if inside else "")),
        ]
    )


def show_comparison(out: Console, comparison: Comparison) -> None:
    """Both times to the first token, and where the answers part."""
    blended, full = comparison.blended, comparison.full
    out.print()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("", "blended", "full prefill"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("TTFT", milliseconds(blended.stats.ttft_ms), milliseconds(full.stats.ttft_ms))
    for name in ("prefix", "reused", "recomputed", "computed"):
        table.add_row(f"{name} tokens", *(f"{getattr(a.stats, f'{name}_tokens'):,}" for a in (blended, full)))
    show(out, table)
    out.print(
        f"The first token came {comparison.speedup:.1f} times as fast."
        if blended.stats.blended
        else "Nothing was reused: both are full prefills."
    )
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
