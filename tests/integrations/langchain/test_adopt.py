"""LangChain vector stores that were filled before they were wrapped: real ones of other projects."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_kit import FAKE, kv_files, kv_texts, registered, workspace
from lmcache_rag.integrations.adoption import PAGE
from lmcache_rag.integrations.langchain import FaissStore, LMCacheVectorStore
from stores_kit import LANGCHAIN, langchain_store, postgres

from lmcache_rag import Workspace
from lmcache_rag.errors import ConfigError, PrecomputeError

TEXTS = [f"Orchard {i} lies {i} miles off." for i in range(2 * PAGE + 3)]


@pytest.fixture(scope="module")
def database() -> Iterator[Any]:
    with postgres() as server:
        yield server


@pytest.fixture
def inner(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    server = request.getfixturevalue("database") if "pgvector" in request.param else None
    with langchain_store(request.param, tmp_path, FAKE, 8, server) as store:
        yield store


def check(vectors: LMCacheVectorStore, made: Workspace, live: set[str]) -> None:
    """Registry and KV have what lives, and nothing else."""
    assert set(vectors.register.texts().values()) == live == registered(made)
    assert kv_texts(made, live) == live
    assert kv_files(made, made.settings.store.parent / "kv") == {made.prompts.chunk_key(text) for text in live}


def filled(texts: list[str] = TEXTS) -> InMemoryVectorStore:
    store = InMemoryVectorStore(FAKE)
    store.add_texts(texts, ids=[f"d{i}" for i in range(len(texts))])
    return store


class Slow:
    """An engine that computes a chunk only when it is let."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.let, self.computed = threading.Semaphore(0), 0
        self.fails_after: int | None = None
        real = engine.precompute

        def precompute(prompts: Any, *, stop: threading.Event | None = None) -> Iterator[Any]:
            for prompt in prompts:
                while not self.let.acquire(timeout=0.01):
                    if stop is not None and stop.is_set():
                        return
                if self.computed == self.fails_after:
                    raise PrecomputeError("The server is gone.")
                self.computed += 1
                yield from real(iter([prompt]))

        monkeypatch.setattr(engine, "precompute", precompute)

    def wait_for(self, chunks: int) -> None:
        while self.computed < chunks:
            time.sleep(0.01)

    def release(self, chunks: int) -> None:
        for _ in range(chunks):
            self.let.release()


# -- real stores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", LANGCHAIN, indirect=True)
def test_a_filled_store_is_adopted_when_it_is_wrapped(inner: Any, made: Workspace, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="lmcache_rag")
    ids = [str(uuid.uuid4()) for _ in TEXTS]
    inner.add_texts(TEXTS, ids=ids)
    vectors = LMCacheVectorStore(inner, made)
    assert f"holds {len(TEXTS)} documents" in caplog.text
    assert vectors.adoption is not None
    assert vectors.adoption.result(60).computed == len(TEXTS)
    assert vectors.adoption.progress.total == vectors.adoption.progress.done == len(TEXTS)
    check(vectors, made, set(TEXTS))
    assert set(vectors.register.ids()) == set(ids)
    vectors.delete(ids[:1])
    check(vectors, made, set(TEXTS[1:]))
    assert vectors.warm().computed == 0
    again = LMCacheVectorStore(inner, made)
    assert again.adoption is not None and again.adoption.result(60).computed == 0
    check(again, made, set(TEXTS[1:]))


@pytest.mark.parametrize("inner", LANGCHAIN, indirect=True)
def test_ids_stay_those_of_the_store(inner: Any, made: Workspace) -> None:
    """Qdrant and pgvector's tables return a UUID with hyphens, however it was written when it was added."""
    vectors = LMCacheVectorStore(inner, made)
    ids = [uuid.uuid4().hex for _ in range(2)]
    vectors.add_texts(TEXTS[:2], ids=ids)
    assert vectors.adopt().computed == 0
    vectors.warm()
    assert len(vectors.register.ids()) == 2
    vectors.delete(ids[:1])
    check(vectors, made, {TEXTS[1]})


@pytest.mark.parametrize("inner", ["qdrant"], indirect=True)
def test_warm_follows_a_store_changed_directly(inner: Any, made: Workspace) -> None:
    from qdrant_client.models import FieldCondition, Filter, MatchValue

    vectors = LMCacheVectorStore(inner, made)
    vectors.add_texts(TEXTS[:3], metadatas=[{"n": i} for i in range(3)], ids=[uuid.uuid4().hex for _ in range(3)])
    one = Filter(must=[FieldCondition(key="metadata.n", match=MatchValue(value=1))])
    inner.client.delete(inner.collection_name, one)
    vectors.warm()
    check(vectors, made, {TEXTS[0], TEXTS[2]})


# -- any store --------------------------------------------------------------------------------------------------------


def test_the_constructor_waits_for_no_kv(made: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, wrapped = Slow(made.engine, monkeypatch), Queue[LMCacheVectorStore]()
    wrapping = threading.Thread(target=lambda: wrapped.put(LMCacheVectorStore(filled(), made)), daemon=True)
    wrapping.start()
    try:
        vectors = wrapped.get(timeout=60)  # no KV is computed before it is let
        assert slow.computed == 0
        assert vectors.adoption is not None and vectors.adoption.running
        assert len(vectors.similarity_search("orchard", k=2)) == 2
    finally:
        slow.release(1000)
        wrapping.join(60)  # a process that ends while it computes is aborted
    assert vectors.adoption.wait(60)
    check(vectors, made, set(TEXTS))


def test_an_empty_store_starts_nothing(made: Workspace) -> None:
    assert LMCacheVectorStore(InMemoryVectorStore(FAKE), made).adoption is None
    assert LMCacheVectorStore(filled(), made, space="left", adopt=False).adoption is None
    assert registered(made) == set()


def test_adoption_reports_progress(made: Workspace) -> None:
    vectors, seen = LMCacheVectorStore(filled(), made, adopt=False), []
    assert vectors.adopt(on_progress=lambda progress: seen.append((progress.done, progress.kv.computed))).computed == 35
    assert seen == [(16, 16), (32, 32), (35, 35)]
    assert str(vectors.adoption.progress).startswith("35 of 35 documents, KV of 35 computed (")


def test_a_failed_adoption_is_continued(made: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    slow = Slow(made.engine, monkeypatch)
    slow.fails_after = PAGE + 4
    slow.release(1000)
    vectors = LMCacheVectorStore(filled(), made)
    assert vectors.adoption is not None
    with pytest.raises(PrecomputeError, match="server is gone"):
        vectors.adoption.result(60)
    assert "Call adopt() later to continue" in caplog.text
    assert kv_texts(made, set(TEXTS)) == set(TEXTS[: PAGE + 4])
    with pytest.raises(PrecomputeError):
        vectors.adopt()
    slow.fails_after = None
    assert vectors.adopt().computed == len(TEXTS) - PAGE - 4
    check(vectors, made, set(TEXTS))


async def test_adoption_is_stopped_and_continued(made: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(made.engine, monkeypatch)
    vectors = LMCacheVectorStore(filled(), made, adopt=False)
    slow.release(3)
    task = asyncio.create_task(vectors.aadopt())
    await asyncio.to_thread(slow.wait_for, 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert vectors.adoption.wait(60)
    assert kv_texts(made, set(TEXTS)) == set(TEXTS[:3])
    slow.release(1000)
    assert (await vectors.aadopt()).computed == len(TEXTS) - 3
    check(vectors, made, set(TEXTS))


def test_closing_a_workspace_ends_its_adoptions(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    with workspace(tokenizer, tmp_path) as made:
        slow = Slow(made.engine, monkeypatch)
        vectors = LMCacheVectorStore(filled(), made)
        slow.release(2)
        slow.wait_for(2)
        assert vectors.adoption is not None and vectors.adoption.running
    assert vectors.adoption.wait(60)
    assert vectors.adoption.error is None
    assert "store" not in vars(made)  # it has not been opened again


def test_changes_during_an_adoption_win(made: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, inner = Slow(made.engine, monkeypatch), filled()
    vectors = LMCacheVectorStore(inner, made)
    slow.release(1)
    slow.wait_for(1)
    listed = vectors.adoption
    last = len(TEXTS) - 1  # listed already, and not registered
    vectors.delete(["d0", f"d{last}"])
    adding = threading.Thread(target=vectors.add_texts, args=[["Changed."]], kwargs={"ids": [f"d{last - 1}"]})
    adding.start()
    while "Changed." not in vectors.register.texts().values():
        time.sleep(0.01)
    slow.release(1000)
    adding.join()
    assert listed is not None and listed.wait(60)
    check(vectors, made, {*TEXTS[1:-2], "Changed."})


def test_a_text_deleted_while_adopted_is_forgotten(made: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion by a filter names no ids: what it removed is found out at the end."""
    inner = filled(TEXTS[:3])
    vectors = LMCacheVectorStore(inner, made, adopt=False)
    real = vectors.register.adopt

    def adopt(page: Any, **more: Any) -> Any:
        inner.delete(["d1"])
        vectors.register.remove([])
        return real(page, **more)

    monkeypatch.setattr(vectors.register, "adopt", adopt)
    vectors.adopt()
    check(vectors, made, {TEXTS[0], TEXTS[2]})


# -- stores that cannot be listed -------------------------------------------------------------------------------------


class Remote(VectorStore):
    """A vector store that nobody can list."""

    def __init__(self) -> None:
        self._kept = InMemoryVectorStore(FAKE)

    def add_documents(self, documents: list[Document], **more: Any) -> list[str]:
        return self._kept.add_documents(documents, **more)

    def similarity_search(self, query: str, k: int = 4, **more: Any) -> list[Document]:
        return self._kept.similarity_search(query, k, **more)

    def delete(self, ids: list[str] | None = None, **more: Any) -> bool | None:
        return self._kept.delete(ids, **more)

    @classmethod
    def from_texts(cls, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


def test_a_store_that_cannot_be_listed_is_named(made: Workspace, caplog: Any) -> None:
    inner = Remote()
    documents = [Document(text, id=f"d{i}") for i, text in enumerate(TEXTS)]
    inner.add_documents(documents)
    vectors = LMCacheVectorStore(inner, made)
    assert caplog.text.count("(Remote) holds cannot be listed") == 1
    assert "adopt(documents)" in caplog.text
    assert vectors.warm().computed == 0
    assert caplog.text.count("(Remote) holds cannot be listed") == 2
    with pytest.raises(ConfigError, match=r"adopt\(documents\)"):
        vectors.adopt()
    with pytest.raises(ConfigError, match=r"adopt\(documents\)"):
        vectors.adopt(background=True)
    caplog.clear()
    LMCacheVectorStore(inner, made, adopt=False)
    assert caplog.text == ""
    assert vectors.adopt(iter(documents)).computed == len(TEXTS)  # any iterable, read once
    check(vectors, made, set(TEXTS))
    vectors.delete(["d0"])
    check(vectors, made, set(TEXTS[1:]))


def test_documents_without_ids_are_adopted_by_text(made: Workspace, caplog: Any) -> None:
    vectors = LMCacheVectorStore(Remote(), made, adopt=False)
    unusable = Document("Half a character: \ud83d")
    assert vectors.adopt([Document(TEXTS[0]), unusable, Document(TEXTS[0]), Document(TEXTS[1])]).computed == 2
    assert vectors.adoption is not None and vectors.adoption.progress.unusable == 1
    assert "not valid Unicode" in caplog.text
    assert vectors.adopt([Document(TEXTS[1])]).computed == 0
    check(vectors, made, set(TEXTS[:2]))
    vectors.delete()
    check(vectors, made, set())


def test_our_own_store_is_adopted_too(made: Workspace, tmp_path: Path) -> None:
    store = FaissStore(FAKE, tmp_path / "vectors")
    store.add_texts(TEXTS[:2])
    vectors = LMCacheVectorStore(store, made, adopt=False)
    assert vectors.adopt(background=True).result(60).computed == 2
    check(vectors, made, set(TEXTS[:2]))
    store.close()
