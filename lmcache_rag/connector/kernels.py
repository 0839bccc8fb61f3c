"""Triton kernels: attention of scattered queries over a paged KV cache, the attention per key, and moves of cached KV.

Why own attention kernels: the mask must follow positions. FlashAttention, FlashInfer and vLLM's Triton backend align a
causal mask with the end of the sequence, so a query in the middle would see later tokens; one-token "requests" per
query have the right mask but cost five times as much. The attention is FlashAttention's online softmax (arXiv
2205.14135); few queries over many keys are split along the keys as in Flash-Decoding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
ELEMENTS = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
}
MAX_SPLITS = 32

# With DEVICE a kernel reads the sequence's length from device memory, for CUDA graphs: the number of programs is fixed,
# and those past the end return at once. The number of rows is that of the capture; padding rows are at position -1,
# where every key is masked.
_MIN_SPLIT_KEYS = tl.constexpr(512)


@triton.jit  # type: ignore[untyped-decorator]
def _keys_per_split(end, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys of each split, a multiple of every COLUMNS; with few keys some splits stay empty."""
    return tl.maximum(tl.cdiv(tl.cdiv(end, SPLITS), 64) * 64, _MIN_SPLIT_KEYS)


@triton.jit  # type: ignore[untyped-decorator]
def _load(POINTER, where, wanted, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load keys or values; WHOLE: without a mask, which is faster than a mask that is true everywhere."""
    return tl.load(POINTER + where) if WHOLE else tl.load(POINTER + where, mask=wanted, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _add_keys(  # type: ignore[no-untyped-def]
    q, best, total, out, K, V, BLOCKS, VISIBLE, position, start, end, kv_head, scale,
    k_block, k_token, k_head, v_block, v_token, v_head,
    SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, HIDES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Continue the online softmax over COLUMNS keys; without MASKED all of them exist and every row sees them."""
    column = start + tl.arange(0, COLUMNS)
    lane = tl.arange(0, PADDED)[None, :]
    token = column % BLOCK
    if MASKED:
        exists = column < end
        block = tl.load(BLOCKS + column // BLOCK, mask=exists, other=0).to(tl.int64)
        if HIDES:
            exists = exists & (tl.load(VISIBLE + column, mask=exists, other=0) != 0)
        # KV that does not exist yet may be anything, NaN included: it is never loaded.
        wanted = exists[:, None] & (lane < SIZE)
    else:
        block = tl.load(BLOCKS + column // BLOCK).to(tl.int64)
        wanted = lane < SIZE
    whole: tl.constexpr = not MASKED and SIZE == PADDED
    k = _load(K, (block * k_block + token * k_token + kv_head * k_head)[:, None] + lane, wanted, whole).to(q.dtype)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        score = tl.where((column[None, :] <= position[:, None]) & exists[None, :], score, -1e30)
    top = tl.maximum(best, tl.max(score, 1))
    # Before a row's first visible key this sums garbage, which that key's larger score scales down to zero.
    # NaN stays NaN: damaged KV must show in the normaliser.
    p = tl.math.exp2(score - top[:, None])
    shrink = tl.math.exp2(best - top)
    total = total * shrink + tl.sum(p, 1)
    v = _load(V, (block * v_block + token * v_token + kv_head * v_head)[:, None] + lane, wanted, whole).to(q.dtype)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    return top, total, out


@triton.jit(do_not_specialize=["rows", "per_split", "out_split", "lse_split", "lse_row"])  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    Q, K, V, OUT, LSE, BLOCKS, POSITION, VISIBLE, END, rows, scale, per_split,
    q_row, q_head, k_block, k_token, k_head, v_block, v_token, v_head, out_split, out_row, out_head, lse_split, lse_row,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HIDES: tl.constexpr, DEVICE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    # A tile is some tokens times MEMBERS heads that share their keys. Later tokens attend to more keys: their tiles
    # start first, so that no long one is left for the end.
    tokens: tl.constexpr = ROWS // MEMBERS
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * tokens
    local = tl.arange(0, ROWS)
    row = first + local // MEMBERS
    head = tl.program_id(0) * MEMBERS + local % MEMBERS
    kv_head = tl.program_id(0) * MEMBERS // GROUP
    split = tl.program_id(2)
    lane = tl.arange(0, PADDED)
    inside = (row < rows) & (local < tokens * MEMBERS)
    if DEVICE:
        whole = tl.load(END)
        per_split = _keys_per_split(whole, SPLITS)
        if split * per_split >= whole:
            return
    position = tl.load(POSITION + row, mask=inside, other=0)
    begin = split * per_split
    end = tl.minimum(tl.max(position, 0) + 1, begin + per_split)
    q = tl.load(
        Q + row[:, None] * q_row + head[:, None] * q_head + lane[None, :],
        mask=inside[:, None] & (lane < SIZE)[None, :],
        other=0.0,
    )
    best = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, PADDED], tl.float32)
    seen_by_all = begin
    if not HIDES:  # positions ascend: what the first row sees, all see
        seen_by_all = tl.minimum(tl.load(POSITION + first) + 1, begin + per_split) // COLUMNS * COLUMNS
        for start in range(begin, seen_by_all, COLUMNS):
            best, total, out = _add_keys(
                q, best, total, out, K, V, BLOCKS, VISIBLE, position, start, end, kv_head, scale,
                k_block, k_token, k_head, v_block, v_token, v_head,
                SIZE, PADDED, BLOCK, COLUMNS, False, False,
            )  # fmt: skip
    for start in range(tl.maximum(begin, seen_by_all), end, COLUMNS):
        best, total, out = _add_keys(
            q, best, total, out, K, V, BLOCKS, VISIBLE, position, start, end, kv_head, scale,
            k_block, k_token, k_head, v_block, v_token, v_head,
            SIZE, PADDED, BLOCK, COLUMNS, HIDES, True,
        )  # fmt: skip
    out = out / tl.maximum(total, 1e-30, propagate_nan=tl.PropagateNan.ALL)[:, None]
    lse = tl.where(total == 0, -1e30, best + tl.math.log2(total))
    tl.store(
        OUT + split * out_split + row[:, None] * out_row + head[:, None] * out_head + lane[None, :],
        out.to(OUT.dtype.element_ty),
        mask=inside[:, None] & (lane < SIZE)[None, :],
    )
    tl.store(LSE + split * lse_split + row * lse_row + head, lse, mask=inside)


@triton.jit(do_not_specialize=["rows", "keys", "lse_row", "mass_head"])  # type: ignore[untyped-decorator]
def _mass(  # type: ignore[no-untyped-def]
    Q, K, LSE, BLOCKS, POSITION, VISIBLE, MASS, END, rows, keys, scale,
    q_row, q_head, k_block, k_token, k_head, lse_row, mass_head,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, MAXIMUM: tl.constexpr, DEVICE: tl.constexpr,
):  # fmt: skip
    if DEVICE:
        keys = tl.load(END)
        if tl.program_id(0) * COLUMNS >= keys:
            return
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kv_head = tl.program_id(1)
    lane = tl.arange(0, PADDED)
    exists = column < keys
    exists = exists & (tl.load(VISIBLE + column, mask=exists, other=0) != 0)
    block = tl.load(BLOCKS + column // BLOCK, mask=column < keys, other=0).to(tl.int64)
    where = block * k_block + (column % BLOCK) * k_token + kv_head * k_head
    k = tl.load(K + where[:, None] + lane[None, :], mask=exists[:, None] & (lane < SIZE)[None, :], other=0.0)
    mass = tl.load(MASS + kv_head * mass_head + column, mask=column < keys, other=0.0)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for first in range(0, rows, ROWS):
            row = first + tl.arange(0, ROWS)
            inside = row < rows
            position = tl.load(POSITION + row, mask=inside, other=-1)
            lse = tl.load(LSE + row * lse_row + head, mask=inside, other=0.0)
            q = tl.load(
                Q + row[:, None] * q_row + head * q_head + lane[None, :],
                mask=inside[:, None] & (lane < SIZE)[None, :],
                other=0.0,
            )
            score = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
            seen = (column[None, :] <= position[:, None]) & exists[None, :]
            p = tl.where(seen, tl.math.exp2(score - lse[:, None]), 0.0)
            if MAXIMUM:
                mass = tl.maximum(mass, tl.max(p, 0))
            else:
                mass += tl.sum(p, 0)
    tl.store(MASS + kv_head * mass_head + column, mass, mask=column < keys)


@triton.jit(do_not_specialize=["splits", "in_split", "lse_split", "lse_row"])  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]
    PARTIAL, PARTIAL_LSE, OUT, LSE, END, splits, in_split, in_row, in_head, lse_split, lse_row, out_row, out_head,
    SIZE: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, DEVICE: tl.constexpr,
):  # fmt: skip
    if DEVICE:
        whole = tl.load(END)
        splits = tl.cdiv(whole, _keys_per_split(whole, SPLITS))
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.arange(0, SPLITS)
    lane = tl.arange(0, PADDED)
    lse = tl.load(PARTIAL_LSE + split * lse_split + row * lse_row + head, mask=split < splits, other=-1e30)
    top = tl.max(lse, 0)
    weight = tl.math.exp2(lse - top)
    total = tl.sum(weight, 0)
    part = tl.load(
        PARTIAL + split[:, None] * in_split + row * in_row + head * in_head + lane[None, :],
        mask=(split < splits)[:, None] & (lane < SIZE)[None, :],
        other=0.0,
    )
    out = tl.sum(part * weight[:, None], 0) / total
    tl.store(OUT + row * out_row + head * out_head + lane, out.to(OUT.dtype.element_ty), mask=lane < SIZE)
    tl.store(LSE + row * lse_row + head, top + tl.math.log2(total))


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    positions: Tensor,
    visible: Tensor | None,
    scale: float,
    out: Tensor,
    *,
    end: int | Tensor,
    splits: int = 1,
) -> Tensor:
    """Attention of queries at `positions` over the paged keys 0..position; see PagedAttention.attend.

    `end` may be int32 [1] on the device, for at most 64 queries: then the launches are the same for every length, and
    `splits` is ignored.

    Returns:
        Base-2 logarithm of the softmax normaliser, float32 [m, heads].
    """
    rows, heads, size = query.shape
    padded = max(16, triton.next_power_of_2(size))
    many = rows > 64
    tile = 128 if many else 64
    small = padded * query.element_size() <= 256  # larger tiles do not fit a multiprocessor's shared memory as often
    columns = (128 if many else 64) if small else 32  # measured: docs/results/attention-h100.md
    group = heads // keys.shape[2]
    members = group if group <= tile else 1
    device = isinstance(end, Tensor)
    if isinstance(end, Tensor):
        per_split, splits, length = 0, MAX_SPLITS, end
    else:
        per_split = -(-end // splits)
        per_split = -(-per_split // columns) * columns
        splits, length = -(-end // per_split), positions  # any pointer: it is not read
    # Partial results in float32, only with more than one split.
    partial = out[None] if splits == 1 else torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
    lse = torch.empty((splits, rows, heads), dtype=torch.float32, device=out.device)
    _attend[(heads // members, triton.cdiv(rows, tile // members), splits)](
        query, keys, values, partial, lse, blocks, positions, visible if visible is not None else positions,
        length, rows, scale * LOG2_E, per_split,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), keys.stride(2),
        values.stride(0), values.stride(1), values.stride(2),
        partial.stride(0), partial.stride(1), partial.stride(2), lse.stride(0), lse.stride(1),
        GROUP=group, MEMBERS=members, SIZE=size, PADDED=padded, BLOCK=keys.shape[1], ROWS=tile, COLUMNS=columns,
        HIDES=visible is not None, DEVICE=device, SPLITS=MAX_SPLITS,
        num_warps=8 if many else 4, num_stages=3 if small else 2,
    )  # fmt: skip
    if splits == 1:
        return lse[0]
    whole = torch.empty_like(lse[0])
    _combine[(rows, heads)](
        partial, lse, out, whole, length, splits, partial.stride(0), partial.stride(1), partial.stride(2),
        lse.stride(0), lse.stride(1), out.stride(0), out.stride(1),
        SIZE=size, PADDED=padded, SPLITS=MAX_SPLITS, DEVICE=device, num_warps=1,
    )  # fmt: skip
    return whole


def add_mass(
    query: Tensor,
    keys: Tensor,
    blocks: Tensor,
    positions: Tensor,
    visible: Tensor,
    scale: float,
    lse: Tensor,
    mass: Tensor,
    *,
    reduce: str,
    end: Tensor | None = None,
) -> None:
    """Add the softmax probability of each key to `mass`, float32 [kv heads, n]; without atomics, so reproducible.

    With `end`, int32 [1] on the device, only keys before it count; the launch is the same for every length.
    """
    rows, heads, size = query.shape
    padded = max(16, triton.next_power_of_2(size))
    count: Any = mass.shape[1]
    _mass[(triton.cdiv(count, 64), keys.shape[2])](
        query, keys, lse, blocks, positions, visible, mass, positions if end is None else end, rows, count,
        scale * LOG2_E,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), keys.stride(2), lse.stride(0), mass.stride(0),
        GROUP=heads // keys.shape[2], SIZE=size, PADDED=padded, BLOCK=keys.shape[1], ROWS=64, COLUMNS=64,
        MAXIMUM=reduce == "max", DEVICE=end is not None, num_warps=4,
    )  # fmt: skip


def warm_up(keys: Tensor, values: Tensor, heads: int, dtype: torch.dtype) -> None:
    """Compile the kernels for such caches before the first request; those of CUDA graphs compile at capture.

    Args:
        keys: A layer's keys, [blocks, block, kv heads, size].
        values: Likewise.
        heads: Query heads.
        dtype: Type of the queries; keys and values may be FP8.
    """
    size, device = keys.shape[3], keys.device
    blocks = torch.zeros(4096 // keys.shape[1], dtype=torch.int32, device=device)
    visible = torch.ones(4096, dtype=torch.uint8, device=device)
    for rows, splits in ((16, 1), (16, 4), (96, 4), (256, 1)):
        query = torch.zeros((rows, heads, size), dtype=dtype, device=device)
        positions = torch.arange(4096 - rows, 4096, dtype=torch.int32, device=device)
        for hides in (visible, None):
            lse = attend(
                query, keys, values, blocks, positions, hides, 1.0, torch.empty_like(query), end=4096, splits=splits
            )
        for reduce in ("sum", "max") if rows == 16 else ():
            mass = torch.zeros((keys.shape[2], 4000), dtype=torch.float32, device=device)
            add_mass(query, keys, blocks, positions, visible, 1.0, lse, mass, reduce=reduce)
    torch.cuda.synchronize()


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
    if NEOX:  # halves form pairs
        first, second = lane, HALF + lane
    else:  # neighbours do
        first, second = 2 * lane, 2 * lane + 1
    keys = tl.load(POINTERS + layer).to(tl.pointer_type(ELEMENT))
    read = (source // BLOCK) * k_block + (source % BLOCK) * k_token + head * k_head
    write = (target // BLOCK) * k_block + (target % BLOCK) * k_token + head * k_head
    x = tl.load(keys + read[:, None] + first[None, :], mask=wanted, other=0.0).to(tl.float32)
    y = tl.load(keys + read[:, None] + second[None, :], mask=wanted, other=0.0).to(tl.float32)
    x, y = x * cos - y * sin, y * cos + x * sin
    if tl.float8e4nv == ELEMENT:  # saturates, and NaN stays NaN
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        y = tl.clamp(y, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(keys + write[:, None] + first[None, :], x.to(ELEMENT), mask=wanted)
    tl.store(keys + write[:, None] + second[None, :], y.to(ELEMENT), mask=wanted)
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
    """Copy tokens inside a paged cache, all layers in one launch; keys are rotated by `delta` positions.

    Args:
        pointers: Addresses of every layer's keys, then of every layer's values, int64 [2 * layers].
        keys: One layer's keys, for their strides: [blocks, block, kv heads, size].
        values: Likewise.
        source: Slots to read, int64 [m].
        target: Slots to write, int64 [m].
        delta: New position minus old position, int64 [m].
        table: Cosines and sines of each distance, float32 [positions, size].
        neox: Whether rotary pairs are halves of a head rather than neighbours.
    """
    size, layers = keys.shape[3], len(pointers) // 2
    element = ELEMENTS[keys.dtype]
    _move[(triton.cdiv(len(source), 16), keys.shape[2], layers)](
        pointers, source, target, delta, table, len(source), layers,
        keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
        table.stride(0), HALF=size // 2, PADDED=triton.next_power_of_2(size // 2), BLOCK=keys.shape[1], ROWS=16,
        NEOX=neox, ELEMENT=element,
    )  # fmt: skip
