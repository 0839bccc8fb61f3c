"""The user's own LLM objects on a real vLLM (CPU build) with a real LMCache server behind our connector.

Blending needs CUDA: here every answer is computed in full and must be that of the same token ids without us. That they
arrive as token ids, that ingestion fills LMCache, and that one warning says it all, is the same on a GPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from vllm_cpu_kit import CHUNK, Servers, needs_vllm_cpu, until

from lmcache_rag.engines import vllm_answer
from lmcache_rag.lazy_fill import FillCounts
from lmcache_rag.rag import AnswerStreamer

pytestmark = [
    pytest.mark.slow,
    needs_vllm_cpu,
    pytest.mark.skipif(importlib.util.find_spec("langchain_openai") is None, reason="needs langchain-openai"),
]

QUESTION = "What does the passage say?"
STORED = "lmcache_mp_l1_write_chunks_total"


@pytest.fixture
def texts(sentences: list[str]) -> list[str]:
    """Passages that hold at least one LMCache chunk each."""
    return [" ".join(sentences[start : start + 4]) for start in (0, 4)]


@pytest.fixture
def facts(servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a program knows of its server."""
    monkeypatch.setenv("LMCACHE_RAG_STORE", str(tmp_path / "store"))
    return {"url": f"{servers.url}/v1", "model": "smollm2"}


def wanted(servers: Servers, source: Any, texts: list[str]) -> str:
    """The answer of the same token ids from a client that knows nothing of us."""
    from lmcache_rag.integrations.blender import Blender
    from lmcache_rag.integrations.kv_registry import as_workspace

    ids = list(Blender(as_workspace(source)).build_prompt(texts, QUESTION).prompt.token_ids)
    body = {"model": "smollm2", "prompt": ids, "max_tokens": 8, "temperature": 0}
    return str(servers.client.post("/v1/completions", json=body).json()["choices"][0]["text"])


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_langchain_s_own_clients(
    chat: bool, servers: Servers, facts: dict[str, Any], texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    from langchain_core.documents import Document
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from langchain_core.vectorstores import InMemoryVectorStore
    from langchain_openai import ChatOpenAI, OpenAI
    from lmcache_rag.integrations.langchain import LMCacheVectorStore, blend

    kind = ChatOpenAI if chat else OpenAI
    llm = kind(base_url=facts["url"], model=facts["model"], api_key="none", temperature=0, max_tokens=8)
    before = servers.lmcache_counter(STORED)
    vectors = LMCacheVectorStore(InMemoryVectorStore(DeterministicFakeEmbedding(size=8)), llm)
    vectors.add_documents([Document(text) for text in texts])
    length = len(vectors.register.prompts.chunk_ids(texts[0])) // CHUNK
    assert length >= 1
    if not chat:  # the second time LMCache holds them already
        assert until(lambda: servers.lmcache_counter(STORED) >= before + 1 + length)
    step = blend(llm)
    answers = [step.invoke({"documents": [Document(t) for t in texts], "question": QUESTION}) for _ in range(2)]
    said = [getattr(answer, "text", answer) for answer in answers]
    assert said == [wanted(servers, llm, texts)] * 2
    assert caplog.text.count("is not blended") == 1


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_llama_index_s_own_client(
    chat: bool, servers: Servers, facts: dict[str, Any], texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex
    from llama_index.core.schema import TextNode
    from llama_index.core.vector_stores import SimpleVectorStore
    from llama_index.llms.openai_like import OpenAILike
    from lmcache_rag.integrations.llama_index import LMCacheVectorStore, as_blend_query_engine

    llm = OpenAILike(
        model=facts["model"], api_base=facts["url"], api_key="none", temperature=0, max_tokens=8, is_chat_model=chat
    )
    storage = StorageContext.from_defaults(vector_store=LMCacheVectorStore(SimpleVectorStore(), llm))
    nodes = [TextNode(text=text, id_=str(i)) for i, text in enumerate(texts)]
    index = VectorStoreIndex(nodes, storage_context=storage, embed_model=MockEmbedding(8))
    response = as_blend_query_engine(index, llm, similarity_top_k=2).query(QUESTION)
    order = [node.text for node in response.source_nodes]
    assert sorted(order) == sorted(texts)
    assert str(response) == wanted(servers, llm, order)
    counts = response.metadata["lmcache_rag"]["stats"]
    assert (counts["reused_tokens"], counts["computed_tokens"] > 0) == (0, True)


@pytest.fixture
def all_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers as of a server that blends and misses each passage: this one cannot blend, so it misses none."""
    real = vllm_answer.completion

    def completion(gathered: Any, prompt: Any, **facts: Any) -> Any:
        return dataclasses.replace(real(gathered, prompt, **facts), missed=tuple(range(len(prompt.chunks))))

    monkeypatch.setattr(vllm_answer, "completion", completion)
    monkeypatch.setattr(AnswerStreamer, "allowed", lambda answering, blend: blend)


def lazily_filled(servers: Servers, ask: Any, blender: Any) -> None:
    """Two questions use passages that were never ingested: LMCache holds them after the second."""
    before = servers.lmcache_counter(STORED)
    answers = [ask()]
    assert blender().drain(60)
    assert blender().fill_counts == FillCounts()
    answers.append(ask())
    assert blender().drain(60)
    counts = blender().fill_counts
    assert (counts.ingested + counts.held, counts.failed) == (2, 0)
    assert not counts.ingested or until(lambda: servers.lmcache_counter(STORED) > before), "what is ingested is stored"
    assert answers[0] == answers[1] == ask()


@pytest.mark.usefixtures("all_missed")
@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_langchain_fills_lazily(chat: bool, servers: Servers, facts: dict[str, Any], sentences: list[str]) -> None:
    from langchain_core.documents import Document
    from langchain_openai import ChatOpenAI, OpenAI
    from lmcache_rag.integrations.langchain import blend

    kind = ChatOpenAI if chat else OpenAI
    llm = kind(base_url=facts["url"], model=facts["model"], api_key="none", temperature=0, max_tokens=4)
    step = blend(llm)
    passages = [Document(" ".join(sentences[start : start + 4])) for start in (20 + 8 * chat, 24 + 8 * chat)]

    def ask() -> str:
        answer = step.invoke({"documents": passages, "question": QUESTION})
        return str(getattr(answer, "text", answer))

    lazily_filled(servers, ask, lambda: step.blender)
    step.blender.close()


@pytest.mark.usefixtures("all_missed")
def test_llama_index_fills_lazily(servers: Servers, facts: dict[str, Any], sentences: list[str]) -> None:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.llms.openai_like import OpenAILike
    from lmcache_rag.integrations.llama_index import as_blend_query_engine

    texts = [" ".join(sentences[start : start + 4]) for start in (40, 44)]

    class Retriever(BaseRetriever):
        def _retrieve(self, query_bundle: Any) -> list[NodeWithScore]:
            return [NodeWithScore(node=TextNode(text=text), score=1.0) for text in texts]

    llm = OpenAILike(model=facts["model"], api_base=facts["url"], api_key="none", temperature=0, max_tokens=4)
    engine = as_blend_query_engine(Retriever(), llm)
    lazily_filled(servers, lambda: str(engine.query(QUESTION)), lambda: engine._response_synthesizer.blender)
