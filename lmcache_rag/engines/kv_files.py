"""Chunk KV on disk: one safetensors file per chunk, written whole or not at all, checked when read."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_rag.errors import PrecomputeError, StoreCorruptError, StoreError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("lmcache_rag")

_SUFFIX = ".safetensors"
_STALE_S = 3600.0  # a temporary file older than this was left by a process that died


@dataclass(frozen=True)
class ChunkKV:
    """KV of one chunk, computed after the prefix: keys and values [layers, kv heads, tokens, size]."""

    keys: Tensor
    values: Tensor

    @property
    def tokens(self) -> int:
        """Length of the chunk."""
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return int(self.keys.nbytes + self.values.nbytes)


class KVFiles:
    """A folder of chunk KV under a byte budget; the least recently used files are evicted first.

    Files are named ``<fingerprint>/<two digits>/<key>.safetensors``. The time of last use is the file's own
    modification time, so it is shared between processes and survives them.

    Args:
        folder: Where the files are; made when the first is written.
        budget: Most bytes, or None.
    """

    def __init__(self, folder: Path, *, budget: int | None = None) -> None:
        self.folder = folder
        self.budget = budget
        self._lock = threading.Lock()
        self._total: int | None = None
        self._warned = False

    def path(self, fingerprint: str, key: str) -> Path:
        """Where that chunk's KV is, if it exists."""
        return self.folder / fingerprint[:32] / key[:2] / f"{key}{_SUFFIX}"

    def exists(self, fingerprint: str, key: str) -> bool:
        """Whether the file exists; not whether it is valid."""
        return self.path(fingerprint, key).exists()

    def save(self, fingerprint: str, key: str, kv: ChunkKV) -> int:
        """Write one chunk's KV; returns the file's size.

        Raises:
            PrecomputeError: It could not be written. No partial file stays.
        """
        from safetensors.torch import save_file

        target = self.path(fingerprint, key)
        partial = target.with_name(f".{key}.{uuid.uuid4().hex}.partial")
        tensors = {"keys": kv.keys.contiguous().cpu(), "values": kv.values.contiguous().cpu()}
        facts = {"fingerprint": fingerprint, "key": key, "checksum": _checksum(tensors)}
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata=facts)
            partial.replace(target)
        except Exception as problem:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise _cannot_write(target, problem) from problem
        size = target.stat().st_size
        self._count(size)
        return size

    def load(self, fingerprint: str, key: str) -> ChunkKV | None:
        """Map one chunk's KV into memory and check it; None when there is none.

        Raises:
            StoreCorruptError: The file is damaged or does not belong to its name.
            StoreError: It cannot be read now.
        """
        from safetensors import SafetensorError, safe_open

        path = self.path(fingerprint, key)
        if not _readable(path):
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("keys", "values")}
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as problem:
            raise _damaged(path, str(problem)) from problem
        if (facts.get("fingerprint"), facts.get("key")) != (fingerprint, key):
            raise _damaged(path, "it belongs to another chunk")
        if facts.get("checksum") != _checksum(tensors):
            raise _damaged(path, "its checksum is wrong")
        with contextlib.suppress(OSError):  # a read-only store cannot record the time of use
            os.utime(path)
        return ChunkKV(tensors["keys"], tensors["values"])

    def delete(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Remove the files of these (fingerprint, key) pairs, as far as they exist."""
        for fingerprint, key in pairs:
            path = self.path(fingerprint, key)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                size = path.stat().st_size
                path.unlink()
                self._count(-size, evict=False)

    def holds_other_than(self, fingerprint: str, key: str) -> bool:
        """Whether any KV of the fingerprint is there besides that of the key."""
        mine = self.path(fingerprint, key)
        return any(path != mine for path in (self.folder / mine.parts[-3]).glob(f"*/*{_SUFFIX}"))

    def usage(self) -> tuple[int, int]:
        """Number of files and their bytes."""
        files = self._scan()
        return len(files), sum(size for _, size, _ in files)

    def _count(self, size: int, *, evict: bool = True) -> None:
        """Keep the running total, and the budget."""
        if self.budget is None:
            return
        with self._lock:
            if self._total is None:
                self._total = sum(size for _, size, _ in self._scan())
            else:
                self._total += size
            if evict and self._total > self.budget:
                self._evict()

    def _evict(self) -> None:
        """Remove the least recently used files until the budget holds, with a little room to spare."""
        assert self.budget is not None  # noqa: S101 - only called with a budget
        files = sorted(self._scan())
        total = sum(size for _, size, _ in files)
        for _, size, path in files[:-1]:  # never the newest: it was just used
            if total <= self.budget * 0.95:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._total = total
        if not self._warned:
            self._warned = True
            log.warning(
                "The KV files have reached their budget of %.1f GB: the least recently used were dropped. Queries "
                "compute what is missing; raise --kv-budget to keep more.",
                self.budget / 1e9,
            )

    def _scan(self) -> list[tuple[float, int, Path]]:
        """(time of last use, size, path) of every file; temporary files of dead processes are removed."""
        found = []
        for path in self.folder.glob("*/*/*"):
            with contextlib.suppress(OSError):
                facts = path.stat()
                if path.name.endswith(_SUFFIX):
                    found.append((facts.st_mtime, facts.st_size, path))
                elif path.name.endswith(".partial") and time.time() - facts.st_mtime > _STALE_S:
                    path.unlink()
        return found


def _readable(path: Path) -> bool:
    """Whether the file is there. Never waits: not for a writer at a pipe's other end, not for the holder of a lease.

    Raises:
        StoreCorruptError: It is not a regular file.
        StoreError: It cannot be opened.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as problem:
        if problem.errno in (errno.ELOOP, errno.ENXIO):  # a link to itself; a socket
            raise _damaged(path, "it is not a file") from problem
        raise StoreError(
            f"The KV file {path} cannot be read: {problem.strerror}.",
            remedy="Its chunk is computed; check who may read it, and the disk.",
        ) from problem
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise _damaged(path, "it is not a file")
    finally:
        os.close(handle)
    return True


def _checksum(tensors: dict[str, Any]) -> str:
    import torch
    import xxhash

    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(memoryview(tensor.view(torch.uint8).numpy()))
    return str(digest.hexdigest())


def _damaged(path: Path, why: str) -> StoreCorruptError:
    return StoreCorruptError(
        f"The KV file {path} is damaged: {why}.", remedy="It is recomputed; run `lmcache-rag verify` for the others."
    )


def _cannot_write(path: Path, problem: Exception) -> PrecomputeError:
    full = getattr(problem, "errno", None) == errno.ENOSPC or "No space left" in str(problem)
    return PrecomputeError(
        f"The KV file {path} cannot be written: {'no space is left on the device' if full else problem}.",
        remedy="Free space or lower --kv-budget, then run the command again: it continues where it stopped."
        if full
        else "Check that the store can be written, then run the command again.",
    )
