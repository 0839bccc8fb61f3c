"""Parents of small pieces: the texts that stand in prompts have KV, the pieces have none."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from framework_kit import passages
from langchain_classic.retrievers import ParentDocumentRetriever
from langchain_classic.storage import LocalFileStore, create_kv_docstore
from langchain_core.documents import Document
from langchain_core.runnables import RunnablePassthrough
from langchain_core.stores import InMemoryStore
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_kit import FAKE, Seen, kv_texts, registered
from langchain_text_splitters import CharacterTextSplitter
from lmcache_rag.integrations.langchain import LMCacheDocStore, LMCacheRetriever, LMCacheVectorStore, blend

from lmcache_rag import Workspace
from lmcache_rag.errors import ConfigError

QUESTION = "How is a key moved?"


def kind_of_store(kind: str, folder: Path) -> Any:
    return InMemoryStore() if kind == "memory" else create_kv_docstore(LocalFileStore(folder / "parents"))


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_parents_are_reused_at_the_first_question(
    made: Workspace, sentences: list[str], tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    parents = passages(sentences, 4)
    retriever = ParentDocumentRetriever(
        vectorstore=InMemoryVectorStore(FAKE),
        docstore=LMCacheDocStore(kind_of_store(kind, tmp_path), made),
        child_splitter=CharacterTextSplitter(separator=" ", chunk_size=120, chunk_overlap=0),
    )
    retriever.add_documents([Document(text) for text in parents])
    assert registered(made) == set(parents) == kv_texts(made, set(parents))
    seen = Seen()
    chain: Any = {"documents": retriever, "question": RunnablePassthrough()} | blend(made)
    chain.invoke(QUESTION, {"callbacks": [seen]})
    [(_, facts)] = seen.events
    assert facts["chunks_hit"] > 0 == facts["chunks_missed"]
    assert facts["reused_tokens"] > 0
    assert "not registered" not in caplog.text


async def test_deleted_and_replaced_parents_lose_their_kv(made: Workspace) -> None:
    store = LMCacheDocStore(InMemoryStore(), made)
    store.mset([("a", Document("one")), ("b", Document("two"))])
    await store.amset([("b", Document("three")), ("c", Document("one"))])
    assert [doc and doc.page_content for doc in await store.amget(["a", "b", "x"])] == ["one", "three", None]
    store.mdelete(["a"])
    assert registered(made) == {"one", "three"} == kv_texts(made, {"one", "three"})
    await store.amdelete(["c"])
    assert registered(made) == {"three"}
    assert list(store.yield_keys()) == [key async for key in store.ayield_keys()] == ["b"]


async def test_warm_registers_what_was_there_before(made: Workspace) -> None:
    inner = InMemoryStore()
    inner.mset([("a", Document("one")), ("b", Document("two"))])
    store = LMCacheDocStore(inner, made)
    assert store.warm().computed == 2
    inner.mset([("a", Document("three"))])
    inner.mdelete(["b"])
    await store.awarm()
    assert store.register.texts() == {"a": "three"}
    assert registered(made) == {"three"}


def test_values_that_are_no_documents_are_refused(made: Workspace) -> None:
    inner = InMemoryStore()
    with pytest.raises(ConfigError, match="'a' is bytes, not a Document"):
        LMCacheDocStore(inner, made).mset([("a", b"one")])  # type: ignore[list-item]
    assert list(inner.yield_keys()) == []
    with pytest.raises(ConfigError, match="needs `source`"):
        LMCacheDocStore(inner)


def test_two_stores_of_one_kind_keep_their_kv(made: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    one, two = (LMCacheVectorStore(InMemoryVectorStore(FAKE), made) for _ in range(2))
    assert [store.space for store in (one, two)] == ["InMemoryVectorStore", "InMemoryVectorStore#2"]
    assert "Give each a name, space=" in caplog.text
    again = LMCacheVectorStore(two.inner, made)  # the same store, wrapped twice
    assert again.space == two.space
    one.add_documents([Document("Herons nest by the quay.", id="a")])
    two.add_documents([Document("Storks nest on the mill.", id="a")])
    one.warm()
    one.delete()
    assert registered(made) == {"Storks nest on the mill."} == set(again.register.texts().values())
    caplog.clear()
    assert LMCacheVectorStore(InMemoryVectorStore(FAKE), made, space="mine").space == "mine"
    assert not caplog.records


def test_a_store_that_is_gone_gives_its_name_back(made: Workspace) -> None:
    for _ in range(2):
        assert LMCacheVectorStore(InMemoryVectorStore(FAKE), made).space == "InMemoryVectorStore"


def test_pickling_says_what_to_do_instead(made: Workspace) -> None:
    vectors = LMCacheVectorStore(InMemoryVectorStore(FAKE), made)
    for what in (
        vectors,
        vectors.as_retriever(),
        LMCacheDocStore(InMemoryStore(), made),
        blend(made),
        LMCacheRetriever(vectorstore=vectors),
    ):
        with pytest.raises(ConfigError, match=r"cannot be pickled.*one in each process"):
            pickle.dumps(what)
