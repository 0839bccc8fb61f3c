"""Quantised KV: how the numbers in vLLM's KV cache are read, and how moved keys are written.

With `--kv-cache-dtype fp8` vLLM keeps a key as one byte, float8_e4m3fn(key / k_scale), and a value as
float8_e4m3fn(value / v_scale), with one scale for each layer. A blend's passes write KV by the attention backend's own
operation, so that it is vLLM's to the bit. What is here reads it. A key is moved without its scale: the rotation of a
multiple is the multiple of the rotation.

The numbers are rounded to nearest, ties to even, and saturate at 448, as by CUDA's __nv_cvt_float_to_fp8 with
__NV_SATFINITE, which vLLM's reshape_and_cache_flash calls; NaN stays NaN, so that damage shows. vLLM's build for CPUs
cuts instead of rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FP8_NAMES = ("fp8", "fp8_e4m3")  # of vLLM's --kv-cache-dtype
E4M3_MAX = 448.0
_LMCACHE_E4M3 = "fp8_e4m3"  # see LMCache's cb_register_rope


def lmcache_name(layer: Any) -> str:
    """LMCache's name for the type of a layer's cache if that is FP8; else ""."""
    return _LMCACHE_E4M3 if layer.kv_cache_dtype in FP8_NAMES else ""


def is_fp8(cache: Tensor) -> bool:
    """Whether a cache, as `as_numbers` returns it, holds e4m3 numbers."""
    import torch

    return cache.dtype == torch.float8_e4m3fn


def as_numbers(cache: Tensor) -> Tensor:
    """A cache whose type says what is in it: vLLM keeps FP8 KV as bytes (uint8). No copy."""
    import torch

    return cache.view(torch.float8_e4m3fn) if cache.dtype == torch.uint8 else cache


def take(cache: Tensor, *index: Any) -> Tensor:
    """Elements of a cache by indices; FP8 as float32, without scale."""
    import torch

    if not is_fp8(cache):
        found: Tensor = cache[index]
        return found
    # As bytes: PyTorch has few operations for this type.
    return cache.view(torch.uint8)[index].view(torch.float8_e4m3fn).float()


def put(cache: Tensor, index: Any, numbers: Tensor) -> None:
    """Write numbers, without scale, to a cache at indices; rounded to its type."""
    import torch

    if not is_fp8(cache):
        cache[index] = numbers.to(cache.dtype)
        return
    rounded = numbers.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    cache.view(torch.uint8)[index] = rounded.view(torch.uint8)


def fill(cache: Tensor, index: Any, number: float) -> None:
    """Write one number to all elements at an index."""
    import torch

    put(cache, index, torch.tensor(number, device=cache.device))


def scales(layer: Any) -> tuple[float, float, float]:
    """What the numbers of a layer of vLLM's are to be multiplied by: queries (if they are FP8), keys, values."""
    if layer.kv_cache_dtype not in FP8_NAMES:
        return 1.0, 1.0, 1.0
    return float(layer._q_scale_float), float(layer._k_scale_float), float(layer._v_scale_float)
