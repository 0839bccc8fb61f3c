"""Is a blending server at its default ever slower than stock vLLM? Times to the first token from 128 to 31,000 tokens.

    lmcache-rag serve MODEL --port 8000 &
    vllm serve MODEL --port 8001 --max-num-batched-tokens 8192 &      # on another GPU of the same kind
    python benchmarks/never_slower.py http://localhost:8000 http://localhost:8001 --json never-slower.json

Each length has chunks of its own, all of them ingested before. Four arms are asked in turn, one request at a time:
stock vLLM, the server with blending off in the request, as any client asks it (KV from CPU memory), and with the chunks
named (hot: vLLM itself still has them). Medians of 50 requests, of 20 above 8,192 tokens. The server is at most 3%
slower, or 1 ms, at every length, or the exit status is 1.

Then stock vLLM and the server under load: requests a second with 16 in flight at 8,600 tokens, and GPU-seconds for
1,000 questions: the share of the time in which the GPU ran any kernel, by nvidia-smi's utilization.gpu, times the
seconds that 1,000 questions take. It is left out where nvidia-smi does not run here; --gpus names the GPUs of the two
servers. The slowest hundredth of the gaps between tokens is measured so, too, and again at 0.8 of the requests a second
that stock vLLM can do, at the same moments for each arm: with 16 in flight a server that starts answers sooner has more
starts among its gaps. --load-first: before the lengths, while LMCache's memory holds nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmcache_rag import protocol
from lmcache_rag.bench.client import Workload
from lmcache_rag.bench.speed import OF_BASELINE, Arm, Row, SpeedBench
from lmcache_rag.engines.vllm_client import VLLMClient
from lmcache_rag.protocol import boundaries, costs

LENGTHS = (128, 512, 1024, 2048, 4096, 8192, 16384, 31000)
MANY, FEW, LONG = 50, 20, 8192  # requests of each arm, above LONG tokens fewer
WARM = 5  # requests of each arm and length that are not counted: the server learns from them, too
SHARE, MS = 1.03, 1.0  # of stock's median, or more than it
LOAD, IN_FLIGHT, REQUESTS = 8600, 16, 128
SAMPLE_MS = 100


def workload(tokens: int, seed: int) -> Workload:
    """Prompts of about that many tokens: chunks of 512, or as many as make a short prompt."""
    prefix, question = 64, 32
    chunk = 512 if tokens >= 2048 else max(tokens // 4, 32) if tokens >= 512 else tokens - prefix - question
    inside = max(1, (tokens - prefix - question) // (chunk + 2))
    return Workload(prefix=prefix, question=question, chunk=chunk, chunks=inside + 30, seed=f"{seed}:{tokens}")


def arms(engine: str, baseline: str) -> list[Arm]:
    """Stock vLLM first. What `off` takes more than stock is the connector's own time, without any decision."""
    off = {protocol.BLEND: "off", protocol.MAX_OFFLOAD_TOKENS: 0}
    return [
        Arm("stock", baseline),
        Arm("off", engine, off),
        Arm("from CPU memory", engine),
        Arm("hot", engine, hot=True),
    ]


async def latency(args: argparse.Namespace, tokens: int) -> list[dict[str, Any]]:
    """All arms at one length."""
    bench = SpeedBench(arms(args.engine, args.baseline), workload(tokens, args.seed))
    await bench.open()
    try:
        for url in (args.engine, args.baseline):
            await bench.ingest(url)
        rows = await bench.latency(tokens, args.repeats or (MANY if tokens <= LONG else FEW), warm=WARM)
    finally:
        await bench.close()
    stock = rows[0].median
    return [judged(row, stock) for row in rows]


def judged(row: Row, stock: float) -> dict[str, Any]:
    """A row with its bound."""
    fine = row.median <= max(SHARE * stock, stock + MS)
    return {**row.as_dict(), "of_stock": row.median / stock, "more_ms": row.median - stock, "fine": fine}


async def load(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Throughput, gaps and GPU time of each arm but the one with blending off."""
    tokens = args.load_tokens
    chosen = [arm for arm in arms(args.engine, args.baseline) if arm.name != "off"]
    bench = SpeedBench(chosen, workload(tokens, args.seed))
    await bench.open()
    found = []
    try:
        for url in (args.engine, args.baseline):
            await bench.ingest(url)
        for arm in bench.arms:
            gpu = args.gpus[0 if arm.url == args.engine else -1]
            await bench.throughput(arm, tokens + 1, IN_FLIGHT, at_once=IN_FLIGHT)  # not counted, and other prompts
            with busy(gpu) as samples:
                begin = time.perf_counter()
                row = await bench.throughput(arm, tokens, args.requests, at_once=IN_FLIGHT)
                seconds = time.perf_counter() - begin
            if samples:
                row["gpu_seconds_per_1000"] = statistics.mean(samples) / 100 * seconds / args.requests * 1000
            found.append(row)
        per_second = OF_BASELINE * found[0]["requests_per_second"]
        for arm, row in zip(bench.arms, found, strict=True):
            row["at_rate"] = await bench.rate(arm, tokens, args.requests // 2, per_second=per_second)
    finally:
        await bench.close()
    return found


@contextlib.contextmanager
def busy(gpu: int) -> Iterator[list[float]]:
    """Samples of a GPU's utilisation in percent, complete when the block has ended; none without nvidia-smi."""
    samples: list[float] = []
    if shutil.which("nvidia-smi") is None:
        yield samples
        return
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", f"-lms={SAMPLE_MS}", f"--id={gpu}"]
    with subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, text=True) as program:
        try:
            yield samples
        finally:
            program.terminate()
            out, _ = program.communicate()
            samples += [float(line) for line in out.splitlines() if line.strip().isdigit()]


def shown(rows: list[dict[str, Any]]) -> str:
    """The latency rows as a table in Markdown."""
    lines = [
        "| tokens | arm | median ms | of stock | more ms | recomputed | look-up, load, passes ms | decisions | |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        decided = ", ".join(f"{name} {count}" for name, count in Counter(row["decisions"]).items())
        verdict = "ok" if row["fine"] else "SLOWER"
        steps = row["steps"]
        numbers = f"{row['median_ms']:.1f} | {row['of_stock']:.3f} | {row['more_ms']:+.1f}"
        numbers += f" | {steps.get('recomputed_tokens', 0):,.0f}"
        numbers += " | " + ", ".join(f"{steps.get(f'{name}_ms', 0):.1f}" for name in ("lookup", "load", "blend"))
        lines.append(f"| {row['tokens']:,} | {row['arm']} | {numbers} | {decided} | {verdict} |")
    return "\n".join(lines)


def shown_load(rows: list[dict[str, Any]]) -> str:
    """The rows under load as a table in Markdown."""
    lines = [
        f"At a rate: {rows[0]['at_rate']['per_second']:.2f} requests a second.\n",
        "| arm | requests/s | of stock | gap p99 ms | GPU-seconds per 1,000 | computed | TTFT, gap p99 ms at a rate |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        per_second = row["requests_per_second"]
        gpu = f"{row['gpu_seconds_per_1000']:.0f}" if "gpu_seconds_per_1000" in row else ""
        of_stock = per_second / rows[0]["requests_per_second"]
        cells = f"{per_second:.2f} | {of_stock:.2f} | {row['gap_ms_p99']:.0f} | {gpu}"
        cells += f" | {row['steps'].get('computed_tokens', 0):,.0f}"
        at_rate = row["at_rate"]
        lines.append(f"| {row['arm']} | {cells} | {at_rate['ttft_ms_median']:.0f}, {at_rate['gap_ms_p99']:.0f} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", help="URL of the blending server")
    parser.add_argument("baseline", help="URL of stock vLLM")
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, metavar="N", help="lengths of the prompts")
    parser.add_argument("--repeats", type=int, default=0, help="requests of each arm; default 50, 20 for long ones")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="requests of each arm under load; 0: no load")
    parser.add_argument("--load-tokens", type=int, default=LOAD, help="length of the prompts under load")
    parser.add_argument("--load-first", action="store_true", help="the load before the lengths")
    parser.add_argument("--gpus", type=int, nargs="+", default=[0, 1], metavar="ID", help="GPUs of the two servers")
    parser.add_argument(
        "--seed", type=int, default=time.time_ns() % 1_000_000, help="of the prompts; default: new ones"
    )
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    loaded = asyncio.run(load(args)) if args.requests and args.load_first else []
    for tokens in args.tokens:
        rows += asyncio.run(latency(args, tokens))
        print(shown(rows[-4:]), flush=True)
    if args.requests and not args.load_first:
        loaded = asyncio.run(load(args))
    with VLLMClient(args.engine, attempts=1) as server:
        page = server.metrics()
    print(f"\n{shown(rows)}\n")
    if loaded:
        print(f"{shown_load(loaded)}\n")
    print("costs, ms:", json.dumps(costs(page)), "\nblended from, tokens:", json.dumps(boundaries(page)))
    if args.json:
        document = {"command": sys.argv, "seed": args.seed, "ttft": rows, "load": loaded}
        document |= {"costs_ms": costs(page), "blended_from_tokens": boundaries(page)}
        args.json.write_text(json.dumps(document, indent=1))
    return int(not all(row["fine"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
