"""The chart's script that warms a pod: a real store and `lmcache-rag warm`, stand-ins for both servers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import vllm_engine_kit as kit
from chart_kit import CHART
from fake_vllm import FakeVLLM, is_ingest
from typer.testing import CliRunner

from lmcache_rag.cli.app import app

server, smollm2_tokenizer = kit.server, kit.smollm2_tokenizer

TEXTS = ("A key is moved to another position by turning it further. " * 12, "The river is 12 km long. " * 20)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two documents, and no KV."""
    folder = tmp_path_factory.mktemp("warm")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    done = CliRunner().invoke(app, ["ingest", str(folder), "--no-kv", "--store", str(folder / "store")])
    assert done.exit_code == 0, done.output
    return folder / "store"


@pytest.fixture
def start(server: FakeVLLM, tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Starts the script for a store; returns the file that it makes when the pod is ready."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(store: Path, **variables: str) -> Path:
        ready = tmp_path / "ready"
        names = {"STORE": str(store), "READY": str(ready), "VLLM": server.url, "LMCACHE": server.url, "EVERY": "0.1"}
        env = os.environ | {f"WARM_{name}": value for name, value in (names | variables).items()}
        running.append(subprocess.Popen([sys.executable, str(CHART / "files" / "warm.py")], env=env))
        return ready

    yield begin
    for process in running:
        process.kill()
        process.wait()


def ingested(server: FakeVLLM) -> int:
    return sum(is_ingest(body) for body in server.seen)


def until(holds: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.full
def test_a_pod_is_ready_after_its_chunks_are_there(server: FakeVLLM, store: Path, start: Any) -> None:
    server.gauges["lmcache_rag_index_entries"] = 8.0
    ready = start(store)
    until(ready.exists)
    assert ingested(server) >= len(TEXTS)
    before = ingested(server)
    server.gauges["lmcache_rag_index_entries"] = 0.0  # LMCache was started again
    until(lambda: ingested(server) >= before + len(TEXTS))
    assert ready.exists(), "meanwhile it answers, more slowly"


def test_without_a_store_a_pod_is_ready_at_once(server: FakeVLLM, start: Any, tmp_path: Path) -> None:
    until(start(tmp_path / "none").exists)
    assert ingested(server) == 0


def test_a_store_that_cannot_be_read_only_delays(server: FakeVLLM, start: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "store.db").write_bytes(b"no database " * 1000)
    ready = start(broken, SECONDS="3")
    time.sleep(1)
    assert not ready.exists()
    until(ready.exists)
