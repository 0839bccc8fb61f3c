"""bench quality against a real vLLM with our connector. For CPUs it cannot blend, which the table must show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_cpu_kit import Servers, needs_vllm_cpu

pytestmark = [pytest.mark.slow, needs_vllm_cpu]


def test_every_arm_is_answered_by_a_real_server(servers: Servers, tmp_path: Path) -> None:
    words = ["--cells", "3x64,3x64:around", "--items", "4", "--arms", "prefix,none,query:0.15,all", "--max-tokens", "8"]
    command = [sys.executable, "-m", "lmcache_rag", "bench", "quality", "--engine", servers.url, *words]
    command += ["--baseline", servers.url]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_RAG_")}
    run = {"capture_output": True, "text": True, "cwd": tmp_path, "env": clean, "timeout": 600}
    done = subprocess.run([*command, "--json", "--report", "page.html"], **run)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    lines = [json.loads(line) for line in (tmp_path / "bench-quality.jsonl").read_text().splitlines()[1:]]
    assert len(lines) == 8
    for line in lines:
        arms = line["arms"]
        assert set(arms) == {"full", "prefix", "none", "query:0.15", "all", "stock"}
        assert arms["full"]["counts"]["prefix_tokens"] == 0, "the exact KV of another arm helped"
        assert all(arm["counts"]["recomputed_tokens"] == 0 for arm in arms.values())
        assert all(arm["ttft_ms"] > 0 for arm in arms.values())
        assert all(arm["first_kl"] < 0.01 for arm in arms.values())
        assert all(arm["gold_nll"] is None for arm in arms.values())
        assert arms["stock"]["text"] == arms["full"]["text"]
        assert sum(arms["prefix"]["counts"].values()) == line["prompt_tokens"]
    # The shared prefix of the second question on is vLLM's own cache hit.
    assert any(line["arms"]["prefix"]["counts"]["prefix_tokens"] > 0 for line in lines)
    pooled = {s["arm"]: s for s in found["scores"] if (s["cell"], s["task"]) == ("all", "all")}
    assert (pooled["none"]["blended"], pooled["none"]["recomputed"]) == (0.0, 0.0)
    assert "0% of its answers were blended" in found["recommendation"]
    assert "What does it cost me?" in (tmp_path / "page.html").read_text()

    several = subprocess.run([*command, "--json", "--concurrency", "4", "--out", "several.jsonl"], **run)
    assert several.returncode == 0, several.stderr
    again = {s["arm"]: s for s in json.loads(several.stdout)["scores"] if (s["cell"], s["task"]) == ("all", "all")}
    assert again["none"]["hit"] == pooled["none"]["hit"]
    assert again["none"]["ttft_ms"] is None
