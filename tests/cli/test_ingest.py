"""`ingest` on the command line, over a tiny random Llama with SmolLM2's tokenizer and the real embedder."""

from __future__ import annotations

from pathlib import Path

import cli_kit
import pytest
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


# -- before KV is computed ----------------------------------------------------------------------------------------


def test_chunks_bytes_and_time_are_shown_before(call: Call, stocked: Stocked, tmp_path: Path) -> None:
    result = call("ingest", stocked.docs, "--store", tmp_path / "s")
    plan = document(call("ingest", stocked.docs, "--store", tmp_path / "other", "--dry-run", "--json"))
    [line] = [line for line in result.stderr.splitlines() if line.startswith("To compute: ")]
    assert line.startswith(f"To compute: 3 chunks ({plan['kv_tokens']} tokens), ")
    assert " kB of KV, about " in line
    assert "much" not in result.stderr


def test_nothing_is_announced_if_nothing_is_computed(call: Call, stocked: Stocked, copy: Path, tmp_path: Path) -> None:
    assert "To compute" not in call("ingest", stocked.docs, "--store", copy).stderr
    assert "To compute" not in call("ingest", stocked.docs, "--store", tmp_path / "s", "--no-kv").stderr


def test_kv_that_an_earlier_run_left_out_is_counted(call: Call, stocked: Stocked, tmp_path: Path) -> None:
    call("ingest", stocked.docs, "--store", tmp_path / "s", "--no-kv")
    plan = document(call("ingest", stocked.docs, "--store", tmp_path / "s", "--dry-run", "--json"))
    assert (plan["chunks"], plan["kv_chunks"]) == (0, 3)
    assert plan["kv_bytes"] > 0


def test_max_gb_refuses_and_makes_no_store(call: Call, stocked: Stocked, tmp_path: Path) -> None:
    result = call("ingest", stocked.docs, "--store", tmp_path / "s", "--max-gb", "0.000001")
    assert result.exit_code == 2
    assert "more than --max-gb 1e-06. Nothing was changed." in result.stderr
    assert not (tmp_path / "s").exists()
    assert call("ingest", stocked.docs, "--store", tmp_path / "s", "--max-gb", "1").exit_code == 1  # broken.txt


def test_max_gb_does_not_count_kv_that_is_there(call: Call, stocked: Stocked, copy: Path) -> None:
    assert "KV         0 computed" in call("ingest", stocked.docs, "--store", copy, "--max-gb", 0).stdout


@pytest.fixture
def much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ingestion is above the limit."""
    from lmcache_rag.cli import ingest

    monkeypatch.setattr(ingest, "ASK_BYTES", 0)


def test_a_large_ingestion_warns_without_a_terminal(call: Call, stocked: Stocked, much: None, tmp_path: Path) -> None:
    result = call("ingest", stocked.docs, "--store", tmp_path / "s")
    assert "This is much. --kv lazy only indexes now" in result.stderr
    assert "KV         3 computed" in result.stdout


def test_a_large_ingestion_asks_in_a_terminal(
    call: Call, stocked: Stocked, much: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmcache_rag.cli import ingest

    monkeypatch.setattr(ingest, "is_interactive", lambda: True)
    arguments = ("ingest", stocked.docs, "--store", tmp_path / "s")
    result = call(*arguments, stdin="n\n")
    assert "Compute it now?" in result.stderr
    assert "Nothing was changed." in result.stderr
    assert result.exit_code == 1
    assert not (tmp_path / "s").exists()
    assert "Compute it now?" not in call(*arguments, "--yes").stderr
    assert "KV         0 computed, 0 found" in call(*arguments, stdin="n\n").stdout  # nothing left to ask about


def test_kv_above_its_budget_is_warned_of(call: Call, stocked: Stocked, tmp_path: Path) -> None:
    result = call("ingest", stocked.docs, "--store", tmp_path / "s", "--kv-budget", "0.00001")
    assert "more than the budget of 10.0 kB" in result.stderr


def test_ingesting_nothing_makes_no_store(call: Call, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for name, reason in (("nothere", "does not exist"), ("empty.txt", "is empty")):
        result = call("ingest", tmp_path / name, "--store", tmp_path / "s")
        assert result.exit_code == 1
        assert reason in result.stdout
        assert "no store was made" in result.stderr
        assert not (tmp_path / "s").exists()
    report = document(call("ingest", tmp_path / "nothere", "--store", tmp_path / "s", "--json"))
    assert [failure["source"] for failure in report["failed"]] == [str(tmp_path / "nothere")]


def test_a_store_is_never_ingested(
    call: Call, stocked: Stocked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("The first edition of this text is short.")
    assert len(document(call("ingest", ".", "--json"))["added"]) == 1
    report = document(call("ingest", ".", "--json"))  # now with lmcache-rag-store/ in it
    assert (report["added"], report["failed"], report["unchanged"]) == ([], [], 1)


def test_a_large_preview_reads_documents_again(
    call: Call, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmcache_rag import ingest

    monkeypatch.setattr(ingest.preview, "__kwdefaults__", {"most_characters": 10})
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"A text with the letter {name}.")
    report = document(call("ingest", tmp_path / "a.txt", tmp_path / "b.txt", "--store", copy, "--no-kv", "--json"))
    assert len(report["added"]) == 2


def test_the_rate_of_an_ingestion_is_kept(call: Call, tmp_path: Path) -> None:
    from lmcache_rag.store import Store

    (tmp_path / "a.txt").write_text(" ".join(f"The {number}th word of a long text." for number in range(600)))
    call("ingest", tmp_path / "a.txt", "--store", tmp_path / "s")
    with Store.open(tmp_path / "s", read_only=True) as store:
        [kv] = store.registry.stats().kv
        assert float(store.registry.get_meta(f"ingest_rate:{kv.fingerprint}") or 0) > 0
