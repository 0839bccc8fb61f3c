"""The speed benchmark, against a real HTTP server that counts what it is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai_kit import vllm_serving
from typer.testing import CliRunner

from lmcache_rag.bench.workload import Workload
from lmcache_rag.cli.app import app


@pytest.mark.parametrize("number", [1, 2])
def test_a_workload_s_spans_hold_the_ingested_chunks(number: int) -> None:
    work = Workload(chunk=100, chunks=7)
    prompt, spans = work.prompt(700, number), work.spans(700, number)
    stored = {tuple(work.ingest(i)) for i in range(7)}
    assert len(spans) == 5
    for start, end in spans:
        assert tuple(prompt[:64] + prompt[start:end]) in stored
    assert work.prompt(700, number) == prompt
    assert work.prompt(700, number + 1) != prompt


def test_every_arm_is_measured_and_drawn(tokenizer: Any, tmp_path: Path) -> None:
    plot = tmp_path / "ttft.png"
    with vllm_serving(tokenizer) as server:
        arguments = ["bench", "speed", "--engine", server.url, "--tokens", "2300", "--repeats", "2", "--chunks", "3"]
        result = CliRunner().invoke(app, [*arguments, "--json", "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    rows = {row["arm"]: row for row in json.loads(result.stdout)}
    assert list(rows) == ["full prefill", "query 0.15", "hot query 0.15"]
    assert all(len(row["ttft_ms"]) == 2 and row["median_ms"] > 0 for row in rows.values())
    assert rows["full prefill"]["steps"]["reused_tokens"] == 0
    assert rows["query 0.15"]["steps"]["reused_tokens"] > 500
    assert plot.read_bytes().startswith(b"\x89PNG")
    named = [body for body in server.seen if "lmcache_rag.chunks" in (body.get("kv_transfer_params") or {})]
    assert len(named) == 4


def test_no_server_is_said_with_its_remedy() -> None:
    result = CliRunner().invoke(app, ["bench", "speed", "--engine", "http://127.0.0.1:9"])
    assert result.exit_code != 0
    assert "lmcache-rag serve" in " ".join(result.output.split())
