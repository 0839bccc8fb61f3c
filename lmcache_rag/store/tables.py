"""Reading long tables page by page."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from lmcache_rag.store import queries
from lmcache_rag.store.database import Database
from lmcache_rag.store.types import StoredChunk

T = TypeVar("T")
_PAGE = 256  # rows read at a time, so that no transaction stays open while the caller works on them


class Tables:
    """What every part of the registry stands on."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def _chunk_pages(self, condition: str, *parameters: str) -> Iterator[StoredChunk]:
        def page(connection: sqlite3.Connection, after: int | None, limit: int) -> list[StoredChunk]:
            sql = f"{condition} AND chunk_id > ? ORDER BY chunk_id LIMIT ?"
            return queries.stored_chunks(connection, self._database.path, sql, [*parameters, after or 0, limit])

        yield from self._pages(page, lambda chunk: chunk.chunk_id)

    def _pages(
        self, page: Callable[[sqlite3.Connection, Any, int], list[T]], place: Callable[[T], int | str]
    ) -> Iterator[T]:
        after: int | str | None = None
        while True:
            with self._database.read() as connection:
                rows = page(connection, after, _PAGE)
            yield from rows
            if len(rows) < _PAGE:
                return
            after = place(rows[-1])
