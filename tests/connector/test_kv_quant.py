"""FP8 KV: what is read and written, against the format itself, and a blend over it against a full prefill."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blend_kit import PREFIX, Case
from models import tiny_model
from paged_kit import PagedModel, drained

from lmcache_rag.budget import Budget
from lmcache_rag.connector import kv_quant
from lmcache_rag.connector.attention import AsyncScalar, DeviationCheck, PagedSequence, StopForward
from lmcache_rag.connector.blend_pass import BlendPass
from lmcache_rag.connector.job import BlendJob
from lmcache_rag.connector.model_runner import GpuCopy
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.policies import get_policy

BLOCK = 16


def e4m3(byte: int) -> float:
    """A number of the format, by its definition: 4 bits of exponent with bias 7, 3 of mantissa, no infinity."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


NUMBERS = [e4m3(byte) for byte in range(256)]


def test_each_byte_is_the_number_of_the_format() -> None:
    cache = kv_quant.as_numbers(torch.arange(256, dtype=torch.uint8)[:, None])
    assert kv_quant.is_fp8(cache)
    found = kv_quant.take(cache, slice(None))[:, 0]
    torch.testing.assert_close(found, torch.tensor(NUMBERS), rtol=0, atol=0, equal_nan=True)


def test_numbers_are_rounded_as_cuda_rounds_them() -> None:
    """__nv_cvt_float_to_fp8 with __NV_SATFINITE: to the nearest, of two the even one, and at most 448."""
    positive = sorted({value for value in NUMBERS if value >= 0})
    pairs = list(pairwise(positive))
    middles = [(low + high) / 2 for low, high in pairs]
    even = [value for pair in pairs for value in pair if positive.index(value) % 2 == 0]
    near = [(low + middle) / 2 for low, middle in zip(positive, middles, strict=False)]
    cases = dict(zip(positive, positive, strict=True)) | dict(zip(middles, even, strict=True))
    cases |= dict(zip(near, positive, strict=False)) | {460.0: 448.0, 480.0: 448.0, 1e6: 448.0, math.inf: 448.0}
    cases |= {-value: -wanted for value, wanted in cases.items()}
    cache = kv_quant.as_numbers(torch.zeros(len(cases), 1, dtype=torch.uint8))
    kv_quant.put(cache, (slice(None),), torch.tensor(list(cases))[:, None])
    torch.testing.assert_close(
        kv_quant.take(cache, slice(None))[:, 0], torch.tensor(list(cases.values())), rtol=0, atol=0
    )
    kv_quant.fill(cache, torch.tensor([3]), math.nan)
    assert kv_quant.take(cache, 3).isnan().all()
    assert kv_quant.take(cache, slice(4, None)).isfinite().all()


def test_other_caches_are_left_as_they_are() -> None:
    cache = torch.zeros(3, 2, dtype=torch.bfloat16)
    assert kv_quant.as_numbers(cache) is cache
    kv_quant.put(cache, (torch.tensor([1]),), torch.tensor([[1.5, 500.0]]))
    assert kv_quant.take(cache, torch.tensor([1])).dtype == torch.bfloat16
    assert cache.tolist() == [[0, 0], [1.5, 500], [0, 0]]


def test_scales_are_those_of_the_layer() -> None:
    layer = SimpleNamespace(kv_cache_dtype="fp8", _q_scale_float=0.5, _k_scale_float=0.25, _v_scale_float=2.0)
    assert kv_quant.scales(layer) == (0.5, 0.25, 2.0)
    layer.kv_cache_dtype = "auto"
    assert kv_quant.scales(layer) == (1.0, 1.0, 1.0)


def test_a_deviation_is_measured_in_the_models_numbers() -> None:
    keys, values = (kv_quant.as_numbers(torch.zeros(2, BLOCK, 1, 4, dtype=torch.uint8)) for _ in range(2))
    slots = torch.arange(3)
    kv_quant.put(keys, (0, slice(0, 3)), torch.full((3, 1, 4), 2.0))
    kv_quant.put(values, (0, slice(0, 3)), torch.full((3, 1, 4), 4.0))
    check = DeviationCheck(None, slots, 1, (0.5, 3.0))  # type: ignore[arg-type]
    fresh = torch.ones(3, 1, 4)
    with pytest.raises(StopForward):
        check.before_write(1, fresh, 12 * fresh, keys, values)
    assert check.deviation is not None
    assert check.deviation.tolist() == [0.0, 0.0, 0.0]


def test_a_copy_moves_fp8_keys_and_leaves_values() -> None:
    torch.manual_seed(2)
    stored = torch.randint(0, 120, (4, 2, BLOCK, 2, 8), dtype=torch.uint8)
    cache = kv_quant.as_numbers(stored)
    keys, values = cache.unbind(1)
    angles = torch.arange(64)[:, None] / 10.0 ** torch.linspace(0, 2, 4)
    copy = GpuCopy([(keys, values)], torch.cat([angles.cos(), angles.sin()], 1), neox=True)
    source, target = torch.arange(BLOCK), torch.arange(20, 20 + BLOCK)
    before = kv_quant.take(keys, 0)
    copy._plain(source, target, torch.full_like(source, 9), BLOCK)
    cos, sin = angles[9].cos(), angles[9].sin()
    x, y = before[..., :4], before[..., 4:]
    wanted = torch.cat([x * cos - y * sin, y * cos + x * sin], -1)
    got = kv_quant.take(keys, target // BLOCK, target % BLOCK)
    torch.testing.assert_close(got, wanted, rtol=2**-4, atol=2**-10)  # half a step of the format
    moved = stored.unbind(1)[1][target // BLOCK, target % BLOCK]
    assert torch.equal(moved, stored[0, 1])


@pytest.mark.parametrize("part", [0, 1])
def test_damaged_fp8_kv_is_seen(part: int) -> None:
    """One byte of a value or a key is NaN."""
    cache = torch.zeros(4, 2, BLOCK, 2, 8, dtype=torch.uint8)
    keys, values = kv_quant.as_numbers(cache).unbind(1)
    model = SimpleNamespace(layers=1, device="cpu", cache=lambda layer: (keys, values), all_ranks=lambda fine: fine)
    for damaged in (False, True):
        if damaged:
            cache[1, part, 3, 1, 5] = 0xFF
        job: Any = object.__new__(BlendJob)
        job.plan, job.failure = SimpleNamespace(local=0, exact=BLOCK), ""
        job._sequence, job._resources = PagedSequence.of([0, 1, 2], BLOCK, "cpu"), SimpleNamespace(model=model)
        job._queue_finite_check(torch.arange(BLOCK, 2 * BLOCK), None)
        assert isinstance(job._finite_check, AsyncScalar)
        assert job.verify() is not damaged


class Quantised(PagedModel):
    """A paged model with FP8 KV and scales, written as vLLM writes it on a GPU."""

    SCALES = (0.05, 0.02)

    def __init__(self, model: HFModel, blocks: int) -> None:
        super().__init__(model, layout="NHD", block=BLOCK, blocks=blocks)
        nothing = torch.full((blocks, 2, BLOCK, model.kv_heads, model.head_size), 0x7F, dtype=torch.uint8)
        self.caches = [kv_quant.as_numbers(nothing.clone()).unbind(1) for _ in range(model.layers)]

    def kv_scales(self, layer: int) -> tuple[float, float]:
        return self.SCALES

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, attention: Any) -> torch.Tensor:
        scratch, outer = self._model.buffer(int(positions.max()) + 1), self

        class Hook:
            def attend(self, layer: int, query: Any, key: Any, value: Any, scale: float) -> Any:
                keys, values = outer.caches[layer]
                fresh = [x[0, :, positions].transpose(0, 1) for x in (key, value)]
                attention.before_write(layer, *fresh, keys, values)
                for cache, numbers, by in zip((keys, values), fresh, outer.SCALES, strict=True):
                    kv_quant.put(cache, (slots // BLOCK, slots % BLOCK), numbers / by)
                rows = query[0].transpose(0, 1)
                out = torch.empty_like(rows)
                attention.attend(layer, rows, keys, values, scale * outer.SCALES[0], out)
                return (out * outer.SCALES[1]).transpose(0, 1)[None]

        states: torch.Tensor = self._model.forward(ids[None], positions, scratch, Hook())[0]
        return states


def rounded(numbers: torch.Tensor, scale: float) -> torch.Tensor:
    """As vLLM's cache gives numbers back."""
    return (numbers / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


class Prefill:
    """A full prefill whose attention reads KV as an FP8 cache gives it back; without any of ours."""

    def __init__(self, positions: torch.Tensor) -> None:
        self.positions, self.kv = positions, {}  # type: ignore[var-annotated]

    def attend(self, layer: int, query: Any, key: Any, value: Any, scale: float) -> Any:
        key, value = (
            rounded(x[:, :, : len(self.positions)], by) for x, by in zip((key, value), Quantised.SCALES, strict=True)
        )
        self.kv[layer] = key[0], value[0]
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )


@pytest.fixture(scope="module")
def hf(tokenizer: Any) -> HFModel:
    return HFModel.wrap(tiny_model("llama"), tokenizer)


@pytest.mark.parametrize("policy", ["all", "query", "hkvd"])
def test_ratio_one_equals_a_prefill_with_fp8_kv(hf: HFModel, policy: str) -> None:
    case = Case(hf, [40, 30], [3, 5], 12, 1)
    ids, end = torch.tensor(case.ids), len(case.ids) - 1
    model, sequence = Quantised(hf, 20), PagedSequence.of(range(2, 16), BLOCK, "cpu")
    positions = torch.arange(len(ids))
    prefill = Prefill(positions)
    wanted = hf.forward(ids[None], positions, hf.buffer(len(ids)), prefill)[0]
    blend = BlendPass(model, sequence, chunk_size=50)
    with torch.inference_mode():
        drained(blend.compute(ids, torch.arange(PREFIX), PREFIX))
        for start, stop in case.spans:  # KV of anything: it is all computed again
            slots = sequence.slots(torch.arange(start, stop))
            for layer in range(hf.layers):
                for cache in model.caches[layer]:
                    kv_quant.fill(cache, (slots // BLOCK, slots % BLOCK), 1.0)
        run = blend.run(
            ids, case.spans, PREFIX, policy=get_policy(policy), budget=Budget(share=1.0), end=end, with_last_token=True
        )
        hidden = drained(run).hidden
    torch.testing.assert_close(hidden, wanted[-1:], atol=1e-3, rtol=1e-3)
    for layer, parts in prefill.kv.items():
        for cache, want, by in zip(model.caches[layer], parts, Quantised.SCALES, strict=True):
            got = sequence.gather(cache, len(ids)).transpose(0, 1) * by
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_hkvd_finds_what_deviates_in_fp8_kv(hf: HFModel) -> None:
    """Everything is right but for five tokens at the check layer: they are selected."""
    case = Case(hf, [40, 30], [3, 5], 12, 1)
    ids, policy = torch.tensor(case.ids), get_policy("hkvd")
    model, sequence = Quantised(hf, 20), PagedSequence.of(range(2, 16), BLOCK, "cpu")
    blend = BlendPass(model, sequence)
    wrong = torch.arange(*case.spans[1])[::6][:5]
    slots = sequence.slots(wrong)
    with torch.inference_mode():
        drained(blend.compute(ids, torch.arange(len(ids)), len(ids)))
        assert policy.check_layer is not None
        keys, _ = model.caches[policy.check_layer]
        index = (slots // BLOCK, slots % BLOCK)
        kv_quant.put(keys, index, -kv_quant.take(keys, *index))
        found = drained(blend.select(ids, case.spans, PREFIX, policy=policy, budget=Budget(tokens=5)))
    assert sorted(found.chosen.tolist()) == wrong.tolist()
