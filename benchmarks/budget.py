"""What an answer needs: how often it is right against how many tokens are recomputed, and what the scores knew of it.

    python benchmarks/budget.py MODEL_FOLDER --device cuda --dtype bfloat16 --items 40 --out run.jsonl
    python benchmarks/budget.py --table run*.jsonl        # hits by cell and number of recomputed tokens
    python benchmarks/budget.py --rules run*.jsonl        # what rules for the number would have given: an ablation

Each item is a prompt of a cell (chunks x tokens, sometimes with a style of question) and a question of a task whose
answer is a number in the passages. The answer's beginning is given to the model ("The archive number of A
is"), the number itself is scored: it is hit if each of its tokens is the likeliest one. Tasks, in turn: fact (every
passage states a number of its own), needles (the numbers of two passages), hops (A's number is B's, B's is N) and
alias (A is also called K; the number of K is N).

Each item is one line of JSON: hit and mean log-probability of the number for the full prefill, full reuse, and `query`
at growing numbers of recomputed tokens, and the share of the question's attention that each number covers.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmcache_rag import policies
from lmcache_rag.engines.base import BlendOptions
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.policies import Layout, Passes, QueryPolicy
from lmcache_rag.prompt import PromptBuilder

CELLS = {
    "8x160": (8, 160, ""),
    "6x512": (6, 512, ""),
    "20x64": (20, 64, ""),
    "3x512": (3, 512, ""),
    "20x160": (20, 160, ""),
    "12x512": (12, 512, ""),
    "6x1024": (6, 1024, ""),
    "8x160 instruction after": (8, 160, "after"),
    "8x160 tags": (8, 160, "tags"),
    "30x1024": (30, 1024, ""),
}
TASKS = ("fact", "needles", "hops", "alias")
TOKENS = (16, 32, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048, 3072)
RANKS = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 3072)
AFTER = (
    "\n\nAnswer in one sentence and in the language of the question. Do not mention the passages, do not explain how "
    "the answer was found, do not add headings or lists, and do not repeat the question. If several passages seem to "
    "contradict each other, trust the one that is more precise. Numbers are written in digits, without separators, "
    "exactly as they stand in the passages. If the passages do not say it, say so instead of guessing."
)
TAGS = "\n\nThink silently. Give the answer alone, between <answer> and </answer>, with nothing before or after it."


@dataclass(frozen=True)
class Recording(QueryPolicy):
    """`query`, and what it saw: the attention's share that the first tokens of its ranking cover."""

    kept: dict[str, Any] = field(default_factory=dict, hash=False)

    def scores(self, layout: Layout, passes: Passes) -> torch.Tensor:
        """As QueryPolicy."""
        mass = passes.suffix_attention(window=self.window, from_layer=self.from_layer, reduce=self.reduce)
        pooled = policies.pool_inside_chunks(mass, layout, self.pool)
        if not self.kept:
            order = pooled.argsort(descending=True, stable=True)
            shares = (mass[order].double().cumsum(0) / mass.double().sum()).cpu().numpy()
            tokens = np.sort((mass.double() / mass.double().sum()).cpu().numpy())[::-1].cumsum()
            begins = (layout.offset == 0).cumsum(0) - 1
            chunk = torch.zeros(int(begins[-1]) + 1, dtype=torch.float64, device=mass.device)
            chunk.index_add_(0, begins.clamp(min=0), mass.double())
            self.kept.update(
                {
                    "mass": float(mass.double().sum()),
                    "covered": {rank: round(float(shares[rank - 1]), 5) for rank in RANKS if rank <= len(shares)},
                    "covered, not pooled": {
                        rank: round(float(tokens[rank - 1]), 5) for rank in RANKS if rank <= len(tokens)
                    },
                    "chunks": [round(float(share), 5) for share in chunk / chunk.sum()],
                }
            )
        return pooled


def item(rng: random.Random, texts: Sequence[tuple[str, str]], encode: Any, decode: Any, cell: str, task: str) -> Any:
    """Chunks, question, and the answer in parts: (text, whether it is scored)."""
    count, tokens, style = CELLS[cell]
    pairs = rng.sample(texts, count)
    names, numbers = [title for title, _ in pairs], [rng.randint(1000, 9999) for _ in range(count)]
    facts = [""] * count
    a, b = names[0], names[1]
    if task == "fact":
        facts = [f" The archive number of {n} is {m}." for n, m in zip(names, numbers, strict=True)]
        question, answer = f"What is the archive number of {a}?", [(a, numbers[0])]
    elif task == "needles":
        facts[0], facts[1] = (f" The archive number of {n} is {m}." for n, m in zip(names, numbers[:2], strict=False))
        question, answer = f"What are the archive numbers of {a} and of {b}?", [(a, numbers[0]), (b, numbers[1])]
    elif task == "hops":
        facts[0] = f" The archive number of {a} is the same as that of {b}."
        facts[1] = f" The archive number of {b} is {numbers[1]}."
        question, answer = f"What is the archive number of {a}?", [(a, numbers[1])]
    else:
        code = f"{rng.choice('BCDFGKLMNPRST')}{rng.choice('aeiou')}{rng.choice('lmnrst')}{rng.choice('aeiou')}x"
        facts[0], facts[1] = f" {a} is also known as {code}.", f" The archive number of {code} is {numbers[1]}."
        question, answer = f"What is the archive number of {a}?", [(a, numbers[1])]
    chunks = []
    for (_, text), fact in zip(pairs, facts, strict=True):
        room = tokens - len(encode(fact))
        while len(encode(text)) < room:
            text += " " + rng.choice(texts)[1]
        ids = encode(text)
        sentence = rng.randrange(room // 4, room)  # the fact stands anywhere but in the first quarter
        chunks.append(decode(ids[:sentence]) + fact + decode(ids[sentence:room]))
    rng.shuffle(chunks)
    opening = "<answer>" if style == "tags" else ""
    parts: list[tuple[str, bool]] = []
    for at, (name, number) in enumerate(answer):
        start = "The archive number of" if not at else ", and the archive number of"
        parts += [((opening if not at else "") + f"{start} {name} is ", False), (str(number), True)]
    return chunks, question + {"after": AFTER, "tags": TAGS}.get(style, ""), parts


def scored(engine: EmbeddedEngine, prompt: Any, options: BlendOptions, forced: list[int], marks: list[int]) -> Any:
    """(hit, mean log-probability) of the answer's scored tokens."""
    state = engine.prefill(prompt, options, room=len(forced))
    along = torch.cat([state.logits[None], state.extend(forced[:-1])]).float().log_softmax(-1)
    at = torch.tensor(marks, device=along.device)
    wanted = torch.tensor([forced[mark] for mark in marks], device=along.device)
    return bool((along[at].argmax(-1) == wanted).all()), float(along[at, wanted].mean())


def run(args: argparse.Namespace) -> None:
    """Measure until the items are done or the time is over."""
    texts = [(e["title"], e["extract"]) for e in json.loads(args.texts.read_text()).values() if len(e["extract"]) > 200]
    until = time.monotonic() + args.seconds
    query = Recording()
    policies.POLICIES["query"] = query
    with tempfile.TemporaryDirectory(dir=args.kv) as folder, args.out.open("a") as out:
        model = HFModel.open(args.model, device=args.device, dtype=args.dtype)
        engine = EmbeddedEngine.from_model(model, name=args.model.name, revision="folder", kv_dir=Path(folder))
        builder, decode = PromptBuilder(engine.tokenizer, engine.info), engine.tokenizer.decode
        for number in range(args.items):
            for cell in args.cells:
                if time.monotonic() > until:
                    return
                rng = random.Random(f"{args.seed} {number} {cell}")
                task = TASKS[(number + args.seed) % len(TASKS)]
                chunks, question, parts = item(rng, texts, builder.encode, decode, cell, task)
                keys = [(builder.fingerprint, done.key) for done in engine.precompute(map(builder.ingest, chunks))]
                prompt = builder.query(chunks, question)
                if len(prompt) + 100 > engine.info.context_length:
                    continue
                forced: list[int] = []
                marks: list[int] = []
                for text, is_scored in parts:
                    ids = builder.encode(text)
                    marks += range(len(forced), len(forced) + len(ids)) if is_scored else ()
                    forced += ids
                total = sum(span.end - span.start for span in prompt.chunks[1:])
                row: dict[str, Any] = {"cell": cell, "task": task, "number": number, "seed": args.seed}
                row |= {"model": args.model.name, "prompt": len(prompt), "cached": total, "chunks": len(chunks)}
                row["suffix"] = len(prompt) - prompt.suffix_start
                arms = {"full": BlendOptions(enabled=False), "none": BlendOptions("none", 0.0)}
                arms |= {f"query {n}": BlendOptions("query", n / total) for n in TOKENS if n < total}
                arms |= {f"hkvd {n}": BlendOptions("hkvd", n / total) for n in (128, 256) if n < total}
                query.kept.clear()
                found = {name: scored(engine, prompt, options, forced, marks) for name, options in arms.items()}
                row["scores"] = dict(query.kept)
                for name, other in {"max": Recording(reduce="max"), "long": Recording(window=512)}.items():
                    policies.POLICIES["query"] = other
                    for n in (128, 256):
                        if n < total:
                            options = BlendOptions("query", n / total)
                            found[f"{name} {n}"] = scored(engine, prompt, options, forced, marks)
                policies.POLICIES["query"] = query
                row["hit"] = {name: hit for name, (hit, _) in found.items()}
                row["nll"] = {name: round(-mean, 4) for name, (_, mean) in found.items()}
                out.write(json.dumps(row) + "\n")
                out.flush()
                engine.forget(keys)


def table(paths: Sequence[Path]) -> None:
    """Hits minus the full prefill's, by cell and number of recomputed tokens."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.endswith("}")]
    names = list(dict.fromkeys(name for row in rows for name in row["hit"]))
    names.sort(
        key=lambda name: (name.split()[0] not in ("full", "none"), name.split()[0], int((name + " 0").split()[1]))
    )
    print("cell, items, full: " + ", ".join(names))
    for cell in CELLS:
        own = [row for row in rows if row["cell"] == cell]
        if own:
            full = np.mean([row["hit"]["full"] for row in own])
            gaps = []
            for name in names:
                both = [row["hit"][name] - row["hit"]["full"] for row in own if name in row["hit"]]
                gaps.append(f"{np.mean(both):+.3f}" if both else "")
            print(
                f"{cell}, {len(own)}, {full:.3f}: "
                + " ".join(f"{n}={g}" for n, g in zip(names, gaps, strict=True) if g)
            )


def covering(row: dict[str, Any], share: float) -> float:
    """How many tokens of the ranking cover that share of the question's attention on cached tokens."""
    known = sorted((value, int(rank)) for rank, value in row["scores"]["covered"].items())
    shares, ranks = [0.0, *(value for value, _ in known), 1.0], [0, *(rank for _, rank in known), row["cached"]]
    return float(np.interp(share, shares, ranks))


def outcome(row: dict[str, Any], tokens: float) -> tuple[float, float]:
    """(lost log-probability, lost hit) against the full prefill at so many tokens, from the numbers that were measured.

    The log-probability is interpolated, the hit is that of the next lower number.
    """
    counts = [n for n in TOKENS if f"query {n}" in row["nll"]]
    names = ["none", *(f"query {n}" for n in counts), "full"]
    at = [0, *counts, row["cached"]]
    nll = float(np.interp(tokens, at, [row["nll"][name] for name in names])) - row["nll"]["full"]
    lower = max(place for place, count in enumerate(at) if count <= tokens)
    return nll, float(row["hit"]["full"]) - float(row["hit"][names[lower]])


def rules(paths: Sequence[Path]) -> None:
    """A table of rules: mean number of tokens, what is lost on average, and in the worst cell."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.endswith("}")]
    choices: dict[str, Any] = {
        f"{k} for each chunk": lambda row, k=k: k * (row["chunks"] - 1) for k in (20, 40, 50, 60, 80)
    }
    choices |= {
        f"share {share}": lambda row, share=share: share * row["cached"] for share in (0.1, 0.15, 0.2, 0.3, 0.4)
    }
    choices |= {f"{n} for each prompt": lambda row, n=n: n for n in (256, 512, 768)}
    choices |= {f"tail {1 - c:.1f}": lambda row, c=c: covering(row, c) for c in (0.5, 0.6, 0.7, 0.8)}
    for cover, low, high in ((0.6, 40, 80), (0.7, 40, 80), (0.7, 50, 80), (0.8, 50, 80), (0.8, 50, 100)):
        choices[f"tail {1 - cover:.1f}, {low} to {high} for each chunk"] = lambda row, c=cover, a=low, b=high: min(
            max(covering(row, c), a * (row["chunks"] - 1)), b * (row["chunks"] - 1)
        )
    choices |= {f"{k} times chunks squared": lambda row, k=k: k * row["chunks"] ** 2 for k in (4, 6, 8)}
    print(f"{len(rows)} items\n")
    print("| rule | tokens, mean | lost log-probability, mean | in the worst cell | lost hits |")
    print("| --- | --- | --- | --- | --- |")
    for name, rule in choices.items():
        counts = [min(rule(row), row["cached"]) for row in rows]
        lost = [outcome(row, count) for row, count in zip(rows, counts, strict=True)]
        by_cell = [
            np.mean([nll for row, (nll, _) in zip(rows, lost, strict=True) if row["cell"] == cell])
            for cell in {row["cell"] for row in rows}
        ]
        hits = np.mean([hit for _, hit in lost])
        nll = np.mean([each for each, _ in lost])
        print(f"| {name} | {np.mean(counts):.0f} | {nll:.4f} | {max(by_cell):.3f} | {hits:.3f} |")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--texts", type=Path, help="JSON of Wikipedia summaries, see quality.py")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--items", type=int, default=40, help="of each cell")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv", type=Path, help="folder for chunk KV while it runs")
    parser.add_argument("--out", type=Path, default=Path("budget.jsonl"))
    parser.add_argument("--table", type=Path, nargs="+")
    parser.add_argument("--rules", type=Path, nargs="+")
    args = parser.parse_args()
    if args.table:
        table(args.table)
    elif args.rules:
        rules(args.rules)
    elif args.model and args.texts:
        run(args)
    else:
        sys.exit("Name a model's folder and --texts, --table or --rules.")


if __name__ == "__main__":
    main()
