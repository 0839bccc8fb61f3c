"""The KV cache of one request: allocated once, filled in any order, then continued by transformers' generation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    import torch


class _Layer(DynamicLayer):  # type: ignore[misc]
    """One layer in memory of a fixed capacity; appending copies nothing but the new tokens."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.all_keys, self.all_values = keys, values
        self.places: torch.Tensor | None = None
        self.set_length(0)

    def set_length(self, length: int) -> None:
        """Let the first `length` tokens be the ones that exist."""
        self.keys, self.values = self.all_keys[:, :, :length], self.all_values[:, :, :length]

    def get_seq_length(self) -> int:
        """Tokens that exist."""
        return int(self.keys.shape[2])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append; or, while a pass says places, write there and return everything up to the capacity."""
        if self.places is not None:
            self.all_keys.index_copy_(2, self.places, key_states)
            self.all_values.index_copy_(2, self.places, value_states)
            return self.all_keys, self.all_values
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        self.all_keys[:, :, start:end] = key_states
        self.all_values[:, :, start:end] = value_states
        self.set_length(end)
        return self.keys, self.values


class KVBuffer(DynamicCache):  # type: ignore[misc]
    """KV of one sequence, `capacity` tokens long.

    Args:
        layers: Number of layers.
        kv_heads: Key and value heads.
        size: Size of a head.
        capacity: Most tokens.
        like: A tensor whose dtype and device are used.
        batch: Sequences.
    """

    def __init__(
        self, layers: int, kv_heads: int, size: int, capacity: int, *, like: torch.Tensor, batch: int = 1
    ) -> None:
        super().__init__()
        memory = like.new_empty((2, layers, batch, kv_heads, capacity, size))
        self.layers = [_Layer(memory[0, i], memory[1, i]) for i in range(layers)]
        self.layer_class_to_replicate = None

    def set_length(self, length: int) -> None:
        """Let the first `length` tokens be the ones that exist."""
        for layer in self.layers:
            layer.set_length(length)

    def clear(self, places: torch.Tensor, start: int, end: int) -> None:
        """Zero these places and [start, end): a mask hides what is not there yet, but NaN would pass through it."""
        for layer in self.layers:
            for memory in (layer.all_keys, layer.all_values):
                memory.index_fill_(2, places, 0)
                memory[:, :, start:end] = 0

    def set_places(self, places: torch.Tensor | None) -> None:
        """Make the next forward pass write its KV to these places, int64 [m]; None: append again."""
        for layer in self.layers:
            layer.places = places
