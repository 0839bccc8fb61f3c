"""LoRA adapters on a GPU: blended answers under each adapter beside a full prefill's. Skipped without CUDA.

In float32, as test_serve_on_gpu.py; the adapters' weights are random, the model's are real.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from adapter_kit import write_adapter
from gpu_serve_kit import ALL, LACKING, Served, parted
from vllm_cpu_kit import until

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(LACKING, reason="no CUDA device, vLLM and LMCache")]
NAMES = ("", "one", "two")  # the model alone, and two adapters
NONE = {"lmcache_rag.policy": "none", "lmcache_rag.ratio": 0.0, "lmcache_rag.blend": "always"}


@pytest.fixture(scope="module")
def served(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with two adapters; chunks were ingested under the first of them only."""
    from transformers import AutoModelForCausalLM

    folder, model = tmp_path_factory.mktemp("lora"), AutoModelForCausalLM.from_pretrained(smollm2_path)
    paths = [f"{name}={write_adapter(folder / name, model, seed=seed)}" for seed, name in enumerate(NAMES) if name]
    lora = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8")  # in the type of the model, float32
    served = Served(smollm2_path, folder, *lora, "--lora-modules", *paths)
    try:
        served.adapter = "one"
        served.ingest()
        assert until(served.reused), "LMCache stores behind the answer"
        yield served
    finally:
        served.close()


def asked(served: Served, name: str, prompt: list[int], **params: Any) -> tuple[list[int], Any]:
    served.adapter = name
    return served.ask(prompt, **params)


def test_the_self_check_compared_an_adapter(served: Served) -> None:
    log = "".join(path.read_text(errors="replace") for path in served.folder.glob("*.log"))
    assert "Self-check: passed" in log
    assert "BLENDING IS OFF" not in log


def test_an_adapters_kv_is_found_by_its_requests_only(served: Served) -> None:
    prompt, _ = served.prompt()
    for name in NAMES:
        told = asked(served, name, prompt, **NONE)[1]
        assert bool(told["reused_tokens"]) == (name == "one")
        assert parted(told, prompt)


def test_ratio_one_equals_a_full_prefill_under_each(served: Served) -> None:
    for name in NAMES:
        served.adapter = name
        served.ingest()
        assert until(served.reused)
    for _ in range(5):
        prompt, _ = served.prompt()
        full = {}
        for name in NAMES:
            served.adapter = name
            full[name] = served.full(prompt)
            got, told = served.ask(prompt, **ALL, **{"lmcache_rag.blend": "always"})
            assert got == full[name]
            assert told["recomputed_tokens"] > len(prompt) / 2
        assert len({tuple(tokens) for tokens in full.values()}) == 3, "the adapters do nothing"


def test_adapters_in_one_batch_do_not_mix(served: Served) -> None:
    """Blends in the background beside steps of other adapters, and of the model alone."""
    prompts = [(NAMES[number % 3], served.prompt()[0]) for number in range(12)]
    wanted = []
    for name, prompt in prompts:
        served.adapter = name
        wanted.append(served.full(prompt))

    def ask(item: tuple[str, list[int]]) -> tuple[list[int], Any]:
        return served.ask(item[1], **ALL, **{"lmcache_rag.blend": "always"}, model=item[0] or served.name)

    with ThreadPoolExecutor(12) as pool:
        got = list(pool.map(ask, prompts))
    assert [tokens for tokens, _ in got] == wanted
    assert all(told["recomputed_tokens"] for _, told in got)
