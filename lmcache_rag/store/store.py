"""The store: one folder with the registry, the index, the engine's KV and the writer lock."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from lmcache_rag.errors import StoreError, StoreFullError
from lmcache_rag.store.connections import can_write, cannot_write, from_os, full
from lmcache_rag.store.database import Database, WriterLock
from lmcache_rag.store.index import VectorIndex
from lmcache_rag.store.registry import Registry

logger = logging.getLogger("lmcache_rag.store")

LOCK_TIMEOUT = 10.0  # seconds that a write waits for another process


class Store:
    """A store folder, open. Make one with Store.open(); it is a context manager.

    Readers are never blocked. Writers take turns, see writing(). One Store serves all threads of a process; a process
    that was forked opens its own.

    Attributes:
        path: The folder.
        registry: Documents, chunks and KV records.
        index: Search.
        read_only: Whether every write raises StoreReadOnlyError.
    """

    def __init__(self, path: Path, *, read_only: bool, refusal: Callable[[Path], StoreError] = cannot_write) -> None:
        self.path = path
        self.read_only = read_only
        self._lock = WriterLock(path / "lock")
        self._database = Database(
            path / "store.db", self._lock, read_only=read_only, lock_timeout=LOCK_TIMEOUT, refusal=refusal
        )
        self.registry = Registry(self._database)
        self.index = VectorIndex(path / "index.faiss", self._database)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, create: bool = True, read_only: bool = False) -> Store:
        """Open the store in a folder.

        Args:
            path: The folder.
            create: Make it if it is missing.
            read_only: Open only to read. A store that cannot be written, or not even be opened to write because the
                disk is full, is opened so in any case.

        Raises:
            StoreError: There is no store, or the path is not a folder.
            StoreVersionError, StoreCorruptError, StoreReadOnlyError, StoreFullError: As their names say.
        """
        folder = Path(path)
        database = folder / "store.db"
        try:
            if not database.exists():
                if not create or read_only:
                    raise StoreError(
                        f"There is no store in {folder}.", remedy="Make one with: lmcache-rag ingest, or name another."
                    )
                folder.mkdir(parents=True, exist_ok=True)
            writable = can_write(folder, database)
        except OSError as error:
            raise from_os(error, folder) from error
        if read_only or (database.exists() and not writable):
            return cls(folder, read_only=True)
        try:
            return cls(folder, read_only=False)
        except StoreFullError as error:
            try:
                store = cls(folder, read_only=True, refusal=full)
            except StoreError:  # there was no store yet, or not one that can be read
                raise error from None
            logger.warning("%s It is opened only to read.", error)
            return store

    @property
    def kv_dir(self) -> Path:
        """Where an engine keeps the KV of this store; the engine makes and owns it."""
        return self.path / "kv"

    @contextmanager
    def writing(self, timeout: float | None = LOCK_TIMEOUT) -> Iterator[Store]:
        """Be the only process that writes, for the length of the block; saves the index at its end.

        Threads of this process that share the store can write too. The lock ends with the process: a kill releases it.

        Args:
            timeout: Most seconds to wait for another process; 0 tries once, None waits for ever.

        Raises:
            StoreLockedError: Another process is writing.
            StoreReadOnlyError: The store cannot be written.
        """
        self._database.require_writable()
        with self._lock.held(-1 if timeout is None else timeout) as outermost:
            yield self
            if outermost:
                self.index.save()

    def close(self) -> None:
        """Save the index, if no other process is writing, and release the files. Safe to call twice."""
        if not self.read_only and not self._database.closed:
            with suppress(StoreError), self._lock.held(0):
                self.index.save()
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
