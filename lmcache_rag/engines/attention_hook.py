"""Our attention function for transformers models, by their own registry of attention functions.

The model's own forward runs unchanged; only the attention itself is ours. A pass that needs more than plain causal
attention hands a `ForwardPass` to the model's forward as ``blend_pass=``, and it arrives here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from lmcache_rag.blend.attention import PositionAttention

if TYPE_CHECKING:
    from torch import Tensor

NAME = "lmcache_rag"


class ForwardPass(Protocol):
    """Attention of one forward pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[1, heads, m, size], twice [1, kv heads, n, size] -> [1, heads, m, size]."""
        ...


@lru_cache(maxsize=8)
def _tail(rows: int, keys: int, device: str) -> PositionAttention:
    """Plain causal attention of the last `rows` of `keys` tokens; the same in every layer of a pass."""
    import torch

    return PositionAttention(torch.arange(keys - rows, keys, device=device))


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    blend_pass: ForwardPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer. No padding masks: this library never pads on the left."""
    from torch.nn.functional import scaled_dot_product_attention

    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    rows, keys = query.shape[2], key.shape[2]
    if blend_pass is not None:
        out = blend_pass.attend(module.layer_idx, query, key, value, scale)
    elif rows in (1, keys):
        gqa = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(query, key, value, is_causal=rows > 1, scale=scale, enable_gqa=gqa)
    else:
        out = _tail(rows, keys, str(query.device))(query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


def register() -> str:
    """Make the function known to transformers; returns its name. Without a mask function no mask is ever built."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    return NAME
