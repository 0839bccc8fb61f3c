"""Documents that are removed or changed: their KV leaves the server, what others need stays, and what is left shows."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import vllm_engine_kit as kit
from lmcache_rag.integrations.kv_registry import KVRegistry
from openai_kit import BLOCK

from lmcache_rag import Workspace
from lmcache_rag.protocol import FORGET, KEEP

builder, call, chunks, connect = kit.builder, kit.call, kit.chunks, kit.connect
engine, server, smollm2_tokenizer = kit.engine, kit.server, kit.smollm2_tokenizer


def held(server: Any) -> int:
    """Blocks of text that the server keeps, beyond those of the prefix."""
    return len(server.backend.memory.chains)


def removals(server: Any) -> list[dict[str, Any]]:
    return [params for body in server.seen if (params := body.get("kv_transfer_params") or {}).get(FORGET)]


def write(folder: Path, **texts: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)


def test_remove_takes_kv_out_of_the_server(call, server, chunks, tmp_path) -> None:
    write(tmp_path / "docs", a=chunks[0], b=chunks[0], c=chunks[1])
    assert call("ingest", tmp_path / "docs").exit_code == 0
    full = held(server)
    assert call("remove", "a.txt").exit_code == 0
    assert (held(server), removals(server)) == (full, []), "b.txt holds its chunks, too"
    done = call("remove", "b.txt", "--verify", "--json")
    kv = json.loads(done.stdout)["kv"]
    assert (done.exit_code, kv["waiting"], kv["left"]) == (0, 0, {"memory": 0})
    assert kv["before"]["memory"] == full - held(server) > 0
    assert call("verify", "--all", "--no-repair").exit_code == 0, "the KV of c.txt is there"


def test_remove_verify_fails_if_a_tier_keeps_kv(call, server, chunks, tmp_path) -> None:
    write(tmp_path / "docs", a=chunks[0])
    call("ingest", tmp_path / "docs")
    server.keeps = True
    done = call("remove", "a.txt", "--verify")
    assert done.exit_code == 1
    assert "memory: " in done.stdout
    assert " 0 left" not in done.stdout
    assert "there is KV of it left in memory" in done.stderr.replace("\n", " ")
    server.keeps = False
    assert json.loads(call("remove", "nothing", "--verify", "--json").stdout)["kv"]["left"] == {"memory": 0}


def test_an_update_takes_the_old_kv_out_of_the_server(call, server, chunks, tmp_path) -> None:
    write(tmp_path / "docs", a=chunks[0], b=chunks[1])
    call("ingest", tmp_path / "docs")
    before = set(server.backend.memory.chains)
    write(tmp_path / "docs", a=chunks[2])
    assert call("ingest", tmp_path / "docs").exit_code == 0
    gone = before - server.backend.memory.chains
    assert gone
    assert removals(server)
    assert call("verify", "--all", "--no-repair").exit_code == 0
    (tmp_path / "docs" / "b.txt").unlink()
    after = set(server.backend.memory.chains)
    call("ingest", tmp_path / "docs", "--prune")
    assert after - server.backend.memory.chains, "so does --prune"


def test_first_blocks_that_another_chunk_has_stay(server, connect, smollm2_tokenizer, chunks, tmp_path) -> None:
    """LMCache names a block by all tokens up to its end: two chunks that begin alike share their first blocks."""
    head = " ".join(chunks[0].split()[:90])
    with Workspace.open(tmp_path / "s", engine=connect(server.url)) as workspace:
        register = KVRegistry.of(workspace)
        register.add({"a": f"{head} {chunks[1]}", "b": f"{head} {chunks[2]}"})
        prompts = {key: workspace.prompts.ingest(f"{head} {chunks[at]}") for key, at in (("a", 1), ("b", 2))}
        shared = len(workspace.prompts.chunk_ids(head))
        assert shared > BLOCK
        register.remove(["a"])
        assert [workspace.engine.verify(prompts[key]).status for key in "ab"] == ["missing", "ok"]
        assert [BLOCK < params[KEEP] <= shared for params in removals(server)] == [True]
        register.remove(["b"])
        assert workspace.engine.verify(prompts["b"]).status == "missing"
        assert KEEP not in removals(server)[-1]
        register.add({"a": f"{head} {chunks[1]}", "b": f"{head} {chunks[2]}", "c": head})
        register.forget(["a", "b"])
        assert [workspace.engine.verify(prompts[key]).status for key in "ab"] == ["missing", "missing"]
        assert workspace.engine.verify(workspace.prompts.ingest(head)).status == "ok"


def test_kv_waits_for_a_server_that_is_down(call, server, chunks, tmp_path) -> None:
    write(tmp_path / "docs", a=chunks[0], b=chunks[1])
    call("ingest", tmp_path / "docs")
    full = held(server)
    url = "http://127.0.0.1:9"
    done = call("remove", "a.txt", "--json", LMCACHE_RAG_ENGINE=url)
    report = json.loads(done.stdout)
    assert (done.exit_code, report["documents"], report["kv"]["waiting"] > 0) == (1, 1, True)
    assert "cannot be reached" in done.stderr
    assert held(server) == full
    assert call("remove", "x", "--json", LMCACHE_RAG_ENGINE="embedded").exit_code == 1
    assert held(server) == full, "another engine does not lose track of it"
    assert json.loads(call("warm", "--json").stdout)["computed"] == 0
    assert held(server) < full
    with sqlite3.connect(tmp_path / "store" / "store.db") as raw:
        assert raw.execute("SELECT count(*) FROM trash").fetchone() == (0,)


def test_a_removal_goes_on_after_lmcache_fails(server, connect, chunks, tmp_path, caplog) -> None:
    engine = connect(server.url, attempts=1, patience=1, concurrency=1)
    with Workspace.open(tmp_path / "s", engine=engine) as workspace:
        register = KVRegistry.of(workspace)
        register.add({"a": chunks[0], "b": chunks[1], "c": chunks[2]})
        server.cannot_forget = 1
        assert register.remove(["a", "b"]) == 2, "a framework's deletion does not fail"
        assert "is still on a server" in caplog.text
        assert workspace.store.registry.trash()
        register.add({"d": chunks[3]})
        assert workspace.store.registry.trash() == []
        statuses = [engine.verify(workspace.prompts.ingest(text)).status for text in chunks[:4]]
        assert statuses == ["missing", "missing", "ok", "ok"]


def test_prune_takes_other_prompts_kv_out_of_a_server(server, connect, chunks, tmp_path) -> None:
    engine = connect(server.url)
    with Workspace.open(tmp_path / "s", engine=engine) as workspace:
        other = workspace.prompts_with(system="You are brief.")
        KVRegistry.of(workspace, prompts=[other, workspace.prompts]).add({"a": chunks[0]})
        assert workspace.maintainer.prune() == 1
        statuses = [engine.verify(each.ingest(chunks[0])).status for each in (other, workspace.prompts)]
        assert statuses == ["missing", "ok"]
        assert list(workspace.store.registry.prefixes()) == [workspace.prompts.fingerprint]


def test_another_models_kv_waits_for_its_server(server, connect, chunks, tmp_path) -> None:
    with Workspace.open(tmp_path / "s", engine=connect(server.url), tenant="one") as workspace:
        KVRegistry.of(workspace).add({"a": chunks[0]})
    with Workspace.open(tmp_path / "s", engine=connect(server.url), tenant="two") as workspace:
        full = held(server)
        result = workspace.maintainer.remove(workspace.store.registry.doc_ids())
        assert (result.removed_chunks, result.kv.dropped, result.kv.waiting, held(server)) == (1, 0, 1, full)
        assert "tenant" in result.kv.why
    with Workspace.open(tmp_path / "s", engine=connect(server.url), tenant="one") as workspace:
        assert workspace.maintainer.remove([]).kv.dropped == 1
        assert held(server) < full


def test_kv_that_is_too_old_leaves_the_server(server, connect, chunks, tmp_path, monkeypatch) -> None:
    engine = connect(server.url)
    with Workspace.open(tmp_path / "s", engine=engine, kv_ttl="30d") as workspace:
        register, prompts = KVRegistry.of(workspace), workspace.prompts
        register.add({"old": chunks[0]})
        later = time.time() + 29 * 86400
        monkeypatch.setattr(time, "time", lambda: later)
        register.add({"new": chunks[1]})
        assert engine.verify(prompts.ingest(chunks[0])).status == "ok"
        monkeypatch.setattr(time, "time", lambda: later + 2 * 86400)
        register.remove(["nothing"])
        assert [engine.verify(prompts.ingest(text)).status for text in chunks[:2]] == ["missing", "ok"]
        assert register.ids() == {"old", "new"}, "the documents stay"
        assert workspace.maintainer.warm().computed == 1
        assert engine.verify(prompts.ingest(chunks[0])).status == "ok"
