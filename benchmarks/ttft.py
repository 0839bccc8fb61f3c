"""Time to the first token on this machine: full prefill against blended KV, side by side in one run.

python benchmarks/ttft.py                  # six chunks of 512 tokens, SmolLM2 in float32 on the CPU
"""

from __future__ import annotations

import argparse
import platform
import random
import tempfile
import time
from pathlib import Path

import torch

from lmcache_rag.engines.base import BlendOptions, Sampling
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.prompt import PromptBuilder

DATA = Path(__file__).parents[1] / "examples" / "data" / "documents"
ARMS = (("all", 1.0), ("query", 0.15), ("query", 0.05), ("hkvd", 0.15), ("head", 0.15), ("none", 0.0))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = EmbeddedEngine(args.model, kv_dir=folder)
        engine.load()
        builder = PromptBuilder(engine.tokenizer, engine.info)
        text = " ".join(path.read_text() for path in sorted(DATA.glob("**/*.txt")) + sorted(DATA.glob("**/*.md")))
        ids, rng = builder.encode(text), random.Random(0)
        starts = [rng.randrange(len(ids) - args.tokens) for _ in range(args.chunks)]
        chunks = [engine.tokenizer.decode(ids[start : start + args.tokens]) for start in starts]
        list(engine.precompute(map(builder.ingest, chunks)))
        rng.shuffle(chunks)
        prompt = builder.query(chunks, "What do the passages have in common, and in what do they differ?")
        once = Sampling(max_tokens=1)
        arms = {"full prefill": BlendOptions(enabled=False)}
        arms |= {f"{policy} {ratio:.2f}": BlendOptions(policy, ratio) for policy, ratio in ARMS}
        times: dict[str, list[float]] = {"transformers": [], **{name: [] for name in arms}}
        stats = {}
        for _ in range(args.repeats):
            times["transformers"].append(plain_ms(engine, prompt.token_ids))
            for name, blend in arms.items():
                done = engine.generate(prompt, once, blend)
                times[name].append(done.stats.ttft_ms)
                stats[name] = done.stats
    machine = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"{engine.info.model}, {engine.info.dtype}, {machine}, torch {torch.__version__}: {len(prompt)} tokens\n")
    print("| arm | TTFT ms, minimum | median | sooner (of medians) | look-up ms | load ms | blend ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    base = sorted(times["full prefill"])[args.repeats // 2]
    for name, values in times.items():
        middle = sorted(values)[args.repeats // 2]
        part = stats.get(name)
        cells = f"{part.lookup_ms:.0f} | {part.load_ms:.0f} | {part.blend_ms:.0f}" if part else " | | "
        print(f"| {name} | {min(values):.0f} | {middle:.0f} | {base / middle:.2f} | {cells} |")


def plain_ms(engine: EmbeddedEngine, token_ids: tuple[int, ...]) -> float:
    """A prefill by transformers' own attention function and cache, in milliseconds."""
    model = engine._model.model
    ids = torch.tensor(token_ids, device=model.device)[None]
    ours = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        begin = time.perf_counter()
        with torch.inference_mode():
            model(ids, logits_to_keep=1, use_cache=True).logits[0, -1].argmax().item()
        return (time.perf_counter() - begin) * 1e3
    finally:
        model.set_attn_implementation(ours)


if __name__ == "__main__":
    main()
