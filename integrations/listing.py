"""Lists what other vector stores hold, page by page: neither LangChain nor LlamaIndex has a method for it.

By class and attributes: no package of a vector store needs to be installed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """One document or node as a vector store has it.

    Attributes:
        id: Its id.
        text: Its text.
        payload: What else is stored with it; LlamaIndex's stores keep the node there.
    """

    id: str
    text: str
    payload: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Listing:
    """How the rows of one vector store are listed. Rows that are added or removed meanwhile may be missed.

    Attributes:
        count: Returns how many rows it holds.
        pages: Returns its rows, so many at a time.
        canonical: Converts an id to the form in which the vector store has it.
    """

    count: Callable[[], int]
    pages: Callable[[int], Iterator[list[Row]]]
    canonical: Callable[[str], str] = str

    @classmethod
    def of_texts(cls, texts: Callable[[], Mapping[str, str]]) -> Listing:
        """A listing of texts by id that are in memory, or that one call returns."""
        return cls(lambda: len(texts()), lambda size: _paged(texts(), size))


def listing_of(store: Any) -> Listing | None:
    """Return the listing of a vector store of LangChain or LlamaIndex; None: it cannot be listed from here.

    Chroma, Qdrant, Milvus (also Milvus Lite) and pgvector of both frameworks; LangChain's in-memory and FAISS stores. A
    store that has only an async client or connection cannot be listed.
    """
    pgvector = (_pgvector_of_langchain, _pgvector_with_tables, _pgvector_of_llama_index)
    kinds = (_chroma, _qdrant, _milvus, *pgvector, _memory)
    return next((found for kind in kinds if (found := kind(store)) is not None), None)


def _paged(texts: Mapping[str, str], size: int) -> Iterator[list[Row]]:
    for page in _batches(list(texts.items()), size):
        yield [Row(str(key), text) for key, text in page]


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _is_from(thing: Any, module: str) -> bool:
    return any(f"{cls.__module__}.".startswith(f"{module}.") for cls in type(thing).__mro__)


def _as_uuid(key: str) -> str:
    with suppress(ValueError):
        return str(uuid.UUID(key))
    return key


def _chroma(store: Any) -> Listing | None:
    try:
        collection: Any = getattr(store, "_collection", None)
    except ValueError:  # LangChain's, after delete_collection()
        return None
    if not _is_from(collection, "chromadb") or type(collection).__name__.startswith("Async"):
        return None

    def pages(size: int) -> Iterator[list[Row]]:
        for ids in _batches(collection.get(include=[])["ids"], size):
            found = collection.get(ids=ids, include=["documents", "metadatas"])
            rows = zip(found["ids"], found["documents"], found["metadatas"], strict=True)
            yield [Row(key, text or "", payload or {}) for key, text, payload in rows]

    return Listing(lambda: int(collection.count()), pages)


def _qdrant(store: Any) -> Listing | None:
    client: Any = getattr(store, "_client", None)
    if not _is_from(client, "qdrant_client") or type(client).__name__.startswith("Async"):
        return None
    name: str = store.collection_name
    text_key = getattr(store, "content_payload_key", None) or getattr(store, "text_key", None) or "text"

    def count() -> int:
        return int(client.count(name).count) if client.collection_exists(name) else 0

    def pages(size: int) -> Iterator[list[Row]]:
        after, more = None, client.collection_exists(name)
        while more:
            points, after = client.scroll(name, limit=size, offset=after, with_payload=True, with_vectors=False)
            payloads = [(str(point.id), point.payload or {}) for point in points]
            yield [Row(key, str(payload.get(text_key) or ""), payload) for key, payload in payloads]
            more = after is not None

    return Listing(count, pages, _as_uuid)


def _milvus(store: Any) -> Listing | None:
    if not (_is_from(store, "langchain_milvus") or _is_from(store, "llama_index.vector_stores.milvus")):
        return None
    client, name = store.client, store.collection_name
    key_field = getattr(store, "_primary_field", "id")
    text_field = getattr(store, "_text_field", None) or getattr(store, "text_key", None) or "text"
    fields = [key_field, text_field]
    if not hasattr(store, "_primary_field"):
        fields += ["_node_content", "_node_type"]

    def count() -> int:
        return int(client.get_collection_stats(name)["row_count"]) if client.has_collection(name) else 0

    def pages(size: int) -> Iterator[list[Row]]:
        if not client.has_collection(name):
            return
        rows = client.query_iterator(name, batch_size=size, output_fields=fields, consistency_level="Strong")
        try:
            while page := rows.next():
                yield [Row(str(row[key_field]), row.get(text_field) or "", dict(row)) for row in page]
        finally:
            rows.close()

    return Listing(count, pages)


def _pgvector_of_langchain(store: Any) -> Listing | None:
    """Return the listing of langchain_postgres.PGVector."""
    table: Any = getattr(store, "EmbeddingStore", None)
    if not _is_from(store, "langchain_postgres") or table is None or store.async_mode:
        return None
    from sqlalchemy import func, select
    from sqlalchemy.orm import Session

    def count() -> int:
        with Session(store._engine) as session:
            if (found := store.get_collection(session)) is None:
                return 0
            mine = select(func.count()).select_from(table).where(table.collection_id == found.uuid)
            return int(session.execute(mine).scalar_one())

    def pages(size: int) -> Iterator[list[Row]]:
        after = ""
        while True:
            with Session(store._engine) as session:
                if (found := store.get_collection(session)) is None:
                    return
                mine = select(table.id, table.document).where(table.collection_id == found.uuid)
                rows = session.execute(mine.where(table.id > after).order_by(table.id).limit(size)).all()
            if not rows:
                return
            yield [Row(key, text or "") for key, text in rows]
            after = rows[-1][0]

    return Listing(count, pages)


def _pgvector_with_tables(store: Any) -> Listing | None:
    """Return the listing of langchain_postgres.PGVectorStore. It is async inside, in an event loop of its PGEngine."""
    table: Any = getattr(store, "_PGVectorStore__vs", None)
    engine: Any = getattr(store, "_engine", None)
    if not _is_from(store, "langchain_postgres") or table is None or getattr(engine, "_loop", None) is None:
        return None
    from sqlalchemy import text as sql

    def quoted(name: str) -> str:
        return '"' + name.replace('"', '""') + '"'

    place, key = f"{quoted(table.schema_name)}.{quoted(table.table_name)}", quoted(table.id_column)
    columns = f"{key}, {quoted(table.content_column)}"

    async def fetch(query: str, **values: Any) -> list[Any]:
        async with table.engine.connect() as connection:
            return list((await connection.execute(sql(query), values)).all())

    def count() -> int:
        return int(engine._run_as_sync(fetch(f"SELECT count(*) FROM {place}"))[0][0])

    def pages(size: int) -> Iterator[list[Row]]:
        rows = engine._run_as_sync(fetch(f"SELECT {columns} FROM {place} ORDER BY {key} LIMIT :size", size=size))
        following = f"SELECT {columns} FROM {place} WHERE {key} > :after ORDER BY {key} LIMIT :size"
        while rows:
            yield [Row(str(name), text or "") for name, text in rows]
            rows = engine._run_as_sync(fetch(following, after=rows[-1][0], size=size))

    return Listing(count, pages, _as_uuid)


def _pgvector_of_llama_index(store: Any) -> Listing | None:
    table: Any = getattr(store, "_table_class", None)
    if table is None or not _is_from(store, "llama_index.vector_stores.postgres"):
        return None
    from sqlalchemy import func, select

    def count() -> int:
        store._initialize()
        with store._session() as session:
            return int(session.execute(select(func.count()).select_from(table)).scalar_one())

    def pages(size: int) -> Iterator[list[Row]]:
        store._initialize()
        after = 0
        while True:
            with store._session() as session:
                wanted = select(table.id, table.node_id, table.text, table.metadata_).where(table.id > after)
                rows = session.execute(wanted.order_by(table.id).limit(size)).all()
            if not rows:
                return
            yield [Row(name, text or "", payload or {}) for _, name, text, payload in rows]
            after = rows[-1][0]

    return Listing(count, pages)


def in_memory(store: Any) -> Mapping[str, Any] | None:
    """Return what LangChain's in-memory store, or its FAISS over an in-memory docstore, holds by id; None: another."""
    found = (getattr(store, "store", None), getattr(getattr(store, "docstore", None), "_dict", None))
    return next((rows for rows in found if isinstance(rows, Mapping)), None)


def _memory(store: Any) -> Listing | None:
    """Return the listing of a store that in_memory() knows."""
    rows = in_memory(store)
    if rows is None:
        return None

    def text_of(row: Any) -> str:
        return str(row["text"] if isinstance(row, Mapping) else row.page_content)

    return Listing.of_texts(lambda: {str(key): text_of(row) for key, row in list(rows.items())})
