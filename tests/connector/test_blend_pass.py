"""The blend pass on a paged cache, against the embedded engine's blend of the same tensors."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from blend_kit import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import tiny_model
from paged_kit import PagedModel, drained

from lmcache_rag.budget import Budget, parse_budget
from lmcache_rag.connector.attention import PagedSequence
from lmcache_rag.connector.blend_pass import BlendPass
from lmcache_rag.engines.hf_blend import blended_prefill
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.policies import get_policy


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> HFModel:
    return HFModel.wrap(tiny_model("llama", "llama3"), tokenizer)


cases = st.tuples(
    st.lists(  # length, gap in front, whether its KV is found
        st.tuples(st.integers(6, 60), st.integers(0, 9), st.sampled_from([True, True, False])), min_size=1, max_size=5
    ),
    st.integers(1, 90),
    st.integers(0, 1000),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=cases,
    block=st.sampled_from([16, 32, 64]),
    layout=st.sampled_from(["NHD", "HND", "packed"]),
    policy=st.sampled_from(["query", "hkvd", "head", "none", "all"]),
    ratio=st.floats(0, 1),
    most=st.sampled_from([7, 64, 8192]),
)
def test_a_paged_blend_is_the_embedded_blend(
    model: HFModel, case: Any, block: int, layout: str, policy: str, ratio: float, most: int
) -> None:
    chunks, suffix, seed = case
    lengths, gaps, found = map(list, zip(*chunks, strict=True))
    missed = frozenset(number for number, hit in enumerate(found) if not hit)
    it = Case(model, lengths, gaps, suffix, seed, missed)
    ids = torch.tensor(it.ids)
    cache = model.buffer(len(ids))
    want = blended_prefill(model, it.prompt, ids, cache, it.kv[0], it.hits, get_policy(policy), parse_budget(ratio))
    if not it.spans:
        return  # no chunk's KV, or that of an exact one alone: nothing to blend

    needed = -(-len(ids) // block)
    order = random.Random(seed).sample(range(needed + 5), needed)
    sequence = PagedSequence.of(order, block, "cpu")
    # The suffix pass is one pass, so a pass has room for the window at least.
    paged = PagedModel(model, layout=layout, block=block, blocks=needed + 5, max_tokens=most)
    it.place(model, paged, sequence)
    with torch.inference_mode():
        got = drained(
            BlendPass(paged, sequence).run(
                ids, it.spans, it.exact, policy=get_policy(policy), budget=parse_budget(ratio)
            )
        )
    assert got.recomputed == want.recomputed_tokens
    assert want.exact_tokens == it.exact
    assert it.exact + sum(b - a for a, b in it.spans) + got.gaps == want.length
    for layer in range(model.layers):
        keys, values = paged.read(sequence, layer, want.length)
        torch.testing.assert_close(keys, cache.layers[layer].keys[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values, cache.layers[layer].values[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", ["query", "hkvd", "head", "none", "all"])
def test_a_model_of_one_layer_is_blended(tokenizer: Any, policy: str) -> None:
    model = HFModel.wrap(tiny_model("llama", num_hidden_layers=1), tokenizer)
    it = Case(model, [40, 30, 50], [3, 0, 7], 12, 1, frozenset())
    ids, cache, sequence = torch.tensor(it.ids), model.buffer(len(it.ids)), PagedSequence.of(range(20), 16, "cpu")
    paged, half = PagedModel(model, layout="NHD", block=16, blocks=20), Budget(share=0.5)
    it.place(model, paged, sequence)
    want = blended_prefill(model, it.prompt, ids, cache, it.kv[0], it.hits, get_policy(policy), half)
    got = drained(BlendPass(paged, sequence).run(ids, it.spans, it.exact, policy=get_policy(policy), budget=half))
    assert got.recomputed == want.recomputed_tokens


@pytest.mark.parametrize("missed", [(), (0,), (1,), (0, 1)], ids=str)
def test_ratio_one_equals_a_full_prefill(model: HFModel, missed: tuple[int, ...]) -> None:
    it = Case(model, [40, 30, 50], [3, 0, 7], 12, 1, frozenset(missed))
    ids = torch.tensor(it.ids)
    full = model.buffer(len(ids))
    model.forward(ids[None], torch.arange(len(ids)), full)
    sequence = PagedSequence.of(range(20), 16, "cpu")
    paged = PagedModel(model, layout="NHD", block=16, blocks=20)
    it.place(model, paged, sequence)
    end = it.spans[-1][1]
    drained(
        BlendPass(paged, sequence).run(ids, it.spans, it.exact, policy=get_policy("query"), budget=Budget(share=1.0))
    )
    for layer in range(model.layers):
        for got, want in zip(
            paged.read(sequence, layer, end), (full.layers[layer].keys, full.layers[layer].values), strict=True
        ):
            torch.testing.assert_close(got, want[0, :, :end], atol=1e-3, rtol=1e-3)


def test_blocks_of_others_are_left_alone(model: HFModel) -> None:
    it = Case(model, [40, 30], [3, 5], 12, 2)
    paged = PagedModel(model, layout="NHD", block=16, blocks=30)
    sequence = PagedSequence.of(range(4, 14), 16, "cpu")
    it.place(model, paged, sequence)
    drained(
        BlendPass(paged, sequence).run(
            torch.tensor(it.ids), it.spans, it.exact, policy=get_policy("query"), budget=Budget(share=0.3)
        )
    )
    for keys, values in paged.caches:
        for cache in (keys, values):
            assert cache[:4].isnan().all()
            assert cache[14:].isnan().all()
