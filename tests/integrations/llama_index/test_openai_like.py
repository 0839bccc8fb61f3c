"""A user's OpenAILike object and a vLLM-like server: what goes over the wire, and what happens when it does not."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import openai
import pytest
from embedded_server_kit import serving
from framework_kit import fresh, passages
from llama_index_kit import client, events, index_over, node, tiny_engine
from lmcache_rag.integrations.kv_registry import as_workspace
from lmcache_rag.integrations.llama_index import (
    BlendSynthesizer,
    EngineLLM,
    LMCacheVectorStore,
    as_blend_chat_engine,
    as_blend_query_engine,
)

from lmcache_rag.engines.base import BlendOptions
from lmcache_rag.errors import ConfigError, EngineError, EngineUnavailableError, PrecomputeError


@pytest.fixture
def running(tokenizer, tmp_path, monkeypatch):
    fresh(monkeypatch, tmp_path)
    engine = tiny_engine(tmp_path / "kv", tokenizer)
    with serving(engine) as made:
        yield made
    engine.close()


@pytest.fixture
def texts(sentences):
    return passages(sentences)


def stats(response):
    return response.metadata["lmcache_rag"]["stats"]


def wanted_ids(llm, engine, response):
    """The token ids that our own builder makes for that answer."""
    blender = engine._response_synthesizer.blender
    from lmcache_rag.integrations.llama_index import node_text

    return list(blender.build_prompt([node_text(n.node) for n in response.source_nodes], "What?").prompt.token_ids)


@pytest.mark.parametrize(
    ("chat", "version", "path"),
    [
        (False, "0.33.0", "/v1/completions"),
        (True, "0.33.0", "/v1/chat/completions"),
        (True, "0.32.0", "/v1/chat/completions"),
        (True, "0.25.1", "/v1/completions"),
    ],
)
async def test_token_ids_arrive_and_kv_is_reused(running, texts, chat, version, path):
    running.version = version
    llm = client(running, is_chat_model=chat)
    index = index_over(LMCacheVectorStore(None, llm), texts)
    ask = as_blend_query_engine(index, llm, similarity_top_k=3)
    with events() as heard:
        response = ask.query("What?")
        other = await ask.aquery("What?")
    assert other.response == response.response
    assert [q["path"] for q in running.questions] == [path, path]
    assert running.backend.ids[-1] == running.backend.ids[-2] == wanted_ids(llm, ask, response)
    for one in (response, other):
        assert (stats(one)["chunks_hit"], stats(one)["chunks_missed"]) == (3, 0)
        assert stats(one)["reused_tokens"] > 0
    names = [event.class_name() for event in heard]
    assert names.count("LMCacheBlendEvent") == 2
    assert ("LLMChatEndEvent" if path.startswith("/v1/chat") else "LLMCompletionEndEvent") in names


@pytest.mark.parametrize("chat", [False, True])
async def test_streams_come_in_pieces_with_statistics(running, texts, chat):
    llm = client(running, is_chat_model=chat)
    index = index_over(LMCacheVectorStore(None, llm), texts)
    whole = as_blend_query_engine(index, llm).query("What?")
    ask = as_blend_query_engine(index, llm, streaming=True)
    streamed = ask.query("What?")
    assert "".join(streamed.response_gen) == whole.response
    assert stats(streamed)["chunks_hit"] == 2
    streamed = await ask.aquery("What?")
    assert "".join([piece async for piece in streamed.async_response_gen()]) == whole.response
    assert stats(streamed)["chunks_hit"] == 2
    assert running.questions[-1]["stream"] is True


async def test_a_closed_stream_closes_the_connection(running, texts):
    running.pause = 0.02  # or the answer could be over before the stream is closed
    llm = client(running, max_tokens=2000)
    index = index_over(LMCacheVectorStore(None, llm), texts)
    streamed = await as_blend_query_engine(index, llm, streaming=True).aquery("What?")
    await anext(streamed.response_gen)
    await streamed.response_gen.aclose()
    assert await asyncio.to_thread(running.gone.wait, 60)


def test_a_stream_that_is_left_closes_the_connection(running, texts):
    running.pause = 0.02
    llm = client(running, max_tokens=2000, is_chat_model=True)
    index = index_over(LMCacheVectorStore(None, llm), texts)
    streamed = as_blend_query_engine(index, llm, streaming=True).query("What?")
    next(streamed.response_gen)
    streamed.response_gen.close()
    assert running.gone.wait(60)


def test_what_the_constructor_adds_is_merged(running, texts):
    theirs = {
        "extra_body": {"min_p": 0.2, "kv_transfer_params": {"theirs": 1, "lmcache_rag.ratio": 0.5}},
        "presence_penalty": 0.5,
        "max_tokens": 3,
    }
    llm = client(running, additional_kwargs=theirs, max_tokens=None)
    index = index_over(LMCacheVectorStore(None, llm), texts)
    response = as_blend_query_engine(index, llm).query("What?")
    asked = as_blend_query_engine(index, llm)._response_synthesizer
    asked.synthesize("What?", response.source_nodes, blend=BlendOptions(ratio=0.3))
    body, other = running.questions
    assert (body["min_p"], body["presence_penalty"], body["max_tokens"]) == (0.2, 0.5, 3)
    assert body["kv_transfer_params"]["theirs"] == other["kv_transfer_params"]["theirs"] == 1
    assert body["kv_transfer_params"]["lmcache_rag.blend"] == "on"
    assert len(body["kv_transfer_params"]["lmcache_rag.chunks"]) == 2
    assert [q["kv_transfer_params"]["lmcache_rag.ratio"] for q in (body, other)] == [0.5, 0.3]
    assert stats(response)["chunks_hit"] == 2
    assert llm.additional_kwargs["extra_body"]["kv_transfer_params"] == {"theirs": 1, "lmcache_rag.ratio": 0.5}
    with pytest.raises(ConfigError, match="several answers"):
        BlendSynthesizer(client(running, additional_kwargs={"n": 2}))


def test_the_users_settings_are_kept_and_filled_in(running, texts):
    running.context = 500
    llm = client(running, max_tokens=None, temperature=0.7)
    index = index_over(LMCacheVectorStore(None, llm), texts)
    ask = as_blend_query_engine(index, llm, similarity_top_k=1)
    ask.query("What?")
    assert (running.questions[-1]["max_tokens"], running.questions[-1]["temperature"]) == (256, 0.7)
    llm.temperature, llm.max_tokens = 0.0, 100_000
    ask.query("What?")
    body = running.questions[-1]
    assert body["temperature"] == 0.0
    assert body["max_tokens"] + len(running.backend.ids[-1]) == running.context
    nodes = ask.retriever.retrieve("What?")
    ask._response_synthesizer.synthesize("What?", nodes, max_tokens=2, blend=BlendOptions(enabled=False))
    assert running.questions[-1]["max_tokens"] == 2
    assert running.questions[-1]["kv_transfer_params"]["lmcache_rag.blend"] == "off"


def test_a_stop_string_does_not_prove_a_stock_server(running, texts, caplog):
    llm = client(running, additional_kwargs={"stop": ["a", "e", "i", "o", "u", " "]}, max_tokens=50)
    index = index_over(LMCacheVectorStore(None, llm), texts)
    response = as_blend_query_engine(index, llm).query("What?")
    assert stats(response)["reused_tokens"] == 0
    assert as_workspace(llm).engine.info.can_blend
    assert "is not blended" not in caplog.text


def test_a_chat_engine_over_a_server(running, texts):
    llm = client(running, is_chat_model=True)
    chat = as_blend_chat_engine(index_over(LMCacheVectorStore(None, llm), texts), llm)
    chat.chat("What is first?")
    with events() as heard:
        chat.chat("And then?")
    [event] = [event for event in heard if event.class_name() == "LMCacheBlendEvent"]
    assert event.stats["chunks_hit"] == 2


def test_a_url_will_do(running, texts):
    index = index_over(LMCacheVectorStore(None, running.url), texts)
    assert stats(as_blend_query_engine(index, running.url).query("What?"))["chunks_hit"] == 2
    assert EngineLLM.of(running.url).complete("Hello", max_tokens=2).text


def test_a_server_without_our_connector_warns_once(running, texts, caplog):
    running.connector = False
    llm = client(running)
    index = index_over(LMCacheVectorStore(None, llm), texts)
    ask = as_blend_query_engine(index, llm)
    responses = [ask.query("What?") for _ in range(3)]
    assert all(response.response for response in responses)
    assert all(stats(response)["reused_tokens"] == 0 for response in responses)
    assert caplog.text.count("is not blended") == 1


def test_another_model_at_the_url_is_an_early_error(running, texts):
    with pytest.raises(EngineError, match="another-model"):
        LMCacheVectorStore(None, client(running, model="another-model"))
    assert running.seen == []


def test_an_engine_that_is_down_lets_retrieval_go_on(running, texts):
    llm = client(running)
    store = LMCacheVectorStore(None, llm)
    index = index_over(store, texts)
    ask = as_blend_query_engine(index, llm)
    running.fail = [503] * 30
    with pytest.raises(openai.InternalServerError) as caught:
        ask.query("What?")
    assert "Retrieval still works" in caught.value.__notes__[0]
    assert len(ask.retriever.retrieve("What?")) == 2
    running.fail = []
    assert stats(ask.query("What?"))["chunks_hit"] == 2


def test_an_engine_that_is_down_takes_no_nodes(running, texts):
    llm = client(running)
    store = LMCacheVectorStore(None, llm)
    running.fail = [400] * 50
    with pytest.raises((PrecomputeError, EngineError)):
        store.add([node(texts[0], "a", name="1")])
    assert store.kv.ids() == store.inner.ids() == set()
    running.fail = []
    store.add([node(texts[0], "a", name="1")])
    assert store.kv.ids() == {"1"}


def test_a_server_that_is_not_there_is_named(tmp_path, monkeypatch):
    fresh(monkeypatch, tmp_path)
    llm = client(type("Nowhere", (), {"url": "http://127.0.0.1:9"}))
    with pytest.raises(EngineUnavailableError, match=r"127\.0\.0\.1:9"):
        LMCacheVectorStore(None, llm)


def test_a_broken_stream_is_an_error(running, texts):
    llm = client(running, max_tokens=20)
    index = index_over(LMCacheVectorStore(None, llm), texts)
    running.drop_after = 2
    streamed = as_blend_query_engine(index, llm, streaming=True).query("What?")
    with pytest.raises((EngineUnavailableError, openai.APIError)):
        list(streamed.response_gen)


async def test_many_questions_and_an_ingestion_at_once(running, texts):
    llm = client(running, max_tokens=1, timeout=300.0)
    store = LMCacheVectorStore(None, llm)
    ask = as_blend_query_engine(index_over(store, texts), llm)
    queries = [ask.aquery("What?") for _ in range(25)]
    threads = [asyncio.to_thread(ask.query, "What?") for _ in range(25)]
    more = [node(f"{i} {text}", f"more{i}") for i, text in enumerate(texts)]
    *answers, _ = await asyncio.gather(*queries, *threads, store.async_add(more))
    assert [len(answer.source_nodes) for answer in answers] == [2] * 50
    assert all(stats(answer)["chunks_missed"] == 0 for answer in answers)
    assert len(store.kv.ids()) == 12


def test_it_needs_neither_other_framework_nor_torch():
    code = (
        "import sys, lmcache_rag.integrations.llama_index; "
        "print([m for m in ('torch', 'langchain', 'langchain_core', 'openai', 'faiss') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_the_framework_the_extra_is_named():
    code = (
        "import sys; sys.modules['llama_index'] = None\n"
        "try:\n import lmcache_rag.integrations.llama_index\n"
        "except ImportError as problem: print(problem)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install ".[llama-index]"' in done.stdout
