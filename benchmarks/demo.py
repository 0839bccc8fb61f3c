"""The demo's own functions without its page: many questions to two servers, and the session's export.

    python benchmarks/demo.py --engine URL [--baseline URL] --out session.json

What the page's *Ask*, *Shuffle*, *Check* and *Repeat* call, with the sample documents: every question gets its own
passages, in random order, first with one pane after the other and then with both at the same time. The export has,
in addition to what the page's *Export* saves, the GPU of each server on this machine.

Needs `lmcache-rag[demo]` without NiceGUI, psutil, and nvidia-smi for the GPUs' ids.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from lmcache_rag.demo import samples
from lmcache_rag.demo.hub import Hub
from lmcache_rag.demo.record import ARMS, Turn
from lmcache_rag.demo.session import Session
from lmcache_rag.rag import first_difference
from lmcache_rag.settings import Settings


def all_questions(count: int) -> list[str]:
    """The sample questions, then one about each of the sample documents."""
    known = json.loads(samples.documents().parent.joinpath("questions.json").read_text(encoding="utf-8"))
    found = [entry["question"] for entry in known] + [samples.RUSSIAN]
    names = sorted(path.stem.replace("-", " ") for path in samples.documents().iterdir() if path.is_file())
    random.shuffle(names)
    return (found + [f"What do the passages say about {name}?" for name in names])[:count]


def gpus(url: str) -> dict[str, Any]:
    """The process that listens there, and the GPUs that it sees."""
    port = urlsplit(url).port
    listening = [each for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.laddr[1] == port]
    server = psutil.Process(next(each.pid for each in listening if each.pid))
    visible = server.environ().get("CUDA_VISIBLE_DEVICES", "all")
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [dict(zip(("index", "uuid", "name", "driver"), line.split(", "), strict=True)) for line in lines]
    seen = [row for row in rows if visible == "all" or row["index"] in visible.split(",")]
    return {"command": " ".join(server.cmdline()), "cuda_visible_devices": visible, "gpus": seen}


async def ask_all(session: Session, questions: list[str], *, at_once: bool) -> None:
    """Each question once, its passages in random order."""
    session.set(at_once=at_once)
    for question in questions:
        session.passages = await session.find(question, session.controls.top_k)
        session.shuffle()
        if task := session.ask(question):
            await task
        if session.problem:
            raise SystemExit(f"{session.problem.message} {session.problem.remedy}")


def row_of(turns: list[Turn], mode: str) -> dict[str, Any]:
    """Medians of the questions, and how many answers differ."""
    by = {arm: {turn.ask: turn for turn in turns if turn.arm == arm} for arm in ARMS}
    failed = [turn.problem.message for turn in turns if turn.problem]
    times = {arm: [turn.ttft_ms for turn in by[arm].values() if turn.ttft_ms is not None] for arm in ARMS}
    pairs = [(by["blended"][ask].completion, by["baseline"][ask].completion) for ask in by["blended"]]
    done = [(mine, other) for mine, other in pairs if mine and other]
    medians = {arm: statistics.median(values) for arm, values in times.items() if values}
    return {
        "mode": mode,
        "questions": len(by["blended"]),
        "failed": failed,
        "prompt_tokens": statistics.median(mine.stats.prompt_tokens for mine, _ in done),
        "blended_answers": sum(mine.stats.blended for mine, _ in done),
        "median_ttft_ms": medians,
        "ttft_ratio": medians["baseline"] / medians["blended"],
        "pair_ratios": [other.stats.ttft_ms / mine.stats.ttft_ms for mine, other in done],
        "differing_answers": sum(first_difference(mine.token_ids, other.token_ids) is not None for mine, other in done),
    }


async def run(hub: Hub, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask all questions, and write the export."""
    session = Session("benchmark", hub)
    session.set(top_k=arguments.passages, max_tokens=arguments.max_tokens)
    questions = all_questions(arguments.questions)
    rows = []
    await ask_all(session, questions[:2], at_once=False)  # warm-up: the servers compile kernels
    for mode, at_once in (("in turn", False), ("at the same time", True)):
        before = len(session.turns)
        await ask_all(session, questions, at_once=at_once)
        rows.append(row_of(session.turns[before:], mode))
        print(json.dumps(rows[-1]), flush=True)
    if task := session.check():
        await task
    if task := session.repeat(arguments.questions):
        await task
    export = session.as_dict()
    urls = {"blended": arguments.engine, "baseline": arguments.baseline or arguments.engine}
    export["servers"] = {name: {"url": url, **gpus(url)} for name, url in urls.items()}
    export["summary"] = rows
    check, repeats = export["checks"][-1:], export["repeats"][-1]
    print("ratio 1 equals the full prefill:", [each["equal"] for each in check])
    print({name: value for name, value in repeats.items() if name not in ("pairs", "passages")})
    return export


def main() -> None:
    """Open what the page opens, ask, write the export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, help="URL of the server that blends")
    parser.add_argument("--baseline", help="URL of stock vLLM; without it the first server answers both panes")
    parser.add_argument("--embedder", help="folder or name of the embedding model")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--passages", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as store:
        settings = Settings.load(store, engine=arguments.engine, embedder=arguments.embedder, device="cpu")
        hub = Hub(settings, baseline=arguments.baseline)
        hub.open()
        try:
            if hub.start.problem:
                raise SystemExit(f"{hub.start.problem.message} {hub.start.problem.remedy}")
            export = asyncio.run(run(hub, arguments))
        finally:
            hub.close()
    arguments.out.write_text(json.dumps(export, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
