"""LlamaIndex's own callback handlers, events and spans over blended answers; what chat answers report."""

from __future__ import annotations

import json

import pytest
from embedded_server_kit import serving
from framework_kit import fresh
from llama_index.core import Settings
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.callbacks.schema import EventPayload
from llama_index.core.callbacks.simple_llm_handler import SimpleLLMHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import ChatMessage
from llama_index_kit import client, events, index_over
from lmcache_rag.integrations.llama_index import (
    EngineLLM,
    LMCacheVectorStore,
    as_blend_chat_engine,
    as_blend_query_engine,
)


@pytest.fixture(scope="module")
def engine(module_engine):
    return module_engine


async def ask_in_every_way(index, source):
    """One question by each method, as (name, the response after its end)."""
    for streaming in (False, True):
        engine = as_blend_query_engine(index, source, streaming=streaming)
        response = engine.query("What?")
        if streaming:
            "".join(response.response_gen)
        yield f"query, streaming {streaming}", response
        response = await engine.aquery("What?")
        if streaming:
            [piece async for piece in response.async_response_gen()]
        yield f"aquery, streaming {streaming}", response
    chat = as_blend_chat_engine(index, source)
    yield "chat", chat.chat("What?")
    yield "achat", await chat.achat("What?")
    response = chat.stream_chat("What?")
    "".join(response.response_gen)
    yield "stream_chat", response
    response = await chat.astream_chat("What?")
    [piece async for piece in response.async_response_gen()]
    yield "astream_chat", response


@pytest.mark.parametrize("source", ["embedded", "server"])
async def test_tokens_of_every_kind_of_answer_are_counted(
    request, tokenizer, tmp_path, corpus, engine, monkeypatch, source
):
    counter = TokenCountingHandler(tokenizer=str.split)
    monkeypatch.setattr(Settings, "_callback_manager", CallbackManager([counter]))
    with serving(engine) as running:
        fresh(monkeypatch, tmp_path)
        llm = client(running) if source == "server" else request.getfixturevalue("workspace")
        if source == "server":
            llm.callback_manager = Settings.callback_manager
        made = index_over(LMCacheVectorStore(None, llm), corpus)
        async for name, response in ask_in_every_way(made, llm):
            [count] = counter.llm_token_counts
            reported = response.metadata["lmcache_rag"]["stats"]["prompt_tokens"]
            if source == "embedded":  # of a server's streams LlamaIndex estimates
                assert count.prompt_token_count == reported, name
            assert count.prompt_token_count > 0 and count.completion_token_count > 0, name
            assert "None" not in count.completion, name
            counter.reset_counts()


async def test_the_engine_as_an_llm_counts_tokens(workspace):
    counter = TokenCountingHandler(tokenizer=str.split)
    llm = EngineLLM.of(workspace)
    llm.callback_manager = CallbackManager([counter])
    said = [ChatMessage(role="user", content="Hello")]
    list(llm.stream_complete("Hello"))
    list(llm.stream_chat(said))
    for response in (llm.complete("Hello"), await llm.acomplete("Hello"), llm.chat(said), await llm.achat(said)):
        assert response.raw["usage"]["completion_tokens"] == 4
        assert json.loads(response.model_dump_json())["raw"]["usage"]["total_tokens"] > 4
    counts = {(one.prompt_token_count, one.completion_token_count) for one in counter.llm_token_counts}
    assert len(counter.llm_token_counts) == 6
    assert counts == {(llm.complete("Hello").raw["usage"]["prompt_tokens"], 4)}


async def test_no_handler_breaks_an_answer(workspace, index, capsys):
    debug, spans = LlamaDebugHandler(print_trace_on_end=True), SimpleSpanHandler()
    handlers = [TokenCountingHandler(tokenizer=str.split, verbose=True), SimpleLLMHandler(), debug]
    index._callback_manager = CallbackManager(handlers)
    root = get_dispatcher()
    root.add_span_handler(spans)
    try:
        with events() as heard:
            Settings.callback_manager = CallbackManager(handlers)
            async for name, response in ask_in_every_way(index, workspace):
                assert response.metadata["lmcache_rag"]["stats"]["chunks_hit"] == 2, name
    finally:
        root.span_handlers.remove(spans)
        Settings._callback_manager = None
    ended = [pair[1].payload for pair in debug.get_event_pairs(CBEventType.LLM)]
    assert len(ended) == 8
    assert [payload for payload in ended if EventPayload.EXCEPTION in payload] == []
    names = [event.class_name() for event in heard]
    assert names.count("LLMCompletionEndEvent") == names.count("LLMCompletionStartEvent") == 8
    assert "ExceptionEvent" not in names
    for event in heard:  # what handlers that write files or send events do; a stream cannot be written
        if event.class_name().startswith("LLM"):
            json.loads(event.model_dump_json())
    assert "** Completion: **" in capsys.readouterr().out
    assert spans.completed_spans and not spans.dropped_spans


async def test_chat_answers_report_what_was_reused(workspace, index):
    ways = ("chat", "achat", "stream_chat", "astream_chat")
    chats = {name: response async for name, response in ask_in_every_way(index, workspace) if name in ways}
    assert chats.keys() == set(ways)
    for name, response in chats.items():
        found = response.metadata["lmcache_rag"]
        assert (found["stats"]["chunks_hit"], found["stats"]["chunks_missed"]) == (2, 0), name
        assert found["finish_reason"] in ("stop", "length")


def test_a_chat_without_passages_reports_none(workspace):
    empty = as_blend_chat_engine(index_over(LMCacheVectorStore(None, workspace, space="empty")), workspace)
    assert empty.chat("What?").metadata == {}
    streamed = empty.stream_chat("What?")
    "".join(streamed.response_gen)
    assert streamed.metadata == {}


def test_chats_at_once_report_their_own(workspace, index):
    """The metadata of one answer does not reach another that is made at the same time."""
    first, second = (as_blend_chat_engine(index, workspace, similarity_top_k=k) for k in (1, 3))
    streams = [first.stream_chat("What?"), second.stream_chat("What?")]
    for stream in streams:
        "".join(stream.response_gen)
    assert [stream.metadata["lmcache_rag"]["passages"] for stream in streams] == [1, 3]
