"""The Triton kernels against the plain torch operations that do the same."""

from __future__ import annotations

import math

import pytest
import torch

from lmcache_rag.connector.paged import PagedSequence, keys_and_values
from lmcache_rag.connector.paged_attention import PagedAttention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def case(rows: int, length: int, *, size: int = 128, block: int = 16, packed: bool = False) -> tuple:  # type: ignore[type-arg]
    """Random queries at random positions over a random paged cache on the GPU."""
    torch.manual_seed(rows + length)
    blocks = -(-length // block)
    shape = (blocks + 3, 8, block, 2 * size) if packed else (blocks + 3, 2, block, 8, size)
    keys, values = keys_and_values(torch.randn(shape, device="cuda", dtype=torch.bfloat16))
    sequence = PagedSequence.of(torch.randperm(blocks + 3)[:blocks].tolist(), block, "cuda")
    positions = torch.randperm(length, device="cuda")[:rows].sort().values.to(torch.int32)
    query = torch.randn(rows, 32, size, device="cuda", dtype=torch.bfloat16)
    return query, keys, values, sequence, positions


@pytest.mark.parametrize("rows", [1, 20, 64, 65, 400])
@pytest.mark.parametrize("length", [70, 1500, 5000])
@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [64, 128])
def test_attention(rows: int, length: int, hides: bool, packed: bool, size: int) -> None:
    rows = min(rows, length)
    query, keys, values, sequence, positions = case(rows, length, packed=packed, size=size)
    # A query always sees itself.
    hidden = torch.arange(0, length, 3, device="cuda") if hides else None
    if hidden is not None:
        hidden = hidden[~torch.isin(hidden, positions)]
        gone = sequence.slots(hidden)
        for cache in (keys, values):  # what does not exist yet may hold anything
            cache[gone // 16, gone % 16] = float("nan")
    attention = PagedAttention(sequence, positions, length, hidden)
    out, want = torch.empty_like(query), torch.empty_like(query)
    scale = 1 / math.sqrt(size)
    lse = attention.attend(query, keys, values, scale, out)
    if hidden is not None:
        keys, values = keys.nan_to_num(), values.nan_to_num()
    want_lse = attention._plain(query, keys, values, scale, want)
    torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, want_lse, atol=2e-2, rtol=2e-2)

    mass = torch.zeros(8, length, device="cuda")
    attention.add_mass(query, keys, scale, lse, mass)
    assert mass.sum().item() == pytest.approx(rows * 32, rel=1e-2)
    scores = attention._scores(query, sequence.gather(keys, length), scale)
    weights = scores.softmax(-1).view(8, 4, rows, length)
    torch.testing.assert_close(mass, weights.sum((1, 2)), atol=2e-2, rtol=5e-2)
    most = torch.zeros(8, length, device="cuda")
    attention.add_mass(query, keys, scale, lse, most, reduce="max")
    torch.testing.assert_close(most, weights.amax((1, 2)), atol=2e-2, rtol=5e-2)


def test_damage_shows() -> None:
    """NaN in a key or a value that is seen must not be masked away."""
    query, keys, values, sequence, positions = case(20, 3000)
    attention = PagedAttention(sequence, positions, 3000, torch.empty(0, dtype=torch.int64, device="cuda"))
    first = sequence.slots(torch.tensor([0], device="cuda"))
    out = torch.empty_like(query)
    damaged = keys.clone()
    damaged[first // 16, first % 16, :, 5] = float("nan")
    assert attention.attend(query, damaged, values, 0.1, out).isnan().all()
    damaged = values.clone()
    damaged[first // 16, first % 16, :, 5] = float("nan")
    attention.attend(query, keys, damaged, 0.1, out)
    assert out.isnan().any(-1).all()
