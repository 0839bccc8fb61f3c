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
from typing import Any

DATA = Path(__file__).parents[1] / "examples" / "data" / "documents"
ARMS = {
    "query 1.0": ("query", 1.0, False),
    "hot query 1.0": ("query", 1.0, True),
    "query 0.15": ("query", 0.15, False),
    "hkvd 0.15": ("hkvd", 0.15, False),
    "none": ("none", 0.0, False),
}
OFF = {"lmcache_rag.blend": "off", "lmcache.max_offload_tokens": 64}


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

    def answer(
        self, prompt: Sequence[int], tokens: int, params: dict[str, Any]
    ) -> tuple[list[int], dict[str, Any], Any]:
        """Greedy tokens, what was reused, and the likeliest two tokens at each place."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=2, extra_args={"kv_transfer_params": params}
        )
        request = {"prompt_token_ids": list(prompt), "cache_salt": self._salt}
        found = self._llm.generate([request], sampling, use_tqdm=False)[0]
        return (
            list(found.outputs[0].token_ids),
            (found.kv_transfer_params or {})["lmcache_rag"],
            found.outputs[0].logprobs,
        )


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
    rng = random.Random(0)
    text = " ".join(path.read_text() for path in sorted(DATA.rglob("*")) if path.suffix in (".txt", ".md"))
    ids = engine.tokenizer.encode(text)
    prefix, gap = ids[:64], engine.tokenizer.encode("\n\n")
    chunks = [ids[start : start + rng.randrange(200, 300)] for start in range(70, 70 + 300 * 30, 300)]
    question = engine.tokenizer.encode("\n\nQuestion: what do these passages say? Answer:")
    for chunk in chunks:
        engine.answer(prefix + chunk, 1, {"lmcache_rag.blend": "off"})
    time.sleep(1.5)  # LMCache stores behind the answer
    rows: dict[str, dict[str, Any]] = {arm: {"blended": 0, "equal": 0, "first equal": 0, "gaps": []} for arm in ARMS}
    for _ in range(prompts):
        prompt, spans = list(prefix), []
        for number in rng.sample(range(len(chunks)), rng.randrange(4, 9)):
            spans.append([len(prompt), len(prompt) + len(chunks[number])])
            prompt += chunks[number] + gap
        prompt += question
        got = {}
        for arm, (policy, ratio, hot) in ARMS.items():
            params: dict[str, Any] = {"lmcache_rag.policy": policy, "lmcache_rag.ratio": ratio}
            got[arm] = engine.answer(prompt, tokens, params | ({"lmcache_rag.chunks": spans} if hot else {}))
        full, _, likely = engine.answer(prompt, tokens, OFF)
        for arm, (answer, told, _) in got.items():
            row = rows[arm]
            place = next((i for i, (mine, theirs) in enumerate(zip(answer, full, strict=True)) if mine != theirs), None)
            row["blended"] += told["reused_tokens"] + told["recomputed_tokens"] > 0
            row["equal"] += place is None
            row["first equal"] += place != 0
            if place is not None:  # how much likelier its own token was there than the next: near 0, rounding decides
                first, second = sorted((each.logprob for each in likely[place].values()), reverse=True)[:2]
                row["gaps"] = sorted([*row["gaps"], round(first - second, 2)])
    return rows


if __name__ == "__main__":
    main()
