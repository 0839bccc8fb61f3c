"""The first ten minutes: ingest the samples, ask in two retrieval orders, compare with full prefills."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lmcache_rag import Workspace

DATA = Path(__file__).parent / "data"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default=".store", help="where the KV is kept (default: .store)")
    parser.add_argument("--questions", type=int, default=4, help="how many questions")
    args = parser.parse_args()
    console = Console()
    table = Table(title="Full prefill against blended KV, chunks in two orders", show_lines=True)
    table.add_column("question, answer from blended KV, sources", overflow="fold", ratio=1)
    for name in ("TTFT full, ms", "TTFT blend, ms", "prefix", "reused", "recom- puted", "com- puted"):
        table.add_column(name, justify="right", width=6)

    with Workspace.open(args.store, top_k=5, max_tokens=48) as ws:
        console.print("Ingesting examples/data/documents; what was done before is skipped ...")
        with console.status("computing KV"):
            report = ws.ingestor.ingest([DATA / "documents"])
        console.print(
            f"{len(report.added)} added, {report.unchanged} unchanged, {len(report.failed)} failed; KV of "
            f"{report.kv.computed} chunks computed in {report.seconds:.0f} s"
        )
        ws.engine.load()  # type: ignore[attr-defined]
        for entry in json.loads((DATA / "questions.json").read_text())[: args.questions]:
            best_first = ws.rag.retrieve(entry["question"])
            for hits in (best_first, best_first[::-1]):
                result = ws.rag.compare(entry["question"], hits=hits)
                stats = result.blended.stats
                sources = list(dict.fromkeys(Path(h.documents[0].source).name for h in result.blended.sources))
                numbers = (stats.prefix_tokens, stats.reused_tokens, stats.recomputed_tokens, stats.computed_tokens)
                table.add_row(
                    f"[bold]{escape(entry['question'])}[/]\n{escape(result.blended.text.strip())}\n"
                    f"[dim]{escape(', '.join(sources))}[/]",
                    f"{result.full.stats.ttft_ms:.0f}",
                    f"{stats.ttft_ms:.0f}",
                    *map(str, numbers),
                )
                console.print(f"{result.speedup:.1f} times sooner: {entry['question']}")
    console.print(table)


if __name__ == "__main__":
    main()
