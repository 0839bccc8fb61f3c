"""The pass of policy `query` as one CUDA graph: a prompt's last tokens through all layers, what they look at added up.

Launched layer by layer, so few tokens keep the host busier than the GPU. Everything that differs between requests
stands in tensors that stay where they are; the graph is captured once, over those, and replayed for each request.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from lmcache_rag.connector.attention import FixedAttention, Watch

if TYPE_CHECKING:
    from torch import Tensor

    from lmcache_rag.connector.attention import Attention, PagedSequence

    Forward = Callable[[Tensor, Tensor, Tensor, Attention], object]

ROWS = 64  # what the kernels take in one tile, and the default policy's window


class Graph(Protocol):
    """Work on a GPU that is recorded once."""

    def capture(self, work: Callable[[], None]) -> None:
        """Record."""
        ...

    def replay(self) -> None:
        """Do it again, with what the tensors hold now."""
        ...


class CudaGraph:
    """A CUDA graph with memory of its own.

    vLLM's graphs share a pool, where each may overwrite what the others left: their outputs stay out of it only as far
    as vLLM itself captured them. Ours needs little more than the partial results of one layer's attention: splits x
    rows x heads x size in float32, 32 x 64 x 32 x 128 x 4 bytes = 34 MB for an 8B Llama, and the activations of 64
    tokens.

    Args:
        surroundings: Entered while work is recorded; gives the stream to record on. None: a stream of its own.
    """

    def __init__(self, surroundings: Callable[[], AbstractContextManager[Any]] | None = None) -> None:
        import torch

        self._graph = torch.cuda.CUDAGraph()
        self._surroundings = surroundings or _side_stream

    def capture(self, work: Callable[[], None]) -> None:
        """Run the work twice on a side stream, which compiles and allocates what may not be in a capture; record."""
        import torch

        torch.cuda.synchronize()
        with self._surroundings() as side:
            for _ in range(2):
                work()
            torch.cuda.synchronize()
            # Other threads of a worker (LMCache's heartbeat) may call CUDA meanwhile: that must not end the capture.
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                work()
        torch.cuda.synchronize()

    def replay(self) -> None:
        """Queue it on the current stream."""
        self._graph.replay()


@contextlib.contextmanager
def _side_stream() -> Iterator[Any]:
    import torch

    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        yield side


class CapturedWatch:
    """The attention that a prompt's last tokens give to each token before them, by a captured graph.

    Args:
        forward: The model's forward pass; see lmcache_rag.connector.blend_pass.Model. A slot of -1 is not written.
        layers: Layers of the model.
        kv_heads: Key and value heads of this rank.
        block: Tokens in a block of the cache.
        longest: Most tokens of a sequence.
        device: Where the cache lies.
        from_layer: First layer that counts, as a share of the model's depth.
        reduce: "sum" or "max" over rows, heads and layers.
        graph: Records the pass; a CUDA graph unless told otherwise.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        layers: int,
        kv_heads: int,
        block: int,
        longest: int,
        device: Any,
        from_layer: float,
        reduce: str,
        graph: Graph | None = None,
    ) -> None:
        import torch

        self._forward, self._longest = forward, longest
        self._asked = (from_layer, reduce)

        def filled(value: int, *shape: int, dtype: torch.dtype) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self._ids = filled(0, ROWS, dtype=torch.int32)
        self._positions = filled(0, ROWS, dtype=torch.int64)  # the rotary table has no row -1
        self._slots = filled(-1, ROWS, dtype=torch.int64)
        self._attention = FixedAttention(
            blocks=filled(0, -(-longest // block), dtype=torch.int32),
            block=block,
            positions=filled(-1, ROWS, dtype=torch.int32),
            end=filled(1, 1, dtype=torch.int32),
            visible=filled(1, longest, dtype=torch.uint8),
        )
        self._mass = filled(0, kv_heads, longest, dtype=torch.float32)
        self._watch = Watch(self._attention, self._mass, int(from_layer * layers), reduce)
        self._graph = CudaGraph() if graph is None else graph

    def capture(self) -> None:
        """Record the pass. Writes no KV: all rows are to spare."""
        import torch

        with torch.inference_mode():
            self._graph.capture(self._run)

    def takes(self, *, rows: int, end: int, from_layer: float, reduce: str) -> bool:
        """Whether the graph answers this: so many rows, so long a sequence, and what is wanted of it."""
        return rows <= ROWS and end <= self._longest and (from_layer, reduce) == self._asked

    def watch(
        self, ids: Tensor, rows: Tensor, slots: Tensor, sequence: PagedSequence, *, end: int, hidden: Tensor
    ) -> Tensor:
        """Run the last tokens of a sequence; their KV is written. Never waits for the GPU.

        Args:
            ids: Their token ids, int64 [m], m <= 64.
            rows: Their positions, int64 [m], ascending.
            slots: Where their KV goes, int64 [m].
            sequence: The sequence's blocks.
            end: Largest position + 1.
            hidden: Positions before the end that nobody may see, int64.

        Returns:
            Attention that each position got, float32 [kv heads, end]. The next call overwrites it.
        """
        count, fixed = len(rows), self._attention
        for buffer, given, spare in (
            (self._ids, ids, 0),
            (self._positions, rows, 0),
            (self._slots, slots, -1),
            (fixed.positions, rows, -1),
        ):
            buffer[:count].copy_(given)
            buffer[count:].fill_(spare)
        blocks = sequence.blocks[: -(-end // fixed.block)]
        fixed.blocks[: len(blocks)].copy_(blocks)
        fixed.visible[:end].fill_(1).index_fill_(0, hidden, 0)
        fixed.end.fill_(end)
        self._graph.replay()
        return self._mass[:, :end]

    def _run(self) -> None:
        self._mass.zero_()
        self._forward(self._ids, self._positions, self._slots, self._watch)
