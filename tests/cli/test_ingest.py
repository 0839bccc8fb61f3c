"""`ingest` on the command line, over a tiny random Llama with SmolLM2's tokenizer and the real embedder."""

from __future__ import annotations

from pathlib import Path

import cli_kit
from cli_kit import Call, Stocked, document

call, copy, make_tiny, stocked = cli_kit.call, cli_kit.copy, cli_kit.make_tiny, cli_kit.stocked


def test_ingest_reports_added_and_failed_documents(stocked: Stocked) -> None:
    report = document(stocked.first)
    assert len(report["added"]) == 4
    assert report["chunks_added"] == 3  # the copy adds none
    assert report["kv"]["computed"] == 3
    [failure] = report["failed"]
    assert failure["source"] == str(stocked.docs / "broken.txt")
    assert "binary" in failure["reason"]


def test_a_failed_document_gives_status_1(stocked: Stocked) -> None:
    assert stocked.first.exit_code == 1


def test_ingesting_again_computes_nothing(call: Call, copy: Path, stocked: Stocked) -> None:
    report = document(call("ingest", stocked.docs, "--store", copy, "--json"))
    assert report["unchanged"] == 4
    assert report["kv"]["computed"] == 0
    assert report["added"] == report["updated"] == []


def test_the_summary_for_people_names_every_outcome(call: Call, copy: Path, stocked: Stocked) -> None:
    result = call("ingest", stocked.docs, stocked.docs / "none.md", "--store", copy)
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if not line.startswith("  "))
    assert lines["Added"] == "0 documents"
    assert lines["Unchanged"] == "4 documents"
    assert lines["Failed"] == "2 documents"
    assert "broken.txt' " in result.stdout
    assert "none.md' does not exist" in result.stdout


def test_a_failure_is_told_once(call: Call, copy: Path, stocked: Stocked) -> None:
    assert call("ingest", stocked.docs, "--store", copy).output.count("broken.txt") == 1


def test_a_changed_document_is_updated(call: Call, copy: Path, stocked: Stocked, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.txt").write_text("The first edition of this text is short.")
    call("ingest", docs, "--store", copy)
    (docs / "a.txt").write_text("The second edition of this text is short too.")
    result = call("ingest", docs, "--store", copy, "--json")
    report = document(result)
    assert result.exit_code == 0
    assert report["updated"] == [str(docs / "a.txt")]
    assert (report["chunks_added"], report["chunks_removed"], report["kv"]["computed"]) == (1, 1, 1)


def test_a_dash_reads_the_paths_from_stdin(call: Call, stocked: Stocked, tmp_path: Path) -> None:
    paths = f"{stocked.docs / 'rope.md'}\n\n{stocked.docs / 'cache.txt'}\n"
    report = document(call("ingest", "-", "--store", tmp_path / "s", "--no-kv", "--json", stdin=paths))
    assert len(report["added"]) == 2


def test_globs_are_followed(call: Call, stocked: Stocked, tmp_path: Path) -> None:
    report = document(call("ingest", stocked.docs / "**" / "c*.txt", "--store", tmp_path / "s", "--no-kv", "--json"))
    assert [Path(name).name for name in report["added"]] == ["cache.txt", "copy.txt"]


def test_a_dry_run_writes_nothing(call: Call, stocked: Stocked, tmp_path: Path) -> None:
    result = call("ingest", stocked.docs, "--store", tmp_path / "s", "--dry-run")
    assert not (tmp_path / "s").exists()
    assert result.exit_code == 1  # for the broken document


def test_a_dry_run_foretells_what_the_run_then_does(call: Call, stocked: Stocked, tmp_path: Path) -> None:
    plan = document(call("ingest", stocked.docs, "--store", tmp_path / "s", "--dry-run", "--json"))
    report = document(stocked.first)
    assert plan["documents"] == len(report["added"])
    assert plan["chunks"] == report["chunks_added"]
    assert plan["tokens"] == report["kv"]["tokens"]
    assert abs(plan["kv_bytes"] - report["kv"]["nbytes"]) < 0.01 * report["kv"]["nbytes"]  # the files have heads
    assert plan["failed"] == report["failed"]


def test_a_dry_run_of_a_full_store_predicts_no_work(call: Call, stocked: Stocked) -> None:
    plan = document(call("ingest", stocked.docs, "--store", stocked.store, "--dry-run", "--json"))
    assert (plan["documents"], plan["unchanged"], plan["chunks"]) == (0, 4, 0)
