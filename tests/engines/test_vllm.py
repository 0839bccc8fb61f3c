"""The engine that asks a vLLM server: what it knows of it, what goes over the wire, what is made of the answers."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import openai._utils._transform as openai_transform
import pytest
import vllm_engine_kit as kit
from fake_vllm import MODEL, FakeVLLM
from openai_kit import TEXT, vllm_serving
from vllm_engine_kit import LONG, OFF, SHORT, add_up

from lmcache_rag import VLLMEngine
from lmcache_rag.engines.base import BlendOptions, Completion, Engine, Sampling, TextDelta
from lmcache_rag.engines.vllm_client import VLLMClient
from lmcache_rag.errors import EngineError, SourceError
from lmcache_rag.prompt import PromptBuilder

builder, chunks, connect = kit.builder, kit.chunks, kit.connect
engine, server, smollm2_tokenizer = kit.engine, kit.server, kit.smollm2_tokenizer


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
    with VLLMClient(server.url) as client:
        alone, adapter = client.served_model(None), client.served_model("an-adapter")
    assert (alone.name, alone.base) == (server.model, "")
    assert (adapter.name, adapter.base) == ("an-adapter", server.root)
    assert adapter.context_length == alone.context_length > 0, "vLLM reports it of its model only"


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
