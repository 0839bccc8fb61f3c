"""The first ten minutes: ingest samples, ask, and see reference, full prefill and blended answer side by side."""

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
    parser.add_argument("--questions", type=int, default=5, help="how many questions")
    args = parser.parse_args()
    console = Console()

    with Workspace.open(args.store, max_tokens=20) as ws:
        console.print("Ingesting examples/data/documents; finished documents are skipped ...")
        with console.status("computing KV"):
            report = ws.ingestor.ingest([DATA / "documents"])
        console.print(
            f"{len(report.added)} added, {report.unchanged} unchanged, {len(report.failed)} failed; KV of "
            f"{report.kv.computed} chunks computed in {report.seconds:.0f} s. Model: {ws.engine.info.model}"
        )
        ws.engine.load()  # type: ignore[attr-defined]
        table = Table(title="The same passages, from a full prefill and from blended KV", show_lines=True)
        for name in ("question and reference", "full prefill", "blended KV"):
            table.add_column(name, overflow="fold", ratio=1)
        right = {"full prefill": 0, "blended KV": 0}
        questions = json.loads((DATA / "quickstart.json").read_text(encoding="utf-8"))[: args.questions]
        for entry in questions:
            with console.status(escape(entry["question"])):
                result = ws.rag.compare(entry["question"])
            cells = []
            for name, answer in (("full prefill", result.full), ("blended KV", result.blended)):
                stats, found = answer.stats, entry["answer"] in answer.text
                right[name] += found
                cells.append(
                    f"{escape(' '.join(answer.text.split()))}\n[{'green]right' if found else 'red]wrong'}[/]\n"
                    f"[dim]TTFT {stats.ttft_ms:.0f} ms; of {stats.prompt_tokens} tokens {stats.prefix_tokens} prefix, "
                    f"{stats.reused_tokens} reused, {stats.recomputed_tokens} recomputed, "
                    f"{stats.computed_tokens} computed[/]"
                )
            source = Path(result.full.sources[0].documents[0].source).name
            table.add_row(
                f"[bold]{escape(entry['question'])}[/]\n{escape(entry['reference'])}\n[dim]{escape(source)}[/]", *cells
            )
            console.print(f"TTFT {result.speedup:.1f} times lower: {entry['question']}")
    console.print(table)
    total = len(questions)
    console.print("; ".join(f"{name}: {number} of {total} right" for name, number in right.items()))
    console.print("Questions for a very small model. `lmcache-rag bench quality` measures what blending costs.")


if __name__ == "__main__":
    main()
