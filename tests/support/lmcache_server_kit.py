"""LMCache's server in this process: its real storage, sessions and blend module; only the copy from a GPU is not."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contract_kit import CHUNK

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from lmcache.v1.distributed.api import MemoryLayoutDesc
    from lmcache.v1.distributed.config import add_storage_manager_args, parse_args_to_config
    from lmcache.v1.mp_coordinator import cache_events
    from lmcache.v1.mp_observability import event_bus
    from lmcache.v1.multiprocess import server
    from lmcache.v1.multiprocess.config import (
        DEFAULT_COORDINATOR_CONFIG,
        CoordinatorConfig,
        HTTPFrontendConfig,
        add_mp_server_args,
        parse_args_to_mp_server_config,
    )
    from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey

    from lmcache_rag.connector.lmcache_server.modules import HTTP_SERVER, Guard
    from lmcache_rag.connector.lmcache_server.tier_check import register
    from lmcache_rag.connector.server_guard import MODULE

MODEL, TOKENS = "m", 1024  # bytes of a token


def key(
    tokens: Sequence[int], request: str, salt: str = "", configs: dict[str, Any] | None = None, worker: int | None = 0
) -> Any:
    """An LMCache key of all whole chunks of these tokens."""
    end = len(tokens) // CHUNK * CHUNK if worker is not None else len(tokens)
    return IPCCacheServerKey.from_token_ids(MODEL, 1, worker, list(tokens), 0, end, request, salt, 1, configs)


def content(chunk_hash: bytes) -> bytes:
    """The KV of a chunk, as the replaced copy makes it."""
    return hashlib.sha256(chunk_hash).digest() * (CHUNK * TOKENS // 32)


class LMCacheServer:
    """A server made of LMCache's own parts, and our module in it.

    Args:
        config: Of --server-module.
        l1_gb: Memory.
        l2: A second tier: a folder, or LMCache's settings of it.
        coordinator: URL of a coordinator, which it reports to; then `name` is its own name.
    """

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        l1_gb: float = 0.05,
        l2: Path | dict[str, Any] | None = None,
        coordinator: str = "",
        name: str = "here",
    ) -> None:
        register()
        parser = argparse.ArgumentParser()
        add_mp_server_args(parser)
        add_storage_manager_args(parser)
        line = f"--engine-type blend --supported-transfer-mode lmcache_driven --chunk-size {CHUNK}"
        line += f" --l1-size-gb {l1_gb} --eviction-policy LRU"
        words = line.split()
        words += ["--server-module", json.dumps({"module_path": MODULE, "config": config or {}})]
        if l2 is not None:
            tier = l2 if isinstance(l2, dict) else {"type": "fs", "base_path": str(l2)}
            words += ["--l2-adapter", json.dumps(tier)]
        arguments = parser.parse_args(words)
        mp_config = parse_args_to_mp_server_config(arguments)
        joins = DEFAULT_COORDINATOR_CONFIG
        if coordinator:
            joins = CoordinatorConfig(coordinator, event_reporting=True, event_flush_interval=0.05, blend_timeout=0.5)
            self.bus = event_bus.init_event_bus()
        self.context = server.MPCacheServerContext(
            storage_manager_config=parse_args_to_config(arguments), chunk_size=CHUNK, full_sw_kv=True
        )
        self.storage = self.context.storage_manager
        self.modules = server._build_server_components(self.context, mp_config, joins).modules
        self.blend = next(module for module in self.modules if hasattr(module, "cb_unified_lookup"))
        self.layout = MemoryLayoutDesc(shapes=[torch.Size([1, 1, CHUNK, TOKENS // 4])], dtypes=[torch.float32])
        self.context.layout_desc_registry.register(MODEL, 1, self.layout)
        self.blend._transfer_module.store_with_chunk_mask = self._copy
        self.guard: Guard = self.blend._token_range_matcher._guard
        self._requests = 0
        if coordinator:
            mp_config.instance_id = name
            reports = cache_events.maybe_create_cache_event_subscriber(mp_config, HTTPFrontendConfig(), joins)
            self.bus.register_subscriber(reports)
            self.bus.start()
            self.storage.publish_capacity()  # as after LMCache's registration

    def _copy(self, key: Any, _: int, blocks: list[list[int]], __: bytes) -> tuple[bytes, bool, list[bool]]:
        """LMCache's store_with_chunk_mask, without a GPU."""
        keys = self.context.resolve_obj_keys(key, [0])[0]
        if not all(blocks):
            return b"an event", False, []
        reserved = self.storage.reserve_write(keys, self.layout)
        for each, memory in reserved.items():
            self.data(memory)[:] = content(each.chunk_hash)
        self.copying()
        try:
            completion = self.storage.prepare_write_completion(reserved) if reserved else []
        except Exception:
            return b"", False, [False] * len(keys)
        self.storage.finish_write_by_owner(completion)
        return b"", True, [each in reserved for each in keys]

    @staticmethod
    def data(memory: Any) -> memoryview:
        """The bytes of an object in memory."""
        return memoryview(memory.byte_array).cast("B")

    def sound(self, tokens: Sequence[int]) -> bool:
        """Whether all objects of a prompt that are in memory have the bytes that were stored."""
        keys = [each for each in self.keys(tokens) if self.storage._l1_manager.get_object_state(each) is not None]
        found = self.storage._l1_manager.reserve_read(keys)
        try:
            return all(self.data(memory) == content(each.chunk_hash) for each, (_, memory) in found.items())
        finally:
            self.storage._l1_manager.finish_read(keys)

    def copying(self) -> None:
        """What happens while KV is copied."""

    def request(self) -> str:
        """The name of another request."""
        self._requests += 1
        return f"r{self._requests}"

    def store(self, tokens: Sequence[int], salt: str = "", **configs: Any) -> bool:
        """Store a prompt, as a worker does."""
        asked = key(tokens, self.request(), salt, {f"lmcache_rag.{name}": value for name, value in configs.items()})
        _, stored = self.blend.store(asked, 7, [[1]], b"")
        self.context.session_manager.remove(asked.request_id)
        return bool(stored)

    def look_up(self, tokens: Sequence[int], salt: str = "", **configs: Any) -> Any:
        """What a look-up finds, asked until it is known; its locks are given back."""
        asked, found = self.hold(tokens, salt, **configs)
        self.release(asked, found)
        return found

    def hold(self, tokens: Sequence[int], salt: str = "", **configs: Any) -> tuple[Any, Any]:
        """(key, what is found): as `look_up`, but what is found stays locked until `release`."""
        names = {f"lmcache_rag.{name}": value for name, value in configs.items()}
        asked = key(tokens, self.request(), salt, names, worker=None)
        return asked, self.answer(asked)

    def answer(self, asked: Any) -> Any:
        """A look-up's result, asked for until it is known."""
        end = time.monotonic() + 20
        while (found := self.blend.cb_unified_lookup(asked, 1)) is None:
            assert time.monotonic() < end
            time.sleep(0.005)
        return found

    def release(self, asked: Any, found: Any) -> None:
        """Give a look-up's locks back, as the end of its request does."""
        self.blend._release_unretrieved_locks(self.context.session_manager.get_or_create(asked.request_id))
        if chunks := found.prefix_coverage_tokens // CHUNK:
            worker = dataclasses.replace(asked, worker_id=0, end=chunks * CHUNK)
            self.storage.finish_read_prefetched(self.context.resolve_obj_keys(worker, [0])[0])
        self.context.session_manager.remove(asked.request_id)

    def chunks(self, tokens: Sequence[int], salt: str = "") -> int:
        """How many chunks beyond the exact prefix are found in a prompt."""
        return len(self.look_up(tokens, salt).non_prefix_segments)

    def keys(self, tokens: Sequence[int], salt: str = "") -> list[Any]:
        """The names of a prompt's objects."""
        asked = key(tokens, self.request(), salt)
        found: list[Any] = self.context.resolve_obj_keys(asked, [0])[0]
        self.context.session_manager.remove(asked.request_id)
        return found

    def in_memory(self, tokens: Sequence[int], salt: str = "") -> int:
        """How many of a prompt's objects are in memory."""
        memory = self.storage._l1_manager
        return sum(memory.get_object_state(each) is not None for each in self.keys(tokens, salt))

    def evict(self) -> None:
        """Have memory emptied."""
        self.storage.clear()

    def make_room(self) -> None:
        """What LMCache does every second when its memory is nearly full."""
        controller = self.storage._eviction_controllers[0]
        evictable = self.storage._l1_manager.is_key_evictable
        for action in controller._eviction_policy.get_eviction_actions(0.2, key_eligible_filter=evictable):
            controller.execute_eviction_action(action)

    def close(self) -> None:
        """End it."""
        if (fleet := self.guard.fleet) is not None:
            fleet.close()
            self.bus.stop()
        for _, tier in self.storage.l2_adapters():
            tier.delete = lambda _: None  # threads that remove KV go on, and a closed adapter cannot
        for module in reversed(self.modules):
            module.close()
        self.context.close()


@contextmanager
def made_servers() -> Iterator[Callable[..., LMCacheServer]]:
    """Makes servers, and ends them at the end. A server removes routes of LMCache's application: they come back."""
    http, servers = sys.modules.get(HTTP_SERVER), list[LMCacheServer]()
    routes = list(http.app.router.routes) if http else []

    def made(*args: Any, **kwargs: Any) -> LMCacheServer:
        servers.append(LMCacheServer(*args, **kwargs))
        return servers[-1]

    yield made
    for server in servers:
        server.close()
    if http:
        http.app.router.routes[:] = routes


def text(draw: random.Random, chunks: int) -> list[int]:
    """Token ids of so many LMCache chunks."""
    return [draw.randrange(1 << 32) for _ in range(chunks * CHUNK)]
