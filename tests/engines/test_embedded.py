"""The embedded engine on the real model: statistics, misses, damage, streaming, tenants."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest
from models import tiny_model

from lmcache_rag.engines.base import BlendOptions, Completion, Sampling, TextDelta
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_generate import StopStringFilter
from lmcache_rag.engines.hf_model import HFModel, unsupported_reason
from lmcache_rag.errors import ConfigError, ContextLengthError, PrecomputeError
from lmcache_rag.prompt import PromptBuilder

SHORT = Sampling(max_tokens=4)


def test_all_chunks_hit_in_20_permutations_and_add_up(smollm2_engine, corpus):
    builder = PromptBuilder(smollm2_engine.tokenizer, smollm2_engine.info)
    list(smollm2_engine.precompute(map(builder.ingest, corpus)))
    rng = random.Random(1)
    for _ in range(20):
        rng.shuffle(corpus)
        prompt = builder.query(corpus, "What?")
        stats = smollm2_engine.generate(prompt, Sampling(max_tokens=1), BlendOptions(ratio=0.15)).stats
        assert (stats.chunks_hit, stats.chunks_missed) == (6, 0)
        parts = (stats.prefix_tokens, stats.reused_tokens, stats.recomputed_tokens, stats.computed_tokens)
        assert sum(parts) == stats.prompt_tokens == len(prompt)
        assert stats.reused_tokens > stats.recomputed_tokens > 0


def test_precompute_skips_known_kv_and_verify_agrees(tiny, corpus):
    builder = PromptBuilder(tiny.tokenizer, tiny.info)
    prompts = [builder.ingest(text) for text in corpus]
    assert tiny.missing(prompts) == [True] * 6
    assert all(result.computed for result in tiny.precompute(prompts))
    assert not any(result.computed for result in tiny.precompute(prompts))
    assert tiny.verify(prompts[0]).status == "ok"
    tiny.forget([(prompts[0].fingerprint, prompts[0].key)])
    assert tiny.verify(prompts[0]).status == "missing"


def test_kv_in_a_batch_equals_kv_one_by_one(tokenizer, corpus, tmp_path):
    model = HFModel.wrap(tiny_model("qwen3"), tokenizer)
    batched = EmbeddedEngine.from_model(model, name="t", revision="0", kv_dir=tmp_path, batch=4)
    builder = PromptBuilder(batched.tokenizer, batched.info)
    prompts = [builder.ingest(text) for text in corpus]
    list(batched.precompute(prompts))
    single = EmbeddedEngine.from_model(model, name="t", revision="0", kv_dir=tmp_path, batch=1)
    assert [single.verify(prompt).status for prompt in prompts] == ["ok"] * 6


def test_the_stream_is_the_answer_and_closing_it_stops(smollm2_engine, corpus):
    builder = PromptBuilder(smollm2_engine.tokenizer, smollm2_engine.info)
    prompt = builder.query(corpus[:1], "Say something about it.")
    events = list(smollm2_engine.stream(prompt, Sampling(max_tokens=12), BlendOptions()))
    assert isinstance(events[-1], Completion)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == events[-1].text != ""
    stream = smollm2_engine.stream(prompt, Sampling(max_tokens=400), BlendOptions())
    next(stream)
    assert decoding()
    stream.close()
    assert not decoding()


def decoding():
    return [thread.name for thread in threading.enumerate() if thread.name == "lmcache-rag-decode"]


async def test_async_twins_answer_the_same(tiny, corpus):
    builder = PromptBuilder(tiny.tokenizer, tiny.info)
    prompt = builder.query(corpus[:2], "What?")
    wanted = tiny.generate(prompt, SHORT, BlendOptions()).token_ids
    several = await asyncio.gather(*(tiny.agenerate(prompt, SHORT, BlendOptions()) for _ in range(3)))
    assert [done.token_ids for done in several] == [wanted] * 3


def test_stop_strings_end_the_answer_before_them(tiny, corpus):
    builder = PromptBuilder(tiny.tokenizer, tiny.info)
    prompt = builder.query(corpus[:1], "What?")
    text = tiny.generate(prompt, Sampling(max_tokens=12), BlendOptions()).text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    done = tiny.generate(prompt, Sampling(max_tokens=12, stop=(stop,)), BlendOptions())
    assert done.text == text[: text.find(stop)]
    assert done.finish_reason == "stop"


def test_a_part_of_a_stop_string_is_never_shown():
    cutter = StopStringFilter(("END",))
    assert [cutter.push(p) for p in ("abE", "N", "xEN", "Dmore")] == ["ab", "", "ENx", ""]
    assert cutter.stopped


def test_seeded_sampling_repeats(tiny, corpus):
    builder = PromptBuilder(tiny.tokenizer, tiny.info)
    prompt = builder.query(corpus[:1], "What?")
    warm = Sampling(max_tokens=8, temperature=1.0, seed=3)
    assert (
        tiny.generate(prompt, warm, BlendOptions()).token_ids == tiny.generate(prompt, warm, BlendOptions()).token_ids
    )


def test_what_cannot_be_blended_says_why():
    from models import tiny_config

    assert unsupported_reason(tiny_config("llama")) == ""
    assert "dynamic" in unsupported_reason(
        tiny_config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    )
    assert "sliding" in unsupported_reason(tiny_config("mistral", sliding_window=512))


def test_limits_are_errors_with_remedies(tiny):
    builder = PromptBuilder(tiny.tokenizer, tiny.info)
    with pytest.raises(ContextLengthError, match="Retrieve fewer"):
        tiny.generate(builder.query(["word " * 5000], "What?"), SHORT, BlendOptions())
    with pytest.raises(PrecomputeError, match="smaller chunks"):
        list(tiny.precompute([builder.ingest("word " * 5000)]))
    with pytest.raises(ConfigError, match="query, hkvd, head, none, all"):
        tiny.generate(builder.query(["a"], "What?"), SHORT, BlendOptions("best"))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        BlendOptions(ratio=1.5)
    with pytest.raises(ConfigError, match="max_tokens"):
        Sampling(max_tokens=0)


def test_a_full_budget_drops_the_least_recently_used(tokenizer, corpus, tmp_path, caplog):
    model = HFModel.wrap(tiny_model("llama"), tokenizer)
    engine = EmbeddedEngine.from_model(model, name="t", revision="0", kv_dir=tmp_path, kv_budget=200_000)
    builder = PromptBuilder(tokenizer, engine.info)
    prompts = [builder.ingest(text) for text in corpus]
    list(engine.precompute(prompts))
    absent = engine.missing(prompts)
    assert absent[0] and not absent[-1]
    assert engine.usage().disk_bytes <= 200_000
    assert "budget" in caplog.text


def test_hot_chunks_stay_within_the_memory_budget(tokenizer, corpus, tmp_path):
    model = HFModel.wrap(tiny_model("llama"), tokenizer)
    engine = EmbeddedEngine.from_model(model, name="t", revision="0", kv_dir=tmp_path, memory_budget=150_000)
    builder = PromptBuilder(tokenizer, engine.info)
    list(engine.precompute(map(builder.ingest, corpus)))
    done = engine.generate(builder.query(corpus, "What?"), SHORT, BlendOptions())
    assert done.stats.chunks_hit == 6
    assert 0 < engine.usage().memory_bytes <= 150_000
    engine.close()
    assert engine.usage().memory_bytes == 0
