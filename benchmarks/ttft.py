"""Time to the first token on this machine: full prefill against blended KV, side by side in one run.

python benchmarks/ttft.py                  # six chunks of 512 tokens, SmolLM2 in float32 on the CPU
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lmcache_rag.engines.base import BlendOptions, QueryPrompt, Sampling
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.prompt import PromptBuilder
from lmcache_rag.weights import find_model

DATA = Path(__file__).parents[1] / "examples" / "data" / "documents"
ARMS = (("all", 1.0), ("query", 0.15), ("query", 0.05), ("hkvd", 0.15), ("head", 0.15), ("none", 0.0))
STEPS = ("look-up", "load", "key shift", "selection", "selected layers", "suffix")


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    source = find_model(args.model)
    with tempfile.TemporaryDirectory() as folder:
        engine = EmbeddedEngine(source.path, kv_dir=folder)
        engine.load()
        prompt = make_prompt(engine, args.chunks, args.tokens)
        plain = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=getattr(torch, engine.info.dtype), local_files_only=True, use_safetensors=True
        ).to(engine.device)
        plain.eval()
        arms = {"full prefill": BlendOptions(enabled=False)}
        arms |= {f"{policy} {ratio:.2f}": BlendOptions(policy, ratio, always=True) for policy, ratio in ARMS}
        times: dict[str, list[float]] = {"transformers": [], **{name: [] for name in arms}}
        spent: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
        for repeat in range(-1, args.repeats):
            if repeat == 0:  # the first round warms up caches and memory and is not counted
                times, spent = {name: [] for name in times}, {name: [] for name in spent}
            times["transformers"].append(plain_ms(plain, prompt.token_ids))
            for name, blend in arms.items():
                times[name].append(engine.generate(prompt, Sampling(max_tokens=1), blend).stats.ttft_ms)
                if blend.enabled:
                    spent[name].append(engine.prefill(prompt, blend).spent)
        machine = (
            torch.cuda.get_device_name()
            if engine.device.startswith("cuda")
            else f"{platform.machine()}, {torch.get_num_threads()} threads"
        )
        head = f"{source.name}, {engine.info.dtype}, {machine}, torch {torch.__version__}: {len(prompt)} tokens"
        print(f"{head}, {args.repeats} repeats after one to warm up\n")
    report(times, spent)


def make_prompt(engine: EmbeddedEngine, chunks: int, tokens: int) -> QueryPrompt:
    """A question over random pieces of the sample documents, their KV computed."""
    builder = PromptBuilder(engine.tokenizer, engine.info)
    text = " ".join(path.read_text() for path in sorted(DATA.glob("**/*.txt")) + sorted(DATA.glob("**/*.md")))
    ids, rng = builder.encode(text), random.Random(0)
    starts = [rng.randrange(len(ids) - tokens) for _ in range(chunks)]
    texts = [engine.tokenizer.decode(ids[start : start + tokens]) for start in starts]
    list(engine.precompute(map(builder.ingest, texts)))
    rng.shuffle(texts)
    return builder.query(texts, "What do the passages have in common, and in what do they differ?")


def plain_ms(model: Any, token_ids: tuple[int, ...]) -> float:
    """A prefill by transformers alone, in milliseconds."""
    ids = torch.tensor(token_ids, device=model.device)[None]
    begin = time.perf_counter()
    with torch.inference_mode():
        model(ids, logits_to_keep=1, use_cache=True).logits[0, -1].argmax().item()
    return (time.perf_counter() - begin) * 1e3


def report(times: dict[str, list[float]], spent: dict[str, list[dict[str, float]]]) -> None:
    """The times, and where they go (medians; the steps were timed in separate runs)."""
    best, middle = min(times["full prefill"]), statistics.median(times["full prefill"])
    print("| arm | TTFT ms, minimum | median | speedup (minima) | speedup (medians) |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in times.items():
        low, median = min(values), statistics.median(values)
        print(f"| {name} | {low:.0f} | {median:.0f} | {best / low:.2f} | {middle / median:.2f} |")
    print("\nWhere the time goes, median ms:\n")
    print(f"| arm | {' | '.join(STEPS)} |")
    print(f"| --- |{' --- |' * len(STEPS)}")
    for name, runs in spent.items():
        if runs:
            cells = (f"{statistics.median(run.get(step, 0.0) for run in runs):.0f}" for step in STEPS)
            print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
