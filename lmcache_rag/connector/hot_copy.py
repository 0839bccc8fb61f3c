"""Copies hot chunks inside the paged KV cache, their keys turned to their new positions."""

from __future__ import annotations

from collections.abc import Sequence
from operator import sub
from typing import TYPE_CHECKING, Any

from lmcache_rag.connector.metadata import Match
from lmcache_rag.connector.paged import PagedSequence
from lmcache_rag.connector.pinned import on_device

if TYPE_CHECKING:
    from torch import Tensor


class HotCopy:
    """Moves tokens from other sequences' blocks to a request's own.

    Args:
        caches: Keys and values of each layer, each [blocks, block, kv heads, size].
        table: Cosines, then sines, of each position: float32 [positions, size]; a magnitude (YaRN) is taken out.
        neox: Whether halves rather than neighbours of a head are turned together.
    """

    def __init__(self, caches: Sequence[tuple[Tensor, Tensor]], table: Tensor, *, neox: bool) -> None:
        import torch

        self._caches, self._neox = list(caches), neox
        half = table.shape[1] // 2
        norm = (table[:1, :half].float() ** 2 + table[:1, half:].float() ** 2).sqrt()
        self._table = (table.float() / torch.cat([norm, norm], 1)).contiguous()
        addresses = [pair[part].data_ptr() for part in (0, 1) for pair in self._caches]
        self._pointers = torch.tensor(addresses, dtype=torch.int64, device=self._table.device)

    @property
    def reach(self) -> int:
        """Keys cannot be moved further than this."""
        return int(self._table.shape[0]) - 1

    def warm_up(self) -> None:
        """Compile the kernel before the first request: vLLM's null block, which nobody reads, is copied to itself."""
        block = self._caches[0][0].shape[1]
        self.run([Match(0, block, 0, block, block=0)], PagedSequence.of((0,), block, str(self._table.device)))

    def run(self, matches: Sequence[Match], sequence: PagedSequence) -> None:
        """Copy hot matches to their places. Work is queued on the current stream."""
        import torch

        device = self._table.device
        block = sequence.block
        new_starts, _, old_starts, _, _, old_blocks = zip(*matches, strict=True)
        columns = [*old_blocks, *new_starts, *map(sub, new_starts, old_starts)]
        blocks, starts, deltas = on_device(columns, torch.int64, device).view(3, -1)
        within = torch.arange(block, device=device)
        source = (blocks[:, None] * block + within).flatten()
        target = sequence.slots((starts[:, None] + within).flatten())
        delta = deltas.repeat_interleave(block)
        if device.type == "cuda":
            from lmcache_rag.connector import move_kernel

            keys, values = self._caches[0]
            move_kernel.move(self._pointers, keys, values, source, target, delta, self._table, neox=self._neox)
        else:
            self._plain(source, target, delta, block)

    def _plain(self, source: Tensor, target: Tensor, delta: Tensor, block: int) -> None:
        import torch

        half = self._table.shape[1] // 2
        rows = self._table[delta.abs()]
        cos = rows[:, None, :half]
        sin = rows[:, None, half:] * delta.sign()[:, None, None]
        for keys, values in self._caches:
            moved: Any = keys[source // block, source % block].float()
            x, y = (moved[..., :half], moved[..., half:]) if self._neox else (moved[..., ::2], moved[..., 1::2])
            turned = (x * cos - y * sin, y * cos + x * sin)
            moved = torch.cat(turned, -1) if self._neox else torch.stack(turned, -1).flatten(-2)
            keys[target // block, target % block] = moved.to(keys.dtype)
            values[target // block, target % block] = values[source // block, source % block]
