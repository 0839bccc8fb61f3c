"""Looking after a store on the command line: status, warm, verify, remove, prune, settings."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import cli_kit
import pytest
from cli_kit import Call, Stocked, document, kv_files

from lmcache_rag.settings import Settings

call, copy, make_tiny, stocked = cli_kit.call, cli_kit.copy, cli_kit.make_tiny, cli_kit.stocked


def test_status_counts_documents_chunks_and_kv(call: Call, stocked: Stocked) -> None:
    status = document(call("status", "--store", stocked.store, "--json"))
    assert (status["store"]["documents"], status["store"]["chunks"]) == (4, 3)
    assert status["store"]["chunks_without_kv"] == 0
    [kv] = status["store"]["kv"]
    assert kv["keys"] == 3
    assert kv["nbytes"] == document(stocked.first)["kv"]["nbytes"]
    assert kv["fingerprint"] == status["fingerprint"]
    assert status["usage"]["disk_bytes"] == sum(file.stat().st_size for file in kv_files(stocked.store))


def test_status_for_people_shows_the_same(call: Call, stocked: Stocked) -> None:
    status = document(call("status", "--store", stocked.store, "--json"))
    shown = call("status", "--store", stocked.store).stdout
    assert "Documents    4\n" in shown
    assert "Chunks       3 (" in shown
    assert status["fingerprint"][:16] in shown
    assert "3 chunks, " in shown
    assert "warm" not in shown
    assert "prune" not in shown


def test_status_names_missing_kv_and_warm_computes_it(call: Call, stocked: Stocked, tmp_path: Path) -> None:
    store = tmp_path / "s"
    call("ingest", stocked.docs, "--store", store, "--no-kv")
    assert "3 chunks without KV. To compute it: lmcache-rag warm" in call("status", "--store", store).stdout
    totals = document(call("warm", "--store", store, "--json"))
    assert (totals["computed"], totals["existed"]) == (3, 0)
    assert "without KV" not in call("status", "--store", store).stdout
    assert call("warm", "--store", store).stdout == "Nothing was missing.\n"


def test_warm_computes_what_was_lost(call: Call, copy: Path) -> None:
    for file in kv_files(copy):
        file.unlink()
    assert call("warm", "--store", copy).stdout.startswith("3 computed, 0 found (")


def test_another_tenants_kv_is_stale_until_pruned(call: Call, copy: Path) -> None:
    call("warm", "--store", copy, LMCACHE_RAG_TENANT="other")
    shown = call("status", "--store", copy).stdout
    assert "Stale KV" in shown
    assert "To drop them: lmcache-rag prune" in shown
    before = len(kv_files(copy))
    assert document(call("prune", "--store", copy, "--json")) == {"dropped": 3}
    assert len(kv_files(copy)) <= before - 3
    assert "Stale KV" not in call("status", "--store", copy).stdout
    assert document(call("status", "--store", copy, "--json"))["store"]["chunks_without_kv"] == 0


def test_verify_of_sound_kv_finds_nothing(call: Call, stocked: Stocked) -> None:
    result = call("verify", "--store", stocked.store)
    assert result.exit_code == 0
    assert "3 chunks" in result.stdout
    assert "all right" in result.stdout


def damage(store: Path) -> None:
    """Break the KV of one chunk, not of the prefix."""
    keys = _keys(store)
    file = next(file for file in kv_files(store) if file.stem in keys)
    file.write_bytes(file.read_bytes()[:2000])


def _keys(store: Path) -> set[str]:
    from store_kit import kv_keys

    from lmcache_rag.store import Store

    with Store.open(store, read_only=True) as opened:
        [kv] = opened.registry.stats().kv
        return kv_keys(opened.registry, kv.fingerprint)


def test_verify_repairs_damaged_kv(call: Call, copy: Path) -> None:
    damage(copy)
    report = document(call("verify", "--store", copy, "--all", "--json"))
    assert [bad["status"] for bad in report["bad"]] == ["damaged"]
    assert (report["checked"], report["repaired"]) == (3, 1)
    assert "all right" in call("verify", "--store", copy, "--all").stdout


def test_verify_without_repair_reports_and_exits_1(call: Call, copy: Path) -> None:
    damage(copy)
    for _ in range(2):
        result = call("verify", "--store", copy, "--all", "--no-repair")
        assert result.exit_code == 1
        assert "1 damaged" in result.stdout


def test_verify_checks_a_repeatable_sample(call: Call, copy: Path) -> None:
    damage(copy)
    arguments = ["verify", "--store", copy, "--sample", 1, "--no-repair", "--json", "--seed"]
    reports = {seed: [document(call(*arguments, seed)) for _ in range(2)] for seed in range(3)}
    assert all(report["checked"] == 1 for pair in reports.values() for report in pair)
    assert all(first == second for first, second in reports.values())


def test_remove_by_path_keeps_shared_chunks(
    call: Call, copy: Path, stocked: Stocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stocked.docs)
    result = document(call("remove", "cache.txt", "--store", copy, "--json"))
    assert (result["documents"], result["removed_chunks"], result["kept_chunks"]) == (1, 0, 1)
    result = document(call("remove", "more/copy.txt", "--store", copy, "--json"))
    assert (result["documents"], result["removed_chunks"], result["kept_chunks"]) == (1, 1, 0)
    assert len(_keys(copy)) == 2


def test_remove_of_a_folder_removes_all_below_it(call: Call, copy: Path, stocked: Stocked) -> None:
    assert document(call("remove", stocked.docs, "--store", copy, "--json"))["documents"] == 4
    assert document(call("status", "--store", copy, "--json"))["store"]["chunks"] == 0


def test_remove_takes_the_id_of_a_fileless_document(call: Call, copy: Path, make_tiny: Any, embedder: Any) -> None:
    from lmcache_rag import Document, Workspace

    with Workspace.open(copy, engine=make_tiny(copy / "kv"), embedder=embedder) as workspace:
        workspace.ingestor.ingest([Document("note-7", "A note about nothing.", "1", "notes")], kv=False)
    assert document(call("remove", "note-7", "--store", copy, "--json"))["documents"] == 1


def test_an_unknown_document_exits_1_and_stops_nothing(call: Call, copy: Path, stocked: Stocked) -> None:
    result = call("remove", "nothing.md", stocked.docs / "rope.md", "--store", copy)
    assert result.exit_code == 1
    assert "There is no document 'nothing.md'" in result.stderr
    assert result.stdout.startswith("1 document removed, with 1 chunk;")


def test_remove_all_asks_first(call: Call, copy: Path) -> None:
    result = call("remove", "--all", "--store", copy, stdin="n\n")
    assert "Remove all 4 documents" in result.stderr
    assert result.exit_code == 1
    assert document(call("status", "--store", copy, "--json"))["store"]["documents"] == 4
    assert call("remove", "--all", "--store", copy, stdin="y\n").exit_code == 0
    assert document(call("status", "--store", copy, "--json"))["store"]["documents"] == 0


def test_settings_lists_each_with_value_and_origin(call: Call, tmp_path: Path) -> None:
    store = tmp_path / "s"
    store.mkdir()
    (store / "settings.toml").write_text("top_k = 7\nratio = 0.5\n")
    found = document(call("settings", "--store", store, "--max-tokens", 9, "--json", LMCACHE_RAG_RATIO="0.25"))
    rows = {row["name"]: (row["value"], row["source"]) for row in found["settings"]}
    assert set(rows) == set(Settings.model_fields)
    assert rows["store"] == (str(store), "argument")
    assert rows["max_tokens"] == (9, "argument")
    assert rows["ratio"] == (0.25, "environment")
    assert rows["top_k"] == (7, "settings.toml")
    assert rows["policy"] == ("query", "default")


def test_settings_marks_what_makes_new_kv(call: Call) -> None:
    rows = {row["name"]: row["makes_new_kv"] for row in document(call("settings", "--json"))["settings"]}
    assert {name for name, marked in rows.items() if marked} == {
        "engine",
        "model",
        "dtype",
        "system",
        "instruction",
        "tenant",
    }
    shown = call("settings").stdout
    assert "model * = not set" in shown
    assert "ratio = auto  (default; LMCACHE_RAG_RATIO)" in shown


def test_settings_notices_a_misspelt_variable(call: Call) -> None:
    assert "did you mean LMCACHE_RAG_RATIO" in call("settings", LMCACHE_RAG_RATOI="1").stderr


def test_prune_drops_kv_that_is_too_old(call: Call, copy: Path) -> None:
    assert document(call("prune", "--store", copy, "--kv-ttl", "1h", "--json")) == {"dropped": 0}
    before = len(kv_files(copy))
    with sqlite3.connect(copy / "store.db") as raw:
        raw.execute("UPDATE kv SET created_at = created_at - 7200 WHERE kv_id = (SELECT min(kv_id) FROM kv)")
    assert document(call("prune", "--store", copy, "--json", LMCACHE_RAG_KV_TTL="3h")) == {"dropped": 0}
    assert document(call("prune", "--store", copy, "--json", LMCACHE_RAG_KV_TTL="1h")) == {"dropped": 1}
    assert len(kv_files(copy)) == before - 1
    assert document(call("warm", "--store", copy, "--json"))["computed"] == 1
    assert "is not an age" in call("prune", "--store", copy, "--kv-ttl", "soon").stderr


def test_remove_verify_counts_the_kv_files(call: Call, copy: Path) -> None:
    before = len(kv_files(copy))
    done = call("remove", "--store", copy, "*", "--verify", "--json")
    kv = document(done)["kv"]
    assert (kv["waiting"], kv["left"]) == (0, {"disk": 0})
    assert before - 1 <= kv["before"]["disk"] == kv["dropped"] <= before, "the prefix has a file, too"
    assert kv_files(copy) == []
