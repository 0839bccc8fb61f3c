"""Checks that a second tier returns the bytes that were stored: a serde of LMCache's that adds a keyed digest.

LMCache stores KV as it is, and takes what a disk, a Redis or a bucket returns for KV of the right chunk: a damaged
file, an object that another program wrote, or one under a wrong name would become part of answers. Here the digest is
over the object's name and its bytes, under a key made of the servers' secret. An object that fails is a miss: its chunk
is computed, and it is deleted, so that it can be stored again.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lmcache_rag.connector.lmcache_server.settings import SERDE
from lmcache_rag.connector.patching import Patch, patch_object

log = logging.getLogger("lmcache_rag")

MAGIC = b"LMRAG\x00\x00\x01"
TRAILER = 40  # bytes: MAGIC, and a digest of 32
WORKERS = 4  # threads of each tier: the digest is taken without Python's lock, at some 7 GB/s each
MOST_UNREAD = 4096
PAUSES_S = (0.1, 1.0, 10.0)  # before attempts to delete a damaged object
QUIET_S = 60.0  # between two warnings
FINALIZE_LOAD = Patch(
    "lmcache.v1.distributed.l2_adapters.serde_wrapper:SerdeL2AdapterWrapper._finalize_load",
    "A second tier's damaged objects are misses; LMCache fails all that were loaded together.",
    "LMCache's serdes fail single objects",
)


def register() -> None:
    """Make the serde known to LMCache's server; before it reads its options."""
    from lmcache.v1.distributed import serde

    if SERDE not in serde.factory.get_registered_serde_types():
        serde.factory.register_serde_factory(SERDE, _create)


def _create(settings: dict[str, Any]) -> Any:
    return processor(_key(str(settings.get("secret_file") or "")))


def _key(secret_file: str) -> bytes:
    """The key of the digests; without a secret it is a known one, which guards against damage, not against people."""
    from lmcache_rag.credentials import read_secret

    secret = read_secret(Path(secret_file)) if secret_file else ""
    return hmac.digest(secret.encode(), b"lmcache_rag second tier", "sha256")


class Digest:
    """The digest of an object.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def of(self, name: Any, data: Any) -> bytes:
        """32 bytes.

        Args:
            name: LMCache's ObjectKey.
            data: The KV, as a buffer.
        """
        from blake3 import blake3

        facts = (name.model_name, name.kv_rank, name.object_group_id, name.chunk_hash.hex(), name.cache_salt)
        digest = blake3("\0".join(map(str, facts)).encode(), key=self._key)
        digest.update(data)
        found: bytes = digest.digest()
        return found


def processor(key: bytes) -> Any:
    """LMCache's SerdeProcessor with this check.

    Args:
        key: 32 bytes.
    """
    from lmcache.v1.distributed.serde.async_processor import AsyncSerdeProcessor
    from lmcache.v1.distributed.serde.base import Deserializer, Serializer

    digest = Digest(key)

    class Sealing(Serializer):  # type: ignore[misc]
        def serialize(self, src: Any, dst: Any, key: Any) -> int:
            data, out = _bytes(src), _bytes(dst)
            out[: len(data)] = data
            out[len(data) : len(data) + TRAILER] = MAGIC + digest.of(key, data)
            return len(data) + TRAILER

        def estimate_serialized_size(self, layout_desc: Any) -> int:
            sizes = zip(layout_desc.shapes, layout_desc.dtypes, strict=True)
            return TRAILER + sum(int(shape.numel()) * int(dtype.itemsize) for shape, dtype in sizes)

    class Checking(Deserializer):  # type: ignore[misc]
        def deserialize(self, src: Any, dst: Any, key: Any) -> None:
            data, out = _bytes(src), _bytes(dst)
            end = len(out)
            sealed = MAGIC + digest.of(key, data[:end])
            if not hmac.compare_digest(bytes(data[end : end + TRAILER]), sealed):
                raise DamagedError
            out[:] = data[:end]

    class Checked(AsyncSerdeProcessor):  # type: ignore[misc]
        """Reports which objects of a task are damaged, instead of failing all of them."""

        def __init__(self) -> None:
            super().__init__(Sealing(), Checking(), max_workers=WORKERS)
            self._damaged: dict[int, list[Any]] = {}
            self._taken: dict[int, list[Any]] = {}  # by thread
            self.damaged = 0
            self._warned = -QUIET_S

        def submit_deserialize(self, src_objs: Any, dst_objs: Any, keys: Any) -> int:
            task = self._alloc_task_id()
            self._pool.submit(self._open, task, src_objs, dst_objs, keys)
            return int(task)

        def _open(self, task: int, src_objs: Any, dst_objs: Any, keys: Any) -> None:
            damaged = []
            for src, dst, key in zip(src_objs, dst_objs, keys, strict=True):
                try:
                    self._deserializer.deserialize(src, dst, key)
                except Exception as problem:
                    if not isinstance(problem, DamagedError):
                        log.exception("KV of a second tier could not be read")
                    damaged.append(key)
            with self._lock:
                self._damaged[task] = damaged
                self._completed_deserialize[task] = True
            self._deserialize_efd.notify()

        def query_deserialize_result(self, task_id: int) -> bool | None:
            done: bool | None = super().query_deserialize_result(task_id)
            if done is not None:
                with self._lock:
                    self._taken[threading.get_ident()] = self._damaged.pop(task_id, [])
            return done

        def take(self) -> list[Any]:
            """The damaged objects of the task whose result this thread has just asked for."""
            return self._taken.pop(threading.get_ident(), [])

        def count(self, keys: list[Any]) -> None:
            """Objects were damaged."""
            self.damaged += len(keys)
            if time.monotonic() - self._warned >= QUIET_S:
                self._warned = time.monotonic()
                log.warning(
                    "A second tier returned bytes that are not what was stored, %d objects so far: they are deleted "
                    "there, and their chunks are computed.",
                    self.damaged,
                )

    return Checked()


class DamagedError(Exception):
    """An object is not what was stored."""


def watch(adapters: Iterable[Any]) -> list[Any]:
    """Have damaged objects counted as misses, and deleted. Returns the processors, with their counts.

    Args:
        adapters: LMCache's L2 adapters.
    """
    found = []
    for adapter in adapters:
        serde = getattr(adapter, "_serde", None)
        if hasattr(serde, "take"):
            patch_object(FINALIZE_LOAD, adapter, _Loads(adapter, serde).finalize)
            found.append(serde)
    return found


class _Loads:
    """The loads of one second tier.

    An object that could not even be read may be one of a wrong size, or the tier may be away. It is deleted when that
    happens again after another object was read.

    Args:
        adapter: LMCache's SerdeL2AdapterWrapper.
        serde: Its processor.
    """

    def __init__(self, adapter: Any, serde: Any) -> None:
        self._adapter, self._serde, self._finalize = adapter, serde, adapter._finalize_load
        self._unread: dict[Any, int] = {}  # objects that could not be read, by the number of reads until then
        self._read = 0
        self._doomed: dict[Any, None] = {}
        adapter.register_listener(self)

    def on_l2_keys_stored(self, keys: list[Any], _: Any = None) -> None:
        """Objects were stored, and are sound."""
        for key in keys:
            self._doomed.pop(key, None)

    def on_l2_keys_deleted(self, keys: list[Any]) -> None:
        """Objects were deleted."""
        self.on_l2_keys_stored(keys)

    def on_l2_keys_accessed(self, _: list[Any]) -> None:
        """Objects were read."""

    def finalize(self, wrapped_id: int, bitmap: Any) -> None:
        """As LMCache's own, without the objects that are damaged."""
        damaged = self._serde.take()
        state = self._adapter._load_tasks.get(wrapped_id)
        if state is not None:
            damaged += self._unreadable(state.keys, bitmap)
            for at, key in enumerate(state.keys):
                if key in damaged:
                    bitmap.clear(at)
            if damaged:
                self._serde.count(damaged)
                self._doomed |= dict.fromkeys(damaged)
                threading.Thread(target=self._delete, args=(damaged,), name="lmcache-rag-damaged", daemon=True).start()
        self._finalize(wrapped_id, bitmap)

    def _unreadable(self, keys: list[Any], bitmap: Any) -> list[Any]:
        again = []
        for at, key in enumerate(keys):
            if bitmap.test(at):
                self._read += 1
                self._unread.pop(key, None)
            elif self._unread.setdefault(key, self._read) < self._read:
                del self._unread[key]
                again.append(key)
        while len(self._unread) > MOST_UNREAD:
            del self._unread[next(iter(self._unread))]
        return again

    def _delete(self, keys: list[Any]) -> None:
        for pause in PAUSES_S:  # LMCache does not delete what a look-up has locked
            time.sleep(pause)
            left = [key for key in keys if key in self._doomed]
            if not left:
                return
            try:
                self._adapter.delete(left)
            except Exception:
                log.warning("Damaged KV could not be deleted from a second tier", exc_info=True)
        for key in keys:
            self._doomed.pop(key, None)


def _bytes(memory: Any) -> memoryview:
    return memoryview(memory.byte_array).cast("B")
