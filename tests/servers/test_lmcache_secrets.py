"""A real LMCache server whose second tier has a password: who sees it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
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
from lmcache_rag.credentials import ensure_secret, lmcache_key_file
from lmcache_rag.serving import lmcache_checks
from lmcache_rag.serving.commands import lmcache_environment
from lmcache_rag.serving.tiers import second_tier

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


def lmcache(folder: Path, url: str, tiers: list[str], **environment: str) -> Process:
    """A server as `serve` starts it, with no other variables than those that it gives to it."""
    options = {
        "engine-type": "blend",
        "chunk-size": CHUNK,
        "l1-size-gb": 1,
        "eviction-policy": "LRU",
        "port": free_port(),
        "http-host": "127.0.0.1",
        "http-port": url.rpartition(":")[2],
        "server-module": json.dumps({"module_path": MODULE}),
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    words += [word for tier in tiers for word in ("--l2-adapter", tier)]
    variables = lmcache_environment({**os.environ, **environment}, tiers) | SURROUNDINGS
    command = [sys.executable, "-m", "lmcache_rag.serving.lmcache_server", "server", *words]
    # Process adds to our own variables: this puts others in their place.
    start = folder / "start.py"
    start.write_text(f"import os; os.execve({sys.executable!r}, {command!r}, {variables!r})")
    return Process([sys.executable, str(start)], folder / "lmcache.log")


def test_the_http_port_asks_for_a_key_and_we_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From LMCache 0.5.7 on. Earlier ones ask for none, and are asked in the same way."""
    monkeypatch.setenv("LMCACHE_RAG_STATE", str(tmp_path))
    key = ensure_secret(lmcache_key_file())
    url = f"http://127.0.0.1:{free_port()}"
    server = lmcache(tmp_path, url, [], LMCACHE_HTTP_API_KEY_FILE=str(lmcache_key_file()))
    try:
        server.wait_for(lambda: lmcache_checks.answers(url, "/healthcheck"), 120)
        numbers = [int(part) for part in re.findall(r"\d+", importlib.metadata.version("lmcache"))[:3]]
        asks = numbers >= [0, 5, 7]
        assert httpx.get(f"{url}/status", timeout=10).status_code == (401 if asks else 200)
        status = lmcache_checks.get_json(url, "/status")
        assert status is not None
        assert status["is_healthy"]
        assert key not in server.text
    finally:
        server.kill()


@pytest.mark.parametrize("how", ["variable", "file"])
def test_redis_gets_its_password_and_nothing_shows_it(tmp_path: Path, redis: tuple[int, bytearray], how: str) -> None:
    """Faults D1 and D6: `ps`, the log, GET /config and GET /env."""
    port, sent = redis
    (tmp_path / "pw").write_text(f"{PASSWORD}\n")
    placeholder = "${TIER_PASSWORD}" if how == "variable" else f"${{file:{tmp_path / 'pw'}}}"
    tier = second_tier(json.dumps({"type": "resp", "host": "127.0.0.1", "port": port, "password": placeholder}))
    url = f"http://127.0.0.1:{free_port()}"
    server = lmcache(tmp_path, url, [tier], TIER_PASSWORD=PASSWORD, OPENAI_API_KEY="foreign")
    try:
        server.wait_for(lambda: answers(f"{url}/healthcheck"), 120)
        assert until(lambda: PASSWORD.encode() in sent), "LMCache itself has it"
        shown = subprocess.run(["ps", "axww", "-o", "args="], capture_output=True, text=True, check=True).stdout
        assert placeholder in shown
        config, environment = (httpx.get(f"{url}/{page}", timeout=10).text for page in ("config", "env"))
        named = f'"port": {port}', "RESPL2AdapterConfig"  # from LMCache 0.5.7 on by its class alone
        assert any(name in config for name in named), "it tells of the second tier"
        assert PASSWORD not in shown + config + environment + server.text
        assert "foreign" not in environment
    finally:
        server.kill()
