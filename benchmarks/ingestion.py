"""How fast ingestion computes KV, against raw prefill of the same batch shapes, side by side in one run.

python benchmarks/ingestion.py             # the sample documents, SmolLM2 in float32 on the CPU

Ingestion starts from files and an empty store: it reads, splits, embeds, indexes, computes and writes KV. Raw prefill
is transformers' own model, attention function and cache with token ids at hand, one chunk at a time: once after a
cached prefix, which is the shape that ingestion computes, and once the chunk alone. A machine's speed drifts; so each
chunk is prefilled raw right after ingestion has computed it, and that time is taken off the ingestion's.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import transformers

import lmcache_rag.ingest
from lmcache_rag import Workspace
from lmcache_rag.embedding import SentenceTransformerEmbedder
from lmcache_rag.engines.chunk_cache import KVStore
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.ingest import Progress
from lmcache_rag.weights import find_model, revision_of

DATA = Path(__file__).parents[1] / "examples" / "data" / "documents"


class Stopwatch:
    """Wall time by label; what a labelled call spends in another labelled call counts only there."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner = [0.0]
        self._undo: list[Callable[[], None]] = []

    @contextmanager
    def part(self, label: str) -> Iterator[None]:
        """Count the block."""
        begin = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self.seconds[label] += spent - self._inner.pop()
            self._inner[-1] += spent

    def watch(self, owner: Any, method: str, label: str, *, steps: bool = False) -> None:
        """Count a method's calls, or the steps of the generator that it returns."""
        call: Callable[..., Any] = getattr(owner, method)

        @wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(label):
                return call(*args, **kwargs)

        @wraps(call)
        def stepped(*args: Any, **kwargs: Any) -> Iterator[Any]:
            items = iter(call(*args, **kwargs))
            while True:
                with self.part(label):
                    item = next(items, None)
                if item is None:
                    return
                yield item

        own = method in vars(owner)
        setattr(owner, method, stepped if steps else counted)
        self._undo.append(lambda: setattr(owner, method, call) if own else delattr(owner, method))

    def release(self) -> None:
        """Put every watched method back."""
        while self._undo:
            self._undo.pop()()


class Raw:
    """Plain transformers: how long the prefill of a chunk takes."""

    def __init__(self, folder: Path, prefix_ids: tuple[int, ...], text_ids: list[int]) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._text = torch.tensor([text_ids])
        with torch.inference_mode():
            self._prefix = self._model(torch.tensor([prefix_ids]), use_cache=True, logits_to_keep=1).past_key_values

    def seconds(self, tokens: int, *, after_prefix: bool) -> float:
        """Prefill so many tokens; copying the prefix's KV is not counted."""
        with torch.inference_mode():
            cache = copy.deepcopy(self._prefix) if after_prefix else None
            begin = time.perf_counter()
            self._model(self._text[:, :tokens], past_key_values=cache, use_cache=True, logits_to_keep=1)
            return time.perf_counter() - begin


@dataclass(frozen=True)
class Measured:
    """One ingestion, in seconds, and the raw prefills between its steps."""

    tokens: int
    chunks: int
    ingestion: float
    after_prefix: float
    alone: float
    parts: dict[str, float]


def measure(files: list[Path], hf: HFModel, embedder: Any, revision: str, raw: Raw) -> Measured:
    """Ingest into a new store, and prefill each chunk raw as soon as its KV is kept."""
    watch, after, alone = Stopwatch(), 0.0, 0.0

    def each(progress: Progress) -> None:
        nonlocal after, alone
        if progress.step == "kv":
            with watch.part("raw"):
                after += raw.seconds(progress.tokens, after_prefix=True)
                alone += raw.seconds(progress.tokens, after_prefix=False)

    with tempfile.TemporaryDirectory() as folder:
        engine = EmbeddedEngine.from_model(hf, name="benchmark", revision=revision, kv_dir=Path(folder) / "kv")
        with Workspace.open(Path(folder) / "store", engine=engine, embedder=embedder) as ws:
            ws.ingestor.on_progress = each
            watch.watch(lmcache_rag.ingest, "load_document", "reading files")
            watch.watch(ws.splitter, "split", "splitting")
            watch.watch(embedder, "embed_documents", "embedding")
            watch.watch(engine, "precompute", "KV: computing", steps=True)
            watch.watch(ws.prompts, "ingest", "KV: token ids")
            watch.watch(KVStore, "put", "KV: writing files")
            for method in ("put_documents", "record_kv", "chunks_without_kv", "known_texts", "document"):
                watch.watch(ws.store.registry, method, "registry (SQLite)")
            watch.watch(ws.store.index, "save", "index (FAISS)")
            try:
                with watch.part("everything else"):
                    report = ws.ingestor.ingest(files)
            finally:
                watch.release()
        engine.close()
    if report.failed or not report.kv.computed:
        raise SystemExit(f"The ingestion did not do its work: {report}")
    spent = report.seconds - watch.seconds.pop("raw")
    return Measured(report.kv.tokens, report.kv.computed, spent, after, alone, dict(watch.seconds))


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--embedder")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--documents", type=int, help="take so many, spread evenly; default: all")
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    files = sorted(path for path in args.data.rglob("*") if path.is_file())
    if args.documents:
        files = files[:: max(1, len(files) // args.documents)][: args.documents]

    source = find_model(args.model)
    hf = HFModel.open(source.path, device="cpu", dtype="float32")
    revision = revision_of(source.path)
    embedder = SentenceTransformerEmbedder(args.embedder, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        engine = EmbeddedEngine.from_model(hf, name="benchmark", revision=revision, kv_dir=folder)
        with Workspace.open(Path(folder) / "store", engine=engine, embedder=embedder) as ws:
            prompt = ws.prompts.ingest("A river is a natural stream of water. " * 200)
    prefix_ids = prompt.token_ids[: prompt.prefix_tokens]
    raw = Raw(source.path, prefix_ids, list(prompt.chunk_ids))

    measure(files[:2], hf, embedder, revision, raw)  # warm-up
    runs = [measure(files, hf, embedder, revision, raw) for _ in range(args.repeats)]

    tokens, chunks = runs[0].tokens, runs[0].chunks
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{source.name}, float32, {embedder.name}, {machine}, {versions}")
    print(f"{len(files)} documents, {chunks} chunks of {tokens / chunks:.0f} tokens on average, ", end="")
    print(f"{tokens} tokens, after a prefix of {len(prefix_ids)}; {args.repeats} repeats\n")
    arms = {
        "raw, after the prefix": [run.after_prefix for run in runs],
        "raw, the chunk alone": [run.alone for run in runs],
        "ingestion": [run.ingestion for run in runs],
    }
    print("| arm | seconds, minimum | median | tokens/s, best | median |")
    print("| --- | --- | --- | --- | --- |")
    for arm, values in arms.items():
        low, middle = min(values), statistics.median(values)
        print(f"| {arm} | {low:.2f} | {middle:.2f} | {tokens / low:.0f} | {tokens / middle:.0f} |")
    print("\n| tokens/s of ingestion as a share of | minimum | median | every repeat |")
    print("| --- | --- | --- | --- |")
    for arm in ("raw, after the prefix", "raw, the chunk alone"):
        shares = [base / ours for base, ours in zip(arms[arm], arms["ingestion"], strict=True)]
        every = ", ".join(f"{share:.2f}" for share in shares)
        print(f"| {arm} | {min(shares):.2f} | {statistics.median(shares):.2f} | {every} |")
    print("\n| part of ingestion | seconds, median | share |")
    print("| --- | --- | --- |")
    middles = {label: statistics.median(run.parts[label] for run in runs) for label in runs[0].parts}
    whole = sum(middles.values())
    for label, middle in sorted(middles.items(), key=lambda item: -item[1]):
        print(f"| {label} | {middle:.3f} | {middle / whole:.1%} |")


if __name__ == "__main__":
    main()
