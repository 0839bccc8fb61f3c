"""Lazy fill through LangChain and LlamaIndex: sync, async and streams, with their own clients and with our engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from embedded_server_kit import serving
from fake_vllm import FakeVLLM
from framework_kit import fresh, light_tokenizer, passages, tiny_llama

from lmcache_rag import lazy_fill
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.errors import ConfigError

LONG = 60.0
QUESTION = "What does it say?"


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVLLM]:
    """A server over a tiny model, which indexes what is ingested and nothing else."""
    monkeypatch.setattr(lazy_fill, "QUIET_S", 0.0)
    fresh(monkeypatch, tmp_path)
    model = HFModel.wrap(tiny_llama(), light_tokenizer())
    with serving(EmbeddedEngine.from_model(model, name="tiny", revision="0", kv_dir=tmp_path / "kv")) as made:
        yield made


@pytest.fixture
def texts(sentences: list[str]) -> list[str]:
    return passages(sentences, 3)


# -- LangChain --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["completions", "chat", "url"])
def step(request: pytest.FixtureRequest, running: FakeVLLM) -> Any:
    """A chain's step, whose passages were never ingested."""
    pytest.importorskip("langchain_openai")
    from langchain_kit import client
    from langchain_openai import ChatOpenAI, OpenAI
    from lmcache_rag.integrations.langchain import blend

    kinds = {"completions": OpenAI, "chat": ChatOpenAI}
    kind = kinds.get(request.param)
    return blend(client(kind, running) if kind else running.url)


def test_langchain_fills_at_the_second_use(step: Any, texts: list[str], caplog: pytest.LogCaptureFixture) -> None:
    from langchain_kit import Seen

    caplog.set_level(logging.INFO, "lmcache_rag")
    seen = Seen()
    given, config = {"documents": texts, "question": QUESTION}, {"callbacks": [seen]}
    step.invoke(given, config)
    list(step.stream(given, config))
    assert step.blender.drain(LONG)
    step.invoke(given, config)
    facts = [fact for _, fact in seen.events]
    assert [fact["chunks_missed"] for fact in facts] == [3, 3, 0]
    assert "3 passage(s) without KV are ingested now." in facts[1]["warnings"]
    assert "Lazy fill ingested 3 passage(s)" in caplog.text
    assert "They are ingested in the background at their second use" in caplog.text
    step.blender.close()


async def test_langchain_fills_in_async_programs(step: Any, texts: list[str]) -> None:
    from langchain_kit import Seen

    seen = Seen()
    given, config = {"documents": texts, "question": QUESTION}, {"callbacks": [seen]}
    await step.ainvoke(given, config)
    async for _ in step.astream(given, config):
        pass
    assert await step.blender.adrain()
    await step.ainvoke(given, config)
    assert [fact["chunks_missed"] for _, fact in seen.events] == [3, 3, 0]
    await step.blender.aclose()


def test_langchain_takes_the_mode_as_an_argument(running: FakeVLLM, texts: list[str]) -> None:
    pytest.importorskip("langchain_core")
    from lmcache_rag.integrations.langchain import blend

    with pytest.raises(ConfigError, match="first, second, never"):
        blend(running.url, lazy_fill="sometimes")
    never = blend(running.url, lazy_fill="never")
    for _ in range(3):
        never.invoke({"documents": texts, "question": QUESTION})
    assert never.blender.drain(LONG)
    assert len(running.seen) == 3
    first = blend(running.url, lazy_fill="first")
    first.invoke({"documents": texts, "question": QUESTION})
    assert first.blender.drain(LONG)
    assert len(running.seen) == 4 + 3


# -- LlamaIndex -------------------------------------------------------------------------------------------------------


class Fixed:
    """A retriever that always finds the same."""

    @staticmethod
    def of(texts: list[str]) -> Any:
        from llama_index.core.base.base_retriever import BaseRetriever
        from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

        class Retriever(BaseRetriever):
            def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
                return [NodeWithScore(node=TextNode(text=text), score=1.0) for text in texts]

        return Retriever()


def missed(response: Any) -> int:
    return int(response.metadata["lmcache_rag"]["stats"]["chunks_missed"])


@pytest.fixture(params=["completions", "chat", "url"])
def llm(request: pytest.FixtureRequest, running: FakeVLLM) -> Any:
    pytest.importorskip("llama_index.llms.openai_like")
    from llama_index_kit import client

    return running.url if request.param == "url" else client(running, is_chat_model=request.param == "chat")


def test_llama_index_fills_at_the_second_use(llm: Any, texts: list[str], caplog: pytest.LogCaptureFixture) -> None:
    from lmcache_rag.integrations.llama_index import as_blend_query_engine

    caplog.set_level(logging.INFO, "lmcache_rag")
    engine = as_blend_query_engine(Fixed.of(texts), llm)
    streaming = as_blend_query_engine(Fixed.of(texts), llm, streaming=True)
    first = engine.query(QUESTION)
    second = streaming.query(QUESTION)
    assert "".join(second.response_gen)
    blender = engine._response_synthesizer.blender
    assert blender.drain(LONG)
    third = engine.query(QUESTION)
    assert [missed(response) for response in (first, second, third)] == [3, 3, 0]
    assert "3 passage(s) without KV are ingested now." in second.metadata["lmcache_rag"]["warnings"]
    assert "Lazy fill ingested 3 passage(s)" in caplog.text
    assert "They are ingested in the background at their second use" in caplog.text
    blender.close()


async def test_llama_index_fills_in_async_programs(llm: Any, texts: list[str]) -> None:
    from llama_index.core.memory import ChatMemoryBuffer
    from lmcache_rag.integrations.llama_index import as_blend_chat_engine, as_blend_query_engine

    engine = as_blend_query_engine(Fixed.of(texts), llm)
    first = await engine.aquery(QUESTION)
    chat = as_blend_chat_engine(Fixed.of(texts), llm, memory=ChatMemoryBuffer.from_defaults(token_limit=256))
    stream = await chat.astream_chat(QUESTION)
    assert "".join([piece async for piece in stream.async_response_gen()])
    blender = engine._response_synthesizer.blender
    assert await blender.adrain()
    third = await engine.aquery(QUESTION)
    assert (missed(first), missed(third)) == (3, 0)
    await blender.aclose()


def test_llama_index_takes_the_mode_as_an_argument(running: FakeVLLM, texts: list[str]) -> None:
    pytest.importorskip("llama_index.core")
    from lmcache_rag.integrations.llama_index import BlendSynthesizer, as_blend_chat_engine, as_blend_query_engine

    with pytest.raises(ConfigError, match="first, second, never"):
        BlendSynthesizer(running.url, lazy_fill="sometimes")
    never = as_blend_query_engine(Fixed.of(texts), running.url, lazy_fill="never")
    for _ in range(3):
        never.query(QUESTION)
    assert len(running.seen) == 3
    as_blend_chat_engine(Fixed.of(texts), running.url, lazy_fill="first").chat(QUESTION)
    assert never._response_synthesizer.blender.drain(LONG)
    assert len(running.seen) == 4 + 3
