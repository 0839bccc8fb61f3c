"""Hostile requests among ordinary ones on a real vLLM (CPU build) and LMCache, which is paused meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner
from vllm_cpu_kit import Servers, needs_vllm_cpu

from lmcache_rag.cli.app import app

pytestmark = [pytest.mark.slow, pytest.mark.full, needs_vllm_cpu]


@pytest.fixture
def pair(smollm2_path: Path, tmp_path: Path) -> Iterator[Servers]:
    servers = Servers(smollm2_path, tmp_path)
    yield servers
    servers.close()


def test_hostile_requests_and_pauses_harm_nothing(pair: Servers, tmp_path: Path, sentences: list[str]) -> None:
    documents = tmp_path / "docs"
    documents.mkdir()
    for i in range(14):
        (documents / f"{i}.txt").write_text(" ".join(sentences[6 * i :][:6]))
    arguments = [
        "bench",
        "soak",
        str(documents),
        "--engine",
        pair.url,
        "--lmcache-url",
        f"http://127.0.0.1:{pair.http}",
    ]
    arguments += ["--seconds", "60", "--chunk-tokens", "128", "--in-flight", "4", "--tokens", "8", "--hostile", "0.3"]
    arguments += ["--pause", "1", "--watch", str(pair.vllm.pid), "--may-grow", "500", "--json"]
    result = CliRunner().invoke(app, arguments)
    report = json.loads(result.stdout)
    print(json.dumps(report, indent=2))
    assert report["hostile_failed"] == report["failed"] == report["wrong"] == []
    assert report["pauses"] == [1, 1]
    before, after = report["engine_cores"]
    assert len(before) == 1
    assert before == after
    assert set(report["hostile"]) >= {"200", "400", "aborted"}
    assert (result.exit_code, report["sound"]) == (0, True), result.stdout
