"""The first ten minutes: ingest the samples, ask in two retrieval orders, compare with full prefills."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from lmcache_rag import Workspace

DATA = Path(__file__).parent / "data"


# Name, width and alignment of each column; the widths are fixed, so that all rows of the table are aligned.
COLUMNS = (
    ("order of chunks", 11, "left"),
    ("TTFT full", 7, "right"),
    ("TTFT blended", 8, "right"),
    ("prefix tokens", 6, "right"),
    ("tokens reused", 6, "right"),
    ("tokens recomputed", 10, "right"),
    ("tokens computed", 8, "right"),
)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default=".store", help="where the KV is kept (default: .store)")
    parser.add_argument("--questions", type=int, default=4, help="how many questions")
    args = parser.parse_args()
    console = Console()
    table = Table(title="Full prefill against blended KV, chunks in two orders", show_lines=True)
    table.add_column(line(*(f"[bold]{name}[/]" for name, _, _ in COLUMNS)), overflow="fold")

    with Workspace.open(args.store, top_k=5, max_tokens=48) as ws:
        console.print("Ingesting examples/data/documents; finished documents are skipped ...")
        with console.status("computing KV"):
            report = ws.ingestor.ingest([DATA / "documents"])
        console.print(
            f"{len(report.added)} added, {report.unchanged} unchanged, {len(report.failed)} failed; KV of "
            f"{report.kv.computed} chunks computed in {report.seconds:.0f} s"
        )
        ws.engine.load()  # type: ignore[attr-defined]
        for entry in json.loads((DATA / "questions.json").read_text())[: args.questions]:
            best_first = ws.rag.retrieve(entry["question"])
            cell: list[RenderableType] = [f"[bold]{escape(entry['question'])}[/]"]
            for order, hits in (("best first", best_first), ("best last", best_first[::-1])):
                result = ws.rag.compare(entry["question"], hits=hits)
                stats = result.blended.stats
                sources = dict.fromkeys(Path(h.documents[0].source).name for h in result.blended.sources)
                numbers = (stats.prefix_tokens, stats.reused_tokens, stats.recomputed_tokens, stats.computed_tokens)
                times = (f"{result.full.stats.ttft_ms:.0f} ms", f"{stats.ttft_ms:.0f} ms")
                cell += [
                    line(f"[green]{order}[/]", *times, *map(str, numbers)),
                    Padding(
                        f"{escape(' '.join(result.blended.text.split()))}\n[dim]{escape(', '.join(sources))}[/]", (0, 2)
                    ),
                ]
                console.print(f"TTFT {result.speedup:.1f} times lower: {entry['question']}")
            table.add_row(Group(*cell))
    console.print(table)
    console.print(
        "Each row: the question; then, for both orders, the measurements, the answer from blended KV, sources."
    )


def line(*cells: str) -> Table:
    """One line of the table."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _, width, side in COLUMNS:
        grid.add_column(width=width, justify="right" if side == "right" else "left")
    grid.add_row(*cells)
    return grid


if __name__ == "__main__":
    main()
