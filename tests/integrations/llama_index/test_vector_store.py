"""LlamaIndex's vector store API over ours and over another, and the KV that follows it."""

from __future__ import annotations

import asyncio
import itertools
import pickle
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chromadb
import llama_index.core
import pytest
from framework_kit import light_tokenizer
from llama_index.core import Document, MockEmbedding, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    SimpleVectorStore,
    VectorStoreQuery,
)
from llama_index.core.vector_stores.types import VectorStoreQueryMode
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index_kit import EMBED, index_over, kv_keys, node, tiny_engine, tiny_workspace, wanted_keys
from lmcache_rag.integrations.llama_index import (
    FaissVectorStore,
    LMCacheVectorStore,
    as_blend_query_engine,
    vector_store,
)

from lmcache_rag.errors import ConfigError, DocumentError, PrecomputeError, StoreError, StoreLockedError


def chroma():
    collection = chromadb.EphemeralClient().create_collection(f"c{uuid.uuid4()}")
    return ChromaVectorStore(chroma_collection=collection)


INNER = {"ours": lambda: None, "another": SimpleVectorStore, "chroma": chroma}


@pytest.fixture(scope="module")
def tokenizer():
    yield light_tokenizer()


@pytest.fixture
def engine(tokenizer, tmp_path):
    made = tiny_engine(tmp_path / "kv", tokenizer)
    yield made
    made.close()


@pytest.fixture
def workspace(tmp_path, engine):
    with tiny_workspace(tmp_path, engine) as made:
        yield made


@pytest.fixture(params=INNER)
def store(request, workspace):
    return LMCacheVectorStore(INNER[request.param](), workspace)


@pytest.fixture
def ours(workspace):
    return LMCacheVectorStore(None, workspace)


def ask(store, text, k=3, **more):
    return store.query(VectorStoreQuery(query_embedding=EMBED.get_query_embedding(text), similarity_top_k=k, **more))


def only(key, value, operator=FilterOperator.EQ):
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=operator)])


def same(store, workspace, folder):
    """What the registry says exists, what the engine has, and what can be found are one set."""
    texts = store.kv.texts()
    assert kv_keys(folder / "kv", workspace) == wanted_keys(workspace, texts.values())
    assert store._held(None, None) == set(texts)
    return set(texts)


# -- additions and removals -----------------------------------------------------------------------------------------


def test_kv_follows_additions_and_removals(store, workspace, tmp_path, corpus):
    nodes = [node(text, f"d{i % 2}", name=str(i)) for i, text in enumerate(corpus[:4])]
    assert store.add(nodes) == ["0", "1", "2", "3"]
    assert same(store, workspace, tmp_path) == {"0", "1", "2", "3"}
    store.delete("d0")
    assert same(store, workspace, tmp_path) == {"1", "3"}
    store.delete("unknown")
    store.delete_nodes(["1", "unknown"])
    assert same(store, workspace, tmp_path) == {"3"}
    store.add([node(corpus[4], "d1", name="3")])
    assert store.kv.texts() == {"3": corpus[4]}
    store.clear()
    assert same(store, workspace, tmp_path) == set()


async def test_the_async_twins_do_the_same(store, workspace, tmp_path, corpus):
    await store.async_add([node(text, f"d{i}", name=str(i)) for i, text in enumerate(corpus[:4])])
    assert same(store, workspace, tmp_path) == {"0", "1", "2", "3"}
    found = await store.aquery(VectorStoreQuery(query_embedding=EMBED.get_query_embedding(corpus[1])))
    assert found.ids == ["1"]
    await store.adelete("d0")
    await store.adelete_nodes(["1"])
    assert same(store, workspace, tmp_path) == {"2", "3"}
    assert (await store.awarm()).computed == 0
    await store.aclear()
    assert same(store, workspace, tmp_path) == set()


def test_equal_texts_share_kv_until_the_last_leaves(store, workspace, tmp_path, corpus):
    store.add([node(corpus[0], "a", name="1"), node(corpus[0], "b", name="2")])
    assert len(kv_keys(tmp_path / "kv", workspace)) == 1
    store.delete("a")
    assert len(kv_keys(tmp_path / "kv", workspace)) == 1
    store.delete("b")
    assert kv_keys(tmp_path / "kv", workspace) == set()


def test_a_moved_node_leaves_with_its_new_document(store, corpus):
    store.add([node(corpus[0], "a", name="1")])
    store.add([node(corpus[0], "b", name="1")])
    store.delete("a")
    assert store.kv.ids() == {"1"}
    store.delete("b")
    assert store.kv.ids() == set()


def _refused(prompt):
    raise AssertionError("KV was to be computed again")


def test_metadata_the_model_does_not_read_costs_no_kv(store, workspace, corpus):
    one = node(corpus[0], "a", name="1", colour="red")
    one.excluded_llm_metadata_keys = ["colour"]
    store.add([one])
    changed = node(corpus[0], "a", name="1", colour="blue")
    changed.excluded_llm_metadata_keys = ["colour"]
    computed = workspace.engine.precompute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace.engine, "precompute", lambda prompts: computed([_refused(p) for p in prompts]))
        store.add([changed])
    shown = node(corpus[0], "a", name="1", colour="blue")
    store.add([shown])
    assert store.kv.texts() == {"1": f"colour: blue\n\n{corpus[0]}"}


def test_nodes_are_deleted_by_filters(store, workspace, tmp_path, corpus):
    store.add([node(text, "d", name=str(i), number=i) for i, text in enumerate(corpus[:4])])
    store.delete_nodes(filters=only("number", 1, FilterOperator.GT))
    assert same(store, workspace, tmp_path) == {"0", "1"}
    store.delete_nodes(["0", "1"], only("number", 1))
    assert same(store, workspace, tmp_path) == {"0"}


async def test_nodes_are_deleted_by_filters_async(store, workspace, tmp_path, corpus):
    await store.async_add([node(text, "d", name=str(i), number=i) for i, text in enumerate(corpus[:3])])
    await store.adelete_nodes(filters=only("number", 1, FilterOperator.GTE))
    assert same(store, workspace, tmp_path) == {"0"}


@pytest.mark.parametrize("store", ["ours", "chroma"], indirect=True)  # the other is asked by filters
@pytest.mark.parametrize("twin", ["delete_nodes", "adelete_nodes"])
async def test_a_filter_without_match_skips_the_inner_store(store, corpus, monkeypatch, twin):
    """To delete no ids and without filters would be an error to some stores, and everything to others."""
    await store.async_add([node(corpus[0], "d", name="0", number=0)])
    asked = []
    monkeypatch.setattr(type(store.inner), "delete_nodes", lambda *given, **more: asked.append(given))
    monkeypatch.setattr(type(store.inner), "adelete_nodes", lambda *given, **more: asked.append(given))
    done = getattr(store, twin)(filters=only("number", 7))
    if twin == "adelete_nodes":
        await done
    assert asked == []
    assert store.kv.ids() == {"0"}


def test_a_store_without_list_fails_before_deleting(workspace, corpus):
    class Mute(FaissVectorStore):
        def get_nodes(self, node_ids=None, filters=None):
            raise NotImplementedError

    store = LMCacheVectorStore(Mute(workspace.store.path / "mute"), workspace)
    store.add([node(corpus[0], "d", name="1", number=1)])
    with pytest.raises(ConfigError, match="cannot list its nodes"):
        store.delete_nodes(filters=only("number", 1))
    assert store.kv.ids() == store.inner.ids() == {"1"}


# -- failures -------------------------------------------------------------------------------------------------------


def failing(engine, monkeypatch, after):
    """Let the engine fail after so many chunks."""
    real = engine.precompute

    def precompute(prompts, *, stop=None):
        yield from real(itertools.islice(prompts, after))
        raise PrecomputeError("on demand")

    monkeypatch.setattr(engine, "precompute", precompute)


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


# -- questions ------------------------------------------------------------------------------------------------------


def test_our_store_finds_nodes_whole(ours, corpus):
    nodes = [node(text, f"d{i}", name=str(i), number=i, colour="red") for i, text in enumerate(corpus)]
    nodes[2].excluded_llm_metadata_keys = ["number"]
    ours.add(nodes)
    found = ask(ours, corpus[2])
    assert found.ids[0] == "2"
    assert found.similarities == sorted(found.similarities, reverse=True)
    assert found.similarities[0] == pytest.approx(1.0, abs=1e-5)
    [best, *_] = found.nodes
    assert best.text == corpus[2]
    assert best.metadata == {"number": 2, "colour": "red"}
    assert best.ref_doc_id == "d2"
    assert best.excluded_llm_metadata_keys == ["number"]
    assert [n.node_id for n in ours.get_nodes(["3", "x", "1"])] == ["3", "1"]
    assert len(ours.get_nodes()) == 6


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        (only("number", 2), {2}),
        (only("number", 2, FilterOperator.NE), {0, 1, 3, 4, 5}),
        (only("number", [1, 4], FilterOperator.IN), {1, 4}),
        (only("number", [1, 4], FilterOperator.NIN), {0, 2, 3, 5}),
        (only("number", 4, FilterOperator.GTE), {4, 5}),
        (only("number", "4", FilterOperator.GTE), set()),
        (only("colour", "ee", FilterOperator.TEXT_MATCH), {1, 3, 5}),
        (only("tags", "t2", FilterOperator.CONTAINS), {2}),
        (only("tags", ["t2", "t3"], FilterOperator.ANY), {2, 3}),
        (only("none", None, FilterOperator.IS_EMPTY), {0, 1, 2, 3, 4, 5}),
        (MetadataFilters(filters=[]), {0, 1, 2, 3, 4, 5}),
        (
            MetadataFilters(
                filters=[
                    only("colour", "green"),
                    MetadataFilters(
                        filters=only("number", 1).filters + only("number", 2).filters, condition=FilterCondition.OR
                    ),
                ]
            ),
            {1},
        ),
        (MetadataFilters(filters=only("colour", "red").filters, condition=FilterCondition.NOT), {1, 3, 5}),
    ],
)
def test_our_store_filters(ours, corpus, filters, wanted):
    colours = ("red", "green")
    ours.add(
        [
            node(text, f"d{i}", name=str(i), number=i, colour=colours[i % 2], tags=[f"t{i}"])
            for i, text in enumerate(corpus)
        ]
    )
    assert {int(key) for key in ask(ours, "the", 6, filters=filters).ids} == wanted
    assert {n.metadata["number"] for n in ours.get_nodes(filters=filters)} == wanted


def test_our_store_searches_among_documents_and_nodes(ours, corpus):
    ours.add([node(text, f"d{i % 2}", name=str(i)) for i, text in enumerate(corpus)])
    assert set(ask(ours, "the", 6, doc_ids=["d0"]).ids) == {"0", "2", "4"}
    assert set(ask(ours, "the", 6, node_ids=["1", "2"]).ids) == {"1", "2"}
    assert set(ask(ours, "the", 6, node_ids=["1", "2"], doc_ids=["d0"]).ids) == {"2"}


def test_our_store_has_modes(ours, corpus):
    ours.add([node(text, "d", name=str(i)) for i, text in enumerate(corpus)] + [node(corpus[0], "e", name="twin")])
    assert set(ask(ours, corpus[0], 2).ids) == {"0", "twin"}
    apart = ask(ours, corpus[0], 2, mode=VectorStoreQueryMode.MMR, mmr_threshold=0.1)
    assert set(apart.ids) != {"0", "twin"}
    assert len(apart.ids) == 2
    near = ours.query(
        VectorStoreQuery(EMBED.get_query_embedding(corpus[0]), similarity_top_k=2, mode=VectorStoreQueryMode.MMR),
        mmr_threshold=1.0,
    )
    assert set(near.ids) == {"0", "twin"}
    for mode in (VectorStoreQueryMode.SVM, VectorStoreQueryMode.LOGISTIC_REGRESSION):
        assert set(ask(ours, corpus[0], 2, mode=mode).ids) == {"0", "twin"}
    for mode in (VectorStoreQueryMode.HYBRID, VectorStoreQueryMode.SPARSE):
        with pytest.raises(ConfigError, match="has no mode"):
            ask(ours, "x", mode=mode)
    with pytest.raises(ConfigError, match="no embedding"):
        ours.query(VectorStoreQuery(query_str="x"))


def test_an_empty_store_finds_nothing(store):
    for mode in (VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.MMR):
        if isinstance(store.inner, FaissVectorStore):
            assert ask(store, "x", mode=mode).ids == []
    assert store.kv.ids() == set()


# -- restarts -------------------------------------------------------------------------------------------------------


def test_an_index_over_our_store_outlives_the_process(tmp_path, tokenizer, corpus):
    for run in range(2):
        engine = tiny_engine(tmp_path / "kv", tokenizer)
        with tiny_workspace(tmp_path, engine) as workspace:
            store = LMCacheVectorStore(None, workspace)
            if run == 0:
                index = index_over(store, corpus)
                index.storage_context.persist(str(tmp_path / "storage"))
            else:
                index = VectorStoreIndex.from_vector_store(store, embed_model=EMBED)
            response = as_blend_query_engine(index, workspace, similarity_top_k=3).query("What?")
            assert response.metadata["lmcache_rag"]["stats"]["chunks_hit"] == 3
            assert store.warm().computed == 0
            store.inner.close()
        engine.close()


def test_another_store_is_persisted_and_loaded_as_ever(workspace, tmp_path, corpus):
    index = index_over(LMCacheVectorStore(SimpleVectorStore(), workspace), corpus)
    index.storage_context.persist(str(tmp_path / "storage"))
    inner = SimpleVectorStore.from_persist_dir(str(tmp_path / "storage"))
    context = StorageContext.from_defaults(
        vector_store=LMCacheVectorStore(inner, workspace), persist_dir=str(tmp_path / "storage")
    )
    index = load_index_from_storage(context, embed_model=EMBED)
    response = as_blend_query_engine(index, workspace).query("What?")
    assert response.metadata["lmcache_rag"]["stats"]["chunks_hit"] == 2


def test_an_index_is_edited_through_its_own_api(store, workspace, tmp_path, corpus):
    index = index_over(store, corpus[:3])
    index.insert(Document(text=corpus[3], id_="new"))
    index.update_ref_doc(Document(text=corpus[4], id_="d0"))
    index.delete_ref_doc("d1", delete_from_docstore=True)
    same(store, workspace, tmp_path)
    assert {text.split("\n\n", 1)[-1] if text.startswith("number") else text for text in store.kv.texts().values()} == {
        corpus[2],
        corpus[3],
        corpus[4],
    }
    index.delete_nodes(list(store.kv.ids()))
    assert same(store, workspace, tmp_path) == set()


# -- the ingestion pipeline -----------------------------------------------------------------------------------------


def documents(texts):
    return [Document(text=text, id_=f"d{i}") for i, text in enumerate(texts)]


def pipeline(store, strategy, **more):
    return IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=64, chunk_overlap=0), EMBED],
        vector_store=store,
        docstore=SimpleDocumentStore(),
        docstore_strategy=strategy,
        **more,
    )


def live(store, texts):
    """Whether the registered texts are pieces of these texts, and cover all of them."""
    pieces = list(store.kv.texts().values())
    return all(any(piece in text for text in texts) for piece in pieces) and all(
        any(piece in text for piece in pieces) for text in texts
    )


@pytest.mark.parametrize("strategy", DocstoreStrategy)
async def test_a_pipeline_keeps_kv_in_step(store, workspace, tmp_path, corpus, strategy):
    runs = pipeline(store, strategy)
    runs.run(documents=documents(corpus[:3]))
    same(store, workspace, tmp_path)
    assert live(store, corpus[:3])
    before = store.kv.ids()
    runs.run(documents=documents(corpus[:3]))
    assert store.kv.ids() == before
    changed = [corpus[0], corpus[4]]
    await runs.arun(documents=documents(changed))
    same(store, workspace, tmp_path)
    if strategy == DocstoreStrategy.UPSERTS_AND_DELETE:
        assert live(store, changed)
    elif strategy == DocstoreStrategy.UPSERTS:
        assert live(store, [*changed, corpus[2]])
    else:
        assert live(store, [*corpus[:3], corpus[4]])


def test_a_cached_pipeline_still_makes_kv(store, workspace, tmp_path, corpus):
    runs = pipeline(store, DocstoreStrategy.UPSERTS)
    runs.run(documents=documents(corpus[:2]))
    store.clear()
    runs.docstore = SimpleDocumentStore()
    runs.run(documents=documents(corpus[:2]))
    assert live(store, corpus[:2])
    same(store, workspace, tmp_path)


def test_a_pipeline_that_failed_is_run_again(store, workspace, tmp_path, corpus, monkeypatch):
    runs = pipeline(store, DocstoreStrategy.UPSERTS, disable_cache=True)
    with monkeypatch.context() as patch:
        failing(workspace.engine, patch, 1)
        with pytest.raises(PrecomputeError):
            runs.run(documents=documents(corpus[:3]))
    assert same(store, workspace, tmp_path) == set()
    runs.run(documents=documents(corpus[:3]))
    same(store, workspace, tmp_path)
    assert live(store, corpus[:3])


@pytest.mark.filterwarnings("ignore:Specified num_workers")
def test_kv_is_made_here_while_workers_split(ours, workspace, tmp_path, corpus, monkeypatch):
    # In a worker LlamaIndex's tokenizer would be fetched from the web: only a process that made one knows its own copy.
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(llama_index.core.__file__).parent / "_static" / "tiktoken_cache"))
    runs = IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=64, chunk_overlap=0), MockEmbedding(embed_dim=4)],
        vector_store=ours,
        docstore=SimpleDocumentStore(),
    )
    runs.run(documents=documents(corpus[:4]), num_workers=2)
    same(ours, workspace, tmp_path)
    assert live(ours, corpus[:4])
