"""`lmcache-rag serve` with vLLM's CPU build, whose own command `vllm` does not start: it serves, and blends nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serve_kit import alive
from vllm_cpu_kit import CHUNK, Process, answers, counter, free_port, needs_vllm_cpu, until

from lmcache_rag.serving.process import descendants

pytestmark = [pytest.mark.slow, pytest.mark.full, needs_vllm_cpu]

STORED, FOUND = "lmcache_mp_l1_write_chunks_total", "lmcache_mp_lookup_hit_tokens_total"


class Served:
    """The command as a process, and the addresses of its two servers."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.port, self.http = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        options = f"--port {self.port} --lmcache-port {free_port()} --lmcache-http-port {self.http} --l1-gb 1"
        options += " --served-model-name smollm2 --max-model-len 1024 --dtype float32 --enforce-eager"
        self.process = Process(
            [sys.executable, "-m", "lmcache_rag", "serve", str(model), *options.split(), "--log-dir", str(folder)],
            folder / "serve.log",
            OMP_NUM_THREADS="1",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_CPU_NUM_OF_RESERVED_CPU="0",
            VLLM_SERVER_DEV_MODE="1",  # for reset_prefix_cache
            HF_HUB_OFFLINE="1",
        )

    @property
    def metrics(self) -> str:
        return f"http://127.0.0.1:{self.http}/metrics"

    def ask(self, prompt: list[int]) -> tuple[list[int], dict[str, object]]:
        """Tokens of a greedy answer, and what was reused; vLLM's own cache is emptied first."""
        httpx.post(f"{self.url}/reset_prefix_cache", timeout=60).raise_for_status()
        body = {"model": "smollm2", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=body | {"return_token_ids": True}, timeout=120)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        return found["choices"][0]["token_ids"], found["kv_transfer_params"]["lmcache_rag"]


@pytest.fixture
def served(smollm2_path: Path, tmp_path: Path) -> Iterator[Served]:
    served = Served(smollm2_path, tmp_path)
    try:
        served.process.wait_for(lambda: "/v1 serves " in served.process.text, 900)
        yield served
    finally:
        left = descendants(served.process.pid)
        served.process.kill()  # its guards end both servers
        assert until(lambda: not any(map(alive, left)), 60)


def test_serve_on_a_cpu_reuses_exact_prefixes_only(served: Served) -> None:
    said = served.process.text
    assert said.count("nothing is blended") == 1
    assert f"{served.url}/v1 serves smollm2; blending: off, as vLLM runs on a CPU; 1 GB for KV" in said

    prompt = [300 + i * 7 % 4000 for i in range(4 * CHUNK + 9)]
    stored, found = counter(served.metrics, STORED), counter(served.metrics, FOUND)
    wanted, told = served.ask(prompt)
    assert (told["can_blend"], told["reason"], told["prefix_tokens"]) == (False, "needs CUDA", 0)
    assert until(lambda: counter(served.metrics, STORED) >= stored + 4, 30)
    again, told = served.ask(prompt)
    assert again == wanted
    assert told["prefix_tokens"] == 4 * CHUNK
    assert told["reused_tokens"] == told["recomputed_tokens"] == 0
    assert counter(served.metrics, FOUND) == found + 4 * CHUNK

    words = [
        sys.executable,
        "-m",
        "lmcache_rag",
        "doctor",
        served.url,
        "--lmcache-url",
        served.metrics[: -len("/metrics")],
    ]
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, timeout=300)
    checks = {check["name"]: check["state"] for check in json.loads(done.stdout)["checks"]}
    assert (done.returncode, checks["Round trip"]) == (0, "ok"), done.stdout
    assert "failed" not in checks.values(), "an exact prefix is found again, and that is all that it can do"
    assert (checks["GPU"], checks["Versions"], checks["Connector"]) == ("skipped", "ok", "ok")

    os.kill(served.process.pid, signal.SIGTERM)
    assert until(lambda: not served.process.runs, 60)
    assert not answers(f"{served.url}/health")
    assert not answers(f"http://127.0.0.1:{served.http}/healthcheck")


def test_dry_run_shows_a_command_that_starts(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "lmcache_rag", "serve", "some/model", "--dry-run", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    _, *arguments = json.loads(done.stdout)["vllm"]
    shown = subprocess.run([sys.executable, *arguments[:2], "--help"], capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert "kv-transfer-config" in shown.stdout or "--help=" in shown.stdout
