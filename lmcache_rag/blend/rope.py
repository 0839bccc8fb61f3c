"""Move keys to new positions.

A cached key was turned by RoPE to the position where it was computed. At position b instead of a it is the same key
turned by the angle between the two. That angle comes from the model's own rotary embedding, so every kind of scaling
(linear, llama3, yarn) is right by construction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def shift_tables(rotary: Any, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle between two positions, from the model's own rotary embedding.

    The model's tables are read at both positions and subtracted as angles, rather than read at new - old: in float32
    the angle at 8,000 is rounded, and a moved key must carry the same rounding as one computed there.

    Args:
        rotary: The model's rotary module: rotary(x, position_ids [1, n]) -> (cos, sin) [1, n, size].
        old: Positions where the keys were computed, int64 [n].
        new: Positions where they go, int64 [n].

    Returns:
        cos and sin, float32 [n, size].
    """
    import torch

    probe = torch.empty(0, dtype=torch.float32, device=old.device)
    cos_a, sin_a = (t[0].double() for t in rotary(probe, old[None]))
    cos_b, sin_b = (t[0].double() for t in rotary(probe, new[None]))
    # Some scalings (yarn) multiply cos and sin by a factor; the key has it already.
    square = cos_a.square() + sin_a.square()
    return ((cos_a * cos_b + sin_a * sin_b) / square).float(), ((sin_b * cos_a - cos_b * sin_a) / square).float()


def shift_keys(keys: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Turn keys by the angles of `shift_tables`, half-split layout (Llama, Mistral, Qwen).

    Args:
        keys: [..., n, size].
        cos: float32 [n, size], as from shift_tables (both halves are equal).
        sin: float32 [n, size].
        out: Where to write; may not overlap keys.
    """
    import torch

    half = keys.shape[-1] // 2
    if out is None:
        out = torch.empty_like(keys)
    if keys.dtype != torch.float32:  # round once, at the end
        return out.copy_(shift_keys(keys.float(), cos, sin))
    cos, sin = cos[:, :half], sin[:, :half]
    first, second = keys[..., :half], keys[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out
