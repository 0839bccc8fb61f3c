"""Progress on stderr."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lmcache_rag.cli import run as run_module
from lmcache_rag.cli.run import Bars, CommandContext, IngestBars
from lmcache_rag.ingest import Progress


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
