"""What the integrations share: KV of another store's texts, blended prompts for another client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_vllm import FakeVLLM
from lmcache_rag.integrations import kv_registry
from lmcache_rag.integrations.blender import Blender, counts
from lmcache_rag.integrations.kv_registry import KVRegistry, as_workspace
from models import tiny_model
from openai_kit import vllm_serving

from lmcache_rag import Workspace
from lmcache_rag.engines.base import BlendOptions, Completion, Sampling
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.errors import ConfigError, DocumentError, EngineError, PrecomputeError, PromptError
from lmcache_rag.prompt import Turn

FOUR = Sampling(max_tokens=4)


@pytest.fixture
def workspace(tmp_path: Path, tokenizer: Any) -> Iterator[Workspace]:
    """An empty store and a tiny model."""
    model = HFModel.wrap(tiny_model("llama"), tokenizer)
    engine = EmbeddedEngine.from_model(model, name="tiny", revision="0", kv_dir=tmp_path / "store" / "kv")
    with Workspace.open(tmp_path / "store", engine=engine, max_tokens=4) as opened:
        yield opened
    engine.close()


@pytest.fixture(autouse=True)
def no_connections_left() -> Iterator[None]:
    """Workspaces of servers live as long as the process: here, as long as the test."""
    yield
    while kv_registry._by_server:
        kv_registry._by_server.popitem()[1].engine.close()


@pytest.fixture
def register(workspace: Workspace) -> KVRegistry:
    return KVRegistry.of(workspace)


@pytest.fixture
def server(tokenizer: Any) -> Iterator[FakeVLLM]:
    with vllm_serving(tokenizer) as serving:
        yield serving


def kv_files(workspace: Workspace) -> int:
    """Chunks' KV on disk; the prefix has a file of its own."""
    keys = {workspace.prompts.chunk_key(chunk.text) for chunk in workspace.store.registry.chunks()}
    return sum(path.stem in keys for path in workspace.store.kv_dir.rglob("*.safetensors"))


# -- the register -----------------------------------------------------------------------------------------------


def test_equal_texts_share_kv_until_the_last_id_leaves(register, workspace, corpus):
    done = register.add({"a": corpus[0], "b": corpus[0], "c": corpus[1]})
    assert (done.computed, kv_files(workspace)) == (2, 2)
    assert register.texts() == {"a": corpus[0], "b": corpus[0], "c": corpus[1]}
    assert register.remove(["a", "never seen"]) == 1
    assert not workspace.engine.missing([workspace.prompts.ingest(corpus[0])])[0]
    assert register.remove(["b"]) == 1
    assert workspace.engine.missing([workspace.prompts.ingest(text) for text in corpus[:2]]) == [True, False]
    assert register.clear() == 1
    assert register.ids() == set()
    assert kv_files(workspace) == 0


def test_an_id_given_again_replaces_its_text(register, workspace, corpus):
    register.add({"a": corpus[0], "b": corpus[1]})
    assert register.add({"a": corpus[0], "other id": corpus[1]}).computed == 0
    assert register.add({"a": corpus[2]}).computed == 1
    assert register.texts() == {"a": corpus[2], "b": corpus[1], "other id": corpus[1]}
    assert workspace.engine.missing([workspace.prompts.ingest(corpus[0])]) == [True]


def test_spaces_keep_their_ids_apart(workspace, corpus):
    one, two = KVRegistry.of(workspace, space="one"), KVRegistry.of(workspace, space="two")
    one.add({"x": corpus[0]})
    assert two.add({"x": corpus[0], "y": corpus[1]}).computed == 1
    assert one.clear() == 1
    assert two.ids() == {"x", "y"}
    assert not workspace.engine.missing([workspace.prompts.ingest(corpus[0])])[0]


def test_a_failed_computation_is_repaired_by_the_next(register, workspace, corpus, monkeypatch):
    from lmcache_rag.engines.chunk_cache import KVStore

    texts = dict(zip("abc", corpus, strict=False))
    real, calls = KVStore.put, []

    def put(self: Any, *args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise PrecomputeError("the disk is full")
        return real(self, *args, **named)

    monkeypatch.setattr(KVStore, "put", put)
    with pytest.raises(PrecomputeError, match="disk is full"):
        register.add(texts)
    assert register.ids() == {"a", "b", "c"}
    left = len(workspace.store.registry.chunks_without_kv(workspace.prompts.fingerprint))
    assert left > 0
    done = register.add(texts)
    assert done.computed + done.existed == left
    assert workspace.store.registry.chunks_without_kv(workspace.prompts.fingerprint) == []


def test_warm_brings_back_what_the_engine_lost(register, workspace, corpus):
    register.add({"a": corpus[0], "b": corpus[1]})
    workspace.engine.forget([(workspace.prompts.fingerprint, workspace.prompts.chunk_key(corpus[0]))])
    assert register.warm().computed == 1
    assert register.warm().computed == 0


def test_texts_that_can_have_no_kv_are_registered(register, workspace, corpus, caplog):
    endless = "word " * (workspace.engine.info.context_length + 1)
    assert register.add({"empty": "", "long": endless, "a": corpus[0]}).computed == 1
    assert register.ids() == {"empty", "long", "a"}
    assert "longer than the model's context" in caplog.text
    assert register.warm().computed == 0
    with pytest.raises(DocumentError, match="not valid Unicode"):
        register.add({"bad": "\ud800"})


async def test_the_async_twins_do_the_same(register, corpus):
    assert (await register.aadd({"a": corpus[0]})).computed == 1
    assert (await register.awarm()).computed == 0
    assert await register.aremove(["a"]) == 1


# -- blended prompts ----------------------------------------------------------------------------------------------


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


# -- another client -------------------------------------------------------------------------------------------------


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


# -- what a user has in hand ------------------------------------------------------------------------------------------


def test_the_same_source_gives_the_same_workspace(server, workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("LMCACHE_RAG_STORE", str(tmp_path / "elsewhere"))
    assert as_workspace(workspace) is workspace
    engine = workspace.engine
    assert as_workspace(engine) is as_workspace(engine)
    assert as_workspace(engine).settings.store == tmp_path / "elsewhere"
    assert as_workspace(engine, store=tmp_path / "third") is not as_workspace(engine)
    by_url = as_workspace(server.url)
    assert as_workspace(f"{server.url}/v1/") is by_url


def test_a_framework_clients_key_goes_to_its_server(server, tmp_path, monkeypatch):
    from pydantic import SecretStr

    monkeypatch.delenv("LMCACHE_RAG_API_KEY", raising=False)
    server.key = "of this server"
    langchain = SimpleNamespace(
        openai_api_base=f"{server.url}/v1", openai_api_key=SecretStr("of this server"), model_name=server.model
    )
    llama_index = SimpleNamespace(api_base=f"{server.url}/v1", api_key="of this server", model=server.model)
    first = as_workspace(langchain, store=tmp_path / "s")
    assert as_workspace(llama_index, store=tmp_path / "s") is first
    assert server.auth[-1] == "Bearer of this server"
    wrong = SimpleNamespace(api_base=server.url, api_key="x", model="another model")
    with pytest.raises(EngineError, match="not another model"):
        as_workspace(wrong, store=tmp_path / "s")


def test_a_server_with_another_model_is_noticed(server, tmp_path):
    first = as_workspace(server.url, store=tmp_path / "s")
    server.root = "another/model"
    again = as_workspace(server.url, store=tmp_path / "s")
    assert (again is first, again.engine.info.model) == (False, "another/model")
    assert again.prompts.fingerprint != first.prompts.fingerprint
    assert as_workspace(server.url, store=tmp_path / "s") is again


def test_a_server_down_for_a_while_keeps_its_workspace(tokenizer, tmp_path):
    with vllm_serving(tokenizer) as running:
        first = as_workspace(running.url, store=tmp_path / "s")
    assert as_workspace(running.url, store=tmp_path / "s") is first


def test_a_server_that_cannot_blend_is_reported_once(tmp_path, tokenizer, corpus, caplog):
    with vllm_serving(tokenizer) as stock:
        stock.connector = False
        blender = Blender(as_workspace(stock.url, store=tmp_path / "s"))
        for _ in range(3):
            assert blender.answer(blender.build_prompt(corpus, "What?"), sampling=FOUR).text
    assert len([record for record in caplog.records if "blend" in record.message]) == 1


@pytest.mark.parametrize("source", [object(), SimpleNamespace(openai_api_base="https://api.openai.com/v1")])
def test_what_names_no_server_is_refused(source):
    with pytest.raises(ConfigError, match="has no vLLM server URL"):
        as_workspace(source)
