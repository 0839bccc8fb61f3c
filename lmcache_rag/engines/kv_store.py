"""Chunk KV in two tiers: files, and hot chunks in memory."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lmcache_rag.errors import StoreCorruptError, StoreError

if TYPE_CHECKING:
    import torch

    from lmcache_rag.engines.kv_files import KVFiles
    from lmcache_rag.engines.prefill import ChunkKV

log = logging.getLogger("lmcache_rag")


class KVStore:
    """Finds chunk KV: in memory first, then in the files. Thread-safe.

    On a CPU the memory tier holds files that are mapped and checked already, so that the operating system's page
    cache is not copied; on a GPU it holds copies in the GPU's memory.

    Args:
        files: The files.
        memory_budget: Most bytes in memory.
        device: Where the model is.
    """

    def __init__(self, files: KVFiles, *, memory_budget: int, device: torch.device) -> None:
        self.files = files
        self.memory_budget = memory_budget
        self._device = device
        self._hot: OrderedDict[tuple[str, str], ChunkKV] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, fingerprint: str, key: str) -> ChunkKV | None:
        """The chunk's KV on the model's device, or None.

        A file that is damaged or cannot be read is a miss, with a warning; a damaged one is removed.
        """
        name = (fingerprint, key)
        with self._lock:
            if kv := self._hot.get(name):
                self._hot.move_to_end(name)
                return kv
        try:
            kv = self.files.load(fingerprint, key)
        except StoreCorruptError as problem:
            log.warning("%s", problem)
            try:
                self.files.delete([name])
            except OSError as failure:
                log.warning("The damaged file cannot be removed: %s", failure)
            return None
        except StoreError as problem:
            log.warning("%s", problem)
            return None
        if kv is not None:
            kv = self._to_device(kv)
            self._keep(name, kv)
        return kv

    def put(self, fingerprint: str, key: str, kv: ChunkKV) -> int:
        """Keep a chunk's KV in the files; returns its size in bytes."""
        return self.files.save(fingerprint, key, kv)

    def has(self, fingerprint: str, key: str) -> bool:
        """Whether the KV is kept."""
        return (fingerprint, key) in self._hot or self.files.exists(fingerprint, key)

    def forget(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Drop KV from both tiers."""
        pairs = list(pairs)
        with self._lock:
            for name in pairs:
                if kv := self._hot.pop(name, None):
                    self._bytes -= kv.nbytes
        self.files.delete(pairs)

    def holds_other_than(self, fingerprint: str, key: str) -> bool:
        """Whether any file of the fingerprint is kept besides that of the key."""
        return self.files.holds_other_than(fingerprint, key)

    @property
    def memory_bytes(self) -> int:
        """Bytes in memory."""
        return self._bytes

    def clear_memory(self) -> None:
        """Drop the memory tier; the files stay."""
        with self._lock:
            self._hot.clear()
            self._bytes = 0

    def _to_device(self, kv: ChunkKV) -> ChunkKV:
        from lmcache_rag.engines.prefill import ChunkKV

        return ChunkKV(kv.keys.to(self._device), kv.values.to(self._device))

    def _keep(self, name: tuple[str, str], kv: ChunkKV) -> None:
        if kv.nbytes > self.memory_budget:
            return
        with self._lock:
            if name not in self._hot:
                self._bytes += kv.nbytes
            self._hot[name] = kv
            while self._bytes > self.memory_budget:
                _, old = self._hot.popitem(last=False)
                self._bytes -= old.nbytes
