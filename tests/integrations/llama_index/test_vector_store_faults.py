"""A vector store of LlamaIndex when something fails, is cancelled, or changes at the same time."""

from __future__ import annotations

import asyncio
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import llama_index_store_kit as kit
import pytest
from llama_index.core.vector_stores import (
    SimpleVectorStore,
)
from llama_index_kit import kv_keys, node, wanted_keys
from llama_index_store_kit import failing, same
from lmcache_rag.integrations.llama_index import (
    FaissVectorStore,
    LMCacheVectorStore,
    vector_store,
)

from lmcache_rag.errors import ConfigError, DocumentError, PrecomputeError, StoreError, StoreLockedError

ours, store = kit.ours, kit.store


@pytest.mark.parametrize("twin", ["add", "async_add"])
def test_a_failed_addition_leaves_everything_as_it_was(store, workspace, tmp_path, corpus, monkeypatch, twin):
    def add(nodes):
        made = getattr(store, twin)(nodes)
        return asyncio.run(made) if twin == "async_add" else made

    add([node(corpus[0], "a", name="1"), node(corpus[1], "a", name="2")])
    new = [node(corpus[5], "a", name="1"), node(corpus[2], "b", name="3"), node(corpus[3], "b", name="4")]
    with monkeypatch.context() as patch:
        failing(workspace.engine, patch, 1)
        with pytest.raises(PrecomputeError):
            add(new)
    assert store.kv.texts() == {"1": corpus[0], "2": corpus[1]}
    assert store._held(None, None) == {"1", "2"}
    store.warm()
    same(store, workspace, tmp_path)
    add(new)
    assert same(store, workspace, tmp_path) == {"1", "2", "3", "4"}
    assert store.kv.texts()["1"] == corpus[5]


def test_a_vector_store_that_fails_takes_no_kv_along(store, workspace, tmp_path, corpus, monkeypatch):
    def broken(*_, **__):
        raise ConnectionError("on demand")

    with monkeypatch.context() as patch:
        patch.setattr(type(store.inner), "add", broken)
        with pytest.raises(ConnectionError):
            store.add([node(corpus[0], "a", name="1")])
    assert same(store, workspace, tmp_path) == set()


def test_texts_that_are_no_texts(store, workspace, tmp_path):
    with pytest.raises(DocumentError, match="valid Unicode"):
        store.add([node("fine " * 9, "a", name="1"), node("broken \ud800", "a", name="2")])
    assert same(store, workspace, tmp_path) == set()


def test_an_embedding_of_another_length_is_refused(ours, workspace, tmp_path, corpus):
    ours.add([node(corpus[0], "a", name="1")])
    odd = node(corpus[1], "a", name="2")
    odd.embedding = [1.0, 2.0]
    with pytest.raises(StoreError):
        ours.add([odd])
    assert same(ours, workspace, tmp_path) == {"1"}


def test_lost_kv_comes_back_with_warm(store, workspace, tmp_path, corpus):
    store.add([node(text, "d", name=str(i)) for i, text in enumerate(corpus[:3])])
    workspace.engine.forget([(workspace.prompts.fingerprint, key) for key in kv_keys(tmp_path / "kv", workspace)])
    assert kv_keys(tmp_path / "kv", workspace) == set()
    assert store.warm().computed == 3
    same(store, workspace, tmp_path)


def test_prune_drops_what_the_inner_store_lost(store, workspace, tmp_path, corpus):
    store.add([node(text, f"d{i}", name=str(i)) for i, text in enumerate(corpus[:3])])
    store.inner.delete("d1")
    assert store.prune() == 1
    assert same(store, workspace, tmp_path) == {"0", "2"}


def test_a_store_that_was_filled_before_is_adopted(workspace, tmp_path, corpus):
    filled = FaissVectorStore(tmp_path / "filled")
    nodes = [node(text, f"d{i}", name=str(i)) for i, text in enumerate(corpus[:3])]
    filled.add(nodes)
    store = LMCacheVectorStore(filled, workspace)
    assert store.kv.ids() == set()
    assert store.adopt().computed == 3
    assert same(store, workspace, tmp_path) == {"0", "1", "2"}
    store.delete("d1")
    assert same(store, workspace, tmp_path) == {"0", "2"}
    plain = SimpleVectorStore()
    plain.add(nodes[:2])
    other = LMCacheVectorStore(plain, workspace, space="plain")
    with pytest.raises(ConfigError, match="holds no texts"):
        other.adopt()
    other.adopt(nodes)
    assert other.kv.ids() == {"0", "1"}


def test_a_text_that_changed_under_its_id_is_adopted(workspace, tmp_path, corpus):
    inner = FaissVectorStore(tmp_path / "filled")
    store = LMCacheVectorStore(inner, workspace)
    store.add([node(text, "d", name=str(i)) for i, text in enumerate(corpus[:2])])
    inner.add([node(corpus[2], "other", name="0")])  # by a program that knows nothing of KV
    assert store.adopt().computed == 1
    assert store.kv.texts() == {"0": corpus[2], "1": corpus[1]}
    assert same(store, workspace, tmp_path) == {"0", "1"}
    assert store.kv.ids("other") == {"0"}


@pytest.mark.parametrize("store", ["another", "chroma"], indirect=True)
async def test_nodes_without_a_document_are_deleted_as_none(store, workspace, tmp_path, corpus):
    """LlamaIndex's stores keep such nodes under the document "None", and delete them so."""
    for deletes in (store.delete, lambda name: asyncio.run(store.adelete(name))):
        store.add([node(corpus[0], name="0"), node(corpus[1], "d", name="1")])
        await asyncio.to_thread(deletes, "None")
        assert same(store, workspace, tmp_path) == {"1"}


def test_a_node_without_document_stands_for_itself(ours, workspace, tmp_path, corpus):
    ours.add([node(corpus[0], name="0"), node(corpus[1], name="1")])
    ours.delete("None")
    assert same(ours, workspace, tmp_path) == {"0", "1"}
    ours.delete("0")
    assert same(ours, workspace, tmp_path) == {"1"}


async def test_a_cancelled_addition_leaves_nothing(store, workspace, tmp_path, corpus, monkeypatch):
    started, go = threading.Event(), threading.Event()
    real = workspace.engine.precompute

    def slow(prompts):
        started.set()
        assert go.wait(20)
        yield from real(prompts)

    with monkeypatch.context() as patch:
        patch.setattr(workspace.engine, "precompute", slow)
        task = asyncio.create_task(store.async_add([node(text, "d") for text in corpus[:3]]))
        await asyncio.to_thread(started.wait, 20)
        task.cancel()
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert same(store, workspace, tmp_path) == set()
    await store.async_add([node(corpus[0], "d", name="1")])
    assert same(store, workspace, tmp_path) == {"1"}


async def test_changes_from_threads_and_tasks_stay_in_step(ours, workspace, tmp_path, corpus):
    def nodes(i):
        return [node(f"{i % 7} {text}", f"d{i % 3}") for text in corpus[:2]]

    work = [
        change
        for i in range(10)
        for change in (
            ours.async_add(nodes(i)),
            asyncio.to_thread(ours.add, nodes(i)),
            ours.adelete(f"d{i % 3}"),
            asyncio.to_thread(ours.delete, f"d{(i + 1) % 3}"),
        )
    ]
    await asyncio.gather(*work)
    same(ours, workspace, tmp_path)
    for number in range(3):
        await ours.adelete(f"d{number}")
    assert same(ours, workspace, tmp_path) == set()


@pytest.fixture
def held_addition(ours, workspace, monkeypatch):
    """Makes an addition's KV computation wait until `go` is set."""
    started, go, real = threading.Event(), threading.Event(), workspace.engine.precompute

    def slow(prompts):
        started.set()
        assert go.wait(20)
        yield from real(prompts)

    monkeypatch.setattr(workspace.engine, "precompute", slow)
    yield started, go
    go.set()


async def test_a_sync_change_that_would_block_its_loop_fails(ours, workspace, tmp_path, corpus, held_addition):
    started, go = held_addition
    task = asyncio.create_task(ours.async_add([node(corpus[0], name="0")]))
    await asyncio.to_thread(started.wait, 20)
    for change in (lambda: ours.add([node(corpus[1], name="1")]), lambda: ours.delete("0"), ours.clear, ours.prune):
        with pytest.raises(StoreLockedError, match=r"would block\. Await async_add"):
            change()
    go.set()
    await task
    assert same(ours, workspace, tmp_path) == {"0"}
    ours.add([node(corpus[1], name="1")])
    assert same(ours, workspace, tmp_path) == {"0", "1"}


async def test_a_thread_fails_after_a_while_behind_a_task(
    ours, workspace, tmp_path, corpus, held_addition, monkeypatch
):
    monkeypatch.setattr(vector_store, "_PATIENCE_S", 0.3)
    started, go = held_addition
    task = asyncio.create_task(ours.async_add([node(corpus[0], name="0")]))
    await asyncio.to_thread(started.wait, 20)
    with pytest.raises(StoreLockedError, match="await the async methods"):
        await asyncio.to_thread(ours.add, [node(corpus[1], name="1")])
    assert ours.kv.ids() <= {"0"}
    later = asyncio.create_task(ours.async_add([node(corpus[2], name="2")]))  # this one waits
    await asyncio.sleep(0.5)
    assert not later.done()
    go.set()
    await asyncio.gather(task, later)
    assert same(ours, workspace, tmp_path) == {"0", "2"}


def test_a_thread_waits_for_another_thread(ours, workspace, tmp_path, corpus, held_addition, monkeypatch):
    monkeypatch.setattr(vector_store, "_PATIENCE_S", 0.1)
    started, go = held_addition
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ours.add, [node(corpus[0], name="0")])
        assert started.wait(20)
        second = pool.submit(ours.add, [node(corpus[1], name="1")])
        with pytest.raises(TimeoutError):
            second.result(0.8)
        assert ours.inner.ids() == set()
        go.set()
        assert (first.result(), second.result()) == (["0"], ["1"])
    assert same(ours, workspace, tmp_path) == {"0", "1"}


async def test_a_change_inside_a_change_fails(ours, workspace, tmp_path, corpus, monkeypatch):
    nodes = [node(corpus[0], name="0")]
    with monkeypatch.context() as patch:
        patch.setattr(FaissVectorStore, "add", lambda self, given, **_: ours.add(given))
        with pytest.raises(StoreLockedError, match="inside another change"):
            await asyncio.to_thread(ours.add, nodes)
        patch.setattr(FaissVectorStore, "add", lambda self, given, **_: asyncio.run(ours.async_add(given)))
        with pytest.raises(StoreLockedError, match="inside another change"):
            await asyncio.to_thread(ours.add, nodes)
        patch.setattr(FaissVectorStore, "async_add", lambda self, given, **_: ours.async_add(given))
        with pytest.raises(StoreLockedError, match="inside another change"):
            await ours.async_add(nodes)
    assert same(ours, workspace, tmp_path) == set()
    ours.add(nodes)
    assert same(ours, workspace, tmp_path) == {"0"}


def test_two_stores_of_one_name_are_warned_of(workspace, tmp_path, corpus, caplog):
    first = LMCacheVectorStore(SimpleVectorStore(), workspace)
    again, apart = LMCacheVectorStore(first.inner, workspace), LMCacheVectorStore(None, workspace, space="b")
    assert "have the name" not in caplog.text
    second = LMCacheVectorStore(SimpleVectorStore(), workspace)
    assert "Two vector stores have the name '' in one workspace" in caplog.text
    assert "space=" in caplog.text
    assert {store.space for store in (first, again, second)} == {""} != apart.space


def test_two_stores_of_one_workspace_keep_apart(workspace, tmp_path, corpus):
    first, second = (LMCacheVectorStore(None, workspace, space=name) for name in ("a/1", "b"))
    first.add([node(corpus[0], "d", name="1")])
    second.add([node(corpus[0], "d", name="1"), node(corpus[1], "d", name="2")])
    first.clear()
    assert second.kv.ids() == second.inner.ids() == {"1", "2"}
    assert kv_keys(tmp_path / "kv", workspace) == wanted_keys(workspace, corpus[:2])


def test_a_store_is_not_sent_to_another_process(store):
    with pytest.raises(ConfigError, match="stays in its process"):
        pickle.dumps(store)
