"""The forward passes of a blend on a transformers model: selection passes and the redo pass."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lmcache_rag.blend.attention import PositionAttention, attention_with_mass

if TYPE_CHECKING:
    from torch import Tensor

    from lmcache_rag.blend.policies import Layout
    from lmcache_rag.engines.hf_model import HFModel
    from lmcache_rag.engines.kv_buffer import KVBuffer


class _Stop(Exception):  # noqa: N818 - not an error: ends a forward pass early
    """Raised inside a layer once all that was wanted is known."""


class RedoPass:
    """Computes the selected tokens anew, each seeing everything before it."""

    def __init__(self, positions: Tensor) -> None:
        self._attention = PositionAttention(positions)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention by position."""
        return self._attention(query, key, value, scale)


class _MassPass:
    """The suffix's rows over the placed KV; from a layer on, counts what they look at."""

    def __init__(self, positions: Tensor, hidden: Tensor, first_layer: int, last_layer: int, reduce: str) -> None:
        self._attention = PositionAttention(positions, rows=len(positions), hidden=hidden)
        ((_, _, self._keys, self._mask),) = self._attention.masks()
        self._first, self._last, self._reduce = first_layer, last_layer, reduce
        self.mass: Tensor | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention; the upper layers' probabilities are added up."""
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
            raise _Stop
        return out


class _CheckPass:
    """All tokens through the first layers; stops where the check layer's fresh KV exists."""

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
        raise _Stop


class ModelPasses:
    """What a policy may ask of the model; see lmcache_rag.blend.policies.Passes.

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

    def suffix_attention(self, *, window: int, from_layer: float, reduce: str) -> Tensor:
        """See Passes. Tokens whose KV does not exist yet are hidden from the rows."""
        import torch

        first = max(self._suffix_start, len(self._ids) - window)
        rows = torch.arange(first, len(self._ids), device=self._ids.device)
        unseen = torch.arange(self._suffix_start, first, device=self._ids.device)
        layers = self._model.layers
        run = _MassPass(rows, torch.cat([self._gaps, unseen]), int(from_layer * layers), layers - 1, reduce)
        self._run(rows, run)
        assert run.mass is not None  # noqa: S101 - the last layer always counts
        return run.mass[self._layout.cached]

    def deviation(self, *, layer: int) -> Tensor:
        """See Passes."""
        import torch

        places = torch.arange(self._start, self._suffix_start, device=self._ids.device)
        at = self._cache.layers[layer]
        run = _CheckPass(places, layer, at.all_keys, at.all_values)
        self._run(places, run)
        assert run.deviation is not None  # noqa: S101 - the check layer always stops the pass
        return run.deviation[self._layout.cached]

    def _run(self, places: Tensor, run: _MassPass | _CheckPass) -> None:
        with contextlib.suppress(_Stop):
            self._model.forward(self._ids[places][None], places, self._cache, run)
