"""The embedded engine on the real model: statistics, misses, damage, streaming, tenants."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from models import tiny_model

from lmcache_rag.engines.base import BlendOptions, Completion, ReuseStats, Sampling, TextDelta
from lmcache_rag.engines.decode import StopCutter
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_model import HFModel, why_not_blendable
from lmcache_rag.errors import ConfigError, ContextLengthError, PrecomputeError, UnsupportedModelError
from lmcache_rag.prompt import PromptBuilder, PromptFormat

SHORT = Sampling(max_tokens=4)


@pytest.fixture
def tiny(tokenizer, tmp_path):
    model = HFModel.wrap(tiny_model("llama"), tokenizer)
    return EmbeddedEngine.from_model(model, name="tiny", revision="0", kv_dir=tmp_path)


@pytest.fixture
def corpus(sentences):
    return [" ".join(sentences[i : i + 2]) for i in range(0, 12, 2)]


def test_every_chunk_hits_in_20_permutations_and_the_counts_add_up(smollm2_engine, corpus):
    builder = PromptBuilder(smollm2_engine.tokenizer, smollm2_engine.info)
    list(smollm2_engine.precompute(map(builder.ingest, corpus)))
    rng = random.Random(1)
    for _ in range(20):
        rng.shuffle(corpus)
        prompt = builder.query(corpus, "What?")
        stats = smollm2_engine.generate(prompt, Sampling(max_tokens=1), BlendOptions()).stats
        assert (stats.chunks_hit, stats.chunks_missed) == (6, 0)
        parts = (stats.prefix_tokens, stats.reused_tokens, stats.recomputed_tokens, stats.computed_tokens)
        assert sum(parts) == stats.prompt_tokens == len(prompt)
        assert stats.reused_tokens > stats.recomputed_tokens > 0


def test_counts_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="add up"):
        ReuseStats(10, prefix_tokens=4, reused_tokens=5)


def test_nothing_is_called_blended_when_no_kv_is_there(tiny, corpus):
    builder = PromptBuilder(tiny.tokenizer, tiny.info)
    done = tiny.generate(builder.query(corpus, "What?"), SHORT, BlendOptions())
    assert (done.stats.reused_tokens, done.stats.recomputed_tokens, done.stats.chunks_hit) == (0, 0, 0)
    assert not done.stats.blended
    assert "missing" in done.warnings[0]


def test_a_full_prefill_reuses_nothing(tiny, corpus):
    builder = PromptBuilder(tiny.tokenizer, tiny.info)
    list(tiny.precompute(map(builder.ingest, corpus)))
    prompt = builder.query(corpus, "What?")
    stats = tiny.generate(prompt, SHORT, BlendOptions(enabled=False)).stats
    assert stats.computed_tokens == len(prompt)


def test_precompute_skips_what_exists_and_verify_agrees(tiny, corpus):
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


@pytest.mark.parametrize("damage", ["truncate", "flip", "swap"])
def test_a_damaged_file_is_a_miss_and_the_answer_is_right(damage, tiny, corpus, caplog):
    builder = PromptBuilder(tiny.tokenizer, tiny.info)
    prompts = [builder.ingest(text) for text in corpus]
    list(tiny.precompute(prompts))
    files = [tiny._kv.files.path(p.fingerprint, p.key) for p in prompts]
    if damage == "truncate":
        files[2].write_bytes(files[2].read_bytes()[:-100])
    elif damage == "flip":
        data = bytearray(files[2].read_bytes())
        data[-5] ^= 1
        files[2].write_bytes(data)
    else:  # KV of another text under this chunk's name
        files[2].write_bytes(files[3].read_bytes())
    assert tiny.verify(prompts[2]).status == "damaged"
    query = builder.query(corpus, "What?")
    done = tiny.generate(query, SHORT, BlendOptions("all"))
    assert (done.stats.chunks_hit, done.stats.chunks_missed) == (5, 1)
    assert "damaged" in caplog.text
    assert done.token_ids == tiny.generate(query, SHORT, BlendOptions(enabled=False)).token_ids
    assert tiny.missing(prompts) == [False, False, True, False, False, False]


@pytest.mark.parametrize("change", ["tenant", "prefix", "revision", "dtype"])
def test_kv_of_another_tenant_prefix_or_model_is_never_used(change, tokenizer, corpus, tmp_path):
    def engine(seed=0, revision="0", dtype=torch.float32):
        model = tiny_model("llama", seed=seed).to(dtype)
        return EmbeddedEngine.from_model(
            HFModel.wrap(model, tokenizer), name="tiny", revision=revision, kv_dir=tmp_path
        )

    first = engine()
    list(first.precompute(map(PromptBuilder(tokenizer, first.info).ingest, corpus)))
    second = {"revision": lambda: engine(1, "1"), "dtype": lambda: engine(dtype=torch.bfloat16)}.get(change, engine)()
    builder = PromptBuilder(
        tokenizer,
        second.info,
        tenant="other" if change == "tenant" else "",
        format=PromptFormat(system="Speak like a pirate.") if change == "prefix" else None,
    )
    stats = second.generate(builder.query(corpus, "What?"), SHORT, BlendOptions()).stats
    assert (stats.chunks_hit, stats.chunks_missed) == (0, 6)


def test_blended_kv_is_never_kept(tiny, corpus):
    builder = PromptBuilder(tiny.tokenizer, tiny.info)
    list(tiny.precompute(map(builder.ingest, corpus[:3])))
    before = {path: path.read_bytes() for path in tiny._kv.files.folder.rglob("*.safetensors")}
    tiny.generate(builder.query(corpus, "What?"), SHORT, BlendOptions("query", 0.3))
    after = {path: path.read_bytes() for path in tiny._kv.files.folder.rglob("*.safetensors")}
    assert after == before


def test_the_stream_is_the_answer_and_closing_it_stops(smollm2_engine, corpus):
    builder = PromptBuilder(smollm2_engine.tokenizer, smollm2_engine.info)
    prompt = builder.query(corpus[:1], "Say something about it.")
    events = list(smollm2_engine.stream(prompt, Sampling(max_tokens=12), BlendOptions()))
    assert isinstance(events[-1], Completion)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == events[-1].text != ""
    stream = smollm2_engine.stream(prompt, Sampling(max_tokens=400), BlendOptions())
    next(stream)
    stream.close()
    assert not smollm2_engine._lock.locked()


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
    cutter = StopCutter(("END",))
    assert [cutter.push(p) for p in ("abE", "N", "xEN", "Dmore")] == ["ab", "", "ENx", ""]
    assert cutter.stopped


def test_seeded_sampling_repeats(tiny, corpus):
    builder = PromptBuilder(tiny.tokenizer, tiny.info)
    prompt = builder.query(corpus[:1], "What?")
    warm = Sampling(max_tokens=8, temperature=1.0, seed=3)
    assert (
        tiny.generate(prompt, warm, BlendOptions()).token_ids == tiny.generate(prompt, warm, BlendOptions()).token_ids
    )


def test_an_unsupported_family_is_named_and_answers_without_blending(tokenizer, corpus, tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=49152, n_embd=32, n_layer=2, n_head=2, n_positions=2048, eos_token_id=2)
    config.max_position_embeddings = 2048
    torch.manual_seed(0)
    model = HFModel.wrap(transformers.GPT2LMHeadModel(config).eval(), tokenizer)
    engine = EmbeddedEngine.from_model(model, name="gpt2", revision="0", kv_dir=tmp_path)
    builder = PromptBuilder(tokenizer, engine.info)
    prompt = builder.query(corpus[:1], "What?")
    with pytest.raises(UnsupportedModelError, match=r"'gpt2'.*Llama.*--no-blend"):
        engine.generate(prompt, SHORT, BlendOptions())
    with pytest.raises(UnsupportedModelError):
        list(engine.precompute([builder.ingest(corpus[0])]))
    assert engine.generate(prompt, SHORT, BlendOptions(enabled=False)).token_ids


def test_what_cannot_be_blended_says_why():
    from models import tiny_config

    assert why_not_blendable(tiny_config("llama")) == ""
    assert "dynamic" in why_not_blendable(
        tiny_config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    )
    assert "sliding" in why_not_blendable(tiny_config("mistral", sliding_window=512))


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


def test_the_budget_of_the_files_drops_the_least_recently_used(tokenizer, corpus, tmp_path, caplog):
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
