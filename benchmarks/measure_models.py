"""Measure the folders of benchmarks/models.py on a GPU, each beside stock vLLM, and write the table of all results.

    python benchmarks/models.py MODELS --tokenizer MODEL --memory 10 --weights cuda
    python benchmarks/measure_models.py run MODELS --out RESULTS --group phi-4 granite-3-8b --group "llama-3-8b:FP8 KV"
    python benchmarks/measure_models.py table RESULTS

The models of a group are served at the same time. First their times to the first token are taken, one model after the
other with no other traffic, beside stock vLLM; then, of all of them at once, answers at ratio 1 are compared with those
of a full prefill, and two minutes of mixed traffic are sent. Each model leaves one JSON file in RESULTS. With
--no-speed there is no stock vLLM, and the times are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models import ADAPTERS, OPTIONS, SHAPES

DOCUMENTS = sorted((Path(__file__).parents[1] / "examples" / "data" / "documents").glob("*.txt"))  # no reader is needed
STOCK = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")
OURS = (sys.executable, "-m", "lmcache_rag")
UP_S, PROMPTS, TOKENS, SOAK_S = 600.0, 30, 8192, 120.0


def free_port() -> int:
    """A port that was free just now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Row:
    """One model with its options: two servers, and what they were measured to do.

    Args:
        models: Folder of the models.
        name: A shape's name, and after a colon one of its options in OPTIONS.
        out: Folder of logs and results.
        kv_bytes: GPU memory for each server's KV.
    """

    def __init__(self, models: Path, name: str, out: Path, kv_bytes: int) -> None:
        self.name, (shape, _, self.how), self.out = name, name.partition(":"), out
        self.shape, self.folder = shape, models / shape
        self.slug = name.replace(":", "-").replace(" ", "-").lower()
        common, ours = OPTIONS[shape][self.how] if self.how else ("", "")
        adapters = [f"{each}={self.folder / each}" for each in ADAPTERS]
        shared = [option for word in common.split() for option in (adapters if word == "{adapters}" else [word])]
        shared += ["--max-model-len", "16384", "--kv-cache-memory-bytes", str(kv_bytes)]
        shared += ["--gpu-memory-utilization", "0.1"]
        self.port, self.stock_port, self.http_port = free_port(), free_port(), free_port()
        self.ours = [*OURS, "serve", str(self.folder), "--port", str(self.port), "--l1-gb", "6"]
        self.ours += ["--lmcache-port", str(free_port()), "--lmcache-http-port", str(self.http_port)]
        self.ours += ["--log-dir", str(out / f"{self.slug}-log"), *ours.split(), *shared]
        self.stock = [*STOCK, str(self.folder), "--port", str(self.stock_port), *shared]
        self.stock += ["--max-num-batched-tokens", "8192"]
        self.with_stock = True
        self.result: dict[str, Any] = {"name": name, "shape": shape, "how": self.how}
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        """Of the blending server."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start both servers; they are not waited for."""
        config = json.loads((self.folder / "config.json").read_text())
        whole = SHAPES[self.shape][1]["num_hidden_layers"]
        self.result |= {"layers": config["num_hidden_layers"], "of_layers": whole}
        self.result["commands"] = [" ".join(Path(word).name if "/" in word else word for word in self.ours[2:])]
        self.result["architecture"] = config["architectures"][0]
        for command, log in ((self.ours, "ours"), (self.stock, "stock"))[: 1 + self.with_stock]:
            with (self.out / f"{self.slug}-{log}.log").open("wb") as file:
                run = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            self._processes.append(run)

    def wait(self) -> None:
        """Until both answer.

        Raises:
            SystemExit: One of them ended, or took too long.
        """
        until = time.monotonic() + UP_S
        for port in (self.port, self.stock_port)[: 1 + self.with_stock]:
            while not answers(f"http://127.0.0.1:{port}/health"):
                if time.monotonic() > until or any(run.poll() is not None for run in self._processes):
                    raise SystemExit(f"{self.name}: a server did not start; see its log in {self.out}")
                time.sleep(0.5)

    def speed(self) -> None:
        """Times to the first token beside stock vLLM."""
        args = ["speed", "--tokens", str(TOKENS), "--chunks", "16", "--baseline", f"http://127.0.0.1:{self.stock_port}"]
        self.result["speed"] = self._bench(*args)
        with (
            contextlib.suppress(urllib.error.URLError),
            urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/status", timeout=10) as page,
        ):
            self.result["lmcache_status"] = json.load(page)

    def exact(self) -> None:
        """Answers at ratio 1 and of each policy beside a full prefill's, while the traffic runs."""
        named = ["--model", ADAPTERS[0]] if self.how == "LoRA" else []
        args = ["exact", *map(str, DOCUMENTS), "--prompts", str(PROMPTS), "--orders", "10", "--tokens", "32", *named]
        self.result["exact"] = self._bench(*args)

    def soak(self) -> None:
        """Two minutes of mixed traffic."""
        args = ["soak", *map(str, DOCUMENTS), "--seconds", str(SOAK_S), "--in-flight", "4"]
        self.result["soak"] = self._bench(*args, "--lmcache-url", f"http://127.0.0.1:{self.http_port}")

    def _bench(self, kind: str, *args: str) -> Any:
        command = [*OURS, "bench", kind, *args, "--engine", self.url, "--json"]
        with (self.out / f"{self.slug}-{kind}.log").open("wb") as log:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, check=False)
        try:
            return json.loads(done.stdout)
        except ValueError:
            return {"failed": done.returncode}

    def close(self) -> None:
        """End both servers, and write the result."""
        logs = [path.read_text(errors="replace") for path in (self.out / f"{self.slug}-log").glob("*.log")]
        logs.append((self.out / f"{self.slug}-ours.log").read_text(errors="replace"))
        lines = [line for text in logs for line in text.splitlines()]
        for key, words in (
            ("self_check", "Self-check"),
            ("kv_tokens", "GPU KV cache size"),
            ("off", "BLENDING IS OFF"),
        ):
            found = next((line for line in lines if words in line), "")
            self.result[key] = found[found.find(words) :]
        for run in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGTERM)
        for run in self._processes:
            try:
                run.wait(20)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(run.pid, signal.SIGKILL)
        (self.out / f"{self.slug}.json").write_text(json.dumps(self.result, indent=1))


def answers(url: str) -> bool:
    """Whether the address answers with success."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - our own server
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def at_once(rows: list[Row], *methods: str) -> list[threading.Thread]:
    """Start these methods of all rows, each in a thread of its own."""
    threads = [threading.Thread(target=getattr(row, method)) for row in rows for method in methods]
    for thread in threads:
        thread.start()
    return threads


def finish(rows: list[Row]) -> None:
    """The part of a group that others may run beside, then its end."""
    for thread in at_once(rows, "exact", "soak"):
        thread.join()
    for row in rows:
        row.close()
        print(time.strftime("%T"), shown(row.result), flush=True)


def run(args: argparse.Namespace) -> None:
    """Measure all groups; the next one starts while the traffic of one runs, unless that is too much memory."""
    args.out.mkdir(parents=True, exist_ok=True)
    traffic: threading.Thread | None = None
    import vllm  # its package has another name where it is a build for CPUs

    facts = {"gpu": gpu(), "vllm": vllm.__version__, "lmcache": version("lmcache"), "torch": version("torch")}
    for names in args.group:
        rows = [Row(args.models, name, args.out, int(args.kv_gb * 1e9)) for name in names]
        if traffic and args.one_group:
            traffic.join()
        for row in rows:
            row.result |= facts
            row.with_stock = args.speed
            row.start()
        try:
            for row in rows:
                row.wait()
        except SystemExit as fault:
            print(fault, flush=True)
            for row in rows:
                row.close()
            continue
        if traffic:
            traffic.join()
        for row in rows if args.speed else ():
            row.speed()
        traffic = threading.Thread(target=finish, args=(rows,))
        traffic.start()
    if traffic:
        traffic.join()


def gpu() -> str:
    """Its name; empty where nvidia-smi does not run."""
    if shutil.which("nvidia-smi") is None:
        return ""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]


TIMES = (
    "model", "layers", "TTFT ms: stock", "from CPU memory", "hot", "times as fast", "recomputed", "load ms",
    "tokens of KV in 1 GB",
)  # fmt: skip
ANSWERS = (
    "model", "layers", "self-check", "ratio 1 of 30: equal", "near ties", "other", "other orders, least reused",
    "mixed traffic: requests", "blended", "failed", "wrong",
)  # fmt: skip


def name_of(result: dict[str, Any]) -> list[str]:
    """The first two cells."""
    return [result["name"].replace(":", ", "), f"{result['layers']} of {result['of_layers']}"]


def times(result: dict[str, Any]) -> list[str]:
    """The cells of the first table; none if the times were not taken."""
    if not isinstance(result.get("speed"), list):
        return []
    rows = [row for row in result["speed"] if row["measure"] == "ttft"]
    cells = [*name_of(result), *(f"{row['median_ms']:.1f}" for row in rows)]
    cells.append(", ".join(f"{row['sooner']:.2f}" for row in rows[1:]))
    for step, digits in (("recomputed_tokens", 0), ("load_ms", 1)):
        cells.append(", ".join(f"{row['steps'].get(step, 0):,.{digits}f}" for row in rows[1:]))
    held, memory = (
        re.search(r"size: ([\d,]+) tokens", result["kv_tokens"]),
        re.search(r"cache-memory-bytes (\d+)", result["commands"][0]),
    )
    cells.append(f"{int(held[1].replace(',', '')) / int(memory[1]) * 1e9:,.0f}" if held and memory else "")
    return cells


def answered(result: dict[str, Any]) -> list[str]:
    """The cells of the second table; none if answers were not compared."""
    exact, soak = result.get("exact") or {}, result.get("soak") or {}
    if "server" not in exact and "requests" not in soak:
        return []
    cells = [*name_of(result), result["self_check"].partition(": ")[2].partition(",")[0] or result["off"] or "not run"]
    if "server" in exact:
        one = next(arm for arm in exact["server"] if arm["arm"] == "query 1")
        near = len(one["differences"]) - one["equal"] - one["unexplained"]
        cells += [str(one["equal"]), str(near), str(one["unexplained"])]
        cells.append(f"{exact['orders'][0]['least_cover']:.0%}" if exact.get("orders") else "")
    else:
        cells += ["failed", "", "", ""]
    if "requests" in soak:
        numbers = (sum(soak["requests"].values()), soak["reused"], len(soak["failed"]), len(soak["wrong"]))
        cells += [f"{number:,}" for number in numbers]
    else:
        cells += ["failed", "", "", ""]
    return cells


def shown(result: dict[str, Any]) -> str:
    """What was seen of one model, in one line."""
    return " | ".join([*times(result), *answered(result)]) or f"{result['name']}: nothing was measured"


def results(folder: Path) -> Iterator[dict[str, Any]]:
    """Of each model, in the order of their names."""
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        if isinstance(found, dict) and "of_layers" in found:
            yield found


def table(args: argparse.Namespace) -> None:
    """Print all rows in two tables."""
    for heads, cells in ((TIMES, times), (ANSWERS, answered)):
        print(f"| {' | '.join(heads)} |", f"| --- | ---: |{' ---: |' * (len(heads) - 2)}", sep="\n")
        for folder in args.results:
            for result in results(folder):
                if row := cells(result):
                    print(f"| {' | '.join(row)} |")
        print()


def main() -> None:
    """Measure, or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    measure = parts.add_parser("run", help="measure the groups")
    measure.add_argument("models", type=Path, help="folder that benchmarks/models.py wrote")
    measure.add_argument("--out", type=Path, required=True, help="folder of the results")
    measure.add_argument("--group", nargs="+", action="append", required=True, metavar="NAME", help="served at once")
    measure.add_argument("--kv-gb", type=float, default=4.0, help="GPU memory of each server's KV")
    measure.add_argument("--no-speed", dest="speed", action="store_false", help="without times and stock vLLM")
    measure.add_argument("--one-group", action="store_true", help="do not start a group before the last one has ended")
    measure.set_defaults(act=run)
    printed = parts.add_parser("table", help="print the table")
    printed.add_argument("results", type=Path, nargs="+")
    printed.set_defaults(act=table)
    args = parser.parse_args()
    args.act(args)


if __name__ == "__main__":
    main()
