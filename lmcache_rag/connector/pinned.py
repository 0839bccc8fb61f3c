"""Tensors to and from a GPU without waiting for it.

From memory that is not pinned CUDA copies only when everything before on the stream is done: the host would wait for
the load of a request's KV before it could queue the work behind it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def on_device(values: Sequence[int] | Tensor, dtype: Any, device: Any) -> Tensor:
    """Whole numbers, or a tensor in the host's memory, as a tensor on the device."""
    import torch

    if isinstance(values, torch.Tensor):
        host = values
    else:  # by way of an array: torch.tensor takes three times as long, a millisecond for a prompt's tokens
        numbers = values if isinstance(values, array) and values else array("q", values or (0,))
        host = torch.frombuffer(numbers, dtype=torch.int64)
    host = host[: len(values)].to(dtype)
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, dtype, non_blocking=True)


class Number:
    """A number that comes back from the device.

    Args:
        value: A tensor with one element.
    """

    def __init__(self, value: Tensor) -> None:
        import torch

        self._event: Any = None
        self._host = value
        if value.is_cuda:
            self._host = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> float:
        """The number. Waits for what came before it on the stream, and for nothing behind it."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._host)
