"""The suffix pass of policy `query` as one CUDA graph: a prompt's last tokens run through all layers.

Their attention is summed.

Launched layer by layer, a pass over few tokens is limited by the host. Everything that differs between requests is in
tensors with fixed addresses; the graph is captured once over them and replayed for each request.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from lmcache_rag.connector.attention import FixedAttention, ObserveAttention

if TYPE_CHECKING:
    from torch import Tensor

    from lmcache_rag.connector.attention import Attention, PagedSequence

    Forward = Callable[[Tensor, Tensor, Tensor, Attention], object]

ROWS = 64  # rows of one tile of the kernels, and the default policy's window


class Graph(Protocol):
    """GPU work that is captured once and replayed."""

    def capture(self, work: Callable[[], None]) -> None:
        """Capture the work."""
        ...

    def replay(self) -> None:
        """Run it again on the current contents of its tensors."""
        ...


class CudaGraph:
    """A CUDA graph with a private memory pool.

    vLLM's graphs share a pool, in which each may overwrite the others' results: only outputs of graphs that vLLM itself
    captured are kept out of it. This graph needs little more than the partial results of one layer's attention (splits
    x rows x heads x size in float32: 32 x 64 x 32 x 128 x 4 bytes = 34 MB for an 8B Llama) and the activations of 64
    tokens.

    Args:
        capture_context: Context manager entered during the capture; gives the stream to capture on. None: a new stream.
    """

    def __init__(self, capture_context: Callable[[], AbstractContextManager[Any]] | None = None) -> None:
        import torch

        self._graph = torch.cuda.CUDAGraph()
        self._capture_context = capture_context or _side_stream

    def capture(self, work: Callable[[], None]) -> None:
        """Run the work twice on a side stream, to compile and allocate what a capture may not; then capture it."""
        import torch

        torch.cuda.synchronize()
        with self._capture_context() as side:
            for _ in range(2):
                work()
            torch.cuda.synchronize()
            # Other threads of a worker (LMCache's heartbeat) may call CUDA meanwhile: that must not end the capture.
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                work()
        torch.cuda.synchronize()

    def replay(self) -> None:
        """Queue the graph on the current stream."""
        self._graph.replay()


@contextlib.contextmanager
def _side_stream() -> Iterator[Any]:
    import torch

    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        yield side


class CapturedQueryPass:
    """The attention that a prompt's last tokens give to each token before them, computed by a captured graph.

    Args:
        forward: The model's forward pass; see lmcache_rag.connector.blend_pass.Model. A slot of -1 is not written.
        layers: Number of layers of the model.
        kv_heads: Key and value heads of this rank.
        block_size: Tokens in a block of the cache.
        longest: Maximum length of a sequence, in tokens.
        device: Device of the cache.
        from_layer: First layer that counts, as a share of the model's depth.
        reduce: "sum" or "max" over rows, heads and layers.
        graph: Captures and replays the pass; None: a CUDA graph.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        layers: int,
        kv_heads: int,
        block_size: int,
        longest: int,
        device: Any,
        from_layer: float,
        reduce: str,
        graph: Graph | None = None,
    ) -> None:
        import torch

        self._forward, self._longest = forward, longest
        self._parameters = (from_layer, reduce)

        def filled(value: int, *shape: int, dtype: torch.dtype) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self._ids = filled(0, ROWS, dtype=torch.int32)
        self._positions = filled(0, ROWS, dtype=torch.int64)  # the rotary table has no row -1
        self._slots = filled(-1, ROWS, dtype=torch.int64)
        self._attention = FixedAttention(
            blocks=filled(0, -(-longest // block_size), dtype=torch.int32),
            block_size=block_size,
            positions=filled(-1, ROWS, dtype=torch.int32),
            end=filled(1, 1, dtype=torch.int32),
            visible=filled(1, longest, dtype=torch.uint8),
        )
        self._mass = filled(0, kv_heads, longest, dtype=torch.float32)
        self._observe = ObserveAttention(self._attention, self._mass, int(from_layer * layers), reduce)
        self._graph = CudaGraph() if graph is None else graph

    def capture(self) -> None:
        """Capture the pass. It writes no KV: all rows are padding."""
        import torch

        with torch.inference_mode():
            self._graph.capture(self._forward_once)

    def supports(self, *, rows: int, end: int, from_layer: float, reduce: str) -> bool:
        """Whether the graph can run this many rows over this length, with these parameters of the policy."""
        return rows <= ROWS and end <= self._longest and (from_layer, reduce) == self._parameters

    def run(
        self, ids: Tensor, rows: Tensor, slots: Tensor, sequence: PagedSequence, *, end: int, hidden: Tensor
    ) -> Tensor:
        """Run the last tokens of a sequence, and write their KV. Never waits for the GPU.

        Args:
            ids: Token ids of the rows, int64 [m], m <= 64.
            rows: Positions of the rows, int64 [m], ascending.
            slots: Slots for the rows' KV, int64 [m].
            sequence: The sequence's blocks.
            end: Largest position + 1.
            hidden: Positions before the end that are masked, int64.

        Returns:
            Attention that each position got, float32 [kv heads, end]. The next call overwrites it.
        """
        count, fixed = len(rows), self._attention
        for buffer, values, padding in (
            (self._ids, ids, 0),
            (self._positions, rows, 0),
            (self._slots, slots, -1),
            (fixed.positions, rows, -1),
        ):
            buffer[:count].copy_(values)
            buffer[count:].fill_(padding)
        blocks = sequence.blocks[: -(-end // fixed.block_size)]
        fixed.blocks[: len(blocks)].copy_(blocks)
        fixed.visible[:end].fill_(1).index_fill_(0, hidden, 0)
        fixed.end.fill_(end)
        self._graph.replay()
        return self._mass[:, :end]

    def _forward_once(self) -> None:
        self._mass.zero_()
        self._forward(self._ids, self._positions, self._slots, self._observe)
