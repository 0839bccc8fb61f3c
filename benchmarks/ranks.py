"""Do tensor-parallel ranks agree? Selection, failures and answers of two ranks, against the same model on one.

    python benchmarks/ranks.py MODEL_FOLDER               # a GPU for each rank
    python benchmarks/ranks.py MODEL_FOLDER --one-gpu     # both ranks on one GPU, over gloo: correct, but slow
    python benchmarks/ranks.py MODEL_FOLDER --only-faults # the third part alone; --not-alone: with several ranks only

The tokenizer is MODEL_FOLDER's, the weights are random: a Llama of 8 heads and 4 KV heads, in float32 with vLLM's
Triton backend, so that near ties decide nothing. Needs vLLM and LMCache; starts an LMCache server.

1. Ratio 1 from LMCache, and copied inside vLLM's cache, against a full prefill by the same ranks and by one rank.
2. Requests in batches, with `query` and `hkvd`: what each rank logs of its selection.
3. Loads that fail on the last rank only, then memory that only that rank lacks: all must compute everything. After
   each, without the fault again. And the memory that each rank reserved, against what its passes used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from lmcache_rag import protocol

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
OPTIONS: dict[str, Any] = {"dtype": "float32", "attention_backend": "TRITON_ATTN"}
TOKENS, BATCH = 64, 8
DATA = Path(__file__).parents[1] / "examples" / "data" / "documents"
OFF = {protocol.BLEND: "off", protocol.MAX_OFFLOAD_TOKENS: 64}
PREFIX = 64  # tokens
FAULTS = ["load", "memory"]
INGEST = {protocol.BLEND: "off", protocol.INGEST: True, protocol.PREFIX: PREFIX}


class Answer(NamedTuple):
    """Tokens, reuse statistics, and the likeliest two tokens at each place."""

    tokens: list[int]
    stats: dict[str, Any]
    likely: Any

    def gap(self, place: int) -> float:
        """How much likelier its own token was there than the next: near 0, rounding decides."""
        first, second = sorted((each.logprob for each in self.likely[place].values()), reverse=True)[:2]
        return float(first - second)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ; None: they are equal."""
    return next((i for i, (mine, theirs) in enumerate(zip(one, other, strict=True)) if mine != theirs), None)


class Material:
    """Chunks of the sample documents, and prompts of four to eight of them in random order.

    Each seed has different prompts: vLLM reuses the exact KV of one that it has computed, and blends nothing.
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
        """The next prompt, and the spans of its chunks."""
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
        """Greedy answers to prompts that are sent at once."""
        from vllm import SamplingParams

        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=True,
                logprobs=2,
                extra_args={"kv_transfer_params": {**protocol.ALWAYS_BLEND, **each}},
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


def make_model(source: Path, out: Path) -> None:
    """Random weights whose attention is far from uniform, so that mistakes show."""
    import torch
    import transformers

    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin", "*.gguf"))
    config = transformers.AutoConfig.from_pretrained(source)
    config.update(SHAPE)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                weight.mul_(4)
            elif "embed_tokens" in name or "lm_head" in name:
                weight.mul_(20)
    model.save_pretrained(out)


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def healthy(url: str) -> bool:
    """Whether it answers."""
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=2).is_success
    return False


@contextlib.contextmanager
def lmcache(ranks: int, log: Path) -> Iterator[int]:
    """An LMCache server; its port."""
    port, http = free_port(), free_port()
    command = [sys.executable, "-m", "lmcache.cli.main", "server", "--engine-type", "blend", "--chunk-size", "64"]
    command += ["--supported-transfer-mode", "lmcache_driven", "--l1-size-gb", "6", "--eviction-policy", "LRU"]
    command += ["--host", "localhost", "--port", str(port), "--http-host", "127.0.0.1", "--http-port", str(http)]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--max-gpu-workers", str(ranks)], stdout=out, stderr=out)
    try:
        for _ in range(240):
            if process.poll() is not None or healthy(f"http://127.0.0.1:{http}/healthcheck"):
                break
            time.sleep(0.5)
        if process.poll() is not None:
            raise SystemExit(f"LMCache did not start: {log}")
        yield port
    finally:
        process.kill()
        process.wait()


def ingest(engine: Engine) -> None:
    """Every chunk's KV into LMCache, exact."""
    for prompt in Material(engine.tokenizer).ingestions():
        engine.answer(prompt, 1, INGEST)
    time.sleep(1.5)  # LMCache stores KV after the answer


def answers(engine: Engine, prompts: int, folder: Path) -> dict[str, Any]:
    """Ratio 1 and a full prefill, with the answers of one rank where they are known."""
    material, alone = Material(engine.tokenizer), folder / "alone.json"
    known = json.loads(alone.read_text()) if alone.exists() else []
    arms: dict[str, dict[str, Any]] = {
        name: {"blended": 0, "equal": 0, "gaps": [], "equal to one rank": 0}
        for name in ("ratio 1", "hot ratio 1", "none", "full prefill")
    }
    full_answers = []
    for number in range(prompts):
        prompt, spans = material.prompt()
        one = {protocol.POLICY: "query", protocol.RATIO: 1.0}
        none = {protocol.POLICY: "none", protocol.RATIO: 0.0}
        asked = {"ratio 1": one, "hot ratio 1": one | {protocol.CHUNKS: spans}, "none": none, "full prefill": OFF}
        got = {name: engine.answer(prompt, TOKENS, params) for name, params in asked.items()}
        full = got["full prefill"]
        full_answers.append(full.tokens)
        for name, answer in got.items():
            place = first_difference(answer.tokens, full.tokens)
            row = arms[name]
            row["blended"] += answer.stats["reused_tokens"] + answer.stats["recomputed_tokens"] > 0
            row["equal"] += place is None
            row["gaps"] += [] if place is None else [round(full.gap(place), 5)]
            row["equal to one rank"] += bool(known) and first_difference(answer.tokens, known[number]) is None
    if not known:
        alone.write_text(json.dumps(full_answers))
    return arms


def logged(folder: Path, rank: int) -> dict[str, str]:
    """What a rank logged of each request."""
    found = {}
    for line in (folder / f"rank{rank}.log").read_text().splitlines():
        if line.startswith("request ") and f" on rank {rank}: " in line:
            request, _, words = line.removeprefix("request ").partition(f" on rank {rank}: ")
            found[request] = words
    return found


def agreement(engine: Engine, requests: int, folder: Path, ranks: int) -> dict[str, Any]:
    """Batches with two policies, chunks named and not: do all ranks log the same?"""
    before = [set(logged(folder, rank)) for rank in range(ranks)]
    material = Material(engine.tokenizer, seed=1)
    kinds = [
        {protocol.POLICY: policy, protocol.RATIO: ratio, "named": named}
        for policy, ratio in (("query", 0.15), ("hkvd", 0.15), ("query", 0.4))
        for named in (False, True)
    ]
    failures: dict[str, int] = {}
    blended = 0
    for start in range(0, requests, BATCH):
        prompts, params = [], []
        for number in range(start, min(start + BATCH, requests)):
            prompt, spans = material.prompt()
            kind = dict(kinds[number % len(kinds)])
            prompts.append(prompt)
            params.append(kind | ({protocol.CHUNKS: spans} if kind.pop("named") else {}))
        for answer in engine.answers(prompts, 4, params):
            blended += answer.stats["reused_tokens"] > 0
            why = answer.stats.get("failure")
            if why:
                failures[why] = failures.get(why, 0) + 1
    reports = [{r: w for r, w in logged(folder, rank).items() if r not in before[rank]} for rank in range(ranks)]
    same = sum(
        all(reports[rank].get(request) == words for rank in range(ranks)) for request, words in reports[0].items()
    )
    return {
        "requests": requests,
        "blended": blended,
        "failures": failures,
        "told by ranks": [len(one) for one in reports],
        "same on all": same,
        "different digests": len(set(reports[0].values())),
    }


def memory(folder: Path, rank: int) -> dict[str, Any]:
    """Memory that this rank reserved for its passes, and that they used."""
    log = (folder / f"rank{rank}.log").read_text().splitlines()
    words = [line.split() for line in log if line.startswith("memory on rank")]
    pairs = [(int(word[4]), int(word[6])) for word in words]
    shares = sorted(taken / asked for asked, taken in pairs if asked)
    most = {"most taken of what was asked for": round(shares[-1], 3)} if shares else {}
    return {"pieces": len(shares), "asked, at most": max((asked for asked, _ in pairs), default=0), **most}


def faults(engine: Engine, prompts: int, folder: Path, fault: str, seed: int) -> dict[str, Any]:
    """Faults on the last rank only; see one_gpu.py."""
    material = Material(engine.tokenizer, seed=seed)
    row: dict[str, Any] = {"computed in full": 0, "equal": 0, "gaps": [], "reasons": set(), "blended after": 0}
    asked, others = ([material.prompt()[0] for _ in range(prompts)] for _ in range(2))
    ratio = 1.0 if fault == "full" else 0.15  # one rank is to run out of memory in a pass
    params = {protocol.POLICY: "query", protocol.RATIO: ratio}
    (folder / fault).touch()
    failed = [engine.answer(prompt, TOKENS, params) for prompt in asked]
    (folder / fault).unlink()
    after = [engine.answer(prompt, 1, params) for prompt in others]
    for prompt, answer, later in zip(asked, failed, after, strict=True):
        full = engine.answer(prompt, TOKENS, OFF)
        row["computed in full"] += answer.stats["reused_tokens"] + answer.stats["recomputed_tokens"] == 0
        place = first_difference(answer.tokens, full.tokens)
        row["equal"] += place is None
        row["gaps"] += [] if place is None else [round(full.gap(place), 5)]
        row["reasons"] |= {answer.stats.get("failure")}
        row["blended after"] += later.stats["reused_tokens"] + later.stats["recomputed_tokens"] > 0
    return {**row, "prompts": prompts, "reasons": sorted(map(str, row["reasons"]))}


def part(arguments: argparse.Namespace, folder: Path) -> None:
    """One engine's share, in a separate process."""
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    os.environ["LMCACHE_RAG_BENCHMARK_FOLDER"] = str(folder)
    found: dict[str, Any] = {}
    options = OPTIONS | {"enforce_eager": arguments.one_gpu}  # gloo cannot be recorded in a CUDA graph
    options["worker_cls"] = "one_gpu.OneGPUWorker" if arguments.one_gpu else "one_gpu.RankWorker"
    if arguments.part > 1:
        options |= {"tensor_parallel_size": arguments.part, "distributed_executor_backend": "mp"}
        if arguments.one_gpu:
            options["disable_custom_all_reduce"] = True
            os.environ |= {"VLLM_DISABLE_PYNCCL": "1", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
    engine = Engine(str(folder / "model"), arguments.port, f"ranks {arguments.part}", options)
    ingest(engine)
    measures: dict[str, Callable[[], Any]] = {}
    if not arguments.only_faults:
        measures["answers"] = lambda: answers(engine, arguments.prompts, folder)
    if arguments.part > 1:
        if not arguments.only_faults:
            measures["agreement"] = lambda: agreement(engine, arguments.requests, folder, arguments.part)
        if "load" in arguments.faults:
            measures["fault on the last rank"] = lambda: faults(engine, arguments.prompts, folder, "fault", 2)
    if "memory" in arguments.faults and not arguments.one_gpu:  # there the other rank has the same memory
        measures["no memory on the last rank"] = lambda: faults(engine, arguments.prompts, folder, "full", 3)
    if arguments.part > 1:
        measures["memory"] = lambda: [memory(folder, rank) for rank in range(arguments.part)]
    for name, measure in measures.items():
        found[name] = measure()
        (folder / f"part{arguments.part}.json").write_text(json.dumps(found))  # of what is cut off too


def main() -> None:
    """Run one rank, then several."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--one-gpu", action="store_true", help="all ranks on the first GPU")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--only-faults", action="store_true", help="the third part alone")
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=FAULTS, help="the third part's faults")
    parser.add_argument("--not-alone", action="store_true", help="without the run of one rank")
    parser.add_argument("--folder", type=Path, help="keep logs here")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part(arguments, arguments.folder)
        return
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="ranks-"))
    folder.mkdir(parents=True, exist_ok=True)
    make_model(arguments.model, folder / "model")
    found: dict[str, Any] = {"ranks": arguments.ranks, "one GPU": arguments.one_gpu, "shape": SHAPE}
    with lmcache(arguments.ranks, folder / "lmcache.log") as port:
        for ranks in (arguments.ranks,) if arguments.not_alone else (1, arguments.ranks):
            begin = time.monotonic()
            own = ["--part", str(ranks), "--port", str(port), "--folder", str(folder)]
            with (folder / f"part{ranks}.log").open("wb") as log:
                status = subprocess.run(
                    [sys.executable, *sys.argv, *own], stdout=log, stderr=log, check=False
                ).returncode
            if status:
                raise SystemExit(f"the part with {ranks} ranks ended with {status}: {log.name}")
            found[f"{ranks} ranks"] = json.loads((folder / f"part{ranks}.json").read_text())
            print(f"{ranks} ranks, {time.monotonic() - begin:.0f} s")
            for name, row in found[f"{ranks} ranks"].items():
                print(f"  {name}: {json.dumps(row)}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
