"""FP8 KV on a GPU: vLLM's own writes beside our rounding, and blended answers beside a full prefill's. Needs CUDA.

It decides whether `lmcache_rag.fp8_kv` may be on by default; docs/models.md says what was seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_serve_kit import ALL, LACKING, Served, parted
from vllm_cpu_kit import until

from lmcache_rag.connector import kv_quant
from lmcache_rag.connector.attention import keys_and_values

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(LACKING, reason="no CUDA device, vLLM and LMCache")]
PROMPTS = 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.043, 0.17)])
@pytest.mark.parametrize("kernel", ["C++", "Triton"])
def test_vllms_write_is_our_rounding(dtype: torch.dtype, scales: tuple[float, float], kernel: str) -> None:
    """Bit for bit, of all sizes up to what saturates, and of NaN."""
    from vllm import _custom_ops
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

    torch.manual_seed(0)
    tokens, heads, size = 300, 4, 128
    spread = 10.0 ** torch.linspace(-5, 3.5, tokens, device="cuda")[:, None, None]
    fresh = [(torch.randn(tokens, heads, size, device="cuda") * spread).to(dtype) for _ in range(2)]
    fresh[0][7, 1, 3], fresh[1][9, 0, 0] = math.nan, math.inf
    stored = torch.zeros(24, 2, 16, heads, size, dtype=torch.uint8, device="cuda")
    slots = torch.randperm(24 * 16, device="cuda")[:tokens]
    write = _custom_ops.reshape_and_cache_flash if kernel == "C++" else triton_reshape_and_cache_flash
    caches = stored.unbind(1) if kernel == "C++" else stored.view(torch.float8_e4m3fn).unbind(1)
    by = [torch.tensor(scale, device="cuda") for scale in scales]
    write(*fresh, *caches, slots, "fp8", *by)
    own = torch.zeros_like(stored)
    for cache, numbers, scale in zip(keys_and_values(kv_quant.as_numbers(own)), fresh, scales, strict=True):
        kv_quant.put(cache, (slots // 16, slots % 16), numbers.float() / scale)
    got, want = (kv_quant.take(kv_quant.as_numbers(each), slice(None)) for each in (stored, own))
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.fixture(scope="module", params=["TRITON_ATTN", "FLASH_ATTN", "FLASHINFER"])
def served(
    request: pytest.FixtureRequest, smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    options = ("--dtype", "bfloat16", "--attention-backend", request.param, "--kv-cache-dtype", "fp8")
    served = Served(smollm2_path, folder, *options, "--connector", "lmcache_rag.fp8_kv=true")
    try:
        served.ingest()
        assert until(served.reused), "LMCache stores behind the answer"
        yield served
    finally:
        served.close()


def test_the_self_check_passed(served: Served) -> None:
    log = "".join(path.read_text(errors="replace") for path in served.folder.glob("*.log"))
    assert "Self-check: passed" in log
    assert "BLENDING IS OFF" not in log


@pytest.mark.parametrize("named", [False, True])
def test_ratio_one_equals_a_full_prefill(served: Served, named: bool) -> None:
    """But for near ties: an FP8 number on a border may become the next one, by another order of summation."""
    same = 0
    for _ in range(PROMPTS):
        prompt, spans = served.prompt()
        chunks = {"lmcache_rag.chunks": spans} if named else {}
        got, told = served.ask(prompt, **ALL, **{"lmcache_rag.blend": "always"}, **chunks)
        full = served.full(prompt)
        same += got[:16] == full[:16]
        assert parted(told, prompt)
        assert told["recomputed_tokens"] > len(prompt) / 2
        assert bool(told["hot_tokens"]) == named
        assert not told["failure"]
    assert same >= 0.7 * PROMPTS


@pytest.mark.parametrize("named", [False, True])
def test_moved_fp8_keys_answer_nearly_as_a_prefill(served: Served, named: bool) -> None:
    """By LMCache's rotation, and by our copy on the GPU: with wrong ones nearly no answer begins alike."""
    same = 0
    for _ in range(PROMPTS):
        prompt, spans = served.prompt()
        chunks = {"lmcache_rag.chunks": spans} if named else {}
        how = {"lmcache_rag.policy": "query", "lmcache_rag.ratio": 0.5, "lmcache_rag.blend": "always"}
        got, told = served.ask(prompt, **how, **chunks)
        assert told["reused_tokens"]
        same += got[:4] == served.full(prompt)[:4]
    assert same >= 0.5 * PROMPTS
