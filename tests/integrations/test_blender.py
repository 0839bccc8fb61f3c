"""Blended prompts of texts that a program retrieved, for our engine and for another client."""

from __future__ import annotations

import blender_kit
import pytest
from blender_kit import FOUR
from lmcache_rag.integrations.blender import Blender, counts
from lmcache_rag.integrations.kv_registry import KVRegistry, as_workspace
from openai_kit import vllm_serving

from lmcache_rag.engines.base import BlendOptions, Completion
from lmcache_rag.errors import EngineError, PromptError
from lmcache_rag.prompt import Turn

no_connections_left, register = blender_kit.no_connections_left, blender_kit.register
server, workspace = blender_kit.server, blender_kit.workspace


def test_registered_texts_are_blended_in_any_order(register, workspace, corpus):
    register.add({str(i): text for i, text in enumerate(corpus)})
    blender = Blender(workspace, blend=BlendOptions("query", 0.2))
    for order in (corpus, corpus[::-1], corpus[2:4]):
        done = blender.answer(blender.build_prompt(order, "What is it?"))
        assert (done.stats.chunks_hit, done.stats.chunks_missed) == (len(order), 0)
        assert done.stats.reused_tokens > 0
    off = blender.answer(blender.build_prompt(corpus, "What is it?"), blend=BlendOptions(enabled=False))
    assert off.stats.reused_tokens == 0
    assert counts(off.stats)["blended"] is False


def test_passages_that_a_program_numbered_stay(workspace, corpus):
    blender = Blender(workspace, blend=BlendOptions(order="stable"))
    for name in ("[{}] {}", "Source {}:\n{}", "{}. {}"):
        texts = [name.format(rank, text) for rank, text in enumerate(corpus[:4], start=1)]
        assert blender.build_prompt(texts, "What?").kept == (0, 1, 2, 3), "an answer cites them by these numbers"
    orders = (corpus, corpus[::-1], corpus[1:] + corpus[:1])
    assert len({blender.build_prompt(some, "What?").prompt.token_ids for some in orders}) == 1


def test_lone_surrogates_are_replaced(register, workspace, corpus):
    replaced = f"{corpus[0]} \N{REPLACEMENT CHARACTER}"
    register.add({"a": replaced})
    blender, lone = Blender(workspace, blend=BlendOptions("query", 0.2)), f"{corpus[0]} \ud83d"
    prompted = blender.build_prompt([lone], "what \ud83d?", history=[Turn("user", lone), Turn("assistant", lone)])
    assert (prompted.texts, prompted.registered) == ((replaced,), (True,))
    assert prompted.question == "what \N{REPLACEMENT CHARACTER}?"
    assert blender.answer(prompted).stats.chunks_hit == 1


def test_an_unregistered_text_is_noticed_and_computed(register, workspace, corpus):
    register.add({"a": corpus[0]})
    blender = Blender(workspace)
    changed = corpus[1] + " And more."
    prompted = blender.build_prompt([corpus[0], changed], "What is it?")
    assert prompted.registered == (True, False)
    done = blender.answer(prompted)
    assert (done.stats.chunks_hit, done.stats.chunks_missed) == (1, 1)
    assert workspace.engine.missing([workspace.prompts.ingest(changed)]) == [True]  # not kept: no document has it


def test_lost_kv_is_stored_again_after_the_answer(register, workspace, corpus):
    register.add({"a": corpus[0], "b": corpus[1]})
    workspace.engine.forget([(workspace.prompts.fingerprint, workspace.prompts.chunk_key(corpus[1]))])
    blender = Blender(workspace)
    prompted = blender.build_prompt(corpus[:2], "What is it?")
    assert blender.answer(prompted).stats.chunks_missed == 1
    assert blender.drain(60)
    assert blender.answer(prompted).stats.chunks_missed == 0


def test_what_does_not_fit_goes_by_score_or_from_end(workspace, corpus, caplog):
    blender = Blender(workspace)
    limit = workspace.engine.info.context_length
    many = [corpus[i % len(corpus)] + f" Number {i}." for i in range(limit // 20)]
    by_place = blender.build_prompt(many, "What?")
    assert by_place.kept == tuple(range(len(by_place.kept)))
    assert len(by_place.kept) + len(by_place.dropped) == len(many)
    assert len(by_place.prompt) < limit
    scored = blender.build_prompt(many, "What?", scores=[float(i) for i in range(len(many))])
    assert scored.kept[-1] == len(many) - 1
    assert scored.dropped[0] == 0
    assert "did not fit" in blender.answer(scored, sampling=FOUR).warnings[-1]
    some = blender.build_prompt(many, "What?", scores=[None, *[float(i) for i in range(1, len(many))]])
    assert some.kept == by_place.kept


def test_empty_texts_and_questions(workspace, corpus):
    blender = Blender(workspace)
    assert blender.build_prompt(["", corpus[0], ""], "What?").kept == (1,)
    assert blender.build_prompt([], "What?").texts == ()
    with pytest.raises(PromptError, match="question is empty"):
        blender.build_prompt(corpus, "  ")


def test_history_stands_behind_the_chunks(workspace, corpus):
    blender = Blender(workspace)
    turns = [Turn("user", "Who?"), Turn("assistant", "He.")]
    with_history = blender.build_prompt(corpus, "When?", history=turns).prompt
    without = blender.build_prompt(corpus, "When?").prompt
    assert with_history.chunks == without.chunks
    assert len(with_history) > len(without)


async def test_async_answers_equal_sync_ones(register, workspace, corpus):
    register.add({"a": corpus[0]})
    blender = Blender(workspace)
    prompted = blender.build_prompt([corpus[0]], "What is it?")
    assert (await blender.aanswer(prompted)).text == blender.answer(prompted).text
    pieces = [event async for event in blender.astream(prompted)]
    assert isinstance(pieces[-1], Completion)


def test_another_openai_client_sends_our_prompt(server, tmp_path, tokenizer, corpus):
    import openai

    workspace = as_workspace(server.url, store=tmp_path / "s")
    KVRegistry.of(workspace).add({str(i): text for i, text in enumerate(corpus)})
    blender = Blender(workspace)
    prompted = blender.build_prompt(corpus, "What is it?")
    body = blender.request(prompted)
    assert body["prompt"] == list(prompted.prompt.token_ids)
    assert body["kv_transfer_params"]["lmcache_rag.chunks"] == [[c.start, c.end] for c in prompted.prompt.chunks]
    assert "cache_salt" not in body
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        gathered = blender.gather()
        gathered.take(client.completions.create(model=server.model, max_tokens=3, extra_body=body, prompt=""))
    done = blender.finished(gathered, prompted, streamed=False)
    assert server.seen[-1]["prompt"] == list(prompted.prompt.token_ids)
    assert done.stats.reused_tokens > 0
    assert done.text == gathered.text != ""


def test_chat_takes_token_ids_where_the_server_does(tmp_path, tokenizer, corpus):
    with vllm_serving(tokenizer, version="0.33.0") as new, vllm_serving(tokenizer, version="0.25.1") as old:
        blender = Blender(as_workspace(new.url, store=tmp_path / "s"))
        prompted = blender.build_prompt(corpus, "What is it?")
        params = blender.request_chat(prompted)["kv_transfer_params"]
        assert params["prompt_token_ids"] == list(prompted.prompt.token_ids)
        assert params["lmcache_rag.blend"] == "on"
        refusing = Blender(as_workspace(old.url, store=tmp_path / "s"))
        with pytest.raises(EngineError, match="chat completions of this vLLM take no token ids"):
            refusing.request_chat(prompted)


def test_only_a_server_takes_requests(workspace, corpus):
    blender = Blender(workspace)
    with pytest.raises(EngineError, match="not a vLLM server"):
        blender.request(blender.build_prompt(corpus, "What?"))


def test_a_server_that_cannot_blend_is_reported_once(tmp_path, tokenizer, corpus, caplog):
    with vllm_serving(tokenizer) as stock:
        stock.connector = False
        blender = Blender(as_workspace(stock.url, store=tmp_path / "s"))
        for _ in range(3):
            assert blender.answer(blender.build_prompt(corpus, "What?"), sampling=FOUR).text
    assert len([record for record in caplog.records if "blend" in record.message]) == 1
