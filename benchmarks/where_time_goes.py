"""Where the time to the first token goes: the stages of a request on a blending server, beside stock vLLM.

    lmcache-rag serve MODEL --port 8000 &
    vllm serve MODEL --port 8001 --max-num-batched-tokens 8192 &      # on another GPU of the same kind
    python benchmarks/where_time_goes.py http://localhost:8000 http://localhost:8001 --json where-time-goes.json

Arms, asked in turn, one request at a time: stock vLLM; then the server with the KV in CPU memory, and hot (the chunks
are named, and vLLM itself still has them), each with the budget `auto`, where the server also decides whether to blend,
and with the shares 0.15 and 0.05, which always blend. One row is one arm at one length, in medians:

- TTFT as the client sees it, and how many times as early as stock's;
- the API server and HTTP: TTFT less the time in vLLM's engine;
- queue: from the engine's receipt to the step that runs the request. vLLM hashes the prompt before it. Of it, look-up:
  as long as the request waited for its look-up, which may have been sent before;
- load, selection, recomputation: what the worker measured, on the GPU's clock;
- step: the rest of the time in the step: its preparation, the last token, sampling; of stock vLLM, its prefill.

Queue and step come from vLLM's histograms on /metrics, which are read before and after each request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from lmcache_rag import protocol
from lmcache_rag.bench.client import Workload
from lmcache_rag.bench.speed import Arm, SpeedBench
from lmcache_rag.engines.vllm_client import VLLMClient

LENGTHS = (8600, 16800, 31000)
RATIOS = ("auto", "0.15", "0.05")
SEEN_S = 5.0  # vLLM counts a request soon after its answer
HISTOGRAMS = {
    "queue_ms": "vllm:request_queue_time_seconds",
    "prefill_ms": "vllm:request_prefill_time_seconds",
}
STAGES = ("http_ms", "queue_ms", "lookup_ms", "load_ms", "select_ms", "recompute_ms", "step_ms")
HEADS = ("API server, HTTP", "queue", "of it look-up", "load", "selection", "recomputation", "step")


def arms(engine: str, baseline: str | None, ratios: list[str]) -> list[Arm]:
    """Stock vLLM first, where there is one."""
    found = [Arm("stock vLLM", baseline)] if baseline else []
    for place, hot in (("from CPU memory", False), ("hot", True)):
        for ratio in ratios:
            params: dict[str, Any] = {protocol.RATIO: ratio}
            if ratio != "auto":
                params = {protocol.RATIO: float(ratio), protocol.BLEND: "always"}
            found.append(Arm(f"{place}, {ratio}", engine, params, hot))
    return found


def histogram(page: str, name: str) -> tuple[float, float]:
    """(observations, their sum) of a histogram on /metrics, all engines together."""
    counts = re.findall(rf"^{name}_count(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
    sums = re.findall(rf"^{name}_sum(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
    return sum(map(float, counts)), sum(map(float, sums))


class Server:
    """Reads what vLLM's histograms say of one request."""

    def __init__(self, url: str) -> None:
        self._client = VLLMClient(url, attempts=1)
        self.page = ""

    def begin(self) -> None:
        """Before the request."""
        self.page = self._client.metrics()

    def end(self) -> dict[str, float]:
        """After it: its times in milliseconds; those that vLLM does not count are left out."""
        until = time.monotonic() + SEEN_S
        while True:
            after, found = self._client.metrics(), {}
            for stage, name in HISTOGRAMS.items():
                (before, first), (count, last) = histogram(self.page, name), histogram(after, name)
                if count == before + 1:
                    found[stage] = (last - first) * 1e3
            if len(found) == len(HISTOGRAMS) or time.monotonic() > until:
                return found
            time.sleep(0.02)


def stages(ttft_ms: float, engine: dict[str, float], reported: dict[str, Any]) -> dict[str, float]:
    """The stages of one request. What is not known is left out."""
    found = {name: float(reported.get(name, 0.0)) for name in ("lookup_ms", "load_ms", "select_ms")}
    found["recompute_ms"] = float(reported.get("blend_ms", 0.0)) - found["select_ms"]
    if "queue_ms" in engine:
        found["queue_ms"] = engine["queue_ms"]
    if "prefill_ms" in engine:
        blend = found["load_ms"] + found["select_ms"] + found["recompute_ms"]
        found["step_ms"] = engine["prefill_ms"] - blend
        if "queue_ms" in engine:
            found["http_ms"] = ttft_ms - engine["queue_ms"] - engine["prefill_ms"]
    return found


async def measured(args: argparse.Namespace, tokens: int) -> list[dict[str, Any]]:
    """All arms at one length."""
    prefix, question = 64, 32
    inside = max(1, (tokens - prefix - question) // (args.chunk + 2))
    workload = Workload(
        prefix=prefix, question=question, chunk=args.chunk, chunks=inside + args.spare, seed=f"{args.seed}:{tokens}"
    )
    bench = SpeedBench(arms(args.engine, args.baseline, args.ratios), workload)
    servers = {arm.url: Server(arm.url) for arm in bench.arms}
    taken: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in bench.arms}
    await bench.open()
    try:
        for url in servers:
            await bench.ingest(url)
        number = tokens * 1000
        for repeat in range(-args.warm, args.repeats):
            for arm in bench.arms:
                number += 1  # a prompt of its own: none may find another's in a prefix cache
                await asyncio.to_thread(servers[arm.url].begin)
                done = await bench.ask(arm, tokens, number)
                engine = await asyncio.to_thread(servers[arm.url].end)
                if repeat >= 0:
                    found = stages(done.ttft_ms, engine, done.statistics)
                    taken[arm.name].append({"ttft_ms": done.ttft_ms, **found, "statistics": done.statistics})
    finally:
        await bench.close()
    base = statistics.median(each["ttft_ms"] for each in taken[bench.arms[0].name]) if args.baseline else None
    return [row(arm.name, tokens, taken[arm.name], base) for arm in bench.arms]


def row(arm: str, tokens: int, taken: list[dict[str, Any]], base: float | None) -> dict[str, Any]:
    """The medians of an arm at one length, and each of its requests."""
    medians = {}
    for name in ("ttft_ms", *STAGES):
        if values := [each[name] for each in taken if name in each]:
            medians[name] = statistics.median(values)
    reported = [each["statistics"] for each in taken if each["statistics"]]
    counts = {
        name: statistics.median(each.get(name, 0) for each in reported)
        for name in (*protocol.COUNTS, "hot_tokens")
        if reported
    }
    decisions = Counter(str(each.get(protocol.DECISION) or each.get(protocol.FAILURE) or "") for each in reported)
    times = {"of_stock": base / medians["ttft_ms"]} if base else {}
    return {"arm": arm, "tokens": tokens, **times, **medians, **counts, "decisions": decisions, "requests": taken}


def shown(rows: list[dict[str, Any]]) -> str:
    """The rows as one table in Markdown."""
    head = ("tokens", "arm", "TTFT ms", "faster", *HEADS, "recomputed", "computed", "hot", "decisions")
    lines = [f"| {' | '.join(head)} |", f"| ---: | --- |{' ---: |' * (len(head) - 3)} --- |"]
    for each in rows:
        cells = [f"{each['tokens']:,}", each["arm"], f"{each['ttft_ms']:.1f}"]
        cells.append(f"{each['of_stock']:.2f}" if "of_stock" in each else "")
        ours = bool(each["decisions"])
        for name in STAGES:
            known = name in each and (ours or name in ("http_ms", "queue_ms", "step_ms"))
            cells.append(f"{each[name]:.1f}" if known else "")
        cells += [f"{each[name]:,.0f}" if name in each else "" for name in ("recomputed_tokens", "computed_tokens")]
        cells.append(f"{each['hot_tokens']:,.0f}" if "hot_tokens" in each else "")
        cells.append(", ".join(f"{name} {count}" for name, count in each["decisions"].items() if name))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", help="URL of the blending server")
    parser.add_argument("baseline", nargs="?", help="URL of stock vLLM")
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, metavar="N", help="lengths of the prompts")
    parser.add_argument("--ratios", nargs="+", default=list(RATIOS), metavar="R", help='"auto", or shares')
    parser.add_argument("--chunk", type=int, default=512, metavar="N", help="tokens of a chunk")
    parser.add_argument("--spare", type=int, default=30, metavar="N", help="chunks besides those of one prompt")
    parser.add_argument("--repeats", type=int, default=10, help="requests of each arm and length")
    parser.add_argument("--warm", type=int, default=3, help="requests of each arm before those")
    parser.add_argument(
        "--seed", type=int, default=time.time_ns() % 1_000_000, help="of the prompts; default: new ones"
    )
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        rows += asyncio.run(measured(args, tokens))
    print(shown(rows))
    if args.json:
        with VLLMClient(args.engine, attempts=1) as server:
            page = server.metrics()
        document = {"command": sys.argv, "seed": args.seed, "rows": rows, "costs_ms": protocol.costs(page)}
        args.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
