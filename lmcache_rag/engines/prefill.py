"""Fill a request's KV cache from chunk KV, as far as there is any."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache_rag.blend.policies import Layout, Policy, select
from lmcache_rag.blend.rope import shift_keys, shift_tables
from lmcache_rag.engines.passes import ModelPasses, RedoPass

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lmcache_rag.engines.base import ChunkSpan, QueryPrompt
    from lmcache_rag.engines.hf_model import HFModel
    from lmcache_rag.engines.kv_buffer import KVBuffer


@dataclass(frozen=True)
class ChunkKV:
    """KV of one chunk, computed after the prefix: keys and values [layers, kv heads, tokens, size]."""

    keys: Tensor
    values: Tensor

    @property
    def tokens(self) -> int:
        """Length of the chunk."""
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return int(self.keys.nbytes + self.values.nbytes)


@dataclass(frozen=True)
class Prefilled:
    """What was done. The cache holds `length` tokens; everything from there on is still to be computed.

    Times in milliseconds: `load_ms` copies KV to its place, `shift_ms` turns keys (in part while they are copied),
    `select_ms` is the policy with its pass, `redo_ms` computes the selected tokens and the gaps. `selected` are the
    positions of the recomputed tokens.
    """

    length: int
    exact_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    load_ms: float
    shift_ms: float = 0.0
    select_ms: float = 0.0
    redo_ms: float = 0.0
    selected: tuple[int, ...] = ()


def blended_prefill(
    model: HFModel,
    prompt: QueryPrompt,
    ids: torch.Tensor,
    cache: KVBuffer,
    prefix: ChunkKV,
    hits: Sequence[tuple[ChunkSpan, ChunkKV]],
    policy: Policy,
    ratio: float,
) -> Prefilled:
    """Place the prefix's and the chunks' KV, compute the selected tokens and the gaps anew.

    The gaps are what stands between the hits without KV: separators and missed chunks. What follows the last hit is
    left to the caller. A first chunk that stands right behind the prefix stands where its KV was computed: it is exact
    and no candidate for recomputation.

    Args:
        model: The model.
        prompt: The prompt.
        ids: Its token ids, int64 [n], on the model's device.
        cache: Empty, with room for the prompt.
        prefix: KV of the prefix.
        hits: Chunks whose KV was found, in the prompt's order.
        policy: Chooses what to recompute.
        ratio: Share of the cached, not exact tokens to recompute.
    """
    begin = time.perf_counter()
    exact = prompt.prefix_tokens
    _place(cache, prefix, 0)
    cached = list(hits)
    if cached and cached[0][0].start == exact:
        span, kv = cached.pop(0)
        _place(cache, kv, exact)
        exact = span.end
    if not cached:
        cache.set_length(exact)
        return Prefilled(exact, exact, 0, 0, _ms_since(begin))

    layout = Layout.of([(span.start, span.end) for span, _ in cached], device=str(ids.device))
    end = cached[-1][0].end
    gaps = _gaps(layout, exact, end)
    cos, sin = shift_tables(model.rotary, layout.offset + prompt.prefix_tokens, layout.cached)
    shift_ms = 0.0
    first = 0
    for span, kv in cached:
        last = first + kv.tokens
        shift_ms += _place(cache, kv, span.start, cos[first:last], sin[first:last])
        first = last
    cache.clear(gaps, end, len(ids))
    load_ms = _ms_since(begin) - shift_ms

    begin = time.perf_counter()
    passes = ModelPasses(model, ids, cache, layout, gaps, exact, end)
    chosen = select(policy, ratio, layout, passes)
    select_ms = _ms_since(begin)

    begin = time.perf_counter()
    redo = _merge(chosen, gaps)
    if len(redo):
        model.forward(ids[redo][None], redo, cache, RedoPass(redo))
    cache.set_length(end)
    kept, redone = len(layout.cached) - len(chosen), len(chosen)
    redo_ms = _ms_since(begin)
    selected = tuple(chosen.tolist())
    return Prefilled(end, exact, kept, redone, load_ms, shift_ms, select_ms, redo_ms, selected)


def _place(cache: KVBuffer, kv: ChunkKV, start: int, cos: Tensor | None = None, sin: Tensor | None = None) -> float:
    """Write one chunk's KV to the cache at `start`, its keys turned by the given angles; returns the ms of turning."""
    end = start + kv.tokens
    turning = 0.0
    for index, layer in enumerate(cache.layers):
        keys = layer.all_keys[0, :, start:end]
        if cos is None or sin is None:
            keys.copy_(kv.keys[index])
        else:
            begin = time.perf_counter()
            shift_keys(kv.keys[index].to(keys.device), cos, sin, out=keys)
            turning += _ms_since(begin)
        layer.all_values[0, :, start:end].copy_(kv.values[index])
    return turning


def _gaps(layout: Layout, start: int, end: int) -> Tensor:
    """Positions in [start, end) without cached KV, ascending."""
    import torch

    absent = torch.ones(end, dtype=torch.bool, device=layout.cached.device)
    absent[:start] = False
    absent[layout.cached] = False
    return absent.nonzero()[:, 0]


def _merge(first: Tensor, second: Tensor) -> Tensor:
    import torch

    return torch.cat([first, second]).sort().values


def _ms_since(begin: float) -> float:
    return (time.perf_counter() - begin) * 1e3
