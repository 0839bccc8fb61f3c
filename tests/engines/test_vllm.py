"""The engine that asks a vLLM server: what goes over the wire, what is made of the answers, and all that can fail.

The server is a real one on this machine (openai_kit.py); the connector's statistics come from the connector's own code.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import openai._utils._transform as openai_transform
import pytest
from fake_vllm import MODEL, FakeVLLM
from lmcache_rag.integrations.kv_registry import KVRegistry
from openai_kit import BLOCK, TEXT, vllm_serving
from typer.testing import CliRunner

from lmcache_rag import VLLMEngine, Workspace
from lmcache_rag.cli.app import app
from lmcache_rag.engines import hf_model
from lmcache_rag.engines.base import BlendOptions, Completion, Engine, Sampling, TextDelta
from lmcache_rag.engines.vllm_client import server_urls, vllm_block
from lmcache_rag.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    EngineUnavailableError,
    PrecomputeError,
    SourceError,
)
from lmcache_rag.prompt import PromptBuilder
from lmcache_rag.settings import Settings

SHORT, LONG = Sampling(max_tokens=4), Sampling(max_tokens=100)
OFF = BlendOptions(enabled=False)
QUICK = {"backoff": 0.01, "timeout": 5.0}


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_path, local_files_only=True)


@pytest.fixture
def server(smollm2_tokenizer: Any) -> Iterator[FakeVLLM]:
    with vllm_serving(smollm2_tokenizer) as running:
        yield running


@pytest.fixture
def connect(smollm2_tokenizer: Any) -> Iterator[Any]:
    """Makes engines, with the tokenizer that is loaded already unless told otherwise, and closes them."""
    made: list[VLLMEngine] = []

    def engine(urls: Any, model: str | None = None, **options: Any) -> VLLMEngine:
        made.append(VLLMEngine(urls, model, **{"tokenizer": smollm2_tokenizer, **QUICK, **options}))
        return made[-1]

    yield engine
    for each in made:
        each.close()


@pytest.fixture
def engine(server: FakeVLLM, connect: Any) -> VLLMEngine:
    made: VLLMEngine = connect(server.url)
    return made


@pytest.fixture(scope="module")
def builder(smollm2_tokenizer: Any) -> PromptBuilder:
    """The prompts of every engine here that serves SmolLM2. It takes most of a second to make."""
    with vllm_serving(smollm2_tokenizer) as server:
        engine = VLLMEngine(server.url, tokenizer=smollm2_tokenizer, **QUICK)
        engine.close()
        return PromptBuilder(smollm2_tokenizer, engine.info)


@pytest.fixture
def chunks(sentences: list[str]) -> list[str]:
    """Six chunks of more than two blocks each."""
    return [" ".join(sentences[i : i + 8]) for i in range(0, 48, 8)]


def add_up(completion: Completion) -> bool:
    stats = completion.stats
    parts = (stats.prefix_tokens, stats.reused_tokens, stats.recomputed_tokens, stats.computed_tokens)
    return sum(parts) == stats.prompt_tokens


# -- what the server is ---------------------------------------------------------------------------------------------


def test_it_is_an_engine_with_the_servers_facts(server: FakeVLLM, smollm2_path: Path) -> None:
    engine = VLLMEngine(f"{server.url}/v1/")
    info = engine.info
    assert isinstance(engine, Engine)
    assert (info.engine, info.model, info.context_length, info.kv_block) == ("vllm", MODEL, 8192, 64)
    assert info.can_blend
    assert info.kv_bytes_per_token == 30 * 3 * 64 * 2 * 2  # the tokenizer comes with the model's configuration
    assert engine.tokenizer.encode("a") == server.tokenizer.encode("a")
    engine.close()
    engine.close()


def test_the_servers_chunk_is_the_unit_of_reuse(server: FakeVLLM, smollm2_tokenizer: Any, connect: Any) -> None:
    server.chunk = 256
    engine = connect(server.url)
    assert engine.info.kv_block == 256
    assert len(PromptBuilder(smollm2_tokenizer, engine.info).prefix_ids) % 256 == 0
    assert connect(server.url, kv_block=128).info.kv_block == 128


def test_servers_with_other_chunks_do_not_go_together(server: FakeVLLM, smollm2_tokenizer: Any, connect: Any) -> None:
    with vllm_serving(smollm2_tokenizer) as other:
        server.chunk, other.chunk = 0, 128
        assert connect([server.url, other.url]).info.kv_block == 128
        server.chunk = 64
        with pytest.raises(EngineError, match="chunks of 128 tokens") as raised:
            connect([server.url, other.url])
        assert "--chunk-size" in raised.value.remedy


def test_an_adapter_is_the_model_only_if_named(server: FakeVLLM, connect: Any) -> None:
    assert connect(server.url).info.model == MODEL
    assert connect(server.url, "an-adapter").info.model == "/adapters/a"


def test_another_model_at_the_url_is_an_early_error(server: FakeVLLM, connect: Any) -> None:
    with pytest.raises(EngineError, match=f"serves an-adapter, {MODEL}, not Qwen/Qwen3-8B"):
        connect(server.url, "Qwen/Qwen3-8B")
    assert server.seen == []


def test_a_folder_name_matches_the_servers_folder(
    server: FakeVLLM, smollm2_path: Path, tmp_path: Path, connect: Any
) -> None:
    (tmp_path / "smol").symlink_to(smollm2_path)
    server.model, server.root = "alias", f"/over/there/{smollm2_path.resolve().name}"
    engine = connect(server.url, str(tmp_path / "smol"), tokenizer=None)
    assert engine.info.model == server.root
    (tmp_path / "other").mkdir()
    with pytest.raises(EngineError, match="not "):
        connect(server.url, str(tmp_path / "other"))


def test_a_missing_tokenizer_error_says_what_was_tried(
    server: FakeVLLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    server.model = server.root = "nobody/has-this"
    with pytest.raises(SourceError, match=r"tokenizer of nobody/has-this.*Hugging Face cache") as caught:
        VLLMEngine(server.url)
    assert "--model" in caught.value.remedy


def test_a_server_that_tokenizes_otherwise_is_refused(server: FakeVLLM, smollm2_tokenizer: Any, connect: Any) -> None:
    class Shifted:
        def encode(self, text: str, **options: Any) -> list[int]:
            return [token + 1 for token in smollm2_tokenizer.encode(text, **options)]

    server.tokenizer = Shifted()
    with pytest.raises(EngineError, match="tokenizer of"):
        connect(server.url)


def test_servers_of_different_models_are_refused(server: FakeVLLM, smollm2_tokenizer: Any, connect: Any) -> None:
    with vllm_serving(smollm2_tokenizer, model="other/model") as other, pytest.raises(EngineError, match="other/model"):
        connect([server.url, other.url])


def test_what_is_no_url_is_refused() -> None:
    for bad in ("localhost:8000", "", "http://", "http://a b"):
        with pytest.raises(ConfigError, match="not the URL"):
            server_urls(bad)
    assert server_urls("http://a:1/v1/, https://b/x,http://a:1") == ("http://a:1", "https://b/x")


# -- the wire -------------------------------------------------------------------------------------------------------


def test_token_ids_and_blend_options_arrive_exactly(engine, builder, server, chunks) -> None:
    prompt = builder.query(chunks[:3], "What? <|im_end|>")
    engine.generate(prompt, SHORT, BlendOptions("hkvd", 0.25))
    [body] = server.seen
    assert body["prompt"] == list(prompt.token_ids)
    assert body["kv_transfer_params"] == {
        "lmcache_rag.blend": "on",
        "lmcache_rag.policy": "hkvd",
        "lmcache_rag.ratio": 0.25,
        "lmcache_rag.chunks": [[chunk.start, chunk.end] for chunk in prompt.chunks],
        "lmcache_rag.spans": True,
        "lmcache_rag.prefix": len(builder.prefix_ids),
    }
    engine.generate(prompt, SHORT, OFF)
    assert server.seen[1]["kv_transfer_params"] == {
        "lmcache_rag.blend": "off",
        "lmcache_rag.prefix": len(builder.prefix_ids),
    }


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_request_checks_the_type_of_each_token_id(
    engine: VLLMEngine, builder: PromptBuilder, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    prompt = builder.query([f"{number}. " + "A sentence of ordinary words. " * 60 for number in range(8)], "What?")
    calls = {"_transform_recursive": 0, "_async_transform_recursive": 0}
    for name in calls:
        original = getattr(openai_transform, name)

        def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(openai_transform, name, counted)
    answer = asyncio.run(engine.agenerate(prompt, SHORT, OFF)) if asynchronous else engine.generate(prompt, SHORT, OFF)
    assert answer.stats.prompt_tokens == len(prompt) > 2000
    assert 0 < sum(calls.values()) < 100


def test_all_sampling_parameters_are_sent(engine, builder, server) -> None:
    sampling = Sampling(7, temperature=0.5, top_p=0.8, top_k=9, repetition_penalty=1.1, stop=("x", "y"), seed=3)
    engine.generate(builder.query(["a"], "What?"), sampling, OFF)
    engine.generate(builder.query(["a"], "What?"), Sampling(7), OFF)
    names = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed")
    first, second = ([body.get(name) for name in names] for body in server.seen)
    assert first == [7, 0.5, 0.8, 9, 1.1, ["x", "y"], 3]
    assert second == [7, 0.0, 1.0, 0, 1.0, None, None]


def test_the_api_key_is_from_our_variable_or_vllms(builder, server, monkeypatch, connect) -> None:
    server.key = "right"
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    wrong = connect(server.url)
    prompt = builder.query(["a"], "What?")
    with pytest.raises(EngineError, match="API key") as caught:
        wrong.generate(prompt, SHORT, OFF)
    assert "LMCACHE_RAG_API_KEY or VLLM_API_KEY" in caught.value.remedy
    monkeypatch.setenv("VLLM_API_KEY", "right")
    assert connect(server.url).generate(prompt, SHORT, OFF).text
    monkeypatch.setenv("VLLM_API_KEY", "of another server")
    monkeypatch.setenv("LMCACHE_RAG_API_KEY", "right")
    assert connect(server.url).generate(prompt, SHORT, OFF).text
    assert not any("secret" in str(header) for header in server.auth)


def test_tenants_share_nothing_and_none_needs_no_salt(engine, builder, server, chunks) -> None:
    one, two = (PromptBuilder(engine.tokenizer, engine.info, tenant=tenant) for tenant in ("one", "two"))
    list(engine.precompute(map(one.ingest, chunks[:3])))
    salts = {body.get("cache_salt") for body in server.seen}
    assert salts == {one.fingerprint}
    wanted = {"": 0, "one": 3, "two": 0}
    for tenant, maker in (("two", two), ("", builder), ("one", one)):
        done = engine.generate(maker.query(chunks[:3], "What?"), SHORT, BlendOptions())
        assert done.stats.chunks_hit == wanted[tenant]
    assert "cache_salt" not in server.seen[-2]


# -- ingestion ------------------------------------------------------------------------------------------------------


def test_all_chunks_hit_in_20_permutations_and_add_up(engine, builder, server, chunks) -> None:
    assert all(result.computed for result in engine.precompute(map(builder.ingest, chunks)))
    rng = random.Random(1)
    for _ in range(20):
        rng.shuffle(chunks)
        done = engine.generate(builder.query(chunks, "What?"), Sampling(max_tokens=1), BlendOptions())
        stats = done.stats
        assert (stats.chunks_hit, stats.chunks_missed, done.warnings) == (6, 0, ())
        assert add_up(done)
        assert stats.reused_tokens > stats.recomputed_tokens > 0
        assert stats.prefix_tokens > len(builder.prefix_ids)  # the first chunk stands where it stood at ingestion
        assert (stats.load_ms, stats.blend_ms) == (1.5, 2.5)
        assert stats.ttft_ms > 0


def test_precompute_sends_exact_prefills_in_order(engine, builder, server, chunks) -> None:
    prompts = [builder.ingest(text) for text in chunks]
    assert engine.missing(prompts) == [True] * 6
    results = list(engine.precompute(prompts))
    assert [r.key for r in results] == [p.key for p in prompts]
    assert [r.tokens for r in results] == [len(p.chunk_ids) for p in prompts]
    assert sorted(body["prompt"] for body in server.seen) == sorted(list(p.token_ids) for p in prompts)
    assert {body["max_tokens"] for body in server.seen} == {1}
    params = {"lmcache_rag.blend": "off", "lmcache_rag.ingest": True, "lmcache_rag.prefix": len(builder.prefix_ids)}
    assert all(body["kv_transfer_params"] == params for body in server.seen)
    assert engine.missing(prompts) == [False] * 6
    assert not any(r.computed for r in engine.precompute(prompts))
    engine.forget([(prompts[0].fingerprint, prompts[0].key), ("unknown", "00" * 32)])
    assert engine.missing(prompts) == [True] + [False] * 5


def test_precompute_sends_several_up_to_its_limit(server, connect, chunks, builder) -> None:
    engine = connect(server.url, concurrency=3)
    server.hang = 0.05
    taken = []

    def prompts() -> Iterator[Any]:
        for text in chunks:
            taken.append(text)
            yield builder.ingest(text)

    results = engine.precompute(prompts())
    next(results)
    assert len(taken) <= 4
    list(results)
    assert server.most_active == 3


def test_precompute_spreads_over_the_servers_by_key(server, smollm2_tokenizer, sentences, connect, builder) -> None:
    with vllm_serving(smollm2_tokenizer) as other:
        engine = connect([server.url, other.url])
        prompts = [builder.ingest(sentence) for sentence in sentences[:12]]
        list(engine.precompute(prompts))
        first = [body["prompt"] for body in server.seen]
        assert 0 < len(first) < 12
        list(engine.precompute(reversed(prompts)))
        assert sorted(body["prompt"] for body in server.seen) == sorted(first * 2)
        assert len(server.seen) + len(other.seen) == 24


def test_an_overloaded_server_is_asked_again(engine, builder, server, chunks) -> None:
    server.fail = [503, 429, 500]
    assert len(list(engine.precompute(map(builder.ingest, chunks)))) == 6
    assert len(server.seen) == 9
    server.fail = [503]
    assert engine.generate(builder.query(chunks[:1], "What?"), SHORT, OFF).text


def test_a_failed_precompute_keeps_finished_work(server, connect, chunks, builder) -> None:
    engine = connect(server.url, concurrency=1, patience=2)
    prompts = [builder.ingest(text) for text in chunks]
    results = engine.precompute(prompts)
    assert [r.key for r in islice(results, 2)] == [p.key for p in prompts[:2]]
    server.fail = [503, 503]
    with pytest.raises(PrecomputeError, match=r"not able to answer.*on demand") as caught:
        next(results)
    assert "again" in caught.value.remedy
    assert engine.missing(prompts) == [False] * 2 + [True] * 4


def test_kv_the_server_could_not_keep_is_not_recorded(server, connect, chunks, builder) -> None:
    engine = connect(server.url, patience=2)
    server.failure = "no server"
    with pytest.raises(PrecomputeError, match="could not reach its KV store") as caught:
        list(engine.precompute([builder.ingest(chunks[0])]))
    assert "LMCache" in caught.value.remedy
    assert len(server.seen) == 2


def test_a_chunk_longer_than_the_context_is_not_sent(engine, builder, server) -> None:
    with pytest.raises(PrecomputeError, match="does not fit the context") as caught:
        list(engine.precompute([builder.ingest("word " * 9000)]))
    assert "smaller chunks" in caught.value.remedy
    assert server.seen == []


def test_what_the_server_forgot_is_sent_again(engine, builder, server, chunks) -> None:
    prompts = [builder.ingest(text) for text in chunks[:3]]
    list(engine.precompute(prompts))
    server.backend.memory.chains.clear()
    server.backend.memory.blocks.clear()
    done = engine.generate(builder.query(chunks[:3], "What?"), SHORT, BlendOptions())
    assert (done.stats.chunks_hit, done.stats.chunks_missed) == (0, 3)
    assert done.stats.computed_tokens == len(builder.query(chunks[:3], "What?"))
    assert "missing" in done.warnings[0]
    assert engine.missing(prompts) == [True] * 3
    assert all(result.computed for result in engine.precompute(prompts[1:]))


def test_verify_asks_the_server_that_computed_a_chunk(connect, smollm2_tokenizer, server, chunks) -> None:
    with vllm_serving(smollm2_tokenizer) as other:
        engine = connect([server.url, other.url])
        prompts = [PromptBuilder(engine.tokenizer, engine.info).ingest(chunk) for chunk in chunks]
        list(engine.precompute(prompts))
        assert server.seen, "one of the two computed everything"
        assert other.seen, "one of the two computed everything"
        for _ in range(2):
            assert [engine.verify(prompt).status for prompt in prompts] == ["ok"] * len(prompts)


def test_verify_asks_and_has_nothing_kept(engine, builder, server, chunks) -> None:
    prompts = [builder.ingest(text) for text in chunks[:2]]
    list(engine.precompute(prompts[:1]))
    assert [engine.verify(prompt).status for prompt in prompts] == ["ok", "missing"]
    assert server.seen[-1]["kv_transfer_params"]["lmcache.max_offload_tokens"] == 0
    assert engine.verify(prompts[1]).status == "missing"


@pytest.mark.parametrize("over", [-1, 0, 1, 15, 16, 17])
def test_existing_kv_is_known_at_any_chunk_length(engine, builder, server, sentences, over) -> None:
    """A prompt of whole blocks is never an exact hit to its last token."""
    ids = builder.encode(" ".join(sentences[:20]))[: 2 * BLOCK + over]
    text = engine.tokenizer.decode(ids)
    prompt = builder.ingest(text)
    assert len(prompt.chunk_ids) == len(ids)
    for wanted in (True, False):
        [result] = engine.precompute([prompt])
        assert result.computed is wanted


# -- queries --------------------------------------------------------------------------------------------------------


def test_a_stream_has_the_answers_text_and_statistics(engine, builder, chunks) -> None:
    list(engine.precompute(map(builder.ingest, chunks[:2])))
    prompt = builder.query(chunks[:2], "What?")
    events = list(engine.stream(prompt, LONG, BlendOptions()))
    done = events[-1]
    assert isinstance(done, Completion)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == done.text == TEXT
    assert len(events) > 10
    assert engine.tokenizer.decode(done.token_ids) == TEXT
    assert (done.finish_reason, done.warnings, done.stats.chunks_hit) == ("stop", (), 2)
    assert engine.generate(prompt, LONG, BlendOptions()).token_ids == done.token_ids
    assert engine.generate(prompt, SHORT, BlendOptions()).finish_reason == "length"


def test_the_time_to_the_first_token_is_measured_here(engine, builder, server) -> None:
    server.pause, server.hang = 0.2, 0.1
    begin = time.perf_counter()
    done = engine.generate(builder.query(["a"], "What?"), Sampling(max_tokens=10), OFF)
    total_ms = 1000 * (time.perf_counter() - begin)
    assert 100 <= done.stats.ttft_ms < total_ms - 900  # the nine other tokens take 1,800 ms more


def test_closing_a_stream_closes_the_connection(engine, builder, server) -> None:
    server.pause = 0.01
    stream = engine.stream(builder.query(["a"], "What?"), LONG, OFF)
    next(stream)
    stream.close()
    assert server.gone.wait(60)


async def test_async_twins_answer_the_same_at_once(engine, builder, server, chunks, connect) -> None:
    prompt = builder.query(chunks[:2], "What?")
    wanted = engine.generate(prompt, LONG, BlendOptions()).token_ids
    server.hang = 0.1
    several = await asyncio.gather(*(engine.agenerate(prompt, LONG, BlendOptions()) for _ in range(5)))
    assert [done.token_ids for done in several] == [wanted] * 5
    assert server.most_active > 1
    events = [event async for event in engine.astream(prompt, LONG, BlendOptions())]
    assert "".join(e.text for e in events[:-1]) == events[-1].text == TEXT
    server.version = "0.25.1"
    older = connect(server.url)
    assert (await older.agenerate(prompt, LONG, BlendOptions())).token_ids == wanted


async def test_cancelling_an_async_answer_closes_its_socket(engine, builder, server) -> None:
    server.pause = 0.05
    task = asyncio.create_task(engine.agenerate(builder.query(["a"], "What?"), LONG, OFF))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.gone.wait, 60)


def test_stop_strings_cost_statistics_not_correctness(engine, builder, chunks) -> None:
    list(engine.precompute(map(builder.ingest, chunks[:2])))
    prompt = builder.query(chunks[:2], "What?")
    done = engine.generate(prompt, Sampling(max_tokens=100, stop=("another",)), BlendOptions())
    assert done.text == TEXT[: TEXT.find("another")]
    assert done.finish_reason == "stop"
    assert not done.stats.blended
    assert "does not report" in done.warnings[0]
    assert engine.info.can_blend


def test_an_older_servers_streaming_plugin_is_detected(server, connect, chunks, builder) -> None:
    server.version, server.plugin = "0.25.1", True
    engine = connect(server.url)
    list(engine.precompute(map(builder.ingest, chunks[:2])))
    prompt = builder.query(chunks[:2], "What?")
    assert "one piece" in engine.generate(prompt, LONG, BlendOptions()).warnings[0], "nobody knows yet"
    streamed = list(engine.stream(prompt, LONG, BlendOptions()))[-1]
    assert (streamed.stats.blended, streamed.stats.chunks_hit, streamed.warnings) == (True, 2, ())
    assert engine.generate(prompt, LONG, BlendOptions()).warnings == (), "from now on it streams inside"
    assert server.seen[-1]["stream"]


def test_a_server_before_033_reports_in_whole_answers(server, connect, chunks, builder) -> None:
    server.version, server.cached_details = "0.25.1", True
    engine = connect(server.url)
    list(engine.precompute(map(builder.ingest, chunks[:2])))
    prompt = builder.query(chunks[:2], "What?")
    whole = engine.generate(prompt, LONG, BlendOptions())
    assert whole.stats.chunks_hit == 2
    assert "one piece" in whole.warnings[0]
    streamed = list(engine.stream(prompt, LONG, BlendOptions()))[-1]
    assert not streamed.stats.blended
    assert streamed.stats.computed_tokens == len(prompt)  # cached_tokens would count blended tokens as exact
    assert "64 tokens were cached, exact or blended" in streamed.warnings[0]
    full = list(engine.stream(prompt, LONG, OFF))[-1]
    assert (full.stats.prefix_tokens, full.warnings) == (64, ())
    assert engine.info.can_blend


def test_a_server_without_our_connector_warns_once(engine, builder, server, chunks, caplog) -> None:
    server.connector, server.cached_details = False, True
    results = list(engine.precompute(map(builder.ingest, chunks)))
    assert len(results) == 6
    assert [record.levelname for record in caplog.records if "connector" in record.message] == ["WARNING"]
    assert not engine.info.can_blend
    assert "connector" in engine.info.why_not
    done = engine.generate(builder.query(chunks, "What?"), LONG, BlendOptions())
    assert done.text == TEXT
    assert (done.stats.prefix_tokens, done.stats.reused_tokens, done.stats.blended) == (64, 0, False)
    assert add_up(done)
    server.connector = True
    engine.generate(builder.query(chunks, "What?"), SHORT, BlendOptions())
    assert engine.info.can_blend


def test_a_server_that_cannot_blend_says_why_once(engine, builder, server, chunks, caplog) -> None:
    server.why_not = "blending needs CUDA"
    prompts = [builder.ingest(chunk) for chunk in chunks]
    assert [result.computed for result in engine.precompute(prompts)] == [True] * 6
    assert not engine.info.can_blend
    assert engine.info.why_not == "blending needs CUDA"
    done = engine.generate(builder.query(chunks, "What?"), LONG, BlendOptions())
    assert done.text == TEXT
    assert (done.stats.prefix_tokens > 0, done.stats.reused_tokens, done.stats.blended) == (True, 0, False)
    assert add_up(done)
    assert (done.stats.chunks_hit, done.stats.chunks_missed) == (0, 0)
    assert not any("needs CUDA" in warning or "missing" in warning for warning in done.warnings)
    assert [record.levelname for record in caplog.records if "needs CUDA" in record.message] == ["WARNING"]
    assert not any(engine.missing(prompts)), "a question took chunks off the list that are there"
    assert [engine.verify(prompt).status for prompt in prompts] == ["ok"] * 6
    server.why_not = ""
    engine.generate(builder.query(chunks, "What?"), SHORT, BlendOptions())
    assert engine.info.can_blend


def test_a_failed_blend_says_why(engine, builder, server, chunks) -> None:
    list(engine.precompute(map(builder.ingest, chunks[:2])))
    server.failure = "no server"
    done = engine.generate(builder.query(chunks[:2], "What?"), SHORT, BlendOptions())
    assert done.text
    assert "computed the prompt in full: LMCache does not answer" in done.warnings[0]
    assert (done.stats.computed_tokens, done.stats.blended) == (done.stats.prompt_tokens, False)


def test_statistics_that_do_not_add_up_are_left_out(engine, builder, server, monkeypatch) -> None:
    wrong = {"prefix_tokens": 1, "reused_tokens": 10**6, "recomputed_tokens": 0, "computed_tokens": 0}
    monkeypatch.setattr(server.backend, "statistics", lambda number, body: {"lmcache_rag": wrong})
    done = engine.generate(builder.query(["a"], "What?"), SHORT, BlendOptions())
    assert (done.stats.reused_tokens, add_up(done)) == (0, True)
    assert "not consistent" in done.warnings[0]


def test_some_of_the_chunks_are_not_counted_as_all(engine, builder, chunks) -> None:
    list(engine.precompute(map(builder.ingest, chunks[:2])))
    done = engine.generate(builder.query(chunks[:4], "What?"), SHORT, BlendOptions())
    assert done.stats.blended
    assert (done.stats.chunks_hit, done.stats.chunks_missed) == (2, 2)  # by the spans that the server tells


def test_spans_settle_which_chunks_hit(engine, builder, server, chunks, monkeypatch) -> None:
    prompt = builder.query(chunks[:4], "What?")
    span = prompt.chunks[2]
    found = span.end - span.start
    told = {
        "prefix_tokens": prompt.prefix_tokens,
        "reused_tokens": found,
        "recomputed_tokens": 0,
        "computed_tokens": len(prompt) - prompt.prefix_tokens - found,
        "spans": [[span.start, span.end]],
    }
    monkeypatch.setattr(server.backend, "statistics", lambda number, body: {"lmcache_rag": told})
    done = engine.generate(prompt, SHORT, BlendOptions())
    assert (done.stats.chunks_hit, done.stats.chunks_missed) == (1, 3)


# -- failures -------------------------------------------------------------------------------------------------------


def test_an_absent_server_is_an_error_with_a_remedy(engine, builder, server, connect) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(EngineUnavailableError, match=r"cannot be reached.*lmcache-rag serve"):
        connect(server.url)
    engine.close()  # its open connections are served by a thread of the dead server still
    with pytest.raises(EngineUnavailableError, match="cannot be reached"):
        engine.generate(builder.query(["a"], "What?"), SHORT, OFF)


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


# -- settings and the command line ----------------------------------------------------------------------------------


def test_the_engine_setting_has_all_three_sources(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("LMCACHE_RAG_ENGINE", raising=False)
    assert Settings.load(tmp_path).engine == "embedded"
    (tmp_path / "settings.toml").write_text('engine = ["http://a:1/", "http://b:2/v1"]\n')
    assert Settings.load(tmp_path).engine == "http://a:1,http://b:2"
    monkeypatch.setenv("LMCACHE_RAG_ENGINE", "http://c:3")
    assert Settings.load(tmp_path, engine=[]).engine == "http://c:3"
    assert Settings.load(tmp_path, engine=["http://d:4", "http://e:5"]).engine == "http://d:4,http://e:5"
    assert Settings.load(tmp_path, engine=["embedded"]).engine == "embedded"
    with pytest.raises(ConfigError, match=r"^engine: .*not the URL"):
        Settings.load(tmp_path, engine="vllm")


def test_a_workspace_takes_urls_or_an_engine(engine, server, tmp_path) -> None:
    with Workspace.open(tmp_path / "a", engine=engine) as workspace:
        assert workspace.engine is engine
    with Workspace.open(tmp_path / "b", engine=server.url) as workspace:
        assert isinstance(workspace.engine, VLLMEngine)


@pytest.fixture
def call(server: FakeVLLM, tmp_path: Path) -> Any:
    """Runs a command line against the server, as a user would."""
    runner = CliRunner(env={n: None for n in os.environ if n.startswith("LMCACHE_RAG_")} | {"COLUMNS": "120"})

    def run(*arguments: object, **env: str) -> Any:
        options = [] if env else ["--engine", server.url]
        return runner.invoke(app, [str(a) for a in (*arguments, *options, "--store", tmp_path / "store")], env=env)

    return run


def test_every_verb_works_against_a_server(call, server, chunks, tmp_path) -> None:
    (tmp_path / "docs").mkdir()
    for index, chunk in enumerate(chunks[:3]):
        (tmp_path / "docs" / f"{index}.txt").write_text(chunk)
    first = json.loads(call("ingest", tmp_path / "docs", "--json").stdout)
    assert first["kv"]["computed"] == len(server.seen) > 2
    again = json.loads(call("ingest", tmp_path / "docs", "--json").stdout)
    assert (again["unchanged"], again["kv"]["computed"], again["kv"]["existed"]) == (3, 0, 0)

    answer = json.loads(call("ask", "What?", "--json").stdout)
    assert answer["text"] == TEXT
    assert answer["stats"]["blended"]
    assert answer["stats"]["chunks_hit"] >= 3  # a chunk shorter than a block is never kept
    shown = call("ask", "What?", LMCACHE_RAG_ENGINE=server.url)
    assert TEXT in shown.stdout
    assert "from the store" in shown.stdout

    sent = len(server.seen)
    warmed = json.loads(call("warm", "--json").stdout)
    assert (warmed["computed"], warmed["existed"]) == (0, first["kv"]["computed"])
    assert len(server.seen) == sent + warmed["existed"]
    server.backend.memory.chains.clear()
    server.backend.memory.blocks.clear()
    report = call("verify", "--no-repair", "--json")
    assert report.exit_code == 1
    assert {bad["status"] for bad in json.loads(report.stdout)["bad"]} == {"missing"}
    assert call("verify", "--json").exit_code == 0
    assert json.loads(call("verify", "--json").stdout)["bad"] == []

    status = call("status")
    assert server.url in status.stdout
    assert MODEL in status.stdout


def test_a_conversation_works_against_a_server(call, server, chunks, tmp_path) -> None:
    (tmp_path / "a.txt").write_text(chunks[0])
    assert call("ingest", tmp_path / "a.txt").exit_code == 0
    runner = CliRunner()
    place = ["--engine", server.url, "--store", str(tmp_path / "store")]
    done = runner.invoke(app, ["chat", *place], input="What?\nAnd then?\n/stats\n")
    assert done.exit_code == 0
    assert done.stdout.count(TEXT) == 2
    assert "reused" in done.stdout


def test_an_absent_server_ends_a_verb_with_the_remedy(call, server, tmp_path, caplog) -> None:
    server.shutdown()
    server.server_close()
    (tmp_path / "a.txt").write_text("some text")
    done = call("ingest", tmp_path / "a.txt")
    assert done.exit_code == 3
    assert "cannot be reached" in done.stderr
    assert "lmcache-rag serve" in done.stderr


# -- answers of any length --------------------------------------------------------------------------------------------


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


# -- blocks of vLLM's own prefix cache --------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "over"), [(32, 1), (32, 17), (64, 1), (128, 0), (0, 1)])
def test_kv_is_known_at_any_size_of_vllms_blocks(smollm2_tokenizer, connect, sentences, block, over) -> None:
    with vllm_serving(smollm2_tokenizer) as server:
        server.block = block
        engine = connect(server.url)
        builder = PromptBuilder(smollm2_tokenizer, engine.info)
        ids = builder.encode(" ".join(sentences[:20]))[: 2 * BLOCK + over]
        prompt = builder.ingest(engine.tokenizer.decode(ids))
        real = server.backend.statistics

        def told(number: int, body: dict[str, Any]) -> Any:
            found = real(number, body)
            ours, size = found["lmcache_rag"], block or 16
            exact = min(ours["prefix_tokens"], (len(body["prompt"]) - 1) // size * size)
            return {"lmcache_rag": ours | {"prefix_tokens": exact, "computed_tokens": len(body["prompt"]) - exact}}

        server.backend.statistics = told
        assert engine.verify(prompt).status == "missing"
        assert [result.computed for result in engine.precompute([prompt])] == [True]
        assert engine.verify(prompt).status == "ok"
        assert [result.computed for result in engine.precompute([prompt])] == [False]


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


# -- forgetting -------------------------------------------------------------------------------------------------------


def test_forgetting_takes_a_chunk_out_of_every_server(smollm2_tokenizer, server, connect, chunks) -> None:
    with vllm_serving(smollm2_tokenizer) as other:
        engine = connect([server.url, other.url])
        builder = PromptBuilder(smollm2_tokenizer, engine.info)
        prompts = [builder.ingest(chunk) for chunk in chunks[:2]]
        list(engine.precompute(prompts))
        assert engine.forget_chunk(prompts[0]).forgotten
        assert engine.missing(prompts) == [True, False]
        assert [engine.verify(prompt).status for prompt in prompts] == ["missing", "ok"]
        for each in (server, other):
            [body] = [body for body in each.seen if body["kv_transfer_params"].get("lmcache_rag.forget")]
            assert body["kv_transfer_params"] == {
                "lmcache_rag.blend": "off",
                "lmcache_rag.forget": True,
                "lmcache.max_offload_tokens": 0,
                "lmcache_rag.prefix": len(builder.prefix_ids),
            }
            assert (body["prompt"], body["max_tokens"]) == (list(prompts[0].token_ids), 1)


def test_a_server_that_cannot_forget_says_what_stays(engine, builder, server, chunks) -> None:
    prompt = builder.ingest(chunks[0])
    server.forgets = False
    result = engine.forget_chunk(prompt)
    assert (result.forgotten, "'lmcache_rag.forget' is not known" in result.why) == (False, True)
    server.forgets, server.connector = True, False
    assert "without a connector" in engine.forget_chunk(prompt).why


def test_forgetting_is_retried_while_lmcache_is_away(connect, builder, server, chunks) -> None:
    engine, prompt = connect(server.url, patience=2), builder.ingest(chunks[0])
    list(engine.precompute([prompt]))
    server.cannot_forget = 1
    assert engine.forget_chunk(prompt).forgotten
    server.cannot_forget = 2
    with pytest.raises(EngineError, match="KV store did not answer"):
        engine.forget_chunk(prompt)


def test_forget_spares_what_other_documents_need(call, server, chunks, tmp_path) -> None:
    for name, text in (("a.txt", chunks[0]), ("b.txt", chunks[0]), ("c.txt", chunks[1])):
        (tmp_path / name).write_text(text)
    assert call("ingest", *(tmp_path / name for name in ("a.txt", "b.txt", "c.txt"))).exit_code == 0
    assert server.backend.memory.blocks

    def forgets() -> int:
        return sum(bool(body["kv_transfer_params"].get("lmcache_rag.forget")) for body in server.seen)

    first = call("forget", tmp_path / "a.txt", "--json")
    assert (first.exit_code, json.loads(first.stdout)["deleted"], forgets()) == (0, 0, 0), "b.txt holds it as well"
    second = call("forget", tmp_path / "b.txt")
    sent = forgets()
    assert (second.exit_code, sent > 0) == (0, True)
    assert f"KV of {sent} chunk" in second.stdout
    assert call("verify", "--all", "--no-repair").exit_code == 0, "the KV of c.txt is there"
    server.forgets = False
    third = call("forget", tmp_path / "c.txt", "--json")
    report = json.loads(third.stdout)
    assert (third.exit_code, report["removed"]["documents"], report["deleted"]) == (1, 1, 0)
    assert report["staying"] > 0
    assert "is not known" in report["why"]


def test_documents_stay_while_a_server_is_unreachable(server, connect, chunks, tmp_path) -> None:
    engine = connect(server.url, attempts=1, patience=1)
    with Workspace.open(tmp_path / "s", engine=engine) as workspace:
        register = KVRegistry.of(workspace)
        register.add({"a": chunks[0], "b": chunks[1]})
        server.cannot_forget = 1
        with pytest.raises(EngineError, match="KV store did not answer"):
            register.forget(["a"])
        assert register.ids() == {"a", "b"}
        report = register.forget(["a"])
        assert (report.deleted, report.staying, register.ids()) == (1, 0, {"b"})


# -- the ingest key ---------------------------------------------------------------------------------------------------

KEY = "k3y-" + "0123456789abcdef" * 3  # no real one


def test_only_ingest_and_forget_send_the_ingest_key(connect, builder, server, chunks, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    server.ingest_key = KEY
    engine = connect(server.url, ingest_key=KEY)
    prompt = builder.ingest(chunks[0])
    list(engine.precompute([prompt]))
    engine.generate(builder.query(chunks[:1], "What?"), SHORT, BlendOptions())
    list(engine.stream(builder.query(chunks[:1], "What?"), SHORT, BlendOptions()))
    engine.verify(prompt)
    engine.forget_chunk(prompt)
    assert server.ingest_keys == [(True, KEY), (False, None), (False, None), (False, None), (True, KEY)]
    assert KEY not in caplog.text
    assert KEY not in repr(engine)
    assert KEY not in repr(vars(engine))


@pytest.mark.parametrize("given", ["", KEY + "x"], ids=["none", "another"])
def test_a_wrong_ingest_key_is_named(connect, builder, server, chunks, given) -> None:
    server.ingest_key = KEY
    engine = connect(server.url, ingest_key=given, patience=1)
    with pytest.raises(PrecomputeError, match="rejected the ingest key") as raised:
        list(engine.precompute([builder.ingest(chunks[0])]))
    assert "LMCACHE_RAG_INGEST_KEY" in raised.value.remedy
    assert not given or given not in str(raised.value)


def test_the_ingest_key_comes_from_environment_or_file(connect, builder, server, chunks, tmp_path, monkeypatch) -> None:
    server.ingest_key = KEY
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_text(f"{KEY}\n")
    for name, value in (("LMCACHE_RAG_INGEST_KEY", KEY), ("LMCACHE_RAG_INGEST_KEY_FILE", str(file))):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            assert list(connect(server.url, patience=1).precompute([builder.ingest(chunks[0])]))
    monkeypatch.setattr(hf_model, "open_tokenizer", lambda path: server.tokenizer)
    with Workspace.open(tmp_path / "s", engine=server.url, ingest_key_file=file) as workspace:
        assert list(workspace.engine.precompute([builder.ingest(chunks[1])]))


def test_a_redirect_does_not_carry_the_ingest_key(connect, builder, server, smollm2_tokenizer, chunks) -> None:
    with vllm_serving(smollm2_tokenizer) as other:
        server.redirect = other.url
        engine = connect(server.url, ingest_key=KEY, patience=1)
        with pytest.raises(PrecomputeError):
            list(engine.precompute([builder.ingest(chunks[0])]))
        assert other.ingest_keys == []
