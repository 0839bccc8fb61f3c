"""What another vector store holds, for those that can tell. LangChain's interface has no method for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.vectorstores import VectorStore

from .faiss_store import FaissStore


def texts_of(inner: VectorStore) -> dict[str, str] | None:
    """Text by id of everything in a vector store, or None where it cannot tell.

    Known are ours, Chroma (`get`), the in-memory store (`store`) and LangChain's FAISS (`docstore`).
    """
    if isinstance(inner, FaissStore):
        return inner.texts()
    other: Any = inner
    if callable(get := getattr(other, "get", None)) and hasattr(other, "reset_collection"):
        found = get(include=["documents"])
        return dict(zip(found["ids"], found["documents"], strict=True))
    if isinstance(rows := getattr(other, "store", None), Mapping):
        return {str(key): row["text"] for key, row in list(rows.items())}
    if isinstance(rows := getattr(getattr(other, "docstore", None), "_dict", None), Mapping):
        return {str(key): document.page_content for key, document in list(rows.items())}
    return None


def name_of(inner: VectorStore) -> str:
    """What tells a vector store from others in one workspace, also after a restart: its kind and its collection."""
    for attribute in ("_collection_name", "collection_name", "index_name", "_index_name", "table_name"):
        value = getattr(inner, attribute, None)
        if isinstance(value, str) and value:
            return f"{type(inner).__name__}:{value}"
    return type(inner).__name__
