"""A transformers model whose KV lies in a paged cache, as the connector's blend pass wants it."""

from __future__ import annotations

from typing import Any

import torch

from lmcache_rag.connector.attention import PagedSequence, keys_and_values


def drained(steps: Any) -> Any:
    """Take all steps of a blend; returns what they come to."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def paged_cache(layout: str, blocks: int, block: int, heads: int, size: int) -> torch.Tensor:
    """One layer's cache as vLLM 0.25 (NHD or HND in memory) or 0.33 (packed) lays it out, filled with NaN."""
    if layout == "NHD":
        cache = torch.empty(blocks, 2, block, heads, size)
    elif layout == "HND":
        cache = torch.empty(blocks, 2, heads, block, size).permute(0, 1, 3, 2, 4)
    else:
        cache = torch.empty(blocks, block, heads, 2 * size).permute(0, 2, 1, 3)
    return cache.fill_(float("nan"))


class PagedModel:
    """See lmcache_rag.connector.blend_pass.Model; the weights are those of an HFModel.

    Of `ranks` ranks this is one: it holds its share of the heads, and `join` makes all heads' output of its own.
    """

    def __init__(
        self,
        model: Any,
        *,
        layout: str,
        block: int,
        blocks: int,
        max_tokens: int = 8192,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self._model, self.max_tokens = model, max_tokens
        self.rank, self.ranks = rank, ranks
        self.layers, self.kv_heads = model.layers, model.kv_heads // ranks
        self.caches = [
            keys_and_values(paged_cache(layout, blocks, block, self.kv_heads, model.head_size))
            for _ in range(model.layers)
        ]
        self.passes: list[int] = []
        self.captured: Any = None

    def write(self, sequence: PagedSequence, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write [kv heads, tokens, size] from position `start` on."""
        slots = sequence.slots(torch.arange(start, start + keys.shape[1]))
        for cache, fresh in zip(self.caches[layer], (keys, values), strict=True):
            cache[slots // sequence.block_size, slots % sequence.block_size] = self._own(fresh.transpose(0, 1))

    def _own(self, heads: torch.Tensor) -> torch.Tensor:
        """This rank's share of [m, heads, size]."""
        return heads.chunk(self.ranks, 1)[self.rank]

    def join(self, out: torch.Tensor) -> torch.Tensor:
        """All ranks' heads, of this rank's [m, heads, size]."""
        return out

    def read(self, sequence: PagedSequence, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first tokens, each [kv heads, length, size]."""
        keys, values = (sequence.gather(cache, length).transpose(0, 1) for cache in self.caches[layer])
        return keys, values

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, attention: Any) -> torch.Tensor:
        """The model's own layers; their KV goes to the paged cache only."""
        self.passes.append(len(ids))
        scratch = self._model.buffer(int(positions.max()) + 1)
        block = self.caches[0][0].shape[1]
        outer = self

        class Hook:
            def attend(self, layer: int, query: Any, key: Any, value: Any, scale: float) -> Any:
                keys, values = outer.caches[layer]
                fresh_key, fresh_value = (outer._own(x[0, :, positions].transpose(0, 1)) for x in (key, value))
                attention.before_write(layer, fresh_key, fresh_value, keys, values)
                keys[slots // block, slots % block] = fresh_key
                values[slots // block, slots % block] = fresh_value
                rows = outer._own(query[0].transpose(0, 1))
                out = torch.empty_like(rows)
                attention.attend(layer, rows, keys, values, scale, out)
                return outer.join(out).transpose(0, 1)[None]

        states: torch.Tensor = self._model.forward(ids[None], positions, scratch, Hook())[0]
        return states

    def kv_scales(self, layer: int) -> tuple[float, float]:
        """Nothing is scaled."""
        return 1.0, 1.0

    def has_memory(self, tokens: int, length: int) -> bool:
        """There is enough."""
        return True

    def sum_over_ranks(self, scores: torch.Tensor) -> torch.Tensor:
        """There is one rank."""
        return scores
