"""The command line, verb by verb, in this process: a tiny random Llama with SmolLM2's tokenizer, the real embedder.

What it takes to run with real weights is tested in test_signals.py, by real processes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import cli_kit
import pytest
import typer
from cli_kit import QUESTION, Call, Stocked, document, kv_files
from typer.testing import CliRunner, Result

from lmcache_rag import __version__
from lmcache_rag.cli import run as cli_run
from lmcache_rag.cli.app import app
from lmcache_rag.settings import Settings

copy, make_tiny, stocked = cli_kit.copy, cli_kit.make_tiny, cli_kit.stocked

ROOT = Path(__file__).parents[2]
VERBS = (
    "ingest",
    "ask",
    "chat",
    "status",
    "warm",
    "verify",
    "remove",
    "forget",
    "prune",
    "settings",
    "serve",
    "doctor",
)


@pytest.fixture(scope="module")
def call(make_tiny: Any, embedder: Any) -> Call:
    """Runs one command line in this process, with the model and embedder that are loaded already."""
    from lmcache_rag.workspace import Workspace

    def open_workspace(settings: Settings, *, create: bool) -> Workspace:
        return Workspace(settings, create=create, engine=make_tiny(settings.store / "kv"), embedder=embedder)

    runner = CliRunner(env={n: None for n in os.environ if n.startswith("LMCACHE_RAG_")} | {"COLUMNS": "80"})

    services = cli_run.Services(open_workspace=open_workspace)

    def run(*arguments: object, stdin: str | None = None, **env: str) -> Result:
        return runner.invoke(app, [str(a) for a in arguments], input=stdin, env=env, obj=services)

    return run


# -- help -------------------------------------------------------------------------------------------------------


def test_the_program_alone_shows_all_verbs(call: Call) -> None:
    output = call().output
    assert all(f"\n│ {verb} " in output for verb in VERBS)


def test_the_help_explains_the_exit_statuses(call: Call) -> None:
    output = call("--help").output
    assert all(f"\n {status} " in output for status in (0, 1, 2, 3, 70, 130, 141, 143))


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_has_examples_of_it(call: Call, verb: str) -> None:
    result = call(verb, "--help")
    assert result.exit_code == 0
    examples = result.stdout.partition("Examples")[2].partition("╭")[0]
    assert f"lmcache-rag {verb}" in examples


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_fits_80_columns(call: Call, verb: str) -> None:
    assert max(map(len, call(verb, "--help").stdout.splitlines())) <= 80


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_every_verb_has_a_help_text(verb: str) -> None:
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    assert [p.name for p in command.params if not p.help] == []


@pytest.mark.parametrize("verb", VERBS)
def test_setting_options_name_variable_and_default(verb: str) -> None:
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    for parameter in command.params:
        if field := Settings.model_fields.get(parameter.name):
            assert f"LMCACHE_RAG_{parameter.name.upper()}" in parameter.help
            assert "default: " in parameter.help
            if field.default is not None and field.default is not True:
                assert f"default: {field.default}" in parameter.help


def test_every_verb_that_answers_has_common_options() -> None:
    wanted = {"--store", "--model", "--embedder", "--policy", "--ratio", "--blend", "--top-k", "--json", "--verbose"}
    wanted |= {"--device", "--dtype", "--max-tokens", "--temperature", "--kv-budget"}
    for verb in ("ask", "chat"):
        command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
        assert wanted <= {name for parameter in command.params for name in parameter.opts}


def test_version(call: Call) -> None:
    assert call("--version").stdout == f"lmcache-rag {__version__}\n"


def test_the_package_runs_as_the_program() -> None:
    command = [sys.executable, "-m", "lmcache_rag", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"lmcache-rag {__version__}\n"


def test_the_help_imports_no_heavy_library() -> None:
    code = "import sys\nfrom lmcache_rag.cli.app import app\napp(['ask', '--help'], standalone_mode=False)\n"
    code += "print(sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(eval(done.stderr))
    assert "typer" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "sentence_transformers", "faiss", "numpy", "huggingface_hub"})


def test_help_takes_little_more_than_its_imports() -> None:
    # Side by side and without coverage's tracing, so that neither a slow machine nor a busy one decides.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE", "COV_"))}

    def seconds(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    libraries, help_ = [], []
    for _ in range(3):
        libraries.append(seconds("-m", "typer", "--help"))
        help_.append(seconds("-m", "lmcache_rag.cli", "--help"))
    assert min(help_) < 4 * min(libraries)  # numpy alone would be half of that, torch several times


# -- wrong use --------------------------------------------------------------------------------------------------


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


# -- ingest -----------------------------------------------------------------------------------------------------


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


# -- ask --------------------------------------------------------------------------------------------------------


def test_ask_prints_answer_sources_and_statistics(call: Call, stocked: Stocked) -> None:
    result = call("ask", QUESTION, "--store", stocked.store, "--max-tokens", 24, "--ratio", 0.15)
    answer, _, rest = result.stdout.partition("\n\nSources\n")
    assert answer.strip()
    assert "rope.md, part 1" in rest.splitlines()[0]
    assert "prompt tokens: " in rest
    assert "3 of 3 chunks from the store" in rest
    assert "TTFT" in rest
    assert result.exit_code == 0


def test_ask_with_json_gives_what_the_library_gives(
    call: Call, stocked: Stocked, make_tiny: Any, embedder: Any
) -> None:
    from lmcache_rag.workspace import Workspace

    options = ("--json", "--max-tokens", 16, "--top-k", 2, "--ratio", 0.15)
    found = document(call("ask", QUESTION, "--store", stocked.store, *options))
    engine = make_tiny(stocked.store / "kv")
    with Workspace.open(
        stocked.store, engine=engine, embedder=embedder, max_tokens=16, top_k=2, ratio=0.15, create=False
    ) as workspace:
        answer = workspace.rag.ask(QUESTION)
    assert found["text"] == answer.text
    assert [source["chunk_id"] for source in found["sources"]] == [hit.chunk_id for hit in answer.sources]
    assert found["stats"]["reused_tokens"] == answer.stats.reused_tokens > 0
    assert found["finish_reason"] == answer.completion.finish_reason


def test_no_blend_computes_the_whole_prompt(call: Call, stocked: Stocked) -> None:
    stats = document(call("ask", QUESTION, "--store", stocked.store, "--json", "--no-blend", "--max-tokens", 1))[
        "stats"
    ]
    assert stats["computed_tokens"] == stats["prompt_tokens"]
    assert stats["blended"] is False


def test_policy_and_ratio_reach_the_engine(call: Call, stocked: Stocked) -> None:
    def stats(*more: object) -> Any:
        return document(call("ask", QUESTION, "--store", stocked.store, "--json", "--max-tokens", 1, *more))["stats"]

    assert stats("--policy", "none")["recomputed_tokens"] == 0
    assert stats("--policy", "all")["reused_tokens"] == 0
    assert 0 < stats("--ratio", 0.1)["recomputed_tokens"] < stats("--ratio", 0.6)["recomputed_tokens"]
    found = stats("--ratio", "tokens=7")
    assert (found["recomputed_tokens"], found["budget_tokens"], found["budget_reason"]) == (7, 7, "tokens")
    assert stats()["budget_reason"] == stats("--ratio", "auto")["budget_reason"] == "all"


def test_compare_shows_both_times_and_equal_answers(call: Call, stocked: Stocked) -> None:
    result = call("ask", QUESTION, "--store", stocked.store, "--compare", "--policy", "all", "--max-tokens", 12)
    assert "The answers are equal (" in result.stdout
    [times] = [line.split() for line in result.stdout.splitlines() if line.startswith("TTFT")]
    assert len(times) == 5  # TTFT, a number and its unit, twice
    assert "rope.md" in result.stdout


def test_compare_finds_the_first_difference(call: Call, stocked: Stocked) -> None:
    arguments = ["ask", "Tell me about Berlin and caches.", "--store", stocked.store, "--compare"]
    arguments += ["--policy", "none", "--max-tokens", 40]
    found = document(call(*arguments, "--json"))
    assert found["full"]["stats"]["reused_tokens"] == 0 < found["blended"]["stats"]["reused_tokens"]
    blended, full = found["blended"]["stats"]["ttft_ms"], found["full"]["stats"]["ttft_ms"]
    assert found["speedup"] == pytest.approx(full / blended)
    assert (found["first_difference"] is None) == (found["blended"]["text"] == found["full"]["text"])
    shown = call(*arguments).stdout
    assert ("The answers are equal" in shown) == (found["first_difference"] is None)
    if found["first_difference"] is not None:
        assert f"differ from token {found['first_difference'] + 1} on" in shown


def test_a_dash_reads_the_question_from_stdin(call: Call, stocked: Stocked) -> None:
    result = call("ask", "-", "--store", stocked.store, "--json", "--max-tokens", 1, stdin=f"{QUESTION}\n")
    assert document(result)["question"] == QUESTION


def test_each_question_of_a_file_gives_a_json_line(call: Call, stocked: Stocked, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text(f"{QUESTION}\n\nWhere does Berlin lie?\n")
    result = call("ask", "--questions", tmp_path / "q.txt", "--store", stocked.store, "--max-tokens", 4)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["question"] for line in lines] == [QUESTION, "Where does Berlin lie?"]
    assert all(line["text"] for line in lines)
    assert result.exit_code == 0


def test_a_failed_question_does_not_stop_the_others(call: Call, stocked: Stocked) -> None:
    long = "why " * 1000
    result = call("ask", "--questions", "-", "--store", stocked.store, "--max-tokens", 2, stdin=f"{long}\n{QUESTION}\n")
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first["error"]["type"] == "ContextLengthError"
    assert second["text"]
    assert result.exit_code == 1


def test_an_empty_question_is_refused(call: Call, stocked: Stocked) -> None:
    result = call("ask", "  ", "--store", stocked.store)
    assert result.exit_code == 3
    assert "The question is empty." in result.stderr


def test_a_missing_file_of_questions_exits_2(call: Call, stocked: Stocked, tmp_path: Path) -> None:
    result = call("ask", "--questions", tmp_path / "none", "--store", stocked.store)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_terminal_escapes_in_documents_are_not_printed(call: Call, tmp_path: Path) -> None:
    evil = tmp_path / "evil\x1b[2J\nname.txt"
    evil.write_text("\x1b]0;owned\x07 The password of the vault is swordfish. \x1b[31m")
    call("ingest", evil, "--store", tmp_path / "s")
    result = call("ask", "What is the password?", "--store", tmp_path / "s", "--max-tokens", 8)
    talk = call("chat", "--store", tmp_path / "s", "--max-tokens", 8, stdin="What is the password?\n/sources\n")
    for output in (result.output, talk.output):
        assert "Sources" in output
        assert not {"\x1b", "\x07"} & set(output)
    assert "swordfish" in talk.output


# -- chat -------------------------------------------------------------------------------------------------------


def lines_of_chat(call: Call, stocked: Stocked, questions: str, *more: object) -> list[Any]:
    result = call("chat", "--store", stocked.store, "--json", "--max-tokens", 8, *more, stdin=questions)
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_chat_keeps_the_history_behind_the_chunks(call: Call, stocked: Stocked) -> None:
    first, second = lines_of_chat(call, stocked, f"{QUESTION}\n{QUESTION}\n")
    assert second["stats"]["prompt_tokens"] > first["stats"]["prompt_tokens"]
    reused = [a["stats"]["reused_tokens"] + a["stats"]["recomputed_tokens"] for a in (first, second)]
    assert reused[0] == reused[1] > 0  # with the history in front, nothing could have been reused


def test_reset_forgets_the_history(call: Call, stocked: Stocked) -> None:
    first, second = lines_of_chat(call, stocked, f"{QUESTION}\n/reset\n{QUESTION}\n")
    assert second["stats"]["prompt_tokens"] == first["stats"]["prompt_tokens"]


def test_quit_leaves_at_once(call: Call, stocked: Stocked) -> None:
    assert len(lines_of_chat(call, stocked, f"{QUESTION}\n/quit\n{QUESTION}\n")) == 1


def test_the_commands_of_the_chat(call: Call, stocked: Stocked) -> None:
    commands = f"/stats\n/sources\n{QUESTION}\n/sources\n/stats\n/help\n/dance\n"
    result = call("chat", "--store", stocked.store, "--max-tokens", 8, "--ratio", 0.15, stdin=commands)
    assert result.stderr.count("Nothing has been answered yet.") == 2
    assert "rope.md, part 1" in result.stdout
    assert "proposed by Jianlin Su in 2021" in result.stdout  # the passage itself
    assert "3 of 3 chunks from the store" in result.stdout
    assert all(command in result.stderr for command in ("/help", "/sources", "/stats", "/reset", "/quit"))
    assert "There is no command /dance" in result.stderr
    assert result.exit_code == 0


def test_a_too_long_conversation_offers_reset(call: Call, stocked: Stocked) -> None:
    long = f"{'why ' * 480}?"
    result = call(
        "chat", "--store", stocked.store, "--json", "--max-tokens", 2, stdin=f"{long}\n{long}\n/reset\n{QUESTION}\n"
    )
    first, second, third = (json.loads(line) for line in result.stdout.splitlines())
    assert first["text"] and third["text"]
    assert second["error"]["type"] == "ContextLengthError"
    assert "/reset" in result.stderr
    assert result.exit_code == 1


# -- looking after the store ------------------------------------------------------------------------------------


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


# -- settings ---------------------------------------------------------------------------------------------------


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


def test_every_common_option_is_a_setting() -> None:
    fields = {*cli_run.PLACE, *cli_run.EMBED, *cli_run.SPLIT, *cli_run.ANSWER}
    assert fields <= set(Settings.model_fields)
