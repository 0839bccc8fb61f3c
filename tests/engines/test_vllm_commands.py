"""Settings, workspaces and the command line with a vLLM server."""

from __future__ import annotations

import json

import pytest
import vllm_engine_kit as kit
from fake_vllm import MODEL
from openai_kit import TEXT
from typer.testing import CliRunner

from lmcache_rag import VLLMEngine, Workspace
from lmcache_rag.cli.app import app
from lmcache_rag.errors import ConfigError
from lmcache_rag.settings import Settings

builder, call, chunks, connect = kit.builder, kit.call, kit.chunks, kit.connect
engine, server, smollm2_tokenizer = kit.engine, kit.server, kit.smollm2_tokenizer


def test_the_engine_setting_has_all_three_sources(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("LMCACHE_RAG_ENGINE", raising=False)
    assert Settings.load(tmp_path).engine == "embedded"
    (tmp_path / "settings.toml").write_text('engine = ["http://a:1/", "http://b:2/v1"]\n')
    assert Settings.load(tmp_path).engine == "http://a:1,http://b:2"
    monkeypatch.setenv("LMCACHE_RAG_ENGINE", "http://c:3")
    assert Settings.load(tmp_path, engine=[]).engine == "http://c:3"
    assert Settings.load(tmp_path, engine=["http://d:4", "http://e:5"]).engine == "http://d:4,http://e:5"
    assert Settings.load(tmp_path, engine=["embedded"]).engine == "embedded"
    with pytest.raises(ConfigError, match=r"^engine: .*not the URL"):
        Settings.load(tmp_path, engine="vllm")


def test_a_workspace_takes_urls_or_an_engine(engine, server, tmp_path) -> None:
    with Workspace.open(tmp_path / "a", engine=engine) as workspace:
        assert workspace.engine is engine
    with Workspace.open(tmp_path / "b", engine=server.url) as workspace:
        assert isinstance(workspace.engine, VLLMEngine)


def test_every_verb_works_against_a_server(call, server, chunks, tmp_path) -> None:
    (tmp_path / "docs").mkdir()
    for index, chunk in enumerate(chunks[:3]):
        (tmp_path / "docs" / f"{index}.txt").write_text(chunk)
    first = json.loads(call("ingest", tmp_path / "docs", "--json").stdout)
    assert first["kv"]["computed"] == len(server.seen) > 2
    again = json.loads(call("ingest", tmp_path / "docs", "--json").stdout)
    assert (again["unchanged"], again["kv"]["computed"], again["kv"]["existed"]) == (3, 0, 0)

    answer = json.loads(call("ask", "What?", "--json").stdout)
    assert answer["text"] == TEXT
    assert answer["stats"]["blended"]
    assert answer["stats"]["chunks_hit"] >= 3  # a chunk shorter than a block is never kept
    shown = call("ask", "What?", LMCACHE_RAG_ENGINE=server.url)
    assert TEXT in shown.stdout
    assert "from the store" in shown.stdout

    sent = len(server.seen)
    warmed = json.loads(call("warm", "--json").stdout)
    assert (warmed["computed"], warmed["existed"]) == (0, first["kv"]["computed"])
    assert len(server.seen) == sent + warmed["existed"]
    server.backend.memory.chains.clear()
    server.backend.memory.blocks.clear()
    report = call("verify", "--no-repair", "--json")
    assert report.exit_code == 1
    assert {bad["status"] for bad in json.loads(report.stdout)["bad"]} == {"missing"}
    assert call("verify", "--json").exit_code == 0
    assert json.loads(call("verify", "--json").stdout)["bad"] == []

    status = call("status")
    assert server.url in status.stdout
    assert MODEL in status.stdout


def test_a_conversation_works_against_a_server(call, server, chunks, tmp_path) -> None:
    (tmp_path / "a.txt").write_text(chunks[0])
    assert call("ingest", tmp_path / "a.txt").exit_code == 0
    runner = CliRunner()
    place = ["--engine", server.url, "--store", str(tmp_path / "store")]
    done = runner.invoke(app, ["chat", *place], input="What?\nAnd then?\n/stats\n")
    assert done.exit_code == 0
    assert done.stdout.count(TEXT) == 2
    assert "reused" in done.stdout


def test_an_absent_server_ends_a_verb_with_the_remedy(call, server, tmp_path, caplog) -> None:
    server.shutdown()
    server.server_close()
    (tmp_path / "a.txt").write_text("some text")
    done = call("ingest", tmp_path / "a.txt")
    assert done.exit_code == 3
    assert "cannot be reached" in done.stderr
    assert "lmcache-rag serve" in done.stderr


def test_forget_spares_what_other_documents_need(call, server, chunks, tmp_path) -> None:
    for name, text in (("a.txt", chunks[0]), ("b.txt", chunks[0]), ("c.txt", chunks[1])):
        (tmp_path / name).write_text(text)
    assert call("ingest", *(tmp_path / name for name in ("a.txt", "b.txt", "c.txt"))).exit_code == 0
    assert server.backend.memory.blocks

    def forgets() -> int:
        return sum(bool(body["kv_transfer_params"].get("lmcache_rag.forget")) for body in server.seen)

    first = call("forget", tmp_path / "a.txt", "--json")
    assert (first.exit_code, json.loads(first.stdout)["deleted"], forgets()) == (0, 0, 0), "b.txt holds it as well"
    second = call("forget", tmp_path / "b.txt")
    sent = forgets()
    assert (second.exit_code, sent > 0) == (0, True)
    assert f"KV of {sent} chunk" in second.stdout
    assert call("verify", "--all", "--no-repair").exit_code == 0, "the KV of c.txt is there"
    server.forgets = False
    third = call("forget", tmp_path / "c.txt", "--json")
    report = json.loads(third.stdout)
    assert (third.exit_code, report["removed"]["documents"], report["deleted"]) == (1, 1, 0)
    assert report["staying"] > 0
    assert "is not known" in report["why"]
