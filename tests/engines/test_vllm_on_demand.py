"""KV on demand with a vLLM server: ingested now, lazily or never; warmed by a log; in flight and in a second."""

from __future__ import annotations

import json
from typing import Any

import pytest
import vllm_engine_kit as kit
from lmcache_rag.integrations.blender import Blender
from lmcache_rag.integrations.kv_registry import KVRegistry

from lmcache_rag import Workspace
from lmcache_rag.connector.second_use import SecondUse
from lmcache_rag.kv_policy import KVPolicy, RateLimit
from lmcache_rag.protocol import INGEST
from lmcache_rag.settings import Settings
from lmcache_rag.trace import Retrieval, chunk_name, read_trace, write_trace

builder, call, chunks, connect = kit.builder, kit.call, kit.chunks, kit.connect
engine, server, smollm2_tokenizer = kit.engine, kit.server, kit.smollm2_tokenizer


def ingestions(server: Any) -> int:
    return sum((body.get("kv_transfer_params") or {}).get(INGEST) is True for body in server.seen)


def test_ingest_computes_kv_by_its_mode(call, server, chunks, tmp_path) -> None:
    (tmp_path / "a.txt").write_text(chunks[0])
    done = call("ingest", tmp_path / "a.txt", "--kv", "lazy")
    assert (done.exit_code, ingestions(server)) == (0, 0)
    assert "second use" in done.stdout
    assert call("ingest", tmp_path / "a.txt", LMCACHE_RAG_ENGINE=server.url, LMCACHE_RAG_KV="none").exit_code == 0
    assert ingestions(server) == 0
    assert call("ingest", tmp_path / "a.txt").exit_code == 0
    assert ingestions(server) > 0
    assert "kv" in call("ingest", tmp_path / "a.txt", "--kv", "later").stderr


def test_none_leaves_passages_to_warm(tmp_path) -> None:
    assert Settings.load(tmp_path).fills == "second"
    assert Settings.load(tmp_path, kv="lazy", lazy_fill="first").fills == "first"
    assert Settings.load(tmp_path, kv="none", lazy_fill="first").fills == "never"


def test_a_registry_takes_the_mode(server, connect, chunks, tmp_path) -> None:
    with Workspace.open(tmp_path / "s", engine=connect(server.url), kv="lazy") as workspace:
        register = KVRegistry.of(workspace)
        assert register.add({"a": chunks[0]}).computed == 0
        assert register.ids() == {"a"}
        assert ingestions(server) == 0
        assert KVRegistry.of(workspace, kv="now").add({"a": chunks[0]}).computed == 1
        with pytest.raises(Exception, match="kv is 'x'"):
            KVRegistry.of(workspace, kv="x")


def test_warm_takes_the_most_used_chunks_first(server, connect, chunks, tmp_path) -> None:
    log = tmp_path / "questions.jsonl"
    names = [chunk_name(text) for text in chunks[:4]]
    used = [(names[2],), (names[2], names[1]), (names[2], "another store's"), (names[1],), (names[0],)]
    write_trace(log, [Retrieval(chunks=each) for each in used])
    with Workspace.open(tmp_path / "s", engine=connect(server.url), kv="none") as workspace:
        KVRegistry.of(workspace).add({str(at): text for at, text in enumerate(chunks[:4])})
        ids = workspace.store.registry.chunk_ids(names)
        wanted = [ids[names[at]] for at in (2, 1, 0)]
        assert workspace.most_used(log) == wanted
        assert workspace.most_used(log, 2) == wanted[:2]
        write_trace(log, [Retrieval(chunks=(str(ids[names[3]]),))])
        assert workspace.most_used(log) == [ids[names[3]]], "by their ids, too"
        assert workspace.maintainer.warm(wanted[:2]).computed == 2
        statuses = [workspace.engine.verify(workspace.prompts.ingest(text)).status for text in chunks[:4]]
        assert statuses == ["missing", "ok", "ok", "missing"]
        assert workspace.maintainer.warm(wanted[:1]).computed == 0, "it is there"


def test_warm_reads_a_log_on_the_command_line(call, server, chunks, tmp_path) -> None:
    (tmp_path / "a.txt").write_text(chunks[0])
    (tmp_path / "b.txt").write_text(chunks[1])
    call("ingest", tmp_path / "a.txt", tmp_path / "b.txt", "--kv", "none")
    (tmp_path / "questions.txt").write_text(f"{chunks[1][:60]}\n")
    done = call("warm", "--top", "1", "--from-log", tmp_path / "questions.txt", "--in-flight", "1", "--json")
    assert json.loads(done.stdout)["computed"] == 1
    assert ingestions(server) == server.most_active == 1
    assert "--from-log" in call("warm", "--top", "1").stderr
    assert "cannot be read" in call("warm", "--from-log", tmp_path / "none.jsonl").stderr


def test_ingestion_is_bounded_in_rate_and_flight(server, connect, chunks, tmp_path, monkeypatch) -> None:
    limited: list[tuple[float | None, int]] = []
    monkeypatch.setattr(RateLimit, "wait", lambda self, tokens, stop=None: limited.append((self._rate, tokens)))
    with Workspace.open(tmp_path / "s", engine=connect(server.url), ingest_rate="500") as workspace:
        KVRegistry.of(workspace).add({str(at): text for at, text in enumerate(chunks[:4])})
        assert sorted(limited) == sorted((500.0, len(workspace.prompts.chunk_ids(text))) for text in chunks[:4])
    assert ingestions(server) == 4
    monkeypatch.setenv("LMCACHE_RAG_INGEST_IN_FLIGHT", "3")
    with Workspace.open(tmp_path / "t", engine=server.url) as workspace:
        assert workspace.engine._chunks.concurrency == 3
        assert workspace.kv_policy == KVPolicy()


def test_ask_writes_a_trace_that_warm_and_plan_read(call, server, chunks, tmp_path) -> None:
    for name, text in zip("abc", chunks, strict=False):
        (tmp_path / f"{name}.txt").write_text(text)
    call("ingest", *(tmp_path / f"{name}.txt" for name in "abc"), "--kv", "none")
    trace = tmp_path / "trace.jsonl"
    assert call("ask", "What is an atom?", "--top-k", 2, "--trace", trace).exit_code == 0
    assert call("ask", "And now?", LMCACHE_RAG_ENGINE=server.url, LMCACHE_RAG_TRACE=str(trace)).exit_code == 0
    first, second = read_trace(trace)
    assert (first.question, len(first.chunks), second.question) == ("What is an atom?", 2, "And now?")
    planned = call("plan", "--trace", trace, "--layers", 2, "--kv-heads", 2, "--head-size", 64, "--json")
    assert "2 questions of" in json.loads(planned.stdout)["trace"]
    before = ingestions(server)
    assert call("warm", "--top", 1, "--from-log", trace).exit_code == 0
    assert ingestions(server) == before + 1
    refused = call("ask", "What?", "--trace", tmp_path / "no" / "trace")
    assert (refused.exit_code, "cannot be written" in refused.stderr) == (2, True)


def test_clients_without_memory_ingest_at_second_use(server, connect, chunks, tmp_path) -> None:
    """Each is another process, which has seen a passage once."""
    server.second_use = SecondUse(64, 64)

    def ask(number: int, *passages: str) -> int:
        before = ingestions(server)
        for kept in (server.backend.memory.chains, server.backend.memory.blocks):
            kept.clear()  # this server keeps prompts, too, and finds chunks in them
        with Workspace.open(tmp_path / f"s{number}", engine=connect(server.url), max_tokens=2) as workspace:
            blender = Blender(workspace)
            blender.answer(blender.build_prompt(passages, f"What of {number}?"))
            assert blender.drain(60)
        return ingestions(server) - before

    assert ask(1, chunks[0], chunks[1]) == 0
    assert ask(2, chunks[2], chunks[1]) == 1, "the one that was used before"
    server.second_use = None
    assert ask(4, chunks[0]) == 0, "each counts alone"
