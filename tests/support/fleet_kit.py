"""Several LMCache servers and a coordinator as processes; only the copy from a GPU is replaced.

As a program: LMCache's own command line, as `lmcache-rag serve` runs it, with that replacement.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmcache_rag.connector.server_guard import MODULE
from lmcache_rag.serving.tiers import second_tier

CHUNK, BYTES = 64, 1024  # of a token
MODEL = "m"


def content(chunk_hash: bytes, size: int) -> bytes:
    """The KV of a chunk, as the replaced copy makes it."""
    piece = hashlib.sha256(chunk_hash).digest()
    return (piece * (size // len(piece) + 1))[:size]


def copy(module: Any, key: Any, _: int, blocks: list[list[int]], __: bytes) -> tuple[bytes, bool, list[bool]]:
    """LMCache's store_with_chunk_mask, without a GPU."""
    keys = module._ctx.resolve_obj_keys(key, [0])[0]
    storage = module._ctx.storage_manager
    reserved = storage.reserve_write(keys, layout())
    for each, memory in reserved.items():
        view = memoryview(memory.byte_array).cast("B")
        view[:] = content(each.chunk_hash, len(view))
    storage.finish_write_by_owner(storage.prepare_write_completion(reserved) if reserved else [])
    return b"", True, [each in reserved for each in keys]


def layout() -> Any:
    import torch
    from lmcache.v1.distributed.api import MemoryLayoutDesc

    return MemoryLayoutDesc(shapes=[torch.Size([1, 1, CHUNK, BYTES // 4])], dtypes=[torch.float32])


def main() -> None:
    from lmcache.v1.multiprocess import server
    from lmcache.v1.multiprocess.modules.lmcache_driven_transfer import LMCacheDrivenTransferModule

    from lmcache_rag.serving.lmcache_server import main as lmcache

    made = server.MPCacheServerContext.__init__

    def init(context: Any, *args: Any, **kwargs: Any) -> None:
        made(context, *args, **kwargs)
        context.layout_desc_registry.register(MODEL, 1, layout())

    server.MPCacheServerContext.__init__ = init
    LMCacheDrivenTransferModule.store_with_chunk_mask = copy
    lmcache()


if __name__ == "__main__":
    main()
else:
    import httpx
    import zmq
    from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey
    from lmcache.v1.multiprocess.transport.factory import RequestClientFactory
    from vllm_cpu_kit import BIN, Process, answers, counter, free_port, until


def key(
    tokens: Sequence[int], request: str, salt: str = "", configs: dict[str, Any] | None = None, *, worker: int | None
) -> Any:
    """An LMCache key of these tokens, or for a worker of their whole chunks."""
    end = len(tokens) // CHUNK * CHUNK if worker is not None else len(tokens)
    return IPCCacheServerKey.from_token_ids(MODEL, 1, worker, list(tokens), 0, end, request, salt, 1, configs)


class Node:
    """One LMCache server.

    Args:
        folder: For its logs.
        name: Its --instance-id.
        coordinator: URL, or "".
        tier: A value of --l2, or "".
        config: Of --server-module.
        options: More of LMCache's options.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        coordinator: str = "",
        tier: str = "",
        config: dict[str, Any] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.log, self.name = folder / f"{name}.log", name
        self.port, self.http = free_port(), free_port()
        self._options = [*options]
        if coordinator:
            self._options += ["--coordinator-url", coordinator, "--coordinator-event-reporting"]
            self._options += ["--coordinator-blend-timeout", "0.25", "--coordinator-heartbeat-interval", "1"]
        if tier:
            self._options += ["--l2-adapter", second_tier(tier)]
        self._options += ["--server-module", json.dumps({"module_path": MODULE, "config": config or {}})]
        self._requests = 0
        self._starts = 0
        self.start()

    def start(self) -> None:
        self._starts += 1
        line = f"server --engine-type blend --supported-transfer-mode lmcache_driven --chunk-size {CHUNK}"
        line += f" --l1-size-gb 0.1 --eviction-policy LRU --host localhost --port {self.port} --http-host 127.0.0.1"
        line += f" --http-port {self.http} --instance-id {self.name}"
        self.log = self.log.with_name(f"{self.name}-{self._starts}.log")
        self.process = Process([sys.executable, __file__, *line.split(), *self._options], self.log)
        self.process.wait_for(lambda: answers(f"http://127.0.0.1:{self.http}/healthcheck"), 120)
        self.client = RequestClientFactory.create(f"tcp://localhost:{self.port}", context=zmq.Context.instance())

    def kill(self) -> None:
        with contextlib.suppress(Exception):
            self.client.close()
        self.process.kill()

    def restart(self) -> None:
        self.kill()
        self.start()

    def store(self, tokens: Sequence[int], salt: str = "", **configs: Any) -> bool:
        """Store a prompt, as a worker does; by default as an ingestion."""
        self._requests += 1
        configs = {f"lmcache_rag.{name}": value for name, value in (configs or {"ingest": True}).items()}
        name = f"{self.name}-{self._starts}-{self._requests}"
        _, stored = self.client.store(key(tokens, name, salt, configs, worker=0), 7, [[1]], b"").result(20)
        self.client.end_session(name)
        return bool(stored)

    def look_up(self, tokens: Sequence[int], salt: str = "", *, seconds: float = 20) -> Any:
        """What a look-up finds; its locks are given back."""
        self._requests += 1
        name = f"{self.name}-{self._starts}-{self._requests}"
        asked = key(tokens, name, salt, worker=None)
        end = time.monotonic() + seconds
        while (found := self.client.cb_unified_lookup(asked, 1).result(20)) is None:
            assert time.monotonic() < end, "the look-up has no result"
            time.sleep(0.002)
        self.client.end_session(name)
        return found

    def chunks(self, tokens: Sequence[int], salt: str = "") -> int:
        """How many chunks beyond the exact prefix a look-up finds."""
        return len(self.look_up(tokens, salt).non_prefix_segments)

    def finds(self, tokens: Sequence[int], chunks: int, seconds: float = 20, salt: str = "") -> bool:
        """Whether it finds so many in time."""
        return until(lambda: self.chunks(tokens, salt) == chunks, seconds)

    def counter(self, name: str) -> float:
        return counter(f"http://127.0.0.1:{self.http}/metrics", name)

    def lines(self, *words: str) -> list[str]:
        """Lines of its log with all these words."""
        return [line for line in self.process.text.splitlines() if all(word in line for word in words)]


class CoordinatorProcess:
    """A coordinator, as `lmcache-rag serve --coordinator start` starts it."""

    def __init__(self, folder: Path, *options: str, chunk: int = CHUNK) -> None:
        self.port, self._folder, self._starts = free_port(), folder, 0
        self.url = f"http://127.0.0.1:{self.port}"
        self._options = [
            *("--host", "127.0.0.1", "--port", str(self.port), "--enable-blend-lookup", "--chunk-size", str(chunk)),
            *("--checkpoint-path", str(folder / "checkpoint"), "--metadata-path", str(folder / "metadata")),
            *("--checkpoint-interval", "1", *options),
        ]

    def start(self) -> CoordinatorProcess:
        self._starts += 1
        log = self._folder / f"coordinator-{self._starts}.log"
        self.process = Process([str(BIN / "lmcache"), "coordinator", *self._options], log)
        self.process.wait_for(lambda: answers(f"{self.url}/healthz"), 60)
        return self

    def kill(self) -> None:
        if hasattr(self, "process"):
            self.process.kill()

    def stop(self) -> None:
        """End it as a supervisor does, so that it writes a checkpoint."""
        os.killpg(self.process.pid, signal.SIGTERM)
        assert until(lambda: not self.process.runs, 20)

    def pause(self, *, stopped: bool) -> None:
        """Have it hang: connections are taken, and nothing is answered."""
        os.killpg(self.process.pid, signal.SIGSTOP if stopped else signal.SIGCONT)

    def stats(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/directory/stats", timeout=5).json())
