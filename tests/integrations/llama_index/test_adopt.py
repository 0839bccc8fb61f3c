"""LlamaIndex vector stores that were filled before they were wrapped: real ones of other projects."""

from __future__ import annotations

import asyncio
import uuid

import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from llama_index_kit import EMBED, kv_keys, node, wanted_keys
from lmcache_rag.integrations.adoption import PAGE
from lmcache_rag.integrations.llama_index import FaissVectorStore, LMCacheVectorStore, as_blend_query_engine
from stores_kit import LLAMA_INDEX, llama_index_store, postgres

from lmcache_rag.errors import ConfigError

SIZE = len(EMBED.get_text_embedding("x"))
COUNT = PAGE + 3


@pytest.fixture(scope="module")
def database():
    with postgres() as server:
        yield server


@pytest.fixture
def inner(request, tmp_path):
    server = request.getfixturevalue("database") if request.param == "pgvector" else None
    with llama_index_store(request.param, tmp_path, SIZE, server) as store:
        yield store


def nodes(count=COUNT):
    """Nodes with metadata that the model reads (n) and some that it does not."""
    made = [node(f"Orchard {i} lies {i} miles off.", f"of {i % 2}", name=str(uuid.uuid4()), n=i) for i in range(count)]
    for one in made:
        one.excluded_llm_metadata_keys = ["number"]
    return made


def check(store, workspace, tmp_path, live):
    """Registry and KV have these nodes, and nothing else."""
    assert store.kv.ids() == {one.node_id for one in live}
    texts = store.kv.texts().values()
    assert sorted(texts) == sorted(one.get_content("llm") for one in live)
    assert kv_keys(tmp_path / "kv", workspace) == wanted_keys(workspace, texts)


def filled(tmp_path, made):
    store = FaissVectorStore(tmp_path / "filled")
    store.add(made)
    return store


class Remote(BasePydanticVectorStore):
    """A vector store that cannot be listed."""

    stores_text: bool = True

    @classmethod
    def class_name(cls):
        return cls.__name__

    @property
    def client(self):
        return None

    def add(self, nodes, **more):
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id, **more):
        pass

    def query(self, query, **more):
        raise NotImplementedError


class Choosy(Remote):
    """Another that returns nodes by id only."""

    def get_nodes(self, node_ids=None, filters=None):
        assert node_ids is not None
        return [TextNode(text="x", id_=name) for name in node_ids if name != "unknown"]


@pytest.mark.parametrize("inner", LLAMA_INDEX, indirect=True)
async def test_a_filled_store_is_reported_and_adopted(inner, workspace, tmp_path, caplog):
    made = nodes()
    inner.add(made)
    store = LMCacheVectorStore(inner, workspace)
    assert f"holds {COUNT} nodes, and 0 are registered. adopt()" in caplog.text
    store.warm()
    assert caplog.text.count(f"holds {COUNT} nodes") == 2
    assert store.kv.ids() == set()
    assert (await store.aadopt()).computed == COUNT
    check(store, workspace, tmp_path, made)
    index = VectorStoreIndex.from_vector_store(store, embed_model=EMBED)
    answer = as_blend_query_engine(index, workspace, similarity_top_k=3).query("Which orchard lies far off?")
    stats = answer.metadata["lmcache_rag"]["stats"]
    assert (stats["chunks_hit"], stats["chunks_missed"]) == (3, 0)
    store.delete("of 0")
    check(store, workspace, tmp_path, made[1::2])
    assert store.prune() == 0
    caplog.clear()
    LMCacheVectorStore(inner, workspace)
    assert caplog.text == ""


@pytest.mark.parametrize("inner", LLAMA_INDEX, indirect=True)
def test_nodes_of_a_real_store_are_deleted(inner, workspace, tmp_path):
    from llama_index.core.vector_stores import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

    made, store = nodes(6), LMCacheVectorStore(inner, workspace)
    store.add(made)
    store.delete_nodes([made[0].node_id])
    check(store, workspace, tmp_path, made[1:])
    store.delete_nodes(filters=MetadataFilters(filters=[MetadataFilter(key="n", value=2, operator=FilterOperator.LT)]))
    check(store, workspace, tmp_path, made[2:])
    either = [MetadataFilter(key="n", value=value) for value in (2, 3)]
    store.delete_nodes(
        [made[3].node_id, made[4].node_id], MetadataFilters(filters=either, condition=FilterCondition.OR)
    )
    check(store, workspace, tmp_path, [made[2], *made[4:]])
    with pytest.raises(ConfigError, match="names no nodes"):
        store.delete_nodes()
    check(store, workspace, tmp_path, [made[2], *made[4:]])
    assert store._held(None, None) == {made[2].node_id, *(one.node_id for one in made[4:])}


def test_a_wrapped_store_is_adopted_in_the_background(workspace, tmp_path):
    made = nodes()
    inner = filled(tmp_path, made)
    store = LMCacheVectorStore(inner, workspace, adopt=True)
    assert store.adoption.result(60).computed == COUNT
    check(store, workspace, tmp_path, made)
    assert LMCacheVectorStore(inner, workspace, adopt=True).adoption is None
    assert store.adopt(background=True).result(60).computed == 0


def test_adoption_reports_progress(workspace, tmp_path):
    store, seen = LMCacheVectorStore(filled(tmp_path, nodes()), workspace), []
    store.adopt(on_progress=lambda progress: seen.append((progress.done, progress.total)))
    assert seen == [(PAGE, COUNT), (COUNT, COUNT)]


async def test_nodes_deleted_while_they_are_adopted_leave(workspace, tmp_path, monkeypatch):
    """A document's nodes are deleted after they were listed, and before they were registered."""
    made = nodes(4)
    store = LMCacheVectorStore(filled(tmp_path, made), workspace)
    real = store.kv.adopt

    def adopt(page, **more):
        asyncio.run_coroutine_threadsafe(store.adelete("of 0"), loop).result(60)
        return real(page, **more)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(store.kv, "adopt", adopt)
    await store.aadopt()
    check(store, workspace, tmp_path, made[1::2])


def test_a_store_without_texts_asks_for_the_docstore(workspace, tmp_path, caplog):
    made, plain = nodes(3), SimpleVectorStore()
    plain.add(made[:2])
    store = LMCacheVectorStore(plain, workspace)
    assert "holds 2 nodes, and 0 are registered. adopt(index.docstore.docs.values())" in caplog.text
    context = StorageContext.from_defaults(vector_store=store)
    context.docstore.add_documents(made)
    with pytest.raises(ConfigError, match="holds no texts"):
        store.adopt()
    store.adopt(context.docstore.docs.values())  # one of them is not in the vector store
    check(store, workspace, tmp_path, made[:2])


def test_a_store_that_cannot_be_listed_is_named(workspace, tmp_path, caplog):
    made, remote = nodes(3), Remote()
    store = LMCacheVectorStore(remote, workspace)
    assert "It is not known how many nodes Remote holds" in caplog.text
    with pytest.raises(ConfigError, match=r"adopt\(index.docstore.docs.values\(\)\)"):
        store.adopt()
    store.adopt(iter(made))
    check(store, workspace, tmp_path, made)
    caplog.clear()
    LMCacheVectorStore(remote, workspace)
    assert caplog.text == ""  # said once, before anything was registered
    store.warm()
    assert "It is not known how many nodes" in caplog.text
    choosy = LMCacheVectorStore(Choosy(), workspace, space="choosy")
    with pytest.raises(ConfigError, match="cannot list its nodes"):
        choosy.adopt()
    choosy.adopt([*made, node("Gone.", name="unknown")])
    assert choosy.kv.ids() == {one.node_id for one in made}
