"""The command line as real processes with the real model: a first session, and every way to be cut off."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "lmcache_rag.cli"]
PATIENCE_S = 90.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def env(smollm2_path: Path, embedder_path: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_RAG_")}
    return clean | {
        "LMCACHE_RAG_MODEL": str(smollm2_path),
        "LMCACHE_RAG_EMBEDDER": str(embedder_path),
        "LMCACHE_RAG_CHUNK_TOKENS": "64",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "80",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two documents in docs/: 40 paragraphs of their own, and one fact."""
    folder = tmp_path_factory.mktemp("session")
    (folder / "docs").mkdir()
    paragraphs = [
        f"Station {n} lies {n * 7} kilometres from the coast. Its keeper counts {n * n} birds in a good year, notes "
        f"the wind {n % 5 + 1} times a day, and sends a letter to station {n + 1} whenever the sea is calm enough."
        for n in range(1, 41)
    ]
    (folder / "docs" / "stations.txt").write_text("\n\n".join(paragraphs))
    (folder / "docs" / "rope.md").write_text("# RoPE\n\nRotary position embedding was proposed by Jianlin Su in 2021.")
    return folder


@dataclass
class Ended:
    """A process that is over."""

    status: int
    stdout: str
    stderr: str


@dataclass
class Session:
    """Ingestion, cut off and run again, then a question and the status."""

    cut_off: Ended
    chunks_kept: int
    again: Ended
    asked: Ended
    status: Ended


def run(*arguments: str, env: dict[str, str], cwd: Path) -> Ended:
    done = subprocess.run([*COMMAND, *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S)
    return Ended(done.returncode, done.stdout, done.stderr)


def kv_files(store: Path) -> list[Path]:
    return sorted(store.glob("kv/*/*/*.safetensors"))


@pytest.fixture(scope="module")
def session(env: dict[str, str], folder: Path) -> Session:
    store = folder / "store"
    process = subprocess.Popen(
        [*COMMAND, "ingest", "docs", "--store", "store"],
        env=env,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + PATIENCE_S
    while len(kv_files(store)) < 6 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    cut_off = Ended(-1, *process.communicate(timeout=PATIENCE_S))
    cut_off.status = process.returncode
    kept = len(kv_files(store)) - 1  # one of them is the prefix
    return Session(
        cut_off,
        kept,
        run("ingest", "docs", "--store", "store", "--json", env=env, cwd=folder),
        run(
            "ask",
            "Who proposed RoPE?",
            "--store",
            "store",
            "--json",
            "--max-tokens",
            "24",
            "--ratio",
            "0.15",
            env=env,
            cwd=folder,
        ),
        run("status", "--store", "store", "--json", env=env, cwd=folder),
    )


def test_ctrl_c_gives_status_130(session: Session) -> None:
    assert session.cut_off.status == 130


def test_ctrl_c_says_the_store_is_sound_and_what_next(session: Session) -> None:
    lines = session.cut_off.stderr.splitlines()
    assert "Stopped. The store is intact." in lines
    assert "To continue: lmcache-rag ingest docs --store store" in lines
    assert "Traceback" not in session.cut_off.stderr


def test_ctrl_c_came_in_the_middle_of_the_work(session: Session) -> None:
    total = json.loads(session.status.stdout)["store"]["chunks"]
    assert 0 < session.chunks_kept < total


def test_the_same_command_finishes_only_the_rest(session: Session) -> None:
    report = json.loads(session.again.stdout)
    status = json.loads(session.status.stdout)
    assert session.again.status == 0
    assert report["failed"] == []
    assert report["kv"]["computed"] == status["store"]["chunks"] - session.chunks_kept
    assert status["store"]["chunks_without_kv"] == 0
    assert status["store"]["documents"] == 2


def test_ask_reuses_kv_of_the_right_document(session: Session) -> None:
    answer = json.loads(session.asked.stdout)
    assert session.asked.status == 0
    assert answer["text"].strip()
    assert answer["sources"][0]["documents"][0]["source"].endswith("rope.md")
    assert answer["stats"]["chunks_missed"] == 0
    assert answer["stats"]["reused_tokens"] > 0


def test_stderr_has_no_bar_or_hint_of_other_libraries(session: Session) -> None:
    for ended in (session.again, session.asked, session.status):
        known = re.compile(
            r"The (model|embedder) is served by |To compute: |documents \d+ of \d+; KV "
        )  # the latter, where it lasts
        assert [line for line in ended.stderr.splitlines() if not known.match(line)] == []


# -- a chat at a terminal ---------------------------------------------------------------------------------------


@dataclass
class Talk:
    """What a chat at a terminal showed, step by step."""

    stopped: str
    prompt: str
    terminated: str
    status: int


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, *arguments: str, env: dict[str, str], cwd: Path) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], env=env, cwd=cwd, stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)

    def type(self, line: str) -> None:
        os.write(self._master, line.encode() + b"\n")

    def read_until(self, text: str) -> str:
        """What is shown up to and with this text."""
        shown = ""
        deadline = time.monotonic() + PATIENCE_S
        while text not in shown:
            ready, _, _ = select.select([self._master], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"waited in vain for {text!r} after {shown!r}"
            shown += os.read(self._master, 4096).decode(errors="replace")
        return shown

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture(scope="module")
def talk(session: Session, env: dict[str, str], folder: Path) -> Iterator[Talk]:
    terminal = Terminal("chat", "--store", "store", "--max-tokens", "2000", env=env, cwd=folder)
    try:
        terminal.read_until("> ")
        terminal.type("Write a long list of all stations with their keepers and birds.")
        terminal.read_until("birds.")  # the echo of the question
        terminal.read_until("\x1b[?25h")  # the answer's first token puts the cursor back
        terminal.process.send_signal(signal.SIGINT)
        stopped = terminal.read_until("> ")
        time.sleep(0.5)
        terminal.process.send_signal(signal.SIGINT)
        prompt = terminal.read_until("> ")
        time.sleep(0.5)  # readline shows the prompt before it begins to wait
        terminal.process.send_signal(signal.SIGTERM)
        terminated = terminal.read_until("lmcache-rag chat")
        terminal.process.wait(timeout=PATIENCE_S)
        yield Talk(stopped, prompt, terminated, terminal.process.returncode)
    finally:
        terminal.close()


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(talk: Talk) -> None:
    assert "Stopped. The conversation continues." in talk.stopped


def test_ctrl_c_at_the_prompt_says_how_to_leave(talk: Talk) -> None:
    assert "Ctrl-C again or Ctrl-D leaves." in talk.prompt


def test_sigterm_exits_143_and_says_what_next(talk: Talk) -> None:
    assert talk.status == 143
    assert "Stopped. The store is intact." in talk.terminated


# -- nobody reads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["settings"], ["settings", "--json"]])
def test_a_closed_pipe_ends_quietly_with_status_141(env: dict[str, str], tmp_path: Path, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=env, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, stderr) == (141, "")


def test_a_closed_stdout_does_no_harm(env: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *COMMAND, "settings"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_without_letters_gets_escapes(env: dict[str, str], tmp_path: Path) -> None:
    ascii_only = env | {"PYTHONIOENCODING": "ascii", "LMCACHE_RAG_SYSTEM": "Gr\u00fc\u00dfe"}
    plain, machine = (run(*a, env=ascii_only, cwd=tmp_path) for a in (["settings"], ["settings", "--json"]))
    assert "Gr\\xfc\\xdfe" in plain.stdout
    assert "Gr\u00fc\u00dfe" in {row["value"] for row in json.loads(machine.stdout)["settings"]}
