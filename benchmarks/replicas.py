"""Does one replica reuse KV that another one computed? Replicas of one vLLM that share an LMCache server.

    lmcache-rag serve MODEL --data-parallel-size 2
    python benchmarks/replicas.py http://localhost:8000 --replicas 2

Random chunks are precomputed by replica 0 only. Each replica is then asked for prompts of them in random order, with
everything computed again (ratio 1), and once more without reuse: where its KV came from, and whether the answers agree.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import httpx

from lmcache_rag import protocol

PREFIX, CHUNK, QUESTION = 256, 256, 24  # a prefix of whole LMCache chunks, of any usual size
OFF = {protocol.BLEND: "off", protocol.MAX_OFFLOAD_TOKENS: 64}
ALWAYS = {**protocol.ALWAYS_BLEND, protocol.POLICY: "query"}
COUNTS = ("prefix_tokens", "reused_tokens", "recomputed_tokens", "computed_tokens", "hot_tokens")


class Replicas:
    """Replicas at one address, selected by their number."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=120)
        self._model = self._client.get("/v1/models").raise_for_status().json()["data"][0]["id"]

    def ask(self, replica: int, prompt: list[int], tokens: int, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Greedy tokens, and the reuse statistics."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "kv_transfer_params": params,
        }
        headers = {"X-data-parallel-rank": str(replica)}
        answer = self._client.post("/v1/completions", json=body, headers=headers).raise_for_status().json()
        statistics = (answer.get("kv_transfer_params") or {}).get("lmcache_rag") or {}
        return answer["choices"][0]["token_ids"], statistics


def measure(replicas: Replicas, count: int, prompts: int, tokens: int, ratio: float) -> list[dict[str, Any]]:
    """A row for each replica."""
    rng = random.Random(time.time_ns())  # nothing of an earlier run may be there

    def drawn(length: int) -> list[int]:
        return [rng.randrange(300, 40_000) for _ in range(length)]

    prefix, chunks = drawn(PREFIX), [drawn(CHUNK) for _ in range(8)]
    for chunk in chunks:
        replicas.ask(0, prefix + chunk, 1, {protocol.BLEND: "off", protocol.INGEST: True, protocol.PREFIX: PREFIX})
    time.sleep(2)  # LMCache stores KV after the answer
    rows = []
    for replica in reversed(range(count)):
        row: dict[str, Any] = {"replica": replica, "prompts": prompts, "blended": 0, "equal": 0}
        row |= dict.fromkeys(("prompt_tokens", *COUNTS), 0)
        for _ in range(prompts):
            order = rng.sample(range(len(chunks)), 5)
            prompt = prefix + [token for number in order for token in (*chunks[number], 11, 12)] + drawn(QUESTION)
            answer, statistics = replicas.ask(
                replica, prompt, tokens, {**ALWAYS, protocol.RATIO: ratio, protocol.PREFIX: PREFIX}
            )
            full, _ = replicas.ask(replica, prompt, tokens, OFF)
            row["blended"] += statistics.get("reused_tokens", 0) + statistics.get("recomputed_tokens", 0) > 0
            row["equal"] += answer == full
            row["prompt_tokens"] += len(prompt)
            for name in COUNTS:
                row[name] += statistics.get(name, 0)
        rows.append(row)
    return rows


def main() -> None:
    """Measure, and print a line for each replica."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = measure(Replicas(arguments.url), arguments.replicas, arguments.prompts, arguments.tokens, arguments.ratio)
    for row in rows:
        print(json.dumps(row))
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
