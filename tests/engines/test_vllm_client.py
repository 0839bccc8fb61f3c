"""The client of a vLLM server: addresses, timeouts, failures, what its metrics say."""

from __future__ import annotations

import asyncio

import pytest
import vllm_engine_kit as kit
from fake_vllm import FakeVLLM
from openai_kit import TEXT, vllm_serving
from vllm_engine_kit import LONG, OFF, SHORT, add_up

from lmcache_rag.engines.base import BlendOptions, Sampling
from lmcache_rag.engines.vllm_client import server_urls, vllm_block
from lmcache_rag.errors import ConfigError, ContextLengthError, EngineError, EngineUnavailableError, PrecomputeError

builder, chunks, connect = kit.builder, kit.chunks, kit.connect
engine, server, smollm2_tokenizer = kit.engine, kit.server, kit.smollm2_tokenizer


def test_what_is_no_url_is_refused() -> None:
    for bad in ("localhost:8000", "", "http://", "http://a b"):
        with pytest.raises(ConfigError, match="not the URL"):
            server_urls(bad)
    assert server_urls("http://a:1/v1/, https://b/x,http://a:1") == ("http://a:1", "https://b/x")


def test_an_absent_server_is_an_error_with_a_remedy(engine, builder, server, connect) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(EngineUnavailableError, match=r"cannot be reached.*lmcache-rag serve"):
        connect(server.url)
    engine.close()  # its open connections are served by a thread of the dead server still
    with pytest.raises(EngineUnavailableError, match="cannot be reached"):
        engine.generate(builder.query(["a"], "What?"), SHORT, OFF)


def test_loopback_is_reached_without_the_proxy(server, connect, builder, chunks, monkeypatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    engine = connect(server.url)
    assert len(list(engine.precompute(map(builder.ingest, chunks)))) == 6
    assert engine.generate(builder.query(["a"], "What?"), SHORT, OFF).text
    assert asyncio.run(engine.agenerate(builder.query(["a"], "What?"), SHORT, OFF)).text


def test_a_proxy_before_a_server_is_named(connect, monkeypatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    with pytest.raises(EngineUnavailableError) as caught:
        connect("http://gpu.example:8000")
    assert "go through the proxy http://127.0.0.1:9; NO_PROXY=gpu.example leaves it out" in caught.value.remedy
    assert "secret" not in str(caught.value)


def test_with_two_servers_one_may_die(server, smollm2_tokenizer, chunks, connect, builder) -> None:
    with vllm_serving(smollm2_tokenizer) as other:
        engine = connect([other.url, server.url])
        other.fail = [500] * 1000
        for _ in range(3):
            assert engine.generate(builder.query(["a"], "What?"), SHORT, OFF).text
        assert len(list(engine.precompute(map(builder.ingest, chunks)))) == 6


def test_a_server_that_hangs_ends_at_the_deadline(server, connect, chunks, builder) -> None:
    engine = connect(server.url, timeout=1)
    server.hang = 4  # an answer would come then
    with pytest.raises(EngineUnavailableError, match=r"sent nothing for 1 s.*LMCACHE_RAG_ENGINE_TIMEOUT_S"):
        engine.generate(builder.query(["a"], "What?"), SHORT, OFF)
    with pytest.raises(PrecomputeError, match="sent nothing"):
        list(engine.precompute([builder.ingest(chunks[0])]))
    server.hang, server.pause = 0, 4
    with pytest.raises(EngineUnavailableError, match="sent nothing"):
        list(engine.stream(builder.query(["a"], "What?"), SHORT, OFF))


@pytest.mark.parametrize("twin", ["stream", "astream"])
async def test_a_connection_broken_midway_is_no_answer(engine, builder, server, twin) -> None:
    server.drop_after = 3
    prompt, pieces = builder.query(["a"], "What?"), []
    with pytest.raises(EngineUnavailableError, match="broke off"):
        if twin == "stream":
            for event in engine.stream(prompt, LONG, OFF):
                pieces.append(event.text)
        else:
            async for event in engine.astream(prompt, LONG, OFF):
                pieces.append(event.text)
    assert len(pieces) == 3


def test_a_prompt_longer_than_the_context_is_refused(engine, builder, server) -> None:
    with pytest.raises(ContextLengthError, match="Retrieve fewer"):
        engine.generate(builder.query(["word " * 9000], "What?"), SHORT, BlendOptions())
    assert server.seen == []
    server.context = 128  # the server was restarted with a shorter one
    with pytest.raises(ContextLengthError, match="maximum context length is 128"):
        engine.generate(builder.query(["word " * 200], "What?"), SHORT, BlendOptions())


def test_an_answer_is_cut_to_the_contexts_room(engine, builder, server) -> None:
    prompt = builder.query(["word " * 7000], "What?")
    room = 8192 - len(prompt)
    assert 0 < room < 10_000
    engine.generate(prompt, Sampling(max_tokens=10_000), OFF)
    assert server.seen[0]["max_tokens"] == room


def test_a_server_whose_model_was_changed_refuses(engine, builder, server) -> None:
    server.model = "other/model"
    with pytest.raises(EngineError, match="does not exist"):
        engine.generate(builder.query(["a"], "What?"), SHORT, OFF)


def test_a_policy_that_does_not_exist_is_refused_here(engine, builder, server) -> None:
    with pytest.raises(ConfigError, match="query, hkvd, head, none, all"):
        engine.generate(builder.query(["a"], "What?"), SHORT, BlendOptions("best"))
    assert server.seen == []


def slow(server: FakeVLLM, seconds: float) -> float:
    """Let each token come after a pause; returns how long an answer of LONG takes."""
    server.pause = seconds
    return seconds * len(server.tokenizer.encode(TEXT, add_special_tokens=False))


@pytest.mark.parametrize("chunk", [64, 0], ids=["streamed", "in one piece"])
def test_a_long_answer_of_vllm_0_32_does_not_time_out(smollm2_tokenizer, connect, builder, chunks, chunk) -> None:
    """Where our connector runs it is a stream inside. Elsewhere the timeout grows with the answer's length."""
    with vllm_serving(smollm2_tokenizer, version="0.32.0") as server:
        server.plugin, server.chunk = bool(chunk), chunk
        engine = connect(server.url, timeout=1.5)
        took = slow(server, 0.15)
        assert took > 2 * 1.5
        if not chunk:
            server.hang, server.pause = took, 0.0
        prompt = builder.query(chunks[:1], "What?")
        done = engine.generate(prompt, Sampling(max_tokens=4096), BlendOptions())
        assert (done.text, add_up(done)) == (TEXT, True)
        assert server.seen[-1].get("stream", False) is bool(chunk)
        assert asyncio.run(engine.agenerate(prompt, Sampling(max_tokens=4096), BlendOptions())).text == TEXT
        if not chunk:
            request = engine.request(prompt, Sampling(max_tokens=4096), BlendOptions())
            assert engine.complete(request).choices[0].text == TEXT


def test_a_server_that_says_nothing_still_times_out(smollm2_tokenizer, connect, builder) -> None:
    with vllm_serving(smollm2_tokenizer, version="0.32.0") as server:
        server.hang = 20.0
        for server.chunk in (64, 0):
            engine = connect(server.url, timeout=0.2)
            with pytest.raises(EngineUnavailableError, match=r"sent nothing for 0\.2 s"):
                engine.generate(builder.query([], "What?"), Sampling(max_tokens=1), OFF)


def test_a_stream_without_statistics_means_no_plugin(smollm2_tokenizer, connect, builder, chunks) -> None:
    with vllm_serving(smollm2_tokenizer, version="0.32.0") as server:
        server.chunk = 64
        engine = connect(server.url)
        prompt = builder.query(chunks[:1], "What?")
        assert engine.generate(prompt, SHORT, BlendOptions()).stats.prefix_tokens == 0
        assert engine.info.can_blend, "a stream without statistics is no proof of a stock server"
        done = engine.generate(prompt, SHORT, BlendOptions())
        assert done.stats.prefix_tokens > 0
        assert [bool(body.get("stream")) for body in server.seen] == [True, False]


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ('vllm:cache_config_info{block_size="32",cache_dtype="auto",engine="0"} 1.0\n', 32),
        ('vllm:cache_config_info{_block_size_resolved="True",block_size="128",engine="0"} 1.0\n', 128),
        ('vllm:cache_config_info{hash_block_size="8",block_size="None"} 1.0\n', 0),
        ('vllm:cache_config_info{user_specified_block_size="7"} 1.0\n', 0),
        ("", 0),
    ],
)
def test_the_block_size_is_read_from_vllms_metrics(text: str, block: int) -> None:
    assert vllm_block(text) == block
