"""TTFT of questions alone, and during an ingestion: does the ingestion yield to them?

python benchmarks/ingest_with_questions.py http://localhost:8000 [--questions N] [--rate TOKENS] [--in-flight N]

Asks the same number of questions, one after the other, first alone and then while fresh texts are ingested in another
thread all the time; prints median and p99 of the TTFT in both, and how many tokens were ingested. The server should
have been started by `lmcache-rag serve`, which sets `--scheduling-policy priority`; with
`serve MODEL --scheduling-policy fcfs` the same command measures what that is worth. Each question has a prefix hit of
its own prefix only: its passages are new.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import threading

from lmcache_rag import VLLMEngine
from lmcache_rag.engines.base import BlendOptions, Sampling
from lmcache_rag.kv_policy import RateLimit
from lmcache_rag.prompt import PromptBuilder

WORDS = (
    "water",
    "stone",
    "river",
    "cloud",
    "metal",
    "engine",
    "planet",
    "forest",
    "circuit",
    "market",
    "theory",
    "copper",
)


def text(seed: str, words: int) -> str:
    """Words that no other seed gives."""
    draw = random.Random(seed)
    return f"{seed} " + " ".join(draw.choice(WORDS) for _ in range(words))


def ask(engine: VLLMEngine, prompts: PromptBuilder, name: str, number: int, passages: int) -> list[float]:
    """TTFT of each question, in milliseconds."""
    times = []
    for at in range(number):
        found = [text(f"{name}-{at}-{passage}", 200) for passage in range(passages)]
        prompt = prompts.query(found, f"What is said of {at}?")
        times.append(engine.generate(prompt, Sampling(max_tokens=8), BlendOptions(enabled=False)).stats.ttft_ms)
    return times


def p99(times: list[float]) -> float:
    """The 99th percentile; of fewer than 100 times the largest."""
    return statistics.quantiles(times, n=100, method="inclusive")[98] if len(times) >= 100 else max(times)


def main() -> None:
    """Measure, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--in-flight", type=int, default=8)
    parser.add_argument("--rate", type=float, default=None, help="tokens in a second; default: no limit")
    options = parser.parse_args()
    run = f"{random.SystemRandom().randrange(1 << 32):08x}"
    with_ingestion = VLLMEngine(options.url, concurrency=options.in_flight)
    engine = VLLMEngine(options.url)
    prompts = PromptBuilder(engine.tokenizer, engine.info)
    stop, tokens, limit = threading.Event(), 0, RateLimit(options.rate)

    def ingest() -> None:
        nonlocal tokens

        def chunks() -> object:
            for at in itertools.count():
                if stop.is_set():
                    return
                prompt = prompts.ingest(text(f"{run}-ingest-{at}", 400))
                limit.wait(len(prompt.chunk_ids), stop)
                yield prompt

        for result in with_ingestion.precompute(chunks(), stop=stop):  # type: ignore[arg-type]
            tokens += result.tokens

    ask(engine, prompts, f"{run}-warm", 5, options.passages)
    alone = ask(engine, prompts, f"{run}-alone", options.questions, options.passages)
    thread = threading.Thread(target=ingest, daemon=True)
    thread.start()
    during = ask(engine, prompts, f"{run}-during", options.questions, options.passages)
    stop.set()
    thread.join(60)
    names = ("alone", "during")
    found = {
        name: {"median_ms": statistics.median(each), "p99_ms": p99(each)}
        for name, each in zip(names, (alone, during), strict=True)
    }
    ratio = found["during"]["p99_ms"] / found["alone"]["p99_ms"]
    print(json.dumps(found | {"p99_ratio": ratio, "ingested_tokens": tokens, "questions": options.questions}, indent=2))


if __name__ == "__main__":
    main()
