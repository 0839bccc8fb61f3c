"""The rotary embedding (RoPE) of a loaded model, by which the keys of a chunk are moved.

vLLM's own classes have one in each attention layer. A model of its Transformers backend runs the code of transformers,
which computes the angles once in each pass, for all layers; `TransformersRotary` makes the table of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmcache_rag.families import TRANSFORMERS_BACKEND

if TYPE_CHECKING:
    from torch import Tensor


def decoder_of(model: Any) -> Any:
    """The module with the decoder's layers; the language model's if there is a vision tower beside it."""
    return getattr(model, "language_model", model).model


def rotary_of(model: Any) -> Any:
    """The rotary embedding that all layers share: vLLM's RotaryEmbedding, or what looks like it."""
    return rotaries_of(model)[0]


def rotaries_of(model: Any) -> list[Any]:
    """The rotary embedding of each layer; None where a layer leaves its keys as they are (NoPE)."""
    decoder = decoder_of(model)
    attentions = [layer.self_attn for layer in decoder.layers]
    if type(model).__name__ != TRANSFORMERS_BACKEND:
        return [getattr(attention, "rotary_emb", None) if _is_used(attention) else None for attention in attentions]
    config = model.model_config
    shared = TransformersRotary(
        decoder.rotary_emb, int(attentions[0].head_dim), int(config.max_model_len), config.dtype
    )
    return [shared if _is_used(attention) else None for attention in attentions]


def _is_used(attention: Any) -> bool:
    """Whether a layer rotates its keys. Cohere2 (`v1` is false) has a rotary embedding even where it does not."""
    return bool(getattr(attention, "v1", True)) and bool(getattr(attention, "use_rope", True))


class TransformersRotary:
    """The rotary embedding of a model of transformers, with what is used of vLLM's RotaryEmbedding.

    Args:
        module: transformers' module, called with a tensor of the wanted type and positions [1, n].
        head_size: Size of a head.
        positions: Number of positions.
        dtype: Type of the model's keys.

    Attributes:
        kind: transformers' name of the scaling, such as "yarn".
        rotary_dim: How much of each head is rotated.
        is_neox_style: Whether halves of a head, rather than neighbours, are rotated together. They are in each decoder
            of lmcache_rag.families.TRANSFORMERS_DECODERS.
    """

    is_neox_style = True

    def __init__(self, module: Any, head_size: int, positions: int, dtype: Any) -> None:
        self._module, self._positions, self._dtype = module, positions, dtype
        self.head_size = head_size
        self.kind = str(getattr(module, "rope_type", ""))
        self.rotary_dim = 2 * module.inv_freq.numel()

    @property
    def cos_sin_cache(self) -> Tensor:
        """Cosines, then sines, of each position, [positions, rotary_dim], in the type of the model's keys."""
        return self._compute_cos_sin_cache().to(self._dtype)

    def _compute_cos_sin_cache(self) -> Tensor:
        """The same in float32; vLLM's method of this name does that too."""
        import torch

        device = self._module.inv_freq.device
        places = torch.arange(self._positions, device=device)
        angles = self._module(torch.empty(0, dtype=torch.float32, device=device), places[None])
        return torch.cat([table[0, :, : self.rotary_dim // 2] for table in angles], 1)
