"""The Triton kernels against the plain torch operations that do the same.

With TRITON_INTERPRET=1 they run on the CPU, in Triton's interpreter: fewer heads, float32, and what takes longest is
marked `full`. Otherwise they need a CUDA device.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch

from lmcache_rag.connector import kv_quant
from lmcache_rag.connector.attention import PagedAttention, PagedSequence, keys_and_values

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
HEADS, KV_HEADS = (4, 2) if INTERPRETED else (32, 8)  # the interpreter runs one program after another
NEAR = {"atol": 1e-4, "rtol": 1e-4} if INTERPRETED else {"atol": 2e-2, "rtol": 2e-2}

if INTERPRETED:
    pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy warns where a mask hides the result
else:
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def long(*values: Any) -> Any:
    """A case that takes long in the interpreter."""
    return pytest.param(*values, marks=pytest.mark.full if INTERPRETED else ())


def case(rows: int, length: int, *, size: int = 128, block: int = 16, packed: bool = False) -> tuple:  # type: ignore[type-arg]
    """Random queries at random positions over a random paged cache on the GPU."""
    torch.manual_seed(rows + length)
    blocks = -(-length // block)
    shape = (blocks + 3, KV_HEADS, block, 2 * size) if packed else (blocks + 3, 2, block, KV_HEADS, size)
    keys, values = keys_and_values(torch.randn(shape, device=DEVICE, dtype=DTYPE))
    sequence = PagedSequence.of(torch.randperm(blocks + 3)[:blocks].tolist(), block, DEVICE)
    positions = torch.randperm(length, device=DEVICE)[:rows].sort().values.to(torch.int32)
    query = torch.randn(rows, HEADS, size, device=DEVICE, dtype=DTYPE)
    return query, keys, values, sequence, positions


class Kernels(PagedAttention):
    """As PagedAttention, with the kernels also where they are interpreted."""

    def attend(self, query: Any, keys: Any, values: Any, scale: float, out: Any) -> Any:
        if not INTERPRETED:
            return super().attend(query, keys, values, scale, out)
        from lmcache_rag.connector import kernels

        return kernels.attend(
            query, keys, values, self.sequence.blocks, self.positions, self.visible, scale, out,
            end=self.end, splits=3 if len(query) < 65 and self.end > 1000 else 1,
        )  # fmt: skip

    def add_mass(self, query: Any, keys: Any, scale: float, lse: Any, mass: Any, *, reduce: str = "sum") -> None:
        if not INTERPRETED:
            super().add_mass(query, keys, scale, lse, mass, reduce=reduce)
            return
        from lmcache_rag.connector import kernels

        visible = self.visible if self.visible is not None else torch.ones(self.end, dtype=torch.uint8)
        kernels.add_mass(
            query, keys, self.sequence.blocks, self.positions, visible, scale, lse, mass, reduce=reduce
        )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 20, 64, 65] if INTERPRETED else [1, 20, 64, 65, 400])
@pytest.mark.parametrize("length", [70] if INTERPRETED else [70, 1500, 5000])
@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [64, 128])
def test_attention(rows: int, length: int, hides: bool, packed: bool, size: int) -> None:
    rows = min(rows, length)
    query, keys, values, sequence, positions = case(rows, length, packed=packed, size=size)
    # A query always sees itself.
    hidden = torch.arange(0, length, 3, device=DEVICE) if hides else None
    if hidden is not None:
        hidden = hidden[~torch.isin(hidden, positions)]
        gone = sequence.slots(hidden)
        for cache in (keys, values):  # what does not exist yet may hold anything
            cache[gone // 16, gone % 16] = float("nan")
    attention = Kernels(sequence, positions, length, hidden)
    out, want = torch.empty_like(query), torch.empty_like(query)
    scale = 1 / math.sqrt(size)
    lse = attention.attend(query, keys, values, scale, out)
    if hidden is not None:
        keys, values = keys.nan_to_num(), values.nan_to_num()
    want_lse = attention._plain(query, keys, values, scale, want)
    torch.testing.assert_close(out, want, **NEAR)
    torch.testing.assert_close(lse, want_lse, **NEAR)

    mass = torch.zeros(KV_HEADS, length, device=DEVICE)
    attention.add_mass(query, keys, scale, lse, mass)
    assert mass.sum().item() == pytest.approx(rows * HEADS, rel=1e-2)
    scores = attention._scores(query, sequence.gather(keys, length), scale)
    weights = scores.softmax(-1).view(KV_HEADS, HEADS // KV_HEADS, rows, length)
    torch.testing.assert_close(mass, weights.sum((1, 2)), atol=2e-2, rtol=5e-2)
    most = torch.zeros(KV_HEADS, length, device=DEVICE)
    attention.add_mass(query, keys, scale, lse, most, reduce="max")
    torch.testing.assert_close(most, weights.amax((1, 2)), atol=2e-2, rtol=5e-2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (7, 1), (6, 2), (4, 4), long(160, 1)])
@pytest.mark.parametrize(("rows", "splits"), [(5, 1), (5, 3), (70, 1), (150, 1)])
def test_any_number_of_heads_shares_keys(heads: int, kv_heads: int, rows: int, splits: int) -> None:
    """SmolLM2 has three heads to a key, Qwen2.5-7B seven: a tile has rows to spare. 160 do not fit into one."""
    from lmcache_rag.connector import kernels

    if INTERPRETED and heads == 160:
        rows = min(rows, 70)  # more take minutes
    torch.manual_seed(heads + rows)
    length, size = 1200 if splits > 1 else 300, 64
    blocks = -(-length // 16)
    cache = torch.randn((blocks, 2, 16, kv_heads, size), device=DEVICE, dtype=DTYPE)
    keys, values = keys_and_values(cache)
    sequence = PagedSequence.of(torch.randperm(blocks).tolist(), 16, DEVICE)
    positions = torch.randperm(length, device=DEVICE)[:rows].sort().values.to(torch.int32)
    query = torch.randn(rows, heads, size, device=DEVICE, dtype=DTYPE)
    out, want = torch.empty_like(query), torch.empty_like(query)
    lse = kernels.attend(query, keys, values, sequence.blocks, positions, None, 0.125, out, end=length, splits=splits)
    want_lse = PagedAttention(sequence, positions, length)._plain(query, keys, values, 0.125, want)
    torch.testing.assert_close(out, want, **NEAR)
    torch.testing.assert_close(lse, want_lse, **NEAR)


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("rows", [20, long(100)])
def test_damage_shows(hides: bool, rows: int) -> None:
    """NaN in a key or a value that is seen must not be masked away."""
    query, keys, values, sequence, positions = case(rows, 3000)
    attention = Kernels(sequence, positions, 3000, torch.empty(0, dtype=torch.int64, device=DEVICE) if hides else None)
    first = sequence.slots(torch.tensor([0], device=DEVICE))
    out = torch.empty_like(query)
    damaged = keys.clone()
    damaged[first // 16, first % 16, :, 5] = float("nan")
    assert attention.attend(query, damaged, values, 0.1, out).isnan().all()
    damaged = values.clone()
    damaged[first // 16, first % 16, :, 5] = float("nan")
    attention.attend(query, keys, damaged, 0.1, out)
    assert out.isnan().any(-1).all()


class Fixed:
    """The tensors of a CUDA graph: the form of the kernels that takes the length from device memory.

    What lies behind a sequence is what an earlier, longer one left there.
    """

    LONGEST, ROWS = 6000, 64

    def __init__(self, sequence: PagedSequence, positions: torch.Tensor, end: int, hidden: torch.Tensor | None) -> None:
        self.blocks = torch.randint(0, 3, (self.LONGEST // 16,), dtype=torch.int32, device=DEVICE)
        self.blocks[: len(sequence.blocks)] = sequence.blocks
        self.positions = torch.full((self.ROWS,), -1, dtype=torch.int32, device=DEVICE)
        self.positions[: len(positions)] = positions
        self.end = torch.tensor([end], dtype=torch.int32, device=DEVICE)
        self.visible = torch.randint(0, 2, (self.LONGEST,), dtype=torch.uint8, device=DEVICE)
        self.visible[:end] = 1
        if hidden is not None:
            self.visible[hidden] = 0
        self.mass = torch.full((KV_HEADS, self.LONGEST), 7.0, device=DEVICE)
        self.mass[:, :end] = 0

    def rows(self, query: torch.Tensor) -> torch.Tensor:
        spare = torch.randn(self.ROWS - len(query), *query.shape[1:], device=DEVICE, dtype=query.dtype)
        return torch.cat([query, spare])

    def run(self, query: Any, keys: Any, values: Any, scale: float, reduce: str = "sum") -> tuple[Any, Any]:
        from lmcache_rag.connector import kernels

        query, out = self.rows(query), torch.full((self.ROWS, *query.shape[1:]), math.nan, device=DEVICE, dtype=DTYPE)
        lse = kernels.attend(
            query, keys, values, self.blocks, self.positions, self.visible, scale, out, end=self.end
        )  # fmt: skip
        kernels.add_mass(
            query, keys, self.blocks, self.positions, self.visible, scale, lse, self.mass, reduce=reduce, end=self.end
        )
        return out, lse


@pytest.mark.parametrize("rows", [20, long(64)] if INTERPRETED else [1, 20, 64])
@pytest.mark.parametrize("length", [65, 700, long(2200)] if INTERPRETED else [64, 70, 500, 1500, 3000, 5990])
@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize(("size", "packed"), [(64, False), long(128, True)])
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_lengths_from_device_memory(rows: int, length: int, hides: bool, size: int, packed: bool, reduce: str) -> None:
    query, keys, values, sequence, positions = case(rows, length, size=size, packed=packed)
    positions = torch.arange(length - rows, length, device=DEVICE, dtype=torch.int32)
    scale, hidden = 1 / math.sqrt(size), None
    if hides:  # here and there, and all that a split has
        hidden = (
            torch.cat([torch.arange(1, length, 3), torch.arange(600, max(600, min(1700, length - 64)))])
            .unique()
            .to(DEVICE)
        )
        hidden = hidden[~torch.isin(hidden, positions)]
        gone = sequence.slots(hidden)
        for cache in (keys, values):
            cache[gone // 16, gone % 16] = math.nan
    fixed = Fixed(sequence, positions, length, hidden)
    out, lse = fixed.run(query, keys, values, scale, reduce)

    keys, values = keys.nan_to_num(), values.nan_to_num()
    attention = PagedAttention(sequence, positions, length, hidden)
    want = torch.empty_like(query)
    want_lse = attention._plain(query, keys, values, scale, want)
    torch.testing.assert_close(out[:rows], want, **NEAR)
    torch.testing.assert_close(lse[:rows], want_lse, **NEAR)
    assert out.isfinite().all(), "rows to spare go on through the model"
    weights = attention._scores(query, sequence.gather(keys, length), scale).softmax(-1)
    weights = weights.view(KV_HEADS, -1, rows, length)
    want_mass = weights.amax((1, 2)) if reduce == "max" else weights.sum((1, 2))
    torch.testing.assert_close(fixed.mass[:, :length], want_mass, atol=NEAR["atol"], rtol=5e-2)
    assert (fixed.mass[:, length:] == 7).all(), "written behind the end"


@pytest.mark.parametrize("place", [0, long(2500)])
def test_damage_shows_with_lengths_from_device_memory(place: int) -> None:
    query, keys, values, sequence, _ = case(20, 3000)
    positions = torch.arange(2980, 3000, device=DEVICE, dtype=torch.int32)
    slot = sequence.slots(torch.tensor([place], device=DEVICE))
    damaged = keys.clone()
    damaged[slot // 16, slot % 16, :, 5] = math.nan
    fixed = Fixed(sequence, positions, 3000, None)
    _, lse = fixed.run(query, damaged, values, 0.1)
    assert lse[:20].isnan().all()
    assert fixed.mass[:, :3000].sum(1).isnan().all()
    damaged = values.clone()
    damaged[slot // 16, slot % 16, :, 5] = math.nan
    out, _ = Fixed(sequence, positions, 3000, None).run(query, keys, damaged, 0.1)
    assert out[:20].isnan().any(-1).all()


@pytest.mark.parametrize("size", [64, 80, 96, 120])
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_keys_are_moved_whatever_the_size_of_a_head(size: int, neox: bool, packed: bool) -> None:
    from lmcache_rag.connector import kernels
    from lmcache_rag.connector.model_runner import GpuCopy

    torch.manual_seed(size)
    shape = (6, KV_HEADS, 16, 2 * size) if packed else (6, 2, 16, KV_HEADS, size)
    first = torch.randn(shape, device=DEVICE, dtype=DTYPE)
    angles = torch.arange(200)[:, None] / 10.0 ** torch.linspace(0, 3, size // 2)
    table = torch.cat([angles.cos(), angles.sin()], 1).to(DEVICE)

    def copy(cache: torch.Tensor) -> GpuCopy:
        return GpuCopy([keys_and_values(cache)], table, neox=neox)

    # A block's tokens to the middle of two others, forwards and backwards; the rest is left as it was.
    source = torch.arange(16, 32, device=DEVICE)
    target = torch.arange(55, 71, device=DEVICE)
    for delta in (39, -70):
        moved, plain = first.clone(), first.clone()
        deltas = torch.full_like(source, delta)
        one = copy(moved)
        keys, values = keys_and_values(moved)
        kernels.move(one._pointers, keys, values, source, target, deltas, one._table, neox=neox)
        copy(plain)._plain(source, target, deltas, 16)
        torch.testing.assert_close(moved, plain, **NEAR)
        assert not torch.equal(plain, first)


needs_fp8 = pytest.mark.skipif(
    not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="needs FP8, compute capability 8.9",
)


def fp8_case(rows: int, length: int, *, packed: bool, size: int = 128) -> tuple:  # type: ignore[type-arg]
    """As `case`, with an FP8 cache as vLLM keeps it."""
    torch.manual_seed(rows + length)
    blocks = -(-length // 16) + 3
    shape = (blocks, KV_HEADS, 16, 2 * size) if packed else (blocks, 2, 16, KV_HEADS, size)
    stored = (3 * torch.randn(shape, device=DEVICE)).to(torch.float8_e4m3fn).view(torch.uint8)
    keys, values = keys_and_values(kv_quant.as_numbers(stored))
    sequence = PagedSequence.of(torch.randperm(blocks)[:-3].tolist(), 16, DEVICE)
    positions = torch.randperm(length, device=DEVICE)[:rows].sort().values.to(torch.int32)
    query = torch.randn(rows, HEADS, size, device=DEVICE, dtype=DTYPE)
    return query, keys, values, sequence, positions


@needs_fp8
@pytest.mark.parametrize("rows", [5, 64, 70])
@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_over_fp8_kv(rows: int, hides: bool, packed: bool) -> None:
    query, keys, values, sequence, positions = fp8_case(rows, 90, packed=packed)
    hidden = torch.arange(0, 90, 3, device=DEVICE) if hides else None
    if hidden is not None:
        hidden = hidden[~torch.isin(hidden, positions)]
        gone = sequence.slots(hidden)
        for cache in (keys, values):
            kv_quant.put(cache, (gone // 16, gone % 16), torch.tensor(math.nan, device=DEVICE))
    attention = Kernels(sequence, positions, 90, hidden)
    out, want = torch.empty_like(query), torch.empty_like(query)
    lse = attention.attend(query, keys, values, 0.05, out)
    mass = torch.zeros(KV_HEADS, 90, device=DEVICE)
    attention.add_mass(query, keys, 0.05, lse, mass)
    numbers = [kv_quant.take(cache, slice(None)).nan_to_num() for cache in (keys, values)]
    want_lse = attention._plain(query, *numbers, 0.05, want)
    torch.testing.assert_close(out, want, **NEAR)
    torch.testing.assert_close(lse, want_lse, **NEAR)
    weights = attention._scores(query, sequence.gather(numbers[0], 90), 0.05).softmax(-1)
    weights = weights.view(KV_HEADS, -1, rows, 90).sum((1, 2))
    torch.testing.assert_close(mass, weights, atol=2e-2, rtol=5e-2)
    plain = PagedAttention._plain(attention, query, *((keys, values) if hidden is None else numbers), 0.05, want)
    torch.testing.assert_close(lse, plain, **NEAR)


if not INTERPRETED:  # the interpreter reads FP8's NaN as a number

    @needs_fp8
    def test_damage_in_fp8_kv_shows() -> None:
        query, keys, values, sequence, positions = fp8_case(20, 300, packed=True)
        slot = sequence.slots(torch.tensor([0], device=DEVICE))
        kv_quant.put(keys, (slot // 16, slot % 16), torch.tensor(math.nan, device=DEVICE))
        out = torch.empty_like(query)
        assert Kernels(sequence, positions, 300).attend(query, keys, values, 0.1, out).isnan().all()


@needs_fp8
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_fp8_keys_are_moved_as_lmcache_moves_them(neox: bool, packed: bool) -> None:
    """Rotated in float32, rounded, saturated; damage stays. The interpreter rounds some wrongly, and has no NaN."""
    from lmcache_rag.connector import kernels
    from lmcache_rag.connector.model_runner import GpuCopy

    torch.manual_seed(7)
    size = 96
    shape = (6, KV_HEADS, 16, 2 * size) if packed else (6, 2, 16, KV_HEADS, size)
    first = (150 * torch.randn(shape, device=DEVICE)).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    damage = 0 if INTERPRETED else 2  # of the pair that is rotated
    if damage:
        damaged = keys_and_values(kv_quant.as_numbers(first))[0]
        kv_quant.put(damaged, (1, 3, 0, 5), torch.tensor(math.nan, device=DEVICE))
    angles = torch.arange(200)[:, None] / 10.0 ** torch.linspace(0, 3, size // 2)
    table = torch.cat([angles.cos(), angles.sin()], 1).to(DEVICE)

    def copy(cache: torch.Tensor) -> GpuCopy:
        return GpuCopy([keys_and_values(kv_quant.as_numbers(cache))], table, neox=neox)

    source, target = torch.arange(16, 32, device=DEVICE), torch.arange(55, 71, device=DEVICE)
    moved, plain = first.clone(), first.clone()
    deltas = torch.full_like(source, 39)
    one = copy(moved)
    kernels.move(one._pointers, *one._caches[0], source, target, deltas, one._table, neox=neox)
    copy(plain)._plain(source, target, deltas, 16)
    got, want = (kv_quant.take(kv_quant.as_numbers(each), slice(None)) for each in (moved, plain))
    if not INTERPRETED:
        torch.testing.assert_close(got, want, rtol=0.125, atol=2**-9, equal_nan=True)  # one step of the format
    assert float((got.nan_to_num() != want.nan_to_num()).float().mean()) < (0.01 if INTERPRETED else 0.001)
    keys = keys_and_values(kv_quant.as_numbers(moved))[0]
    there = kv_quant.take(keys, target // 16, target % 16)
    assert there.isnan().sum() == damage
    assert there.nan_to_num().abs().max() == 448
