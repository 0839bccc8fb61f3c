"""What a forward pass of ours does in each layer, in the place of the backend's attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from lmcache_rag.connector.attention import FixedAttention, PagedAttention


class StopForward(Exception):  # noqa: N818 - not an error: ends a forward pass early
    """Raised inside a layer once all that was wanted is known."""


class Attention(Protocol):
    """What a forward pass does in each layer."""

    def before_write(self, layer: int, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
        """Called before the layer's fresh KV [m, kv heads, size] is written over what the cache holds."""
        ...

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """Query and out [m, heads, size]; keys and values [blocks, block, kv heads, size]."""
        ...


class Nothing:
    """No attention at all: what else a pass takes is wanted."""

    def before_write(self, layer: int, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
        """Nothing."""

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """Nothing is seen."""
        out.zero_()


class Redo(Nothing):
    """Attention by position over everything that is there."""

    def __init__(self, attention: PagedAttention) -> None:
        self._attention = attention

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """Attention by position."""
        self._attention.attend(query, keys, values, scale, out)


class Watch(Nothing):
    """The suffix's rows; from a layer on, adds up what they look at.

    Args:
        attention: Of the rows.
        mass: Where it is added up, float32 [kv heads, n].
        first_layer: The first layer that counts.
        reduce: "sum" or "max" over rows, heads and layers.
        last_layer: Where the pass ends, since its output is not needed; None: every layer runs to its end.
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
        """Attention; the upper layers' probabilities are added up."""
        lse = self._attention.attend(query, keys, values, scale, out)
        if layer >= self._first:
            self._attention.add_mass(query, keys, scale, lse, self._mass, reduce=self._reduce)
        if layer == self._last:
            raise StopForward


class Check(Redo):
    """All tokens through the first layers; notes how far the check layer's fresh KV is from the cached one."""

    def __init__(self, attention: PagedAttention, slots: Tensor, layer: int) -> None:
        super().__init__(attention)
        self._slots, self._layer = slots, layer
        self.deviation: Tensor | None = None

    def before_write(self, layer: int, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
        """At the check layer: compare, and write nothing."""
        if layer < self._layer:
            return
        block = keys.shape[1]
        at, within = self._slots // block, self._slots % block
        total = None
        for fresh, cached in ((key, keys), (value, values)):
            distance = (fresh.float() - cached[at, within].float()).square().sum((1, 2))
            total = distance if total is None else total + distance
        self.deviation = total
        raise StopForward
