"""LlamaIndex's vector store API over ours and over another, and the KV that follows it."""

from __future__ import annotations

from pathlib import Path

import llama_index.core
import llama_index_store_kit as kit
import pytest
from llama_index.core import Document, MockEmbedding, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.prompts import PromptTemplate
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import (
    FilterCondition,
    FilterOperator,
    MetadataFilters,
    SimpleVectorStore,
    VectorStoreQuery,
)
from llama_index.core.vector_stores.types import VectorStoreQueryMode
from llama_index_kit import EMBED, index_over, kv_keys, node, tiny_engine, tiny_workspace
from llama_index_store_kit import ask, failing, only, same
from lmcache_rag.integrations.llama_index import (
    BlendSynthesizer,
    FaissVectorStore,
    LMCacheVectorStore,
    as_blend_query_engine,
)

from lmcache_rag.errors import ConfigError, PrecomputeError

ours, store = kit.ours, kit.store


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


async def test_a_deletion_that_names_no_nodes_is_refused(store, workspace, tmp_path, corpus):
    await store.async_add([node(text, "d", name=str(i)) for i, text in enumerate(corpus[:2])])
    for named in ((None, None), (None, MetadataFilters(filters=[]))):
        with pytest.raises(ConfigError, match="names no nodes"):
            store.delete_nodes(*named)
        with pytest.raises(ConfigError, match="names no nodes"):
            await store.adelete_nodes(*named)
    store.delete_nodes([])
    assert same(store, workspace, tmp_path) == {"0", "1"}
    store.delete_nodes(["0"], MetadataFilters(filters=[]))
    assert same(store, workspace, tmp_path) == {"1"}


async def test_kv_of_nodes_that_a_deletion_spares_stays(workspace, tmp_path, corpus):
    """Stores have options that narrow a deletion, as Milvus's partition and Qdrant's shard."""

    class Parts(FaissVectorStore):
        def delete(self, ref_doc_id, part=None, **more):
            self.delete_nodes([node.node_id for node in self.get_nodes() if node.ref_doc_id == ref_doc_id], part=part)

        def delete_nodes(self, node_ids=None, filters=None, part=None, **more):
            super().delete_nodes([name for name in node_ids if part is None or name.startswith(part)])

        async def adelete(self, ref_doc_id, **more):
            self.delete(ref_doc_id, **more)

        async def adelete_nodes(self, node_ids=None, filters=None, **more):
            self.delete_nodes(node_ids, filters, **more)

    store = LMCacheVectorStore(Parts(tmp_path / "parts"), workspace)
    names = ["a1", "a2", "b1", "b2", "c1", "c2", "d1", "d2"]
    store.add([node(f"{name} {corpus[0]}", f"of {name[0]}", name=name) for name in names])
    store.delete_nodes(["a1", "a2"], part="a1")
    await store.adelete_nodes(["b1", "b2"], part="b1")
    store.delete("of c", part="c1")
    await store.adelete("of d", part="d1")
    assert same(store, workspace, tmp_path) == {"a2", "b2", "c2", "d2"}


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


def test_kv_for_several_prompts_is_computed_when_added(workspace, tmp_path, corpus, caplog):
    own = PromptTemplate("Read this:\n---\n{context_str}\n---\nNow: {query_str}")
    other = BlendSynthesizer(workspace, text_qa_template=PromptTemplate("A pirate asks.\n{context_str}\n{query_str}"))
    caplog.clear()
    store = LMCacheVectorStore(None, workspace, prompts=[own, None, other])
    index = index_over(store, corpus[:2])
    engines = [as_blend_query_engine(index, workspace, text_qa_template=own), as_blend_query_engine(index, workspace)]
    engines.append(index.as_query_engine(llm=other.llm, response_synthesizer=other))
    for engine in engines:
        found = engine.query("What?").metadata["lmcache_rag"]["stats"]
        assert (found["chunks_hit"], found["chunks_missed"]) == (2, 0)
    assert "another text before" not in caplog.text
    assert len(store.kv.fingerprints) == 3
    as_blend_query_engine(index, workspace, text_qa_template=PromptTemplate("Now:\n{context_str}\n{query_str}"))
    assert "prompts=[template]" in caplog.text
    assert len(kv_keys(tmp_path / "kv", workspace)) >= 2 * 3
    store.delete_nodes(sorted(store.kv.ids()))
    assert kv_keys(tmp_path / "kv", workspace) == set()
    for wrong in ("a text", PromptTemplate("{query_str} {context_str}")):
        with pytest.raises(ConfigError, match="template"):
            LMCacheVectorStore(None, workspace, space="wrong", prompts=[wrong])
