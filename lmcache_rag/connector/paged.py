"""One sequence in a paged KV cache, addressed by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache_rag.connector.pinned import on_device

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PagedSequence:
    """Where the tokens of one sequence lie in a paged KV cache.

    Attributes:
        blocks: Ids of the sequence's blocks in order, int32 [blocks], on the cache's device.
        block: Tokens in a block.
    """

    blocks: Tensor
    block: int

    @classmethod
    def of(cls, blocks: Sequence[int], block: int, device: str) -> PagedSequence:
        """A sequence whose blocks are given as numbers."""
        import torch

        return cls(on_device(blocks, torch.int32, device), block)

    @property
    def capacity(self) -> int:
        """Tokens that the blocks have room for."""
        return len(self.blocks) * self.block

    def slots(self, positions: Tensor) -> Tensor:
        """Place of each position in the flattened cache, int64 [m]: block id * block + offset."""
        return self.blocks[positions // self.block].long() * self.block + positions % self.block

    def gather(self, cache: Tensor, length: int) -> Tensor:
        """The first `length` keys or values, contiguous: [blocks, block, heads, size] -> [length, heads, size]."""
        count = -(-length // self.block)
        return cache[self.blocks[:count].long()].flatten(0, 1)[:length]


def keys_and_values(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a vLLM KV cache as [blocks, block, kv heads, size], whatever the version's layout.

    vLLM 0.25 keeps [blocks, 2, block, kv heads, size] in logical order for FlashAttention, FlashInfer and Triton, and
    vLLM 0.32 and later [blocks, kv heads, block, 2 * size]; the order in memory is in the strides.

    Raises:
        ValueError: The cache has another shape.
    """
    if cache.dim() == 5 and cache.shape[1] == 2:
        keys, values = cache.unbind(1)
        return keys, values
    if cache.dim() == 4 and cache.shape[3] % 2 == 0:
        both, size = cache.transpose(1, 2), cache.shape[3] // 2
        return both[..., :size], both[..., size:]
    raise ValueError(f"a KV cache of shape {tuple(cache.shape)} is not known")
