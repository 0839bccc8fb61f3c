"""Parents that AutoMergingRetriever merges into, and windows around sentences: texts that no vector store holds."""

from __future__ import annotations

import pytest
from embedded_server_kit import serving
from framework_kit import fresh
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.node_parser import HierarchicalNodeParser, SentenceWindowNodeParser, get_leaf_nodes
from llama_index.core.postprocessor import MetadataReplacementPostProcessor, SentenceEmbeddingOptimizer
from llama_index.core.retrievers import AutoMergingRetriever
from llama_index_kit import EMBED, client, kv_keys, tiny_engine, wanted_keys
from lmcache_rag.integrations.llama_index import LMCacheVectorStore, as_blend_chat_engine, as_blend_query_engine

TEXT = " ".join(f"Row {i} of the north orchard holds {i * 7} quince trees." for i in range(24))
QUESTION = "How many quince trees?"


def merging(store, *, sizes=(256, 64), top_k=12):
    """An AutoMergingRetriever over the leaves of two documents, and its nodes."""
    documents = [Document(text=TEXT, id_="north"), Document(text=TEXT.replace("north", "south"), id_="south")]
    parser = HierarchicalNodeParser.from_defaults(chunk_sizes=list(sizes), chunk_overlap=0)
    nodes = parser.get_nodes_from_documents(documents)
    storage = StorageContext.from_defaults(vector_store=store)
    storage.docstore.add_documents(nodes)
    index = VectorStoreIndex(get_leaf_nodes(nodes), storage_context=storage, embed_model=EMBED)
    return AutoMergingRetriever(index.as_retriever(similarity_top_k=top_k), storage), nodes


def windows(store):
    """An index over single sentences, and its nodes."""
    parser = SentenceWindowNodeParser.from_defaults(window_size=1)
    nodes = parser.get_nodes_from_documents([Document(text=TEXT, id_="north")])
    return VectorStoreIndex(
        nodes, storage_context=StorageContext.from_defaults(vector_store=store), embed_model=EMBED
    ), nodes


def hits(response):
    stats = response.metadata["lmcache_rag"]["stats"]
    return stats["chunks_hit"], stats["chunks_missed"]


def parents(response):
    return {found.node.node_id for found in response.source_nodes if found.node.child_nodes}


@pytest.mark.parametrize("sizes", [(256, 64), (512, 128, 32)])
def test_parents_hit_from_their_second_use(workspace, tmp_path, sizes, caplog):
    store = LMCacheVectorStore(None, workspace)
    retriever, _ = merging(store, sizes=sizes, top_k=40)
    ask = as_blend_query_engine(retriever, workspace)
    first, second = ask.query(QUESTION), ask.query(QUESTION)
    assert parents(second)
    assert hits(first)[1] == len(parents(first))
    assert hits(second) == (len(second.source_nodes), 0)
    assert second.metadata["lmcache_rag"]["stats"]["reused_tokens"] > 0
    assert "not texts of an LMCacheVectorStore" not in caplog.text
    store.delete("north")
    store.delete("south")
    assert kv_keys(tmp_path / "kv", workspace) == set()
    assert list(workspace.store.registry.doc_ids()) == []


@pytest.mark.parametrize("way", ["aquery", "stream", "astream", "chat"])
async def test_every_way_of_asking_registers_parents(workspace, way):
    retriever, _ = merging(LMCacheVectorStore(None, workspace), top_k=40)
    ask = as_blend_query_engine(retriever, workspace, streaming="stream" in way)
    for _ in range(2):
        if way == "chat":
            response = as_blend_chat_engine(retriever, workspace).chat(QUESTION)
        elif way == "stream":
            response = ask.query(QUESTION)
            "".join(response.response_gen)
        else:
            response = await ask.aquery(QUESTION)
            if way == "astream":
                [piece async for piece in response.async_response_gen()]
    assert hits(response) == (len(response.source_nodes), 0)


def workspace_keys(workspace):
    return wanted_keys(workspace, [chunk.text for chunk in workspace.store.registry.chunks()])


def test_parents_can_have_kv_before_the_first_question(workspace, tmp_path):
    store = LMCacheVectorStore(None, workspace)
    retriever, nodes = merging(store)
    made = [node for node in nodes if node.child_nodes]
    assert store.register_nodes(made).computed == len(made)
    response = as_blend_query_engine(retriever, workspace).query(QUESTION)
    assert parents(response) and hits(response)[1] == 0
    assert store.kv.ids() == {node.node_id for node in get_leaf_nodes(nodes)}
    workspace.engine.forget([(workspace.prompts.fingerprint, key) for key in workspace_keys(workspace)])
    assert store.warm().computed == len(nodes)
    south = [node for node in nodes if node.ref_doc_id == "south"]
    store.delete_nodes([node.node_id for node in get_leaf_nodes(nodes) if node.ref_doc_id == "north"])
    texts = {node.get_content("llm") for node in south}
    assert kv_keys(tmp_path / "kv", workspace) == wanted_keys(workspace, texts)
    store.inner.clear()
    store.prune()
    assert kv_keys(tmp_path / "kv", workspace) == set()
    assert store.register_nodes(made[:1]).computed == 1
    store.clear()
    assert kv_keys(tmp_path / "kv", workspace) == set()


def test_a_servers_parents_are_ingested_meanwhile(tmp_path, tokenizer, monkeypatch):
    fresh(monkeypatch, tmp_path)
    engine = tiny_engine(tmp_path / "kv", tokenizer)
    with serving(engine) as running:
        llm = client(running)
        ask = as_blend_query_engine(merging(LMCacheVectorStore(None, llm))[0], llm)
        assert hits(ask.query(QUESTION))[1] > 0
        assert ask._response_synthesizer.blender.drain(60)
        assert hits(ask.query(QUESTION))[1] == 0
    engine.close()


def test_windows_hit_from_their_second_use(workspace, tmp_path):
    store = LMCacheVectorStore(None, workspace)
    index, _ = windows(store)
    replace = MetadataReplacementPostProcessor(target_metadata_key="window")
    ask = as_blend_query_engine(index, workspace, similarity_top_k=3, node_postprocessors=[replace])
    assert hits(ask.query(QUESTION)) == (0, 3)
    assert hits(ask.query(QUESTION)) == (3, 0)
    store.delete("north")
    assert kv_keys(tmp_path / "kv", workspace) == set()


def test_windows_have_kv_in_place_of_sentences(workspace, tmp_path):
    store = LMCacheVectorStore(None, workspace, target_metadata_key="window")
    index, nodes = windows(store)
    texts = set(store.kv.texts().values())
    assert texts == {node.metadata["window"] for node in nodes}
    assert kv_keys(tmp_path / "kv", workspace) == wanted_keys(workspace, texts)
    replace = MetadataReplacementPostProcessor(target_metadata_key="window")
    ask = as_blend_query_engine(index, workspace, similarity_top_k=3, node_postprocessors=[replace])
    assert hits(ask.query(QUESTION)) == (3, 0)
    assert nodes[3].text.startswith("Row 3 ")  # the caller's nodes are as they were


def test_texts_that_depend_on_the_question_stay_out(workspace, caplog):
    retriever, _ = merging(LMCacheVectorStore(None, workspace))
    cut = SentenceEmbeddingOptimizer(
        embed_model=EMBED, percentile_cutoff=0.5, tokenizer_fn=lambda text: text.split(". ")
    )
    before = list(workspace.store.registry.doc_ids())
    ask = as_blend_query_engine(retriever, workspace, node_postprocessors=[cut])
    for _ in range(2):
        assert hits(ask.query(QUESTION))[0] == 0
    assert list(workspace.store.registry.doc_ids()) == before
    assert "SentenceEmbeddingOptimizer changed the text" in caplog.text


def test_never_means_never(workspace):
    retriever, _ = merging(LMCacheVectorStore(None, workspace))
    before = list(workspace.store.registry.doc_ids())
    ask = as_blend_query_engine(retriever, workspace, lazy_fill="never")
    for _ in range(2):
        assert hits(ask.query(QUESTION))[1] > 0
    assert list(workspace.store.registry.doc_ids()) == before
