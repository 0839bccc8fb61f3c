"""Chunks' KV on a vLLM server: computed, recognised, verified and forgotten; the key that this needs."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import vllm_engine_kit as kit
from lmcache_rag.integrations.kv_registry import KVRegistry
from openai_kit import BLOCK, vllm_serving
from vllm_engine_kit import OFF, SHORT, add_up

from lmcache_rag import Workspace, tokenizer
from lmcache_rag.engines.base import BlendOptions, Sampling
from lmcache_rag.errors import EngineError, PrecomputeError
from lmcache_rag.prompt import PromptBuilder

builder, chunks, connect = kit.builder, kit.chunks, kit.connect
engine, server, smollm2_tokenizer = kit.engine, kit.server, kit.smollm2_tokenizer


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
        assert stats.prefix_tokens == len(builder.prefix_ids)  # at ingestion the first chunk stood elsewhere
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
    start = len(builder.prefix_ids) + len(builder.neutral_ids)
    for body in server.seen:
        assert body["kv_transfer_params"] == params | {"lmcache_rag.chunks": [[start, len(body["prompt"])]]}
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
                "lmcache_rag.chunks": [[prompts[0].chunk_start, len(prompts[0].token_ids)]],
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


def test_forgetting_deletes_the_kv_of_every_prompt(server, connect, chunks, tmp_path) -> None:
    engine = connect(server.url)
    with Workspace.open(tmp_path / "s", engine=engine) as workspace:
        other = workspace.prompts_with(system="You are brief.")
        KVRegistry.of(workspace, prompts=[other, workspace.prompts]).add({"a": chunks[0], "b": chunks[1]})
        prompts = [made.ingest(text) for made in (workspace.prompts, other) for text in chunks[:2]]
        server.forgets = False
        assert KVRegistry.of(workspace).forget(["b"]).staying == 1
        server.forgets = True
        report = KVRegistry.of(workspace).forget(["a"])  # it was told of one prompt only
        assert (report.deleted, report.staying) == (1, 0)
        assert [engine.verify(prompt).status for prompt in prompts] == ["missing"] * 4, "b's KV waited for that"


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
    monkeypatch.setattr(tokenizer, "open_tokenizer", lambda path: server.tokenizer)
    with Workspace.open(tmp_path / "s", engine=server.url, ingest_key_file=file) as workspace:
        assert list(workspace.engine.precompute([builder.ingest(chunks[1])]))


def test_a_redirect_does_not_carry_the_ingest_key(connect, builder, server, smollm2_tokenizer, chunks) -> None:
    with vllm_serving(smollm2_tokenizer) as other:
        server.redirect = other.url
        engine = connect(server.url, ingest_key=KEY, patience=1)
        with pytest.raises(PrecomputeError):
            list(engine.precompute([builder.ingest(chunks[0])]))
        assert other.ingest_keys == []
