"""A real LMCache server whose second tier has a password: who sees it."""

from __future__ import annotations

import json
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from contract_kit import missing
from vllm_cpu_kit import CHUNK, SURROUNDINGS, Process, answers, free_port, until

from lmcache_rag.connector.server_guard import MODULE
from lmcache_rag.serving.tiers import second_tier
from lmcache_rag.serving.variables import for_lmcache

pytestmark = pytest.mark.skipif(missing(), reason="needs vLLM and LMCache")

PASSWORD = "hunter2-and-more"


@pytest.fixture
def redis() -> Iterator[tuple[int, bytearray]]:
    """A server that says OK to everything, as far as a client of Redis asks at its start: (port, what was sent)."""
    sent = bytearray()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(65536):
                sent.extend(data)
                self.request.sendall(b"+OK\r\n")

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], sent
        server.shutdown()


@pytest.mark.parametrize("how", ["variable", "file"])
def test_redis_gets_its_password_and_nothing_shows_it(tmp_path: Path, redis: tuple[int, bytearray], how: str) -> None:
    """Faults D1 and D6: `ps`, the log, GET /config and GET /env."""
    port, sent = redis
    (tmp_path / "pw").write_text(f"{PASSWORD}\n")
    placeholder = "${TIER_PASSWORD}" if how == "variable" else f"${{file:{tmp_path / 'pw'}}}"
    tier = second_tier(f"redis://:{placeholder}@127.0.0.1:{port}")
    url = f"http://127.0.0.1:{free_port()}"
    options = {
        "engine-type": "blend",
        "chunk-size": CHUNK,
        "l1-size-gb": 1,
        "eviction-policy": "LRU",
        "port": free_port(),
        "http-host": "127.0.0.1",
        "http-port": url.rpartition(":")[2],
        "server-module": json.dumps({"module_path": MODULE}),
        "l2-adapter": tier,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    variables = for_lmcache({**os.environ, "TIER_PASSWORD": PASSWORD, "OPENAI_API_KEY": "foreign"}, [tier])
    command = [sys.executable, "-m", "lmcache_rag.serving.lmcache_server", "server", *words]
    # Process adds to our own variables: this puts others in their place.
    start = tmp_path / "start.py"
    start.write_text(f"import os; os.execve({sys.executable!r}, {command!r}, { {**variables, **SURROUNDINGS}!r})")
    server = Process([sys.executable, str(start)], tmp_path / "lmcache.log")
    try:
        server.wait_for(lambda: answers(f"{url}/healthcheck"), 120)
        assert until(lambda: PASSWORD.encode() in sent), "LMCache itself has it"
        shown = subprocess.run(["ps", "axww", "-o", "args="], capture_output=True, text=True, check=True).stdout
        assert placeholder in shown
        config, environment = (httpx.get(f"{url}/{page}", timeout=10).text for page in ("config", "env"))
        assert '"resp' in config.lower()
        assert PASSWORD not in shown + config + environment + server.text
        assert "foreign" not in environment
    finally:
        server.kill()
