"""FP8 KV: our passes against vLLM's own prefill with `--kv-cache-dtype fp8`, on a CPU with AVX-512.

vLLM's kernels for CPUs read and scale FP8 KV as those for GPUs do. They write it otherwise: they cut instead of
rounding, so that the cache of ours is written likewise here. tests/connector/test_kv_quant.py has how CUDA rounds, and
tests/servers/test_fp8_on_gpu.py compares it on a GPU. See also test_forward.py.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from contract_kit import vllm_folder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from forward_kit import BLOCK, LENGTH, SIZE, Pair
    from vllm import _custom_ops
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from lmcache_rag.budget import Budget
    from lmcache_rag.connector import kv_quant, model_runner
    from lmcache_rag.connector.attention import keys_and_values
    from lmcache_rag.connector.blend_pass import BlendPass
    from lmcache_rag.connector.self_check import take_steps
    from lmcache_rag.policies import QueryPolicy

LACKING = not torch.cpu._is_avx512_supported()
pytestmark = [
    pytest.mark.own_version,
    pytest.mark.usefixtures("group"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(LACKING, reason="vLLM for CPUs has FP8 KV with AVX-512 only"),
]
SCALES = {"unscaled": (1.0, 1.0), "scaled": (0.11, 0.07)}


def cut(numbers: torch.Tensor, scale: float) -> torch.Tensor:
    """FP8 as vLLM for CPUs writes it: towards zero."""
    wanted = (numbers.float() / scale).clamp(-448, 448)
    near = wanted.to(torch.float8_e4m3fn)
    too_far = near.float().abs() > wanted.abs()
    return near.view(torch.uint8) - too_far.to(torch.uint8)


class CutCache(CPUAttentionBackendImpl):
    """vLLM's attention for CPUs, but that KV lies as on a GPU."""

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any) -> None:
        scales = (layer._k_scale_float, layer._v_scale_float)
        for cache, fresh, scale in zip(keys_and_values(kv_cache), (key, value), scales, strict=True):
            cache[slots // BLOCK, slots % BLOCK] = cut(fresh, scale)


class Eighths(Pair):
    """A pair whose vLLM keeps FP8 KV."""

    def __init__(self, folder: Path, family: str, scales: tuple[float, float]) -> None:
        super().__init__(folder, family, "default", cache_dtype="fp8")
        for layer in self.layers.values():
            layer._k_scale_float, layer._v_scale_float = scales
            layer._k_scale.fill_(scales[0])
            layer._v_scale.fill_(scales[1])

    def plain(self) -> model_runner.VLLMModel:
        for layer in self.layers.values():
            layer.impl.__class__ = CutCache
            layer.kv_cache = torch.full_like(layer.kv_cache, 0x7F)
        return model_runner.VLLMModel(self.config, self.runner)


@pytest.mark.parametrize("scales", SCALES.values(), ids=list(SCALES))
def test_vllm_for_cpus_cuts_what_cuda_rounds(scales: tuple[float, float]) -> None:
    """So its bytes cannot stand for those of a GPU; its values lie as ours do, and show how it scales."""
    torch.manual_seed(1)
    keys, values = (torch.zeros(4, 2, BLOCK, SIZE, dtype=torch.uint8) for _ in range(2))
    fresh, slots = 3 * torch.randn(40, 2, SIZE), torch.arange(40) + 7
    _custom_ops.cpu_attn_reshape_and_cache(
        fresh, fresh, keys, values, slots, "vec", k_scale=scales[0], v_scale=scales[1], kv_cache_dtype="fp8"
    )
    got = values[slots // BLOCK, :, slots % BLOCK]
    assert torch.equal(got, cut(fresh, scales[1]))
    rounded = (fresh / scales[1]).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert (got != rounded).float().mean() > 0.3


@pytest.mark.parametrize("scales", SCALES.values(), ids=list(SCALES))
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_our_pass_gives_vllms_own_logits_with_fp8_kv(
    family: str, scales: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's runner for CPUs does
    pair = Eighths(tmp_path, family, scales)
    own = pair.prefill()
    model = pair.plain()
    assert all(kv_quant.is_fp8(cache) for cache in model.cache(0))
    pieces = torch.arange(LENGTH).split(70)
    ours = torch.cat([pair.forward(model, piece, int(piece[-1]) + 1) for piece in pieces])
    # A number that is on a border of the format may be cut to the next one, by another order of summation.
    apart, size = (ours - own).square().mean().sqrt(), own.square().mean().sqrt()
    assert apart < 0.01 * size
    exact = (pair.logits - own).square().mean().sqrt()
    assert apart < exact / 5, "FP8 makes a difference, and it is the same one"
    with torch.inference_mode(), set_current_vllm_config(pair.config):
        run = BlendPass(model, pair.sequence, chunk_size=40).run(
            pair.ids,
            [(35, 92), (97, 120)],
            BLOCK,
            policy=QueryPolicy(),
            budget=Budget(share=1.0),
            end=LENGTH - 1,
            with_last_token=True,
        )
        hidden = take_steps(run).hidden
        assert hidden is not None
        blended = model.logits(hidden)
    assert blended is not None
    assert (blended - own[-1:]).square().mean().sqrt() < 0.02 * size


def test_what_is_read_of_a_layer_is_there() -> None:
    text = (vllm_folder() / "model_executor/layers/attention/attention.py").read_text()
    for name in ("_q_scale_float", "_k_scale_float", "_v_scale_float", "self.query_quant(query, self._q_scale)"):
        assert name in text
    text = (vllm_folder() / "utils/torch_utils.py").read_text()
    assert '"fp8": torch.uint8,' in text
    assert '"fp8_e4m3": torch.uint8,' in text
    for backend in ("flash_attn", "flashinfer", "triton_attn"):
        assert "layer._k_scale" in (vllm_folder() / f"v1/attention/backends/{backend}.py").read_text()


def test_lmcache_knows_our_name_of_the_format() -> None:
    from lmcache.v1.multiprocess.modules.blend.rope import _FP8_FLAVOR_TO_AT_SCALAR

    layer = SimpleNamespace(kv_cache_dtype="fp8")
    assert _FP8_FLAVOR_TO_AT_SCALAR[kv_quant.lmcache_name(layer)] == 24  # at::ScalarType::Float8_e4m3fn
