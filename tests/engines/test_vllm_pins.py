"""Chunks that are pinned on a vLLM server: by the command line, by settings and by both frameworks' registry."""

from __future__ import annotations

import json
from typing import Any

import pytest
import vllm_engine_kit as kit
from lmcache_rag.integrations.kv_registry import KVRegistry

from lmcache_rag import Workspace
from lmcache_rag.errors import ConfigError, EngineError, PinRefusedError
from lmcache_rag.protocol import INGEST, PIN, TENANT, complaints, pins, tenant_name
from lmcache_rag.trace import Retrieval, write_trace

builder, call, chunks, connect = kit.builder, kit.call, kit.chunks, kit.connect
engine, server, smollm2_tokenizer = kit.engine, kit.server, kit.smollm2_tokenizer


def asked(server: Any) -> list[str]:
    """Which requests ingest and pin, in order."""
    params = [body.get("kv_transfer_params") or {} for body in server.seen]
    return [key.rpartition(".")[2] for one in params for key in (INGEST, PIN) if key in one]


def test_ingest_and_warm_pin_chunks(call, server, chunks, tmp_path) -> None:
    for name, text in zip("abc", chunks, strict=False):
        (tmp_path / f"{name}.txt").write_text(text)
    assert call("ingest", tmp_path / "a.txt", "--pin").exit_code == 0
    assert asked(server)[:2] == ["pin", "ingest"], "pinned before it can be evicted"
    first = len(server.pins)
    assert first == asked(server).count("ingest") > 0
    assert call("ingest", tmp_path / "b.txt", tmp_path / "c.txt").exit_code == 0
    assert len(server.pins) == first
    log = tmp_path / "questions.jsonl"
    write_trace(log, [Retrieval(chunks=(str(first + 1),))])
    done = call("warm", "--top", 1, "--from-log", log, "--pin")
    assert "1 chunk pinned." in done.stdout
    assert len(server.pins) == first + 1
    done = call("warm", "--json", LMCACHE_RAG_ENGINE=server.url, LMCACHE_RAG_PIN="true")
    assert json.loads(done.stdout)["pinned"] == len(server.pins) > first + 1
    assert "no longer pinned" in call("warm", "--no-pin").stdout
    assert not server.pins


def test_pins_beyond_memory_are_refused_clearly(call, server, chunks, tmp_path) -> None:
    for name, text in zip("ab", chunks, strict=False):
        (tmp_path / f"{name}.txt").write_text(text)
    server.most_pinned = 10
    done = call("ingest", tmp_path / "a.txt", "--pin")
    words = " ".join(done.stderr.split())
    assert done.exit_code == 3
    assert "cannot be pinned: 0.00 GB of the 0.00 GB of the server's memory" in words
    assert "warm --no-pin" in words
    assert "ingest" not in asked(server), "nothing is computed for it"
    assert call("ingest", tmp_path / "a.txt").exit_code == 0, "without a pin it is taken"


def test_a_registry_pins_what_is_added(server, connect, chunks, tmp_path) -> None:
    with Workspace.open(tmp_path / "s", engine=connect(server.url), tenant="acme") as workspace:
        assert KVRegistry.of(workspace).add({"a": chunks[0]}).computed == 1
        assert not server.pins
        KVRegistry.of(workspace, pin=True).add({"b": chunks[1]})
        assert len(server.pins) == 1
        prompt = workspace.prompts.ingest(chunks[2])
        server.most_pinned = 1
        with pytest.raises(PinRefusedError, match="cannot be pinned"):
            workspace.engine.pin_chunk(prompt)
        server.failure = "no server"
        server.connector = False
        with pytest.raises(PinRefusedError, match="server cannot pin"):
            workspace.engine.pin_chunk(prompt)
    assert {(body["kv_transfer_params"] or {}).get(TENANT) for body in server.seen} == {"acme"}
    assert issubclass(PinRefusedError, EngineError)


def test_what_a_request_may_pin() -> None:
    assert [pins(params) for params in ({PIN: True}, {PIN: False}, {PIN: "yes"}, {}, None)] == [
        True,
        False,
        None,
        None,
        None,
    ]
    assert complaints({PIN: True, TENANT: "acme"}, 100) == []
    for wrong in ({PIN: 1}, {PIN: True, INGEST: True}, {TENANT: 5}, {TENANT: "x" * 81}, {TENANT: "a\nb"}):
        assert complaints(wrong, 100)
    assert tenant_name("acme") == "acme"
    assert complaints({TENANT: tenant_name("a\nb" * 100)}, 100) == []


def test_the_embedded_engine_says_that_it_pins_nothing(tmp_path, chunks, smollm2_tokenizer) -> None:
    from lmcache_rag.kv_manager import KVManager

    class Embedded:
        info = type("Info", (), {"engine": "embedded"})()

    manager = KVManager.__new__(KVManager)
    manager._engine = Embedded()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="pinned on a server; the engine is embedded"):
        manager.pin(None)  # type: ignore[arg-type]
