"""The paged blend of each family against the embedded engine's, and against a full prefill."""

from __future__ import annotations

import random

import pytest
import torch
from blend_kit import Case
from models import OTHERS, tiny_model
from paged_kit import PagedModel, drained

from lmcache_rag.budget import Budget
from lmcache_rag.connector.attention import PagedSequence
from lmcache_rag.connector.blend_pass import BlendPass
from lmcache_rag.connector.metadata import Match
from lmcache_rag.connector.model_runner import GpuCopy
from lmcache_rag.engines.hf_blend import blended_prefill
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.policies import get_policy

BLOCK = 16


@pytest.fixture(scope="module", params=OTHERS.items(), ids="-".join)
def model(request: pytest.FixtureRequest) -> HFModel:
    return HFModel.wrap(tiny_model(*request.param), None)


def blended(model: HFModel, it: Case, policy: str, share: float) -> tuple[PagedModel, PagedSequence]:
    """A paged blend; its hits stand in any order in the cache's blocks."""
    ids = torch.tensor(it.ids)
    needed = -(-len(ids) // BLOCK)
    sequence = PagedSequence.of(random.Random(3).sample(range(needed + 3), needed), BLOCK, "cpu")
    paged = PagedModel(model, layout="NHD", block=BLOCK, blocks=needed + 3)
    it.place(model, paged, sequence)
    with torch.inference_mode():
        drained(
            BlendPass(paged, sequence).run(
                ids, it.spans, it.exact, policy=get_policy(policy), budget=Budget(share=share)
            )
        )
    return paged, sequence


@pytest.mark.parametrize(("policy", "share"), [("query", 0.3), ("hkvd", 0.3), ("all", 1.0)])
def test_a_paged_blend_is_the_embedded_blend(model: HFModel, policy: str, share: float) -> None:
    it = Case(model, [40, 30, 50], [3, 0, 7], 20, 1, frozenset({1}))
    ids = torch.tensor(it.ids)
    cache = model.buffer(len(ids))
    budget = Budget(share=share)
    done = blended_prefill(model, it.prompt, ids, cache, it.kv[0], it.hits, get_policy(policy), budget)
    paged, sequence = blended(model, it, policy, share)
    for layer in range(model.layers):
        for got, want in zip(
            paged.read(sequence, layer, done.length),
            (cache.layers[layer].keys, cache.layers[layer].values),
            strict=True,
        ):
            torch.testing.assert_close(got, want[0], atol=1e-4, rtol=1e-4)


def test_ratio_one_equals_a_full_prefill(model: HFModel) -> None:
    it = Case(model, [40, 30], [3, 5], 12, 2)
    ids = torch.tensor(it.ids)
    full = model.buffer(len(ids))
    model.forward(ids[None], torch.arange(len(ids)), full)
    paged, sequence = blended(model, it, "query", 1.0)
    end = it.spans[-1][1]
    for layer in range(model.layers):
        for got, want in zip(
            paged.read(sequence, layer, end), (full.layers[layer].keys, full.layers[layer].values), strict=True
        ):
            torch.testing.assert_close(got, want[0, :, :end], atol=1e-3, rtol=1e-3)


def test_a_resident_chunk_is_moved_to_computed_keys(model: HFModel) -> None:
    """GpuCopy's rotation, with the table as vLLM has it, in the first layer: it depends on token and position alone."""
    ids = torch.randint(300, 15000, (1, 2 * BLOCK))
    places = torch.arange(4096)
    cos, sin = (table[0] for table in model.rotary(torch.empty(0), places[None]))
    step = slice(None, None, 2) if model.config.model_type == "cohere" else slice(0, model.head_size // 2)
    paged = PagedModel(model, layout="NHD", block=BLOCK, blocks=12)
    copy = GpuCopy(paged.caches, torch.cat([cos[:, step], sin[:, step]], 1), neox=not model.interleaved)
    sequence = PagedSequence.of(range(12), BLOCK, "cpu")

    def computed(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        cache = model.buffer(2 * BLOCK)
        model.forward(ids, torch.arange(start, start + 2 * BLOCK), cache)
        return cache.layers[0].keys[0], cache.layers[0].values[0]

    old, new = 1 * BLOCK, 6 * BLOCK
    for layer in range(model.layers):
        paged.write(sequence, layer, old, *computed(old))
    starts = [(new + at, old + at) for at in (0, BLOCK)]
    matches = [Match(to, to + BLOCK, at, at + BLOCK, block=at // BLOCK) for to, at in starts]
    copy.run(matches, sequence)
    keys, values = paged.read(sequence, 0, new + 2 * BLOCK)
    want_keys, want_values = computed(new)
    torch.testing.assert_close(keys[:, new:], want_keys, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values[:, new:], want_values, atol=1e-4, rtol=1e-4)
