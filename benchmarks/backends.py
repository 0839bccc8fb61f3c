"""Does a blend that computes everything again answer as a full prefill does, with any attention backend and weights?

    lmcache server --engine-type blend --supported-transfer-mode lmcache_driven --chunk-size 64 --l1-size-gb 6 \
        --eviction-policy LRU --host localhost --port 5570 --http-port 8095 &
    python benchmarks/backends.py MODEL_FOLDER --name triton --attention-backend TRITON_ATTN
    python benchmarks/backends.py MODEL_FOLDER --name fp8 --quantization fp8
    python benchmarks/backends.py MODEL_FOLDER --name float16 --dtype float16

Needs a GPU with vLLM and LMCache. Chunks of the sample documents, four to eight in random order, greedy answers beside
those of the same engine without reuse, which are asked for last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmcache_rag import protocol

DATA = Path(__file__).parents[1] / "examples" / "data" / "documents"
ARMS = {
    "query 1.0": ("query", 1.0, False),
    "hot query 1.0": ("query", 1.0, True),
    "query 0.15": ("query", 0.15, False),
    "hkvd 0.15": ("hkvd", 0.15, False),
    "none": ("none", 0.0, False),
}
OFF = {protocol.BLEND: "off", protocol.MAX_OFFLOAD_TOKENS: 64}
PREFIX = 64  # tokens
INGEST = {protocol.BLEND: "off", protocol.INGEST: True, protocol.PREFIX: PREFIX}


class Answer(NamedTuple):
    """Tokens, what was reused, and the likeliest two tokens at each place."""

    tokens: list[int]
    told: dict[str, Any]
    likely: Any

    def gap(self, place: int) -> float:
        """How much likelier its own token was there than the next: near 0, rounding decides."""
        first, second = sorted((each.logprob for each in self.likely[place].values()), reverse=True)[:2]
        return float(first - second)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two answers part."""
    return next((i for i, (mine, theirs) in enumerate(zip(one, other, strict=True)) if mine != theirs), None)


class Material:
    """Chunks of the sample documents, and prompts of four to eight of them in random order.

    Each seed has prompts of its own: vLLM goes on from the exact KV of one that it has seen, and blends nothing.
    """

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        lengths, self._rng = random.Random(0), random.Random(seed)
        text = " ".join(path.read_text() for path in sorted(DATA.rglob("*")) if path.suffix in (".txt", ".md"))
        ids = tokenizer.encode(text)
        self._prefix, self._gap = ids[:PREFIX], tokenizer.encode("\n\n")
        self._question = tokenizer.encode("\n\nQuestion: what do these passages say? Answer:")
        self._chunks = [ids[start : start + lengths.randrange(200, 300)] for start in range(70, 70 + 300 * 30, 300)]

    def ingestions(self) -> list[list[int]]:
        """A prompt for each chunk."""
        return [self._prefix + chunk for chunk in self._chunks]

    def prompt(self) -> tuple[list[int], list[list[int]]]:
        """The next prompt, and where its chunks stand."""
        prompt, spans = list(self._prefix), []
        for number in self._rng.sample(range(len(self._chunks)), self._rng.randrange(4, 9)):
            spans.append([len(prompt), len(prompt) + len(self._chunks[number])])
            prompt += self._chunks[number] + self._gap
        return prompt + self._question, spans


class Engine:
    """vLLM in this process, with the connector."""

    def __init__(self, model: str, port: int, salt: str, options: dict[str, Any]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.config import KVTransferConfig

        self._salt = salt
        self._llm = LLM(
            model=model,
            max_model_len=8192,
            max_num_batched_tokens=8192,
            gpu_memory_utilization=0.05,
            kv_cache_memory_bytes=2_000_000_000,
            kv_transfer_config=KVTransferConfig(
                kv_connector="CacheBlendConnector",
                kv_connector_module_path="lmcache_rag.connector.connector",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config={"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": port},
            ),
            **options,
        )
        self.tokenizer = self._llm.get_tokenizer()

    def answer(self, prompt: Sequence[int], tokens: int, params: dict[str, Any]) -> Answer:
        """One answer."""
        return self.answers([prompt], tokens, [params])[0]

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int, params: Sequence[dict[str, Any]]) -> list[Answer]:
        """Greedy answers to prompts that are asked at once."""
        from vllm import SamplingParams

        sampling = [
            SamplingParams(
                temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=2, extra_args={"kv_transfer_params": each}
            )
            for each in params
        ]
        requests = [{"prompt_token_ids": list(prompt), "cache_salt": self._salt} for prompt in prompts]
        return [
            Answer(
                list(one.outputs[0].token_ids), (one.kv_transfer_params or {})["lmcache_rag"], one.outputs[0].logprobs
            )
            for one in self._llm.generate(requests, sampling, use_tqdm=False)
        ]


def main() -> None:
    """Measure, and print a line for each arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", default="default", help="also the cache salt: variants share no KV")
    parser.add_argument("--lmcache-port", type=int, default=5570)
    parser.add_argument("--attention-backend")
    parser.add_argument("--quantization")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    options = {"attention_backend": given.attention_backend, "quantization": given.quantization, "dtype": given.dtype}
    engine = Engine(given.model, given.lmcache_port, given.name, {k: v for k, v in options.items() if v})
    rows = measure(engine, given.prompts, given.tokens)
    for arm, row in rows.items():
        print(f"{given.name:12s} {arm:14s} {row}")
    if given.out:
        told = {"name": given.name, **options, "prompts": given.prompts, "arms": rows}
        given.out.write_text(json.dumps(told, indent=1))


def measure(engine: Engine, prompts: int, tokens: int) -> dict[str, dict[str, Any]]:
    """Every arm over all prompts."""
    material = Material(engine.tokenizer)
    for prompt in material.ingestions():
        engine.answer(prompt, 1, INGEST)
    time.sleep(1.5)  # LMCache stores behind the answer
    rows: dict[str, dict[str, Any]] = {arm: {"blended": 0, "equal": 0, "first equal": 0, "gaps": []} for arm in ARMS}
    for _ in range(prompts):
        prompt, spans = material.prompt()
        got = {}
        for arm, (policy, ratio, hot) in ARMS.items():
            params: dict[str, Any] = {protocol.POLICY: policy, protocol.RATIO: ratio}
            got[arm] = engine.answer(prompt, tokens, params | ({protocol.CHUNKS: spans} if hot else {}))
        full = engine.answer(prompt, tokens, OFF)
        for arm, answer in got.items():
            row = rows[arm]
            place = first_difference(answer.tokens, full.tokens)
            row["blended"] += answer.told["reused_tokens"] + answer.told["recomputed_tokens"] > 0
            row["equal"] += place is None
            row["first equal"] += place != 0
            if place is not None:
                row["gaps"] = sorted([*row["gaps"], round(full.gap(place), 4)])
    return rows


if __name__ == "__main__":
    main()
