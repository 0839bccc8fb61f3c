"""A real LMCache server whose second tier has a password: where it shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from contract_kit import missing
from vllm_cpu_kit import CHUNK, SURROUNDINGS, Process, answers, free_port

from lmcache_rag.serving.variables import for_lmcache

pytestmark = pytest.mark.skipif(missing(), reason="needs vLLM and LMCache")

PASSWORD = "hunter2-and-more"


@pytest.mark.parametrize("how", ["variable", "file"])
def test_lmcache_shows_no_password_of_a_second_tier(tmp_path: Path, how: str) -> None:
    """Faults D1 and D6: `ps`, the log, GET /config and GET /env."""
    (tmp_path / "pw").write_text(f"{PASSWORD}\n")
    placeholder = "${TIER_PASSWORD}" if how == "variable" else f"${{file:{tmp_path / 'pw'}}}"
    # LMCache's tier in a folder has no password: it takes its path from one.
    tier = json.dumps({"type": "fs", "base_path": f"{tmp_path}/{placeholder}"})
    port, url = free_port(), f"http://127.0.0.1:{free_port()}"
    options = {
        "engine-type": "blend",
        "chunk-size": CHUNK,
        "l1-size-gb": 1,
        "eviction-policy": "LRU",
        "port": port,
        "http-host": "127.0.0.1",
        "http-port": url.rpartition(":")[2],
        "l2-adapter": tier,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    variables = for_lmcache({**os.environ, "TIER_PASSWORD": PASSWORD, "OPENAI_API_KEY": "foreign"}, [tier])
    command = [sys.executable, "-m", "lmcache_rag.serving.lmcache_server", "server", *words]
    code = f"import os; os.execve({sys.executable!r}, {command!r}, { ({**variables, **SURROUNDINGS})!r})"
    (tmp_path / "start.py").write_text(code)
    server = Process([sys.executable, str(tmp_path / "start.py")], tmp_path / "lmcache.log")
    try:
        server.wait_for(lambda: answers(f"{url}/healthcheck"), 120)
        assert (tmp_path / PASSWORD).is_dir(), "LMCache itself has it"
        shown = subprocess.run(["ps", "axww", "-o", "args="], capture_output=True, text=True, check=True).stdout
        assert placeholder in shown
        config = httpx.get(f"{url}/config", timeout=10).text
        assert "***" in config
        environment = httpx.get(f"{url}/env", timeout=10).text
        assert "foreign" not in environment
        assert PASSWORD not in shown + config + environment + server.text
    finally:
        server.kill()
