"""Answers and times of LMCache's own client, `lmcache bench engine --workload rag-qa-quality`, blending on and off.

    lmcache-rag serve MODEL --index all --port 8000 &
    python benchmarks/rag_qa_quality.py http://localhost:8000 --samples 81 --json rag-qa-quality.json

The client runs unchanged, once for each arm: it prefills each passage alone, then asks the questions one at a time and
scores the answer in its tags by F1. It knows nothing of blending, and cannot turn it off. So both arms' requests pass
through a proxy in this process, which adds a cache salt of the arm's own (no arm finds the KV of another), in the arm
`off` also that nothing is to be blended, and with `--ratio` how much to recompute. It reads from each answer whether
cached chunks were used. `--baseline` adds an arm on a stock server, by the same way.

Questions are generated, in passages of --passages x --tokens, so that nothing is downloaded; --dataset names a file in
one of the client's forms instead. The client needs the model's tokenizer, in a local folder or by its name.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from lmcache_rag import protocol
from lmcache_rag.bench.quality.scores import Interval
from lmcache_rag.bench.quality.tasks import ALL_TASKS, TASKS, Cell, make_samples
from lmcache_rag.budget import parse_budget_text
from lmcache_rag.credentials import api_key
from lmcache_rag.engines.vllm import VLLMEngine
from lmcache_rag.engines.vllm_client import VLLMClient
from lmcache_rag.prompt import SafeTokenizer

CLIENT = f"{shlex.quote(sys.executable)} -m lmcache.cli.main"
_DROPPED = ("host", "content-length", "connection", "accept-encoding", "transfer-encoding")


@dataclass
class Seen:
    """The questions that passed through a proxy: the statistics of each answer."""

    statistics: list[dict[str, Any]] = field(default_factory=list)


class Proxy(ThreadingHTTPServer):
    """Forwards to a server, and adds fields to the body of each completion.

    Args:
        target: The server.
        extra: The fields; kv_transfer_params are merged.
    """

    daemon_threads = True

    def __init__(self, target: str, extra: Mapping[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.client = httpx.Client(base_url=target, timeout=None)  # noqa: S113 - the client's own limit holds
        self.extra, self.seen = extra, Seen()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: Any) -> None:
        """Not in the way of the client's output."""

    def handle(self) -> None:
        """The client ends without closing its connections."""
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        self._forward(b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        asks = False
        if self.path.endswith("/completions"):
            document = json.loads(body)
            # The client prefills a passage with one token of an answer.
            asks = (document.get("max_completion_tokens") or document.get("max_tokens") or 2) > 1
            params = {**(document.get("kv_transfer_params") or {}), **self.server.extra.get("kv_transfer_params", {})}
            document |= self.server.extra
            if params:
                document["kv_transfer_params"] = params
            body = json.dumps(document).encode()
        self._forward(body, asks=asks)

    def _forward(self, body: bytes, *, asks: bool = False) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _DROPPED}
        with self.server.client.stream(self.command, self.path, content=body, headers=headers) as answer:
            self.send_response(answer.status_code)
            self.send_header("content-type", answer.headers.get("content-type", "application/json"))
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            received = b""
            for piece in answer.iter_raw():
                if piece:
                    self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                    received += piece
            self.wfile.write(b"0\r\n\r\n")
        if asks and answer.status_code == httpx.codes.OK:
            self.server.seen.statistics.append(_statistics(received))


def _statistics(received: bytes) -> dict[str, Any]:
    """The reuse statistics in a streamed answer; empty without any."""
    found: dict[str, Any] = {}
    for line in received.splitlines():
        if line.startswith(b"data: {"):
            found = protocol.answer_statistics(json.loads(line[6:])) or found
    return found


@contextmanager
def proxied(target: str, extra: Mapping[str, Any]) -> Iterator[Proxy]:
    """A running proxy."""
    proxy = Proxy(target, extra)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        proxy.client.close()


@dataclass(frozen=True)
class Arm:
    """One way to ask: a server, and the fields that its requests get."""

    name: str
    url: str
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What one run of the client gave.

    Attributes:
        arm: The arm's name.
        samples: The client's own results, a dictionary for each question.
        statistics: The server's statistics of each question's answer, in the same order.
        hit_tokens: Tokens taken from cached chunks during the run, by /metrics; None if unknown.
    """

    arm: str
    samples: list[dict[str, Any]]
    statistics: list[dict[str, Any]]
    hit_tokens: int | None

    def row(self, off: Result) -> dict[str, Any]:
        """The figures, paired with the arm `off` by the questions' ids. An answer outside its tags counts as F1 0."""
        before = {each["sample_id"]: each for each in off.samples}
        pairs = [(each, before[each["sample_id"]]) for each in self.samples]
        scored = [each["f1"] for each in self.samples if each["parsed"]]
        both = [a["f1"] - b["f1"] for a, b in pairs if a["parsed"] and b["parsed"]]
        counted = [each for each in self.statistics if protocol.COUNTS[0] in each]
        cached = [each["reused_tokens"] + each["recomputed_tokens"] for each in counted]
        difference = Interval.of([_f1(a) - _f1(b) for a, b in pairs])
        return {
            "arm": self.arm,
            "samples": len(self.samples),
            "in_tags": len(scored) / len(self.samples),
            "f1_in_tags": statistics.fmean(scored) if scored else None,
            "f1": statistics.fmean(map(_f1, self.samples)),
            "minus_off": None if self is off or difference is None else [*vars(difference).values()],
            "minus_off_in_tags": None if self is off or not both else [*vars(Interval.of(both)).values()],
            "ttft_ms": statistics.median(1e3 * each["ttft"] for each in self.samples),
            "of_off": statistics.median(a["ttft"] / b["ttft"] for a, b in pairs if b["ttft"]),
            "blended": statistics.fmean(tokens > 0 for tokens in cached) if cached else None,
            "prefix": statistics.fmean(each["prefix_tokens"] for each in counted) if counted else None,
            "recomputed": statistics.fmean(each["recomputed_tokens"] for each in counted) if counted else None,
            "prompt_tokens": statistics.fmean(sum(each[n] for n in protocol.COUNTS) for each in counted)
            if counted
            else None,
            "decisions": Counter(each[protocol.DECISION] for each in self.statistics if each.get(protocol.DECISION)),
            "failures": Counter(each[protocol.FAILURE] for each in self.statistics if each.get(protocol.FAILURE)),
            "hit_tokens": self.hit_tokens,
        }


def _f1(sample: Mapping[str, Any]) -> float:
    return float(sample["f1"] or 0.0)


def write_dataset(path: Path, model: VLLMEngine, args: argparse.Namespace) -> None:
    """Generated questions in a form that the client reads."""
    encode = SafeTokenizer.of(model.tokenizer).text
    # The style leaves out our words about short answers: the client has its own.
    cell = Cell(args.passages, args.tokens, "tags")
    tasks = [name for name in args.tasks.split(",") if name]
    lines = [
        {
            "id": s.sample_id,
            "question": s.question,
            "answers": list(s.answers),
            "ctxs": [{"text": t} for t in s.passages],
        }
        for s in make_samples(cell, args.samples, encode, tasks=tasks, seed=args.seed)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def ask(arm: Arm, dataset: Path, folder: Path, args: argparse.Namespace, *, model: str, align: int) -> Result:
    """Run the client in an arm.

    Raises:
        SystemExit: The client failed.
    """
    out = folder / f"{arm.name}.json"
    with VLLMClient(arm.url, attempts=1) as server, proxied(arm.url, arm.extra) as proxy:
        proxy.extra = {**arm.extra, "model": server.first_model().name}  # the client's is where the tokenizer is
        before = protocol.hit_tokens(server.metrics())
        options = {
            "engine-url": proxy.url,
            "model": model,
            "workload": "rag-qa-quality",
            "tokens-per-gb-kvcache": 100_000,  # required, and not used by this workload
            "rag-dataset": dataset,
            "rag-num-samples": args.samples,
            "rag-max-output-length": args.max_tokens,
            "rag-doc-align-tokens": align,
            "rag-output": out,
            "output-dir": folder,
            "seed": args.seed,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [*shlex.split(args.lmcache), "bench", "engine", *words, "--no-interactive", "--no-csv", "--quiet"]
        print(f"{arm.name}: {shlex.join(command)}", flush=True)
        environment = {**os.environ, "LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1"}
        if key := api_key():
            environment["OPENAI_API_KEY"] = key
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode or not out.is_file():
            raise SystemExit(
                f"{arm.name}: the client failed ({done.returncode}):\n{done.stdout}\n{done.stderr[-4000:]}"
            )
        after = protocol.hit_tokens(server.metrics())
    samples = json.loads(out.read_text())["per_sample"]
    tokens = after - before if before is not None and after is not None else None
    return Result(arm.name, samples, proxy.seen.statistics, tokens)


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| arm | samples | in tags | F1 | F1 in tags | minus off | minus off, both in tags | TTFT ms | of off "
        "| blended | exact prefix | recomputed | of prompt |",
        f"| --- |{' ---: |' * 12}",
    ]
    for row in rows:
        counts = [row[name] for name in ("prefix", "recomputed", "prompt_tokens")]
        tokens = " | ".join("" if count is None else f"{count:.0f}" for count in counts)
        lines.append(
            f"| {row['arm']} | {row['samples']} | {row['in_tags']:.0%} | {row['f1']:.3f} | "
            f"{_number(row['f1_in_tags'])} | {_interval(row['minus_off'])} | {_interval(row['minus_off_in_tags'])} | "
            f"{row['ttft_ms']:.1f} | {row['of_off']:.2f} | "
            f"{'' if row['blended'] is None else format(row['blended'], '.0%')} | {tokens} |"
        )
    for row in rows:
        for kind in ("decisions", "failures"):
            if row[kind]:
                lines.append(f"\n{row['arm']}: {', '.join(f'{name} {count}' for name, count in row[kind].items())}")
        if row["blended"] is None and row["hit_tokens"] is not None:
            lines.append(f"\n{row['arm']}: {row['hit_tokens']:,} tokens from cached chunks in all, by /metrics")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(value: Sequence[float] | None) -> str:
    return "" if value is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*value)


def arms(args: argparse.Namespace) -> list[Arm]:
    """The arm `off` first: the others are compared with it."""
    run = f"{time.time_ns():x}"
    ratio = {} if not args.ratio else {protocol.RATIO: parse_budget_text(args.ratio).wire, **protocol.ALWAYS_BLEND}
    found = [
        Arm("off", args.engine, {"cache_salt": f"{run}-off", "kv_transfer_params": dict(protocol.NO_BLEND)}),
        Arm("on", args.engine, {"cache_salt": f"{run}-on", **({"kv_transfer_params": ratio} if ratio else {})}),
    ]
    if args.baseline:
        found.append(Arm("stock", args.baseline, {"cache_salt": f"{run}-stock"}))
    return found


def main() -> int:
    """Ask in every arm, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", help="URL of a server that `lmcache-rag serve --index all` started")
    parser.add_argument("--baseline", default="", metavar="URL", help="a stock server, as one more arm")
    parser.add_argument("--ratio", default="", help="share or tokens=N to recompute, always; default: the server's own")
    parser.add_argument("--samples", type=int, default=81, metavar="N", help="questions")
    parser.add_argument("--passages", type=int, default=8, metavar="N", help="passages of a generated question")
    parser.add_argument(
        "--tokens", type=int, default=120, metavar="N", help="tokens of each, before the client's padding"
    )
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"of generated questions: {', '.join(ALL_TASKS)}")
    parser.add_argument(
        "--dataset", type=Path, help="a file in one of the client's forms, instead of generated questions"
    )
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="most tokens of an answer")
    parser.add_argument(
        "--align", type=int, default=0, metavar="N", help="the client's padding; default: LMCache's chunk"
    )
    parser.add_argument("--model", default="", help="the model's folder or name, for the client's tokenizer")
    parser.add_argument("--lmcache", default=CLIENT, metavar="COMMAND", help=f"the client; default: {CLIENT}")
    parser.add_argument("--seed", type=int, default=0, help="of the questions, and the client's own")
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    args = parser.parse_args()
    engine = VLLMEngine(args.engine)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = args.dataset or folder / "questions.jsonl"
        if not args.dataset:
            write_dataset(dataset, engine, args)
        align, model = args.align or engine.info.kv_block, args.model or engine.info.model
        engine.close()
        results = [ask(arm, dataset, folder, args, model=model, align=align) for arm in arms(args)]
    rows = [result.row(results[0]) for result in results]
    print(f"\n{shown(rows)}")
    if args.json:
        facts = {"command": sys.argv, "model": model, "align": align, "rows": rows}
        args.json.write_text(json.dumps(facts | {"results": [vars(result) for result in results]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
