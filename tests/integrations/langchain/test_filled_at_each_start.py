"""A program that makes a vector store in memory and fills it at each start: what the registry holds after some runs."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_core.documents import Document
from langchain_core.stores import InMemoryStore
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_kit import FAKE, kv_texts, registered
from lmcache_rag.integrations.langchain import LMCacheDocStore, LMCacheVectorStore

from lmcache_rag import Workspace

TEXTS = ["Keys turn.", "Values stay where they are.", "A cache is small."]


def start(made: Workspace, texts: Iterable[str]) -> tuple[LMCacheVectorStore, list[str]]:
    """One run of the program: the vector store, and the ids of its documents."""
    vectors = LMCacheVectorStore(InMemoryVectorStore(FAKE), made, space="notes")
    return vectors, vectors.add_documents([Document(text) for text in texts])


def test_each_text_is_registered_once_in_many_runs(made: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    runs = [start(made, [*TEXTS, TEXTS[0]])[1] for _ in range(4)]
    assert runs == [runs[0]] * 4
    assert len(set(runs[0])) == 4, "equal texts are different documents"
    vectors, _ = start(made, [*TEXTS, TEXTS[0]])
    assert vectors.register.ids() == set(runs[0])
    assert len(vectors.similarity_search("keys", k=9)) == 4
    assert "does not hold" not in caplog.text
    vectors.delete([runs[0][3]])
    assert registered(made) == kv_texts(made, TEXTS) == set(TEXTS)
    vectors.delete([runs[0][0]])
    assert registered(made) == kv_texts(made, TEXTS) == set(TEXTS[1:])
    assert vectors.add_documents([Document(TEXTS[0])]) == runs[0][:1]


async def test_ids_that_the_program_gives_are_kept(made: Workspace) -> None:
    vectors, _ = start(made, [])
    assert vectors.add_texts(TEXTS[:1], ids=["mine"]) == ["mine"]
    given = [Document(TEXTS[0], id="own"), Document(TEXTS[1])]
    own, other = await vectors.aadd_documents(given)
    assert own == "own"
    assert [(await start(made, [])[0].aadd_documents(given))[1]] == [other]
    assert [document.id for document in given] == ["own", None]
    with pytest.raises(ValueError, match="same length"):
        vectors.add_documents(given, ids=["one"])


def test_threads_that_add_one_text_get_own_ids(made: Workspace) -> None:
    vectors, _ = start(made, [])
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda _: vectors.add_texts(TEXTS[:1])[0], range(16)))
    assert len(set(ids)) == 16 == len(vectors.register.ids())


def test_texts_of_an_earlier_run_are_reported_once(made: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    start(made, TEXTS)
    vectors, _ = start(made, ["Rain falls on the sea."])
    with caplog.at_level(logging.WARNING, logger="lmcache_rag"):
        for _ in range(2):
            vectors.similarity_search("rain")
    assert caplog.text.count("3 texts are registered for notes that it does not hold") == 1
    assert "warm() of this vector store drops it" in caplog.text
    assert registered(made) == {*TEXTS, "Rain falls on the sea."}, "it may be another program's"
    vectors.warm()
    assert registered(made) == {"Rain falls on the sea."}
    caplog.clear()
    start(made, ["Rain falls on the sea."])[0].similarity_search("rain")
    assert "does not hold" not in caplog.text


async def test_parents_of_an_earlier_run_are_reported(made: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    for run in range(2):
        store = LMCacheDocStore(InMemoryStore(), made, space="parents")
        store.mset([(f"{run} {at}", Document(text)) for at, text in enumerate(TEXTS)])  # a retriever draws random keys
        for _ in range(2):
            await store.amget([f"{run} 0"])
    assert caplog.text.count("3 texts are registered for parents that it does not hold") == 1
    assert "warm() of this docstore drops it" in caplog.text
    store.warm()
    assert len(store.register.ids()) == 3
