"""Attention of scattered queries: a query at position p sees the keys 0..p.

The mask must follow positions. The causal masks of the usual kernels follow places in the batch (top-left or
bottom-right aligned), with which a scattered query would see later tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_MASK_ELEMENTS = 1 << 26  # masks up to this size in all are kept from layer to layer, larger ones are made anew


class PositionAttention:
    """Attention of queries at given positions over keys 0..n-1, planned once and used in every layer.

    Queries are taken in blocks, each with the keys up to its last position only: so the work is that of a causal
    prefill of the same rows, not of the whole rectangle.

    Args:
        positions: int64 [m], ascending, on the queries' device.
        rows: Queries per block. Few waste the kernel, many compute keys that most of the block may not see.
        hidden: Positions of keys that nobody may see (their KV does not exist yet), int64, or None.
    """

    def __init__(self, positions: Tensor, *, rows: int = 0, hidden: Tensor | None = None) -> None:
        self._positions = positions
        self._hidden = hidden
        self._ends = positions.tolist()
        consecutive = len(positions) > 1 and self._ends[-1] - self._ends[0] == len(positions) - 1
        rows = rows or (256 if consecutive else 64)
        starts = range(0, len(self._ends), rows)
        self._blocks = [(start, min(start + rows, len(self._ends))) for start in starts]
        keep = sum((end - start) * self._keys(end) for start, end in self._blocks) <= _MASK_ELEMENTS
        self._kept = {block: self._mask(*block) for block in self._blocks} if keep else {}

    def _keys(self, end: int) -> int:
        return int(self._ends[end - 1]) + 1

    def _mask(self, start: int, end: int) -> Tensor:
        """Additive mask of one block, float32 [rows, keys]: 0 where the key is seen, -inf elsewhere."""
        import torch

        columns = torch.arange(self._keys(end), device=self._positions.device)
        unseen = columns[None] > self._positions[start:end, None]
        if self._hidden is not None:
            unseen[:, self._hidden[self._hidden < len(columns)]] = True
        return torch.zeros(unseen.shape, device=unseen.device).masked_fill_(unseen, float("-inf"))

    def masks(self) -> list[tuple[int, int, int, Tensor]]:
        """(first row, last row + 1, number of keys, mask) of each block."""
        return [(s, e, self._keys(e), self._kept[s, e] if self._kept else self._mask(s, e)) for s, e in self._blocks]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Query [1, heads, m, size], key and value [1, kv heads, n, size] -> [1, heads, m, size]."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        out = torch.empty_like(query)
        group = query.shape[1] // key.shape[1]
        if group > 1 and query.is_cuda:  # no fast CUDA kernel takes grouped heads and a mask together
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
            group = 1
        for start, end in self._blocks:
            keys = self._keys(end)
            mask = self._kept[start, end] if self._kept else self._mask(start, end)
            out[:, :, start:end] = scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, :keys],
                value[:, :, :keys],
                attn_mask=mask.to(query.dtype),
                scale=scale,
                enable_gqa=group > 1,
            )
        return out


def attention_with_mass(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, reduce: str
) -> tuple[Tensor, Tensor]:
    """Attention that also says how much each key was looked at.

    Args:
        query: [1, heads, m, size].
        key: [1, kv heads, n, size].
        value: [1, kv heads, n, size].
        mask: Additive, float32 [m, n].
        scale: Factor of the scores.
        reduce: "sum" or "max" over heads and rows.

    Returns:
        The attention's output [1, heads, m, size], and float32 [n]: the softmax probability that each key got.
    """
    import torch

    _, heads, rows, size = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    # The heads of a group become rows of one product: keys are read once, and never repeated in memory.
    grouped = (query[0] * scale).reshape(kv_heads, -1, size)
    scores = torch.bmm(grouped, key[0].transpose(1, 2)).float().view(kv_heads, heads // kv_heads, rows, keys)
    weights = scores.add_(mask).softmax(-1)
    mass = weights.sum((0, 1, 2)) if reduce == "sum" else weights.amax((0, 1, 2))
    out = torch.bmm(weights.view(kv_heads, -1, keys).to(value.dtype), value[0])
    return out.view(1, heads, rows, size), mass
