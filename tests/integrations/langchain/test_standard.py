"""LangChain's own standard suites, all of them, over our FAISS and over Chroma, with KV computed behind each."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_chroma import Chroma
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from langchain_kit import FAKE, registered
from langchain_tests.integration_tests import RetrieversIntegrationTests, VectorStoreIntegrationTests
from lmcache_rag.integrations.langchain import FaissStore, LMCacheRetriever, LMCacheVectorStore

from lmcache_rag import Workspace

TEXTS = ["The cat sleeps.", "A dog barks at night.", "Rain falls on the sea.", "Keys turn with their place."]


class _Checked(VectorStoreIntegrationTests):
    """After each test, what is registered is what lives."""

    def vectors(self) -> VectorStore:
        raise NotImplementedError

    @pytest.fixture
    def vectorstore(self, made: Workspace, tmp_path: Path) -> Iterator[VectorStore]:
        inner = self.inner(tmp_path)
        vectors = LMCacheVectorStore(inner, made)
        yield vectors
        live = set(vectors.register.texts().values())
        assert registered(made) == live
        if live:  # Chroma refuses an empty list
            assert {doc.page_content for doc in vectors.get_by_ids(sorted(vectors.register.ids()))} == live

    def inner(self, folder: Path) -> VectorStore:
        raise NotImplementedError


class TestOverOurFaiss(_Checked):
    def inner(self, folder: Path) -> VectorStore:
        return FaissStore(self.get_embeddings(), folder / "vectors")


class TestOverChroma(_Checked):
    def inner(self, folder: Path) -> VectorStore:
        return Chroma(collection_name=f"c{uuid.uuid4().hex}", embedding_function=self.get_embeddings())


class TestOurFaissAlone(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> Iterator[VectorStore]:
        store = FaissStore(self.get_embeddings(), tmp_path / "vectors")
        yield store
        store.close()


class _Retriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def filled(self, made: Workspace, tmp_path: Path) -> None:
        self._params = self.source(made, tmp_path)

    def source(self, made: Workspace, folder: Path) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return LMCacheRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return self._params

    @property
    def retriever_query_example(self) -> str:
        return "What turns?"


class TestRetrieverOverOurFaiss(_Retriever):
    def source(self, made: Workspace, folder: Path) -> dict[str, Any]:
        vectors = LMCacheVectorStore(FaissStore(FAKE, folder / "vectors"), made)
        vectors.add_texts(TEXTS)
        return {"vectorstore": vectors}


class TestRetrieverOverChroma(_Retriever):
    def source(self, made: Workspace, folder: Path) -> dict[str, Any]:
        chroma = Chroma(collection_name=f"c{uuid.uuid4().hex}", embedding_function=FAKE)
        vectors = LMCacheVectorStore(chroma, made)
        vectors.add_texts(TEXTS)
        return {"retriever": vectors.as_retriever()}


class TestRetrieverOverRAG(_Retriever):
    @pytest.fixture(autouse=True)
    def filled(self, parts: Any, documents: Any) -> None:
        parts.ingestor.ingest(documents)
        self._params = {"rag": parts.rag}
