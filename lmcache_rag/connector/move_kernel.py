"""A Triton kernel that copies tokens inside a paged KV cache and turns their keys to new positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _move(  # type: ignore[no-untyped-def]
    POINTERS, SOURCE, TARGET, DELTA, TABLE, tokens, layers,
    k_block, k_token, k_head, v_block, v_token, v_head, table_row,
    HALF: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NEOX: tl.constexpr,
    ELEMENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    layer = tl.program_id(2)
    lane = tl.arange(0, PADDED)  # a power of two; half a head need not be one
    inside = row < tokens
    source = tl.load(SOURCE + row, mask=inside, other=0)
    target = tl.load(TARGET + row, mask=inside, other=0)
    delta = tl.load(DELTA + row, mask=inside, other=0)
    angle = tl.where(delta < 0, -delta, delta).to(tl.int64)
    wanted = inside[:, None] & (lane < HALF)[None, :]
    cos = tl.load(TABLE + angle[:, None] * table_row + lane[None, :], mask=wanted, other=0.0)
    sin = tl.load(TABLE + angle[:, None] * table_row + HALF + lane[None, :], mask=wanted, other=0.0)
    sin = tl.where((delta < 0)[:, None], -sin, sin)
    if NEOX:  # halves are turned together
        first, second = lane, HALF + lane
    else:  # neighbours are
        first, second = 2 * lane, 2 * lane + 1
    keys = tl.load(POINTERS + layer).to(tl.pointer_type(ELEMENT))
    read = (source // BLOCK) * k_block + (source % BLOCK) * k_token + head * k_head
    write = (target // BLOCK) * k_block + (target % BLOCK) * k_token + head * k_head
    x = tl.load(keys + read[:, None] + first[None, :], mask=wanted, other=0.0).to(tl.float32)
    y = tl.load(keys + read[:, None] + second[None, :], mask=wanted, other=0.0).to(tl.float32)
    tl.store(keys + write[:, None] + first[None, :], (x * cos - y * sin).to(ELEMENT), mask=wanted)
    tl.store(keys + write[:, None] + second[None, :], (y * cos + x * sin).to(ELEMENT), mask=wanted)
    values = tl.load(POINTERS + layers + layer).to(tl.pointer_type(ELEMENT))
    read = (source // BLOCK) * v_block + (source % BLOCK) * v_token + head * v_head
    write = (target // BLOCK) * v_block + (target % BLOCK) * v_token + head * v_head
    for part in tl.static_range(2):
        v = tl.load(values + read[:, None] + part * HALF + lane[None, :], mask=wanted, other=0.0)
        tl.store(values + write[:, None] + part * HALF + lane[None, :], v, mask=wanted)


def move(
    pointers: Tensor, keys: Tensor, values: Tensor, source: Tensor, target: Tensor, delta: Tensor, table: Tensor,
    *, neox: bool,
) -> None:  # fmt: skip
    """Copy tokens inside a paged cache, all layers in one launch, keys turned on by `delta` positions.

    Args:
        pointers: Addresses of every layer's keys, then of every layer's values, int64 [2 * layers].
        keys: One layer's keys, for their strides: [blocks, block, kv heads, size].
        values: Likewise.
        source: Slots to read, int64 [m].
        target: Slots to write, int64 [m].
        delta: New position less old one, int64 [m].
        table: Cosines and sines of each distance, float32 [positions, size].
        neox: Whether halves rather than neighbours of a head are turned together.
    """
    size, layers = keys.shape[3], len(pointers) // 2
    element = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[keys.dtype]
    _move[(triton.cdiv(len(source), 16), keys.shape[2], layers)](
        pointers, source, target, delta, table, len(source), layers,
        keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
        table.stride(0), HALF=size // 2, PADDED=triton.next_power_of_2(size // 2), BLOCK=keys.shape[1], ROWS=16,
        NEOX=neox, ELEMENT=element,
    )  # fmt: skip
