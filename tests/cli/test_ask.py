"""`ask` and `chat` on the command line, over a tiny random Llama with SmolLM2's tokenizer and the real embedder.

What it takes to run with real weights is tested in test_signals.py, by real processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cli_kit
import pytest
from cli_kit import QUESTION, Call, Stocked, document

call, copy, make_tiny, stocked = cli_kit.call, cli_kit.copy, cli_kit.make_tiny, cli_kit.stocked


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


def test_compare_shows_no_times_if_nothing_was_reused(call: Call, stocked: Stocked) -> None:
    """The second answer's prompt may be in a prefix cache that the first one filled."""
    result = call("ask", QUESTION, "--store", stocked.store, "--compare", "--no-blend", "--max-tokens", 2)
    assert "Nothing was reused, so there is nothing to compare" in result.stdout
    assert "TTFT" not in result.stdout.partition("Nothing was reused")[2]
    assert "times as fast" not in result.stdout


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


# -- questions that are not valid Unicode -------------------------------------------------------------------------


def test_a_question_in_another_encoding_is_answered(call: Call, stocked: Stocked) -> None:
    latin = b"caf\xe9 opens?".decode("utf-8", "surrogateescape")  # an argument from a Latin-1 terminal
    result = call("ask", latin, "--store", stocked.store, "--max-tokens", 2, "--json")
    assert result.exit_code == 0
    assert document(result)["question"] == "caf\N{REPLACEMENT CHARACTER} opens?"


def test_stdin_may_hold_foreign_bytes() -> None:
    code = "import sys; from lmcache_rag.cli import console; console.settle_streams(); print(*map(ascii, sys.stdin))"
    questions = b"one?\ncaf\xe9?\ntwo?\n"
    done = subprocess.run([sys.executable, "-c", code], input=questions, capture_output=True, check=True)
    assert done.stdout == rb"'one?\n' 'caf\udce9?\n' 'two?\n'" + b"\n"


def test_foreign_bytes_in_a_chat_stop_nothing(call: Call, stocked: Stocked, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache_rag.cli.ask import Chat

    lines = iter(["one?\n", f"{QUESTION} \udce9\n", "two?\n", "/quit\n"])  # typer's runner sends valid UTF-8 only
    monkeypatch.setattr(Chat, "_read", lambda chat: next(lines))
    answers = lines_of_chat(call, stocked, "")
    assert [answer["question"] for answer in answers] == ["one?", f"{QUESTION} \N{REPLACEMENT CHARACTER}", "two?"]
    assert all(answer["text"] for answer in answers)


def test_a_file_of_questions_may_hold_foreign_bytes(call: Call, stocked: Stocked, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_bytes(b"\xef\xbb\xbfone?\ncaf\xe9?\n")
    result = call("ask", "--questions", tmp_path / "q.txt", "--store", stocked.store, "--max-tokens", 2)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["question"] for line in lines] == ["one?", "caf\N{REPLACEMENT CHARACTER}?"]


# -- citations, passages without an answer, what a chat shows -----------------------------------------------------


def test_cite_labels_passages_and_reuses_their_kv(call: Call, stocked: Stocked) -> None:
    options = ("--store", stocked.store, "--max-tokens", 4, "--ratio", 0.15)
    found = document(call("ask", QUESTION, *options, "--cite", "--json"))
    assert (found["stats"]["chunks_hit"], found["stats"]["chunks_missed"]) == (3, 0)
    assert found["stats"]["reused_tokens"] > 0
    assert found["cited"] == []  # a random model cites nothing
    shown = call("ask", QUESTION, *options, "--cite").stdout
    ids = [source["chunk_id"] for source in found["sources"]]
    assert [line.split()[0] for line in shown.partition("Sources\n")[2].splitlines()[:3]] == [f"[{i}]" for i in ids]
    assert "3 of 3 chunks from the store" in shown
    assert "[1]" not in call("ask", QUESTION, *options).stdout


def test_search_shows_passages_without_an_answer(call: Call, stocked: Stocked) -> None:
    result = call("search", QUESTION, "--store", stocked.store, "--top-k", 2)
    assert result.exit_code == 0
    assert "rope.md, part 1" in result.stdout.splitlines()[0]
    assert "proposed by Jianlin Su in 2021" in result.stdout
    found = document(call("search", QUESTION, "--store", stocked.store, "--top-k", 2, "--json"))
    assert found["question"] == QUESTION
    assert len(found["passages"]) == 2
    assert "Jianlin Su" in found["passages"][0]["text"]


def test_search_loads_no_language_model(stocked: Stocked, embedder: Any) -> None:
    from typer.testing import CliRunner

    from lmcache_rag.cli.app import app
    from lmcache_rag.cli.run import Services
    from lmcache_rag.workspace import Workspace

    opened: list[Workspace] = []

    def open_workspace(settings: Any, *, create: bool) -> Workspace:
        opened.append(Workspace(settings, create=create, embedder=embedder))
        return opened[-1]

    words = ["search", QUESTION, "--store", str(stocked.store)]
    assert CliRunner().invoke(app, words, obj=Services(open_workspace=open_workspace)).exit_code == 0
    assert "engine" not in opened[0].__dict__


def test_search_of_nothing_is_an_error(call: Call, stocked: Stocked) -> None:
    assert "The question is empty." in call("search", " ", "--store", stocked.store).stderr


def test_chat_shows_sources_and_ttft(call: Call, stocked: Stocked) -> None:
    result = call("chat", "--store", stocked.store, "--max-tokens", 4, stdin=f"{QUESTION}\n")
    assert "\nSources: " in result.stdout
    assert "rope.md, part 1; " in result.stdout
    assert "\nTTFT " in result.stdout
    assert " prompt tokens reused" in result.stdout


@pytest.mark.parametrize("size", [1, 3, 100])
def test_words_are_wrapped_as_they_come(size: int) -> None:
    from lmcache_rag.cli.render import WordWrap

    text = "The quick brown fox jumps over it.\n\n  - a list\nAbcdefghijklmnopqrstuvwxyz 日本語の長い文"
    wrap = WordWrap(12)
    shown = "".join(wrap.feed(text[i : i + size]) for i in range(0, len(text), size)) + wrap.end()
    assert shown.splitlines() == [
        *("The quick", "brown fox", "jumps over", "it.", "", "  - a list"),
        *("Abcdefghijk", "lmnopqrstuv", "wxyz", "日本語の長い", "文"),
    ]


def test_plan_retrieves_the_chunks_of_questions(call: Call, stocked: Stocked, tmp_path: Path) -> None:
    from lmcache_rag.trace import read_trace

    numbers = ("--layers", 32, "--kv-heads", 8, "--head-size", 128)
    log, saved = tmp_path / "questions.txt", tmp_path / "trace.jsonl"
    log.write_text(f"{QUESTION}\n{QUESTION}\nHow many people live in Berlin?\n")
    words = (*numbers, "--trace", log, "--store", stocked.store, "--top-k", 2, "--save-trace", saved, "--json")
    found = document(call("plan", *words))
    trace = list(read_trace(saved))
    assert [len(each.chunks) for each in trace] == [2, 2, 2]
    assert trace[0].chunks == trace[1].chunks != trace[2].chunks
    assert all(tokens > 0 for each in trace for tokens in each.tokens)
    assert found["corpus"]["chunks"] == 3
    again = document(call("plan", *numbers, "--trace", saved, "--store", stocked.store, "--json"))
    assert again["hit_rate"] == found["hit_rate"]
