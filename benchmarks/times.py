"""Times that must stay short, on this machine: importing the library, the help, opening and searching a store.

python benchmarks/times.py [--documents N]

Tests do not check these: on a busy machine they vary too much. On two busy cores: 5,000 documents a second, 0.12 s
to open a store of 10,000 documents, 0.8 ms for a search.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmcache_rag.store import NewChunk, NewDocument, Store

SIZE = 384
EMBEDDER = "random"


def seconds(do: Callable[[], object]) -> float:
    """The median of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        do()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def python(*arguments: str) -> Callable[[], object]:
    """Runs a new interpreter."""
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def documents(number: int) -> list[NewDocument]:
    """Documents of one chunk of some 1,000 characters each, every fifth of two."""
    rng = np.random.default_rng(0)
    filler = "the quick brown fox jumps over the lazy dog " * 25

    def chunk(text: str, start: int) -> NewChunk:
        return NewChunk(text, 256, start, rng.standard_normal(SIZE).astype(np.float32))

    return [
        NewDocument(
            f"{each:05d}",
            f"{each:064d}",
            "s",
            f"{each}.txt",
            [chunk(f"{each} {filler}", 0)] + ([chunk(f"{each} more {filler}", 1)] if each % 5 == 0 else []),
        )
        for each in range(number)
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Times that must stay short.")
    parser.add_argument("--documents", type=int, default=10_000, metavar="N")
    number = parser.parse_args().documents
    bare = seconds(python("-c", "pass"))
    print(
        f"import lmcache_rag        {seconds(python('-c', 'import lmcache_rag')) - bare:8.3f} s beyond Python's start"
    )
    print(f"lmcache-rag --help        {seconds(python('-m', 'lmcache_rag.cli', '--help')) - bare:8.3f} s beyond it")
    with tempfile.TemporaryDirectory() as folder:
        new = documents(number)
        start = time.perf_counter()
        with Store.open(Path(folder)) as store, store.writing():
            for first in range(0, number, 64):
                store.registry.put_documents(new[first : first + 64], embedder=EMBEDDER)
        print(f"write {number} documents    {number / (time.perf_counter() - start):8.0f} a second")
        start = time.perf_counter()
        with Store.open(Path(folder), read_only=True) as store:
            store.index.refresh()
            print(f"open the store            {time.perf_counter() - start:8.3f} s")
            rows = np.random.default_rng(1).standard_normal((100, SIZE)).astype(np.float32)
            times = []
            for row in rows:
                start = time.perf_counter()
                store.index.search(row, 6)
                times.append(time.perf_counter() - start)
            print(f"search                    {1000 * statistics.median(times):8.2f} ms")


if __name__ == "__main__":
    main()
