"""vLLM workers whose tensor-parallel ranks share one GPU, to try several ranks where there is only one.

NCCL does not support two ranks on one device, so they communicate by gloo: correct, but slow. It cannot be
recorded in a CUDA graph; use it with `enforce_eager=True`, `distributed_executor_backend="mp"` and
VLLM_DISABLE_PYNCCL=1.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm.v1.worker.gpu_worker import Worker

FOLDER = "LMCACHE_RAG_BENCHMARK_FOLDER"
"""Environment variable: folder for the ranks' debug logs (`rank0.log`, ...) and for files that cause faults. While
`fault` is there, KV never arrives on the last rank; while `full` is there, something else holds that rank's memory, but
for what passes of few tokens take."""


def all_but(left: int) -> list[Any]:
    """Leave PyTorch's allocator one piece of `left` bytes and nothing else: its reservation is limited, and filled.

    A limit rather than real memory: free space inside of what is reserved already counts too, and other processes on
    this GPU keep theirs.
    """
    import torch

    hole = torch.empty(left, dtype=torch.uint8, device="cuda")
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1])
    held: list[Any] = []
    for size in (64 << 20, 8 << 20, 1 << 20, 64 << 10, 4 << 10, 512):
        while True:
            try:
                held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                break
    del hole
    return held


def all_again(held: list[Any]) -> None:
    """Free what `all_but` holds, and lift its limit."""
    import torch

    held.clear()
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def weigh(rank: int, full: Path | None) -> None:
    """Log how much memory passes reserved and used; leave little memory while the file exists."""
    import logging

    import torch

    from lmcache_rag.connector.job import SMALL, BlendJob

    held: list[Any] = []
    asked: dict[str, int] = {}
    has_memory, advance = BlendJob.has_memory, BlendJob.advance

    def has_memory_or_not(self: BlendJob) -> bool:
        memory, prompt = self._resources.model._memory, len(self.plan.token_ids)
        need = memory.need if memory is not None else lambda tokens, length: 0  # a single rank reserves nothing
        if full is not None and full.exists() and not held:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            # Between what small passes need and what this one asks for. A single rank reserves nothing, and runs out.
            few, many = need(SMALL, prompt), need(min(self.blend.chunk_size, prompt), prompt)
            held.extend(all_but((few + many) // 2 or 2 << 20))
        elif held and full is not None and not full.exists():
            all_again(held)
        asked[self.plan.request_id] = need(min(self.blend.chunk_size, prompt), prompt)
        fine = has_memory(self)
        torch.cuda.reset_peak_memory_stats()  # without the reservation, which is freed at once
        return fine

    def advance_and_weigh(self: BlendJob, tokens: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        done = advance(self, tokens)
        took, name = torch.cuda.max_memory_allocated() - before, self.plan.request_id
        logging.getLogger("lmcache_rag").debug("memory on rank %d: %d asked, %d taken", rank, asked.get(name, 0), took)
        return done

    BlendJob.has_memory = has_memory_or_not  # type: ignore[method-assign]
    BlendJob.advance = advance_and_weigh  # type: ignore[method-assign]


def watch(rank: int, ranks: int, folder: Path) -> None:
    """Write this rank's debug log, and make its loads fail on request: no real fault affects one rank alone."""
    import logging

    from lmcache_rag.connector.lmcache_transfers import LMCacheLoader

    log = logging.getLogger("lmcache_rag")
    handler = logging.FileHandler(folder / f"rank{rank}.log")
    handler.setLevel(logging.DEBUG)
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    weigh(rank, folder / "full" if rank == ranks - 1 else None)
    if rank != ranks - 1:
        return
    arrived = LMCacheLoader.arrived

    def arrived_or_not(self: LMCacheLoader, future: Any, seconds: float) -> bool:
        return arrived(self, future, seconds) and not (folder / "fault").exists()

    LMCacheLoader.arrived = arrived_or_not  # type: ignore[method-assign]


class RankWorker(Worker):
    """A rank on its own GPU."""

    def init_device(self) -> None:
        """As vLLM does."""
        watch(self.rank, self.parallel_config.world_size, Path(os.environ[FOLDER]))
        super().init_device()


class OneGPUWorker(RankWorker):
    """A rank on the GPU of all."""

    def init_device(self) -> None:
        """As vLLM does, on the first GPU."""
        from vllm.platforms import current_platform

        self.local_rank = 0
        type(current_platform).dist_backend = "gloo"
        super().init_device()
