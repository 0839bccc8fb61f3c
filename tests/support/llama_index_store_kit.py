"""LlamaIndex's vector stores over ours and over others, and what they must have in common."""

from __future__ import annotations

import itertools
import uuid

import chromadb
import pytest
from llama_index.core.vector_stores import (
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    SimpleVectorStore,
    VectorStoreQuery,
)
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index_kit import EMBED, kv_keys, wanted_keys
from lmcache_rag.integrations.llama_index import (
    LMCacheVectorStore,
)

from lmcache_rag.errors import PrecomputeError


def chroma():
    collection = chromadb.EphemeralClient().create_collection(f"c{uuid.uuid4()}")
    return ChromaVectorStore(chroma_collection=collection)


INNER = {"ours": lambda: None, "another": SimpleVectorStore, "chroma": chroma}


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


def failing(engine, monkeypatch, after):
    """Let the engine fail after so many chunks."""
    real = engine.precompute

    def precompute(prompts, *, stop=None):
        yield from real(itertools.islice(prompts, after))
        raise PrecomputeError("on demand")

    monkeypatch.setattr(engine, "precompute", precompute)
