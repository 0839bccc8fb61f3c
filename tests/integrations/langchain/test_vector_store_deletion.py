"""What a deletion removes from the vector store loses its KV, and nothing else does."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_kit import FAKE, kv_texts
from lmcache_rag.integrations.langchain import FaissStore, LMCacheVectorStore

from lmcache_rag import Workspace
from lmcache_rag.errors import ConfigError

TEXTS = {"quince": "The quince orchard.", "fig": "The fig orchard.", "olive": "The olive orchard."}
SIDES = {"quince": "north", "fig": "south", "olive": "south"}


class Unlistable(VectorStore):
    """Deletes by `expr`, finds documents by id if `by_ids`, and lists nothing."""

    def __init__(self, by_ids: bool = True) -> None:
        self.rows: dict[str, Document] = {}
        self.by_ids = by_ids
        self.fails = False

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        self.rows |= {str(doc.id): doc for doc in documents}
        return [str(doc.id) for doc in documents]

    def delete(self, ids: list[str] | None = None, *, expr: str = "", **kwargs: Any) -> bool:
        if self.fails:
            return False
        matching = [key for key, doc in self.rows.items() if doc.metadata["side"] == expr]
        for key in matching if expr else ids or list(self.rows):
            self.rows.pop(key, None)
        return True

    def get_by_ids(self, ids: Any, /) -> list[Document]:
        if not self.by_ids:
            raise NotImplementedError
        return [self.rows[key] for key in ids if key in self.rows]

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return []

    @classmethod
    def from_texts(cls, *args: Any, **kwargs: Any) -> Unlistable:
        raise NotImplementedError


def filled(inner: VectorStore, made: Workspace) -> LMCacheVectorStore:
    vectors = LMCacheVectorStore(inner, made)
    vectors.add_documents([Document(text, id=key, metadata={"side": SIDES[key]}) for key, text in TEXTS.items()])
    return vectors


def left(vectors: LMCacheVectorStore, made: Workspace) -> set[str]:
    """The documents left, which are the registered ones, and those with KV."""
    ids = {str(doc.id) for doc in vectors.get_by_ids(list(TEXTS))}
    assert vectors.register.ids() == ids
    assert kv_texts(made, set(TEXTS.values())) == {TEXTS[key] for key in ids}
    return ids


def store(kind: str, tmp_path: Path) -> tuple[VectorStore, str, Any]:
    """A store, and the keyword by which it deletes what lies in the north."""
    if kind == "faiss":
        return FaissStore(FAKE, tmp_path / "v"), "filter", {"side": "north"}
    if kind == "chroma":
        from langchain_chroma import Chroma

        return Chroma(f"c{uuid.uuid4().hex}", FAKE), "where", {"side": "north"}
    return Unlistable(), "expr", "north"


@pytest.mark.parametrize("kind", ["faiss", "chroma", "unlistable"])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_filter_deletes_what_matches(made: Workspace, tmp_path: Path, kind: str, is_async: bool) -> None:
    inner, name, value = store(kind, tmp_path)
    vectors = filled(inner, made)
    if is_async:
        asyncio.run(vectors.adelete(**{name: value}))
    else:
        vectors.delete(**{name: value})
    assert left(vectors, made) == {"fig", "olive"}


@pytest.mark.parametrize("kind", ["faiss", "chroma"])
def test_ids_and_a_filter_delete_what_is_both(made: Workspace, tmp_path: Path, kind: str) -> None:
    inner, name, value = store(kind, tmp_path)
    vectors = filled(inner, made)
    vectors.delete(["quince", "fig"], **{name: value})
    assert left(vectors, made) == {"fig", "olive"}
    vectors.delete(["olive"])
    assert left(vectors, made) == {"fig"}
    vectors.delete([])
    assert left(vectors, made) == {"fig"}


@pytest.mark.parametrize("how", [{"filter": {"side": "north"}}, {"where": 1}, {"filter": None}])
async def test_keywords_that_would_be_ignored_are_refused(made: Workspace, how: dict[str, Any]) -> None:
    vectors = filled(InMemoryVectorStore(FAKE), made)
    for ids in (None, ["fig"]):
        with pytest.raises(ConfigError, match="deletes by ids only"):
            vectors.delete(ids, **how)
        with pytest.raises(ConfigError, match="deletes by ids only"):
            await vectors.adelete(ids, **how)
    assert left(vectors, made) == set(TEXTS)


def test_our_faiss_refuses_what_it_does_not_know(made: Workspace, tmp_path: Path) -> None:
    vectors = filled(FaissStore(FAKE, tmp_path / "v"), made)
    with pytest.raises(ConfigError, match="no keyword 'where'"):
        vectors.delete(where={"side": "north"})
    with pytest.raises(ConfigError, match="filter is empty"):
        vectors.delete(filter={})
    with pytest.raises(ConfigError, match=r"'\$not', which is not known"):
        vectors.delete(filter={"$not": {"source": "a"}})
    assert left(vectors, made) == set(TEXTS)


def test_a_deletion_that_cannot_be_followed_is_refused(made: Workspace) -> None:
    inner = Unlistable(by_ids=False)
    vectors = filled(inner, made)
    with pytest.raises(ConfigError, match="cannot say which documents it deletes by expr"):
        vectors.delete(expr="north")
    assert set(inner.rows) == vectors.register.ids() == set(TEXTS)
    vectors.delete(["fig"])
    assert set(inner.rows) == vectors.register.ids() == {"quince", "olive"}


def test_a_deletion_that_failed_keeps_the_kv(made: Workspace) -> None:
    inner = Unlistable()
    vectors = filled(inner, made)
    inner.fails = True
    assert vectors.delete(["fig"]) is False
    assert left(vectors, made) == set(TEXTS)
