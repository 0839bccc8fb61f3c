"""vLLM workers whose tensor-parallel ranks share one GPU, to try several ranks where there is only one.

NCCL refuses two ranks on one device, so gloo carries what they say to each other: right, and slow. It cannot be
recorded in a CUDA graph; use it with `enforce_eager=True`, `distributed_executor_backend="mp"` and
VLLM_DISABLE_PYNCCL=1.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm.v1.worker.gpu_worker import Worker

FOLDER = "LMCACHE_RAG_BENCHMARK_FOLDER"
"""Environment variable: where ranks write what they say at debug level (`rank0.log`, ...), and look for `fault`. While
that file is there, KV never arrives on the last rank."""


def watch(rank: int, ranks: int, folder: Path) -> None:
    """Write down what this rank says, and let its loads fail when asked: nothing real makes one rank alone fail."""
    import logging

    from lmcache_rag.connector.compat_lmcache import WorkerLink

    log = logging.getLogger("lmcache_rag")
    handler = logging.FileHandler(folder / f"rank{rank}.log")
    handler.setLevel(logging.DEBUG)
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    if rank != ranks - 1:
        return
    arrived = WorkerLink.arrived

    def arrived_or_not(self: WorkerLink, future: Any, seconds: float) -> bool:
        return arrived(self, future, seconds) and not (folder / "fault").exists()

    WorkerLink.arrived = arrived_or_not  # type: ignore[method-assign]


class RankWorker(Worker):
    """A rank on a GPU of its own."""

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
