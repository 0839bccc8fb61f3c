"""Attention in the forward passes of a blend: over one sequence of a paged KV cache, masked by position.

A pass of a blend runs the model's own layers; in each layer an `Attention` replaces the backend's attention. It runs as
Triton kernels on a GPU, and as plain torch operations elsewhere.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lmcache_rag.connector import kv_quant

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PagedSequence:
    """Where the tokens of one sequence lie in a paged KV cache.

    Attributes:
        blocks: Ids of the sequence's blocks in order, int32 [blocks], on the cache's device.
        block_size: Tokens in a block.
    """

    blocks: Tensor
    block_size: int

    @classmethod
    def of(cls, blocks: Sequence[int], block_size: int, device: str) -> PagedSequence:
        """A sequence from a list of block ids."""
        import torch

        return cls(to_device_async(blocks, torch.int32, device), block_size)

    @property
    def capacity(self) -> int:
        """Number of tokens that fit into the blocks."""
        return len(self.blocks) * self.block_size

    def slots(self, positions: Tensor) -> Tensor:
        """Slot of each position in the flattened cache, int64 [m]: block id * block size + offset."""
        return self.blocks[positions // self.block_size].long() * self.block_size + positions % self.block_size

    def gather(self, cache: Tensor, length: int) -> Tensor:
        """The first `length` keys or values, contiguous: [blocks, block, heads, size] -> [length, heads, size].

        FP8 as float32, see kv_quant.take.
        """
        count = -(-length // self.block_size)
        return kv_quant.take(cache, self.blocks[:count].long()).flatten(0, 1)[:length]


def keys_and_values(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a vLLM KV cache as [blocks, block, kv heads, size], independent of the vLLM version's layout.

    vLLM 0.25 keeps [blocks, 2, block, kv heads, size] in logical order for FlashAttention, FlashInfer and Triton, and
    vLLM 0.32 and later [blocks, kv heads, block, 2 * size]; the strides give the order in memory.

    Raises:
        ValueError: The cache has another shape.
    """
    if cache.dim() == 5 and cache.shape[1] == 2:
        keys, values = cache.unbind(1)
        return keys, values
    if cache.dim() == 4 and cache.shape[3] % 2 == 0:
        both, size = cache.transpose(1, 2), cache.shape[3] // 2
        return both[..., :size], both[..., size:]
    raise ValueError(f"a KV cache of shape {tuple(cache.shape)} is not supported")


class StopForward(Exception):  # noqa: N818 - not an error: ends a forward pass early
    """Raised inside a layer when the pass has computed all that is needed."""


class Attention(Protocol):
    """Replaces the backend's attention in each layer of a pass."""

    def before_write(self, layer: int, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
        """Called before the layer's fresh KV [m, kv heads, size] is written over what the cache holds."""
        ...

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """Write attention to `out`; query and out [m, heads, size], keys and values [blocks, block, kv heads, size]."""
        ...


class NoAttention:
    """Skips attention, to measure the memory of the rest of a pass."""

    def before_write(self, layer: int, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
        """Do nothing."""

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """Write zeros."""
        out.zero_()


class RecomputeAttention(NoAttention):
    """Recomputes tokens: each attends to every position up to its own."""

    def __init__(self, attention: PagedAttention) -> None:
        self._attention = attention

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """Attend, masked by position."""
        self._attention.attend(query, keys, values, scale, out)


class ObserveAttention(NoAttention):
    """Runs the suffix's rows, and from one layer on accumulates the attention that each key gets.

    Args:
        attention: Attention of the rows.
        mass: Accumulated softmax probabilities, float32 [kv heads, n].
        first_layer: First layer that counts.
        reduce: "sum" or "max" over rows, heads and layers.
        last_layer: Layer at which the pass stops, since its output is not needed; None: run all layers in full.
    """

    def __init__(
        self,
        attention: PagedAttention | FixedAttention,
        mass: Tensor,
        first_layer: int,
        reduce: str,
        *,
        last_layer: int | None = None,
    ) -> None:
        self._attention, self._mass, self._reduce = attention, mass, reduce
        self._first, self._last = first_layer, last_layer

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """Attend; accumulate the probabilities of the upper layers."""
        lse = self._attention.attend(query, keys, values, scale, out)
        if layer >= self._first:
            self._attention.add_mass(query, keys, scale, lse, self._mass, reduce=self._reduce)
        if layer == self._last:
            raise StopForward


class DeviationCheck(RecomputeAttention):
    """Runs all tokens through the first layers; measures how far the check layer's fresh KV is from the cached KV.

    Args:
        attention: Attention of the tokens.
        slots: Their slots, int64 [m].
        layer: The check layer.
        scales: What its cached keys and values are to be multiplied by.
    """

    def __init__(
        self, attention: PagedAttention, slots: Tensor, layer: int, scales: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        super().__init__(attention)
        self._slots, self._layer, self._scales = slots, layer, scales
        self.deviation: Tensor | None = None

    def before_write(self, layer: int, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
        """Compare at the check layer, and stop before anything is written there."""
        if layer < self._layer:
            return
        block = keys.shape[1]
        at, within = self._slots // block, self._slots % block
        total = None
        for fresh, cached, scale in zip((key, value), (keys, values), self._scales, strict=True):
            distance = (fresh.float() - kv_quant.take(cached, at, within).float() * scale).square().sum((1, 2))
            total = distance if total is None else total + distance
        self.deviation = total
        raise StopForward


_SPLIT_ROWS = 128  # fewer queries than this leave a GPU idle unless the keys are split
_SPLIT_KEYS = 512
_LOG2_E = 1.4426950408889634


@dataclass
class PagedAttention:
    """Attention of queries at given positions over the keys up to them; built once per pass, used in every layer.

    Args:
        sequence: The sequence whose keys are attended to.
        positions: Positions of the queries, int32 [m], ascending.
        end: Largest position + 1.
        hidden: Positions before the end that are masked since their KV does not exist yet, int64; or None.
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
            keys: [blocks, block, kv heads, size], contiguous in the last dimension.
            values: Likewise.
            scale: Factor of the scores.
            out: Output, [m, heads, size].

        Returns:
            Base-2 logarithm of each softmax normaliser, float32 [m, heads].
        """
        if query.is_cuda:
            from lmcache_rag.connector import kernels

            splits = 1 if len(query) > _SPLIT_ROWS else max(1, min(kernels.MAX_SPLITS, self.end // _SPLIT_KEYS))
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
        """Add the softmax probability of each key to `mass`, float32 [kv heads, n]; or take the maximum."""
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
        end = int(self.positions[-1]) + 1  # later KV may not exist yet, and NaN * 0 is NaN
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
    """As PagedAttention, over tensors of fixed shape and address, so that one CUDA graph serves every sequence.

    Attributes:
        blocks: The sequence's blocks, int32, sized for the longest sequence.
        block_size: Tokens in a block.
        positions: Positions of the queries, int32 [rows], at most 64; padding rows come last, at -1, and attend to
            nothing.
        end: Largest position + 1, int32 [1].
        visible: Whether a position may be attended to, uint8, sized for the longest sequence.
    """

    blocks: Tensor
    block_size: int
    positions: Tensor
    end: Tensor
    visible: Tensor

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> Tensor:
        """See PagedAttention. Padding rows get finite output, as long as the values are finite."""
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
        """See PagedAttention. Only positions of `mass` before the end are written; padding rows add nothing."""
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
        """The same attention without padding, and its number of rows. Synchronises, so it is not used on a GPU."""
        rows, end = int((self.positions >= 0).sum()), int(self.end)
        own = PagedAttention(PagedSequence(self.blocks, self.block_size), self.positions[:rows], end)
        own.visible = self.visible[:end]
        return own, rows


def to_device_async(values: Sequence[int] | Tensor, dtype: Any, device: Any) -> Tensor:
    """Copy integers, or a tensor in host memory, to the device without waiting for the GPU.

    The copy is made from pinned memory. From other memory CUDA copies only when all earlier work on the stream is done:
    the host would wait for the load of a request's KV before it could queue the work that follows.
    """
    import torch

    if isinstance(values, torch.Tensor):
        host = values
    else:  # through an array: torch.tensor takes three times as long, a millisecond for a prompt's tokens
        numbers = values if isinstance(values, array) and values else array("q", values or (0,))
        host = torch.frombuffer(numbers, dtype=torch.int64)
    host = host[: len(values)].to(dtype)
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, dtype, non_blocking=True)


class AsyncScalar:
    """A number that is copied from the device to the host asynchronously.

    Args:
        value: A tensor with one element.
    """

    def __init__(self, value: Tensor) -> None:
        import torch

        self._event: Any = None
        self._host = value
        if value.is_cuda:
            self._host = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> float:
        """Return the number. Waits for the work queued before it on the stream, not for later work."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._host)
