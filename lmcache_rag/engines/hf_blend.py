"""Blend chunk KV into a request's cache: place it, select tokens, recompute them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmcache_rag.engines.hf_model import PositionAttention, attention_with_mass
from lmcache_rag.engines.kv_files import ChunkKV
from lmcache_rag.policies import Layout, Policy, select

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lmcache_rag.budget import Budget
    from lmcache_rag.engines.base import ChunkSpan, QueryPrompt
    from lmcache_rag.engines.hf_model import HFModel, KVBuffer


@dataclass(frozen=True)
class BlendedPrefill:
    """The result of a blend. The cache holds `length` tokens; the caller computes everything from there on.

    Times in milliseconds: `load_ms` copies KV to its place, `shift_ms` rotates keys (in part while they are copied),
    `select_ms` is the policy with its pass, `recompute_ms` computes the selected tokens and the gaps. `selected` are
    the positions of the recomputed tokens, `reason` why so many (a BudgetReason; "" where no chunk was blended).
    """

    length: int
    exact_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    load_ms: float
    shift_ms: float = 0.0
    select_ms: float = 0.0
    recompute_ms: float = 0.0
    selected: tuple[int, ...] = ()
    reason: str = ""


def blended_prefill(
    model: HFModel,
    prompt: QueryPrompt,
    ids: torch.Tensor,
    cache: KVBuffer,
    prefix: ChunkKV,
    hits: Sequence[tuple[ChunkSpan, ChunkKV]],
    policy: Policy,
    budget: Budget,
    *,
    free: int = 0,
) -> BlendedPrefill:
    """Place the prefix's and the chunks' KV, then recompute the selected tokens and the gaps.

    The gaps are the tokens without KV between the hits: separators and missed chunks. What follows the last hit is
    left to the caller. Without neutral passages a first chunk right after the prefix stands where its KV was computed:
    it is exact and no candidate for recomputation.

    Args:
        model: The model.
        prompt: The prompt.
        ids: Its token ids, int64 [n], on the model's device.
        cache: Empty, with room for the prompt.
        prefix: KV of the prefix.
        hits: Chunks whose KV was found, in the prompt's order.
        policy: Chooses what to recompute.
        budget: How many of the cached, not exact tokens to recompute.
        free: So many can be recomputed without any more time.
    """
    begin = time.perf_counter()
    exact = prompt.prefix_tokens
    _place(cache, prefix, 0)
    cached = list(hits)
    if cached and cached[0][0].start == exact == prompt.computed_at:
        span, kv = cached.pop(0)
        _place(cache, kv, exact)
        exact = span.end
    if not cached:
        cache.set_length(exact)
        return BlendedPrefill(exact, exact, 0, 0, _ms_since(begin))

    layout = Layout.of([(span.start, span.end) for span, _ in cached], device=str(ids.device))
    end = cached[-1][0].end
    gaps = _gaps(layout, exact, end)
    cos, sin = shift_tables(model.rotary, layout.offset + prompt.computed_at, layout.cached)
    shift_ms = 0.0
    first = 0
    for span, kv in cached:
        last = first + kv.tokens
        angles = (cos[first:last], sin[first:last])
        shift_ms += _place(cache, kv, span.start, angles, interleaved=model.interleaved)
        first = last
    cache.clear(gaps, end, len(ids))
    load_ms = _ms_since(begin) - shift_ms

    begin = time.perf_counter()
    passes = ModelPasses(model, ids, cache, layout, gaps, exact, end)
    chosen, reason = select(policy, budget, layout, passes, free=free)
    select_ms = _ms_since(begin)

    begin = time.perf_counter()
    redo = _merge(chosen, gaps)
    if len(redo):
        model.forward(ids[redo][None], redo, cache, RecomputeAttention(redo))
    cache.set_length(end)
    kept, redone = len(layout.cached) - len(chosen), len(chosen)
    recompute_ms = _ms_since(begin)
    selected = tuple(chosen.tolist())
    return BlendedPrefill(end, exact, kept, redone, load_ms, shift_ms, select_ms, recompute_ms, selected, str(reason))


def _place(
    cache: KVBuffer, kv: ChunkKV, start: int, angles: tuple[Tensor, Tensor] | None = None, *, interleaved: bool = False
) -> float:
    """Write one chunk's KV to the cache at `start`, its keys rotated by these angles; returns the ms of rotating."""
    end = start + kv.tokens
    rotating = 0.0
    for index, layer in enumerate(cache.layers):
        keys = layer.all_keys[0, :, start:end]
        if angles is None:
            keys.copy_(kv.keys[index])
        else:
            begin = time.perf_counter()
            shift_keys(kv.keys[index].to(keys.device), *angles, out=keys, interleaved=interleaved)
            rotating += _ms_since(begin)
        layer.all_values[0, :, start:end].copy_(kv.values[index])
    return rotating


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


# -- forward passes ---------------------------------------------------------------------------------------------------


class _StopForward(Exception):  # noqa: N818 - not an error: ends a forward pass early
    """Raised inside a layer to end a forward pass whose result is complete."""


class RecomputeAttention:
    """Recomputes the selected tokens: each attends to everything before it."""

    def __init__(self, positions: Tensor) -> None:
        self._attention = PositionAttention(positions)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention by position."""
        return self._attention(query, key, value, scale)


class ObserveAttention:
    """Runs the suffix's rows over the placed KV; from one layer on, adds up their attention to each token."""

    def __init__(self, positions: Tensor, hidden: Tensor, first_layer: int, last_layer: int, reduce: str) -> None:
        self._attention = PositionAttention(positions, rows=len(positions), hidden=hidden)
        ((_, _, self._keys, self._mask),) = self._attention.masks()
        self._first, self._last, self._reduce = first_layer, last_layer, reduce
        self.mass: Tensor | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention; in the upper layers the probabilities are added up."""
        import torch

        if layer < self._first:
            return self._attention(query, key, value, scale)
        key, value = key[:, :, : self._keys], value[:, :, : self._keys]
        out, mass = attention_with_mass(query, key, value, self._mask, scale, self._reduce)
        if self.mass is None:
            self.mass = mass
        elif self._reduce == "sum":
            self.mass += mass
        else:
            self.mass = torch.maximum(self.mass, mass)
        if layer == self._last:
            raise _StopForward
        return out


class DeviationCheck:
    """Runs all tokens through the first layers and measures how far the check layer's KV deviates; stops there."""

    def __init__(self, positions: Tensor, layer: int, key: Tensor, value: Tensor) -> None:
        self._attention = PositionAttention(positions)
        self._positions, self._layer = positions, layer
        self._cached = key.clone(), value.clone()
        self.deviation: Tensor | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention by position, up to the check layer."""
        if layer < self._layer:
            return self._attention(query, key, value, scale)
        # The fresh KV was just written over the cached one: compare, and put the cached one back.
        total = None
        for fresh, cached in zip((key, value), self._cached, strict=True):
            distance = (fresh - cached).float().square().sum((0, 1, 3))
            total = distance if total is None else total + distance
            fresh.copy_(cached)
        self.deviation = total
        raise _StopForward


class ModelPasses:
    """The passes that a policy may run, on a transformers model; see lmcache_rag.policies.Passes.

    Args:
        model: The model.
        ids: The whole prompt, int64 [n].
        cache: Chunk KV is placed in it.
        layout: The cached tokens.
        gaps: Positions before `suffix_start` without KV, int64.
        start: First position that is not exact.
        suffix_start: Where the suffix begins.
    """

    def __init__(
        self, model: HFModel, ids: Tensor, cache: KVBuffer, layout: Layout, gaps: Tensor, start: int, suffix_start: int
    ) -> None:
        self._model, self._ids, self._cache = model, ids, cache
        self._layout, self._gaps, self._start, self._suffix_start = layout, gaps, start, suffix_start
        self._results: dict[tuple[Any, ...], Tensor] = {}

    def suffix_attention(self, *, window: int, from_layer: float, reduce: str) -> Tensor:
        """See Passes. Tokens whose KV does not exist yet are hidden from the rows."""
        how = (window, from_layer, reduce)
        if how not in self._results:
            self._results[how] = self._suffix_attention(*how)
        return self._results[how]

    def _suffix_attention(self, window: int, from_layer: float, reduce: str) -> Tensor:
        import torch

        first = max(self._suffix_start, len(self._ids) - window)
        rows = torch.arange(first, len(self._ids), device=self._ids.device)
        unseen = torch.arange(self._suffix_start, first, device=self._ids.device)
        layers = self._model.layers
        run = ObserveAttention(rows, torch.cat([self._gaps, unseen]), int(from_layer * layers), layers - 1, reduce)
        self._run(rows, run)
        assert run.mass is not None  # noqa: S101 - the last layer always adds up
        return run.mass[self._layout.cached]

    def deviation(self, *, layer: int) -> Tensor:
        """See Passes."""
        layer = min(layer, self._model.layers - 1)  # a policy's layer may be beyond those of a very small model
        if (layer,) not in self._results:
            self._results[layer,] = self._deviation(layer)
        return self._results[layer,]

    def _deviation(self, layer: int) -> Tensor:
        import torch

        positions = torch.arange(self._start, self._suffix_start, device=self._ids.device)
        at = self._cache.layers[layer]
        run = DeviationCheck(positions, layer, at.all_keys, at.all_values)
        self._run(positions, run)
        assert run.deviation is not None  # noqa: S101 - the check layer always stops the pass
        return run.deviation[self._layout.cached]

    def _run(self, positions: Tensor, run: ObserveAttention | DeviationCheck) -> None:
        with contextlib.suppress(_StopForward):
            self._model.forward(self._ids[positions][None], positions, self._cache, run)


# -- moving keys ------------------------------------------------------------------------------------------------------
#
# A cached key was rotated by RoPE to the position where it was computed. At position b instead of a it is the same key
# rotated by the angle between the two. That angle comes from the model's own rotary embedding, so every kind of scaling
# (linear, llama3, yarn) is right by construction.


def shift_tables(rotary: Any, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle between two positions, from the model's own rotary embedding, once for each pair.

    The model's tables are read at both positions and subtracted as angles, rather than read at new - old: in float32
    the angle at 8,000 is rounded, and a moved key must carry the same rounding as one computed there.

    Args:
        rotary: The model's rotary module: rotary(x, position_ids [1, n]) -> (cos, sin) [1, n, size].
        old: Positions where the keys were computed, int64 [n].
        new: Positions where they go, int64 [n].

    Returns:
        cos and sin, float32 [n, size / 2].
    """
    import torch

    probe = torch.empty(0, dtype=torch.float32, device=old.device)
    cos_a, sin_a = (_of_pairs(t[0].double()) for t in rotary(probe, old[None]))
    cos_b, sin_b = (_of_pairs(t[0].double()) for t in rotary(probe, new[None]))
    # Some scalings (yarn) multiply cos and sin by a factor; the key has it already.
    square = cos_a.square() + sin_a.square()
    return ((cos_a * cos_b + sin_a * sin_b) / square).float(), ((sin_b * cos_a - cos_b * sin_a) / square).float()


def _of_pairs(table: Tensor) -> Tensor:
    """A model's table [n, size] once for each pair, [n, size / 2]: it has all twice, as halves or as neighbours."""
    import torch

    first, second = table.chunk(2, -1)
    return first if torch.equal(first, second) else table[:, ::2]


def shift_keys(
    keys: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None, *, interleaved: bool = False
) -> Tensor:
    """Rotate keys by the angles of `shift_tables`.

    Args:
        keys: [..., n, size].
        cos: float32 [n, size / 2].
        sin: float32 [n, size / 2].
        out: Where to write; may not overlap keys.
        interleaved: Whether pairs are neighbours (Cohere, Ernie), rather than the halves of a head (Llama and most).
    """
    import torch

    if out is None:
        out = torch.empty_like(keys)
    if keys.dtype != torch.float32:  # round once, at the end
        return out.copy_(shift_keys(keys.float(), cos, sin, interleaved=interleaved))
    (first, second), (to_first, to_second) = (_pairs(tensor, interleaved) for tensor in (keys, out))
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    return out


def _pairs(keys: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The two members of RoPE's pairs: views, each [..., size / 2]."""
    half = keys.shape[-1] // 2
    return (keys[..., ::2], keys[..., 1::2]) if interleaved else (keys[..., :half], keys[..., half:])
