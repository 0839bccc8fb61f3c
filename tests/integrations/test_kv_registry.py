"""KV for texts of another program's store, and the workspace that belongs to a source."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import blender_kit
import pytest
from lmcache_rag.integrations.kv_registry import KVRegistry, as_workspace
from openai_kit import vllm_serving

from lmcache_rag import Workspace
from lmcache_rag.errors import ConfigError, DocumentError, EngineError, PrecomputeError

no_connections_left, register = blender_kit.no_connections_left, blender_kit.register
server, workspace = blender_kit.server, blender_kit.workspace


def kv_files(workspace: Workspace) -> int:
    """Chunks' KV on disk; the prefix has a file of its own."""
    keys = {workspace.prompts.chunk_key(chunk.text) for chunk in workspace.store.registry.chunks()}
    return sum(path.stem in keys for path in workspace.store.kv_dir.rglob("*.safetensors"))


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


@pytest.mark.parametrize("source", [object(), SimpleNamespace(openai_api_base="https://api.openai.com/v1")])
def test_what_names_no_server_is_refused(source):
    with pytest.raises(ConfigError, match="has no vLLM server URL"):
        as_workspace(source)


def test_a_client_of_another_server_is_named(workspace):
    from langchain_openai import ChatOpenAI
    from llama_index.llms.ollama import Ollama
    from llama_index.llms.openai_like import OpenAILike
    from lmcache_rag.integrations.llama_index import BlendSynthesizer, LMCacheVectorStore

    ollama = Ollama(model="llama3.2")  # its base_url is that of a server that answers /v1/models, but no vLLM
    hosted = OpenAILike(model="m", api_base="https://api.groq.com/openai/v1", api_key="k")
    found = {}
    for llm in (ollama, hosted, ChatOpenAI(model="m", api_key="k", base_url="https://eu.api.openai.com/v1")):
        with pytest.raises(ConfigError, match="has no vLLM server URL") as error:
            as_workspace(llm)
        found[type(llm).__name__] = str(error.value)
    assert "Ollama has no vLLM server URL: it is the client of another (ollama)." in found["Ollama"]
    assert "it calls api.groq.com" in found["OpenAILike"]
    assert "it calls eu.api.openai.com" in found["ChatOpenAI"]
    in_process = type("Vllm", (), {"__module__": "llama_index.llms.vllm.base", "api_url": "http://localhost:8000"})()
    with pytest.raises(ConfigError, match="does not use vLLM's OpenAI server"):
        as_workspace(in_process)
    for text in found.values():
        assert "lmcache-rag serve MODEL" in text and "OpenAILike(" in text and "Workspace.open(" in text
    for use in (lambda: BlendSynthesizer(ollama, workspace=workspace), lambda: LMCacheVectorStore(None, ollama)):
        with pytest.raises(ConfigError, match="it is the client of another"):
            use()
