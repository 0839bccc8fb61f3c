"""What all commands share: wrong use, errors, exit statuses, common options, progress on stderr."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import cli_kit
import pytest
from cli_kit import QUESTION, Call, Stocked, document
from rich.console import Console
from typer.testing import CliRunner

from lmcache_rag.cli import run as cli_run
from lmcache_rag.cli import run as run_module
from lmcache_rag.cli.app import app
from lmcache_rag.cli.run import Bars, CommandContext, IngestBars
from lmcache_rag.ingest import Progress
from lmcache_rag.settings import Settings

call, copy, make_tiny, stocked = cli_kit.call, cli_kit.copy, cli_kit.make_tiny, cli_kit.stocked


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["ask", "q", "--nonsense"],
        ["ask", "q", "--ratio", "much"],
        ["ask", "q", "--ratio", "3"],
        ["ask", "q", "--ratio", "tokens=-1"],
        ["ask", "--store", "s"],
        ["ask", "q", "--questions", "f"],
        ["ask", "--questions", "f", "--compare"],
        ["remove", "--store", "s"],
        ["remove", "x", "--all"],
        ["forget", "x", "--all"],
        ["verify", "--sample", "0"],
        ["ingest"],
    ],
)
def test_wrong_use_exits_2_with_a_reason_on_stderr(call: Call, arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    if arguments != ["ingest"]:  # that shows the help
        assert result.stdout == ""
        assert result.stderr
    assert "Traceback" not in result.output


def test_an_unknown_policy_exits_2_with_the_choices(call: Call, stocked: Stocked) -> None:
    result = call("ask", QUESTION, "--store", stocked.store, "--policy", "best")
    assert result.exit_code == 2
    assert "hkvd" in result.stderr


def test_a_missing_store_exits_3_with_a_remedy(call: Call, tmp_path: Path) -> None:
    result = call("ask", "q", "--store", tmp_path / "none")
    assert result.exit_code == 3
    assert "There is no store" in result.stderr
    assert "lmcache-rag ingest" in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "none").exists()


def test_a_missing_package_ends_with_status_2(call: Call, stocked: Stocked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    done = call("ask", QUESTION, "--store", stocked.store)
    assert done.exit_code == 2
    assert 'faiss-cpu is not installed.\nInstall it with: pip install ".[store]"' in done.stderr


def test_an_error_with_json_is_one_json_document(call: Call, tmp_path: Path) -> None:
    error = document(call("status", "--store", tmp_path / "none", "--json"))["error"]
    assert error["type"] == "StoreError"
    assert "There is no store" in error["message"]
    assert "ingest" in error["remedy"]


def test_verbose_adds_the_traceback(call: Call, tmp_path: Path) -> None:
    result = call("status", "--store", tmp_path / "none", "--verbose")
    assert "Traceback (most recent call last)" in result.stderr
    assert result.exit_code == 3


def test_a_program_fault_exits_70_with_a_hint() -> None:
    def broken(settings: Settings, *, create: bool) -> None:
        raise RuntimeError("a cable is loose")

    result = CliRunner().invoke(app, ["status"], obj=cli_run.Services(open_workspace=broken))
    assert result.exit_code == 70
    assert "RuntimeError: a cable is loose" in result.stderr
    assert "--verbose" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_locked_store_names_who_holds_it(call: Call, copy: Path) -> None:
    from lmcache_rag.store import Store

    with Store.open(copy) as store, store.writing():
        result = call("warm", "--store", copy, LMCACHE_RAG_LOCK_TIMEOUT_S="0.1")
    assert result.exit_code == 3
    assert f"Process {os.getpid()}" in result.stderr


def test_every_common_option_is_a_setting() -> None:
    fields = {*cli_run.PLACE, *cli_run.EMBED, *cli_run.SPLIT, *cli_run.ANSWER}
    assert fields <= set(Settings.model_fields)


def run_on(*, terminal: bool) -> tuple[CommandContext, io.StringIO]:
    shown = io.StringIO()
    return CommandContext({}, err=Console(file=shown, force_terminal=terminal, width=80, color_system=None)), shown


def test_a_terminal_shows_files_chunks_rate_and_time() -> None:
    run, shown = run_on(terminal=True)
    with IngestBars(run, with_kv=True) as bars:
        for done in range(1, 5):
            bars.step(Progress("document", done, 10))
        for done in range(1, 9):
            bars.step(Progress("kv", done, 8, 100))
    last = shown.getvalue().rpartition("documents ")[2]
    assert " 4/10" in last
    assert " 8/20" in last  # six documents are still to come, and four held eight chunks
    assert " tokens/s" in last


def test_no_line_is_wider_than_the_terminal() -> None:
    run, shown = run_on(terminal=True)
    with IngestBars(run, with_kv=True) as bars:
        bars.step(Progress("document", 10_000, 10_000))
        bars.step(Progress("kv", 123_456, 1_234_567, 256))
        bars.step(Progress("kv", 123_457, 1_234_567, 256))
    plain = shown.getvalue().replace("\r", "\n").replace("\x1b[2K", "").replace("\x1b[1A", "")
    assert max(len(line) for line in plain.split("\n") if "\x1b" not in line) <= 80


def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_EVERY_S", 0.0)
    run, shown = run_on(terminal=False)
    with Bars(run, "KV") as bars:
        bars.update("KV", 1, 1200, tokens=5)
        bars.update("KV", 2, 1200, tokens=5)
    first, second = shown.getvalue().splitlines()
    assert first == "KV 1 of 1,200"
    assert second.startswith("KV 2 of 1,200; ")
    assert second.endswith(" tokens/s")


def test_time_left_counts_only_this_runs_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 60.0, 120.0])
    monkeypatch.setattr(run_module, "_EVERY_S", 30.0)
    monkeypatch.setattr(run_module.time, "monotonic", lambda: next(clock))
    run, shown = run_on(terminal=False)
    with Bars(run, "questions") as bars:
        bars.update("questions", 100, 200)  # an earlier run did a hundred
        bars.update("questions", 120, 200)
        bars.update("questions", 199, 200)
    assert shown.getvalue().splitlines() == [
        "questions 120 of 200; about 4 min left",
        "questions 199 of 200; about 1 s left",
    ]


def test_without_a_terminal_a_short_run_shows_nothing() -> None:
    run, shown = run_on(terminal=False)
    with Bars(run, "KV") as bars:
        bars.update("KV", 1, 2, tokens=5)
    assert shown.getvalue() == ""
