"""GPU memory for a blend's passes, asked for before they begin.

A tensor-parallel rank that runs out of memory in the middle of a pass cannot leave it: the others wait for its part of
each layer's sum. So ranks ask beforehand, and vote. What was asked for and given back stays with PyTorch's allocator,
and is there when the pass takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MARGIN = 1.25  # what is asked for is one piece, and is handed out in many
_FEW, _MANY = 512, 2048  # two sizes of passes: what one takes more for each token, any takes
_SCORES = 24  # bytes for a token of the prompt: the selection's int64 and float32 vectors, some at the same time
_DISTANCES = 5  # float32 copies of fresh and cached keys and values that a check layer compares


@dataclass(frozen=True)
class PassMemory:
    """What a pass of a blend takes on this rank.

    Attributes:
        fixed: Bytes for any pass.
        token: Bytes for each of its tokens.
        behind: Bytes for each token of the sequence that it looks at.
        device: Where.
    """

    fixed: float
    token: float
    behind: float
    device: Any

    def need(self, tokens: int, length: int) -> int:
        """Bytes for passes of so many tokens in a sequence of that length."""
        return int(MARGIN * (self.fixed + tokens * self.token + length * self.behind))

    def room(self, tokens: int, length: int) -> bool:
        """Whether this rank has that much; it has it from now on."""
        import torch

        try:
            torch.empty(self.need(tokens, length), dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            return False
        return True


def measured(
    run: Callable[[Tensor, Tensor, Tensor], object], most: int, *, heads: int, cache: tuple[Tensor, Tensor], splits: int
) -> PassMemory:
    """What passes take, from one of few tokens and one of many. Tensor-parallel ranks do so together.

    Args:
        run: Runs all layers over ids and positions, int64 [m], and slots, int64 [m], of which none is written.
        most: Most tokens of a pass.
        heads: Query heads of this rank.
        cache: Keys and values of a layer.
        splits: Most parts into which the attention of few tokens divides the keys.
    """
    keys = cache[0]
    kv_heads, size = int(keys.shape[2]), int(keys.shape[3])
    few, many = min(_FEW, most), min(_MANY, most)
    small, large = _peak(run, few, keys.device), _peak(run, many, keys.device)
    token = (large - small) / (many - few) if many > few else small / few
    return PassMemory(
        fixed=max(small - few * token, 0.0) + splits * 128 * heads * (size + 1) * 4,
        token=token + _DISTANCES * kv_heads * size * 4,
        behind=2 * kv_heads * size * keys.element_size() + 4 * kv_heads + _SCORES * 8,
        device=keys.device,
    )


def _peak(run: Callable[[Tensor, Tensor, Tensor], object], tokens: int, device: Any) -> int:
    """Bytes that a pass of so many tokens takes at its worst, beside what was there."""
    import torch

    ids = torch.zeros(tokens, dtype=torch.int64, device=device)
    slots = torch.full_like(ids, -1)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.inference_mode():
        run(ids, ids, slots)
    return torch.cuda.max_memory_allocated(device) - before
