"""LMCache's own client against a real server: the benchmark script runs it unchanged, with blending on and off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_cpu_kit import Servers, needs_vllm_cpu

pytestmark = [pytest.mark.slow, needs_vllm_cpu]

ROOT = Path(__file__).parents[2]


def test_lmcaches_own_client_is_run_in_both_arms(servers: Servers, smollm2_path: Path, tmp_path: Path) -> None:
    words = ["--samples", "3", "--passages", "2", "--tokens", "48", "--tasks", "needle", "--max-tokens", "8"]
    out = tmp_path / "out.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "rag_qa_quality.py"), servers.url, *words, "--json", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*script, "--baseline", servers.url], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    off, on, _ = found["rows"]
    assert [row["arm"] for row in found["rows"]] == ["off", "on", "stock"]
    assert all(row["samples"] == 3 and row["ttft_ms"] > 0 for row in found["rows"])
    assert off["minus_off"] is None
    assert len(on["minus_off"]) == 3
    kept = [[answer["prefix_tokens"] for answer in result["statistics"]] for result in found["results"]]
    assert kept[0] == kept[1] == kept[2]  # no arm finds the KV of another's prompts
    assert max(kept[1]) < on["prompt_tokens"] - 48
    # The answers' statistics reach the table: a CPU cannot blend.
    assert on["blended"] == 0.0
    assert on["prompt_tokens"] > 2 * 48
    assert "rag-qa-quality" in done.stdout
    assert "| on | 3 |" in done.stdout
