"""Fixtures of LlamaIndex's tests: a tokenizer, a tiny engine of each test or of a module, a workspace, an index."""

from __future__ import annotations

import pytest
from framework_kit import light_tokenizer
from llama_index_kit import index_over, tiny_engine, tiny_workspace
from lmcache_rag.integrations.llama_index import LMCacheVectorStore


@pytest.fixture(scope="session")
def tokenizer():
    return light_tokenizer()


@pytest.fixture(scope="module")
def module_engine(tokenizer, tmp_path_factory):
    made = tiny_engine(tmp_path_factory.mktemp("kv"), tokenizer)
    yield made
    made.close()


@pytest.fixture
def engine(tokenizer, tmp_path):
    made = tiny_engine(tmp_path / "kv", tokenizer)
    yield made
    made.close()


@pytest.fixture
def workspace(tmp_path, engine):
    with tiny_workspace(tmp_path, engine) as made:
        yield made


@pytest.fixture
def index(workspace, corpus):
    return index_over(LMCacheVectorStore(None, workspace), corpus)
