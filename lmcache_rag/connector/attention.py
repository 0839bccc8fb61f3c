"""Attention over a paged KV cache that follows positions: Triton on a GPU, plain torch operations elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lmcache_rag.connector.paged import PagedSequence

_SPLIT_ROWS = 128  # fewer queries than this leave a GPU idle unless the keys are split
_SPLIT_KEYS = 512


@dataclass
class PagedAttention:
    """Attention of queries at given positions over the keys before them, planned once and used in every layer.

    Args:
        sequence: Where the keys lie.
        positions: int32 [m], ascending.
        end: Largest position + 1.
        hidden: Positions before the end that nobody may see, as their KV does not exist yet; int64, or None.
    """

    sequence: PagedSequence
    positions: Tensor
    end: int
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        import torch

        self.visible: Tensor | None = None
        if self.hidden is not None:
            self.visible = torch.ones(self.end, dtype=torch.uint8, device=self.positions.device)
            self.visible.index_fill_(0, self.hidden, 0)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> Tensor:
        """Attention of one layer.

        Args:
            query: [m, heads, size].
            keys: [blocks, block, kv heads, size], any strides but the last.
            values: Likewise.
            scale: Factor of the scores.
            out: [m, heads, size], is written.

        Returns:
            Base-2 logarithm of each softmax normaliser, float32 [m, heads].
        """
        if query.is_cuda:
            from lmcache_rag.connector import kernels

            splits = 1 if len(query) > _SPLIT_ROWS else max(1, min(kernels.MOST_SPLITS, self.end // _SPLIT_KEYS))
            return kernels.attend(
                query,
                keys,
                values,
                self.sequence.blocks,
                self.positions,
                self.visible,
                scale,
                out,
                end=self.end,
                splits=splits,
            )
        return self._plain(query, keys, values, scale, out)

    def add_mass(
        self, query: Tensor, keys: Tensor, scale: float, lse: Tensor, mass: Tensor, *, reduce: str = "sum"
    ) -> None:
        """Add to `mass` the softmax probability that each key got, float32 [kv heads, n]; or take the maximum."""
        import torch

        visible = self.visible
        if visible is None:
            visible = torch.ones(self.end, dtype=torch.uint8, device=query.device)
        if query.is_cuda:
            from lmcache_rag.connector import kernels

            kernels.add_mass(
                query, keys, self.sequence.blocks, self.positions, visible, scale, lse, mass, reduce=reduce
            )
            return
        scores = self._scores(query, self.sequence.gather(keys, mass.shape[1]), scale)
        weights = torch.exp2(scores * _LOG2_E - lse.T[..., None]).view(mass.shape[0], -1, *scores.shape[1:])
        if reduce == "max":
            torch.maximum(mass, weights.amax((1, 2)), out=mass)
        else:
            mass += weights.sum((1, 2))

    def _plain(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> Tensor:
        import torch

        group = query.shape[1] // keys.shape[2]
        end = int(self.positions[-1]) + 1  # what lies behind may not exist yet, and NaN * 0 is NaN
        own = self.sequence.gather(values, end)
        if self.visible is not None:
            own = own.masked_fill(self.visible[:end, None, None] == 0, 0)
        scores = self._scores(query, self.sequence.gather(keys, end), scale)
        lse = torch.logsumexp(scores, -1)
        weights = (scores - lse[..., None]).exp()
        out.copy_(torch.einsum("hmn,nhd->mhd", weights, own.float().repeat_interleave(group, 1)))
        return lse.T * _LOG2_E

    def _scores(self, query: Tensor, keys: Tensor, scale: float) -> Tensor:
        """Masked scores, float32 [heads, m, n]."""
        import torch

        group = query.shape[1] // keys.shape[1]
        columns = torch.arange(len(keys), device=query.device)
        unseen = columns[None] > self.positions[:, None]
        if self.visible is not None:
            unseen = unseen | (self.visible[: len(keys)] == 0)
        scores = torch.einsum("mhd,nhd->hmn", query.float(), keys.float().repeat_interleave(group, 1)) * scale
        return scores.masked_fill(unseen, float("-inf"))


@dataclass(frozen=True)
class FixedAttention:
    """As PagedAttention, over tensors whose shapes and addresses stay: one CUDA graph serves every sequence.

    Attributes:
        blocks: The sequence's blocks, int32, with room for the longest sequence.
        block: Tokens in a block.
        positions: int32 [rows], at most 64; rows to spare stand behind the others at -1 and see nothing.
        end: Largest position + 1, int32 [1].
        visible: Whether a position may be seen, uint8, with room for the longest sequence.
    """

    blocks: Tensor
    block: int
    positions: Tensor
    end: Tensor
    visible: Tensor

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> Tensor:
        """See PagedAttention. Rows to spare get something finite, as long as the values are."""
        if query.is_cuda:
            from lmcache_rag.connector import kernels

            return kernels.attend(
                query, keys, values, self.blocks, self.positions, self.visible, scale, out, end=self.end
            )
        own, rows = self._own()
        lse = query.new_zeros(query.shape[:2]).float()
        out[rows:] = 0
        if rows:
            lse[:rows] = own.attend(query[:rows], keys, values, scale, out[:rows])
        return lse

    def add_mass(
        self, query: Tensor, keys: Tensor, scale: float, lse: Tensor, mass: Tensor, *, reduce: str = "sum"
    ) -> None:
        """See PagedAttention. Of `mass`, only what stands before the end is touched; rows to spare add nothing."""
        if query.is_cuda:
            from lmcache_rag.connector import kernels

            kernels.add_mass(
                query, keys, self.blocks, self.positions, self.visible, scale, lse, mass, reduce=reduce, end=self.end
            )
            return
        own, rows = self._own()
        if rows:
            own.add_mass(query[:rows], keys, scale, lse[:rows], mass[:, : own.end], reduce=reduce)

    def _own(self) -> tuple[PagedAttention, int]:
        """The same for this sequence alone, and its rows. Waits for the device, so not on a GPU."""
        from lmcache_rag.connector.paged import PagedSequence

        rows, end = int((self.positions >= 0).sum()), int(self.end)
        own = PagedAttention(PagedSequence(self.blocks, self.block), self.positions[:rows], end)
        own.visible = self.visible[:end]
        return own, rows


_LOG2_E = 1.4426950408889634
