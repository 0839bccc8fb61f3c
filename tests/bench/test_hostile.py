"""bench soak --hostile and --pause: every outcome is counted, and what harms the server is not sound."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_kit import ApiHandler
from fake_vllm import FakeVLLM
from openai_kit import vllm_serving
from soak_kit import AT_REST, GAUGES, STATUS
from typer.testing import CliRunner

from lmcache_rag import protocol
from lmcache_rag.bench import soak as soak_module
from lmcache_rag.bench.exact import TracedServer
from lmcache_rag.bench.hostile import KEYS, Hostile, HostileError, HostileRequest, send
from lmcache_rag.bench.soak import Soak, SoakReport
from lmcache_rag.cli.app import app
from lmcache_rag.engines.vllm import VLLMEngine
from lmcache_rag.prompt import PromptBuilder
from lmcache_rag.serving.process import descendants


def ordinary() -> dict[str, Any]:
    return {"model": "m", "prompt": list(range(200)), "max_tokens": 4, "kv_transfer_params": {protocol.PREFIX: 64}}


def drawn(number: int = 4000) -> list[HostileRequest]:
    rng, hostile = random.Random(0), Hostile(ordinary, 4)
    return [hostile.draw(rng) for _ in range(number)]


def test_hostile_requests_are_of_every_kind() -> None:
    requests = drawn()
    assert {request.leave for request in requests} == {"", "while sending", "at once", "at the first token", "later"}
    params = [request.body.get("kv_transfer_params") for request in requests]
    assert {type(each) for each in params} >= {dict, list, str, int, bool, float, type(None)}
    given = [each for each in params if isinstance(each, dict)]
    assert {key for each in given for key in each} >= set(KEYS)
    for key in protocol.REQUEST_KEYS:
        assert {type(each[key]) for each in given if key in each} >= {dict, list, str, int, bool, float}, key
    assert any(
        len(each.get(protocol.CHUNKS) or ()) > 100_000 for each in given if isinstance(each.get(protocol.CHUNKS), list)
    )
    assert any(request.body.get("use_beam_search") for request in requests)
    assert any(request.body.get("n", 1) > 1 for request in requests)
    assert {request.path for request in requests} == {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/inference/v1/generate",
    }
    assert ordinary()["kv_transfer_params"] == {protocol.PREFIX: 64}, "they are drawn from copies"


class Scripted(ApiHandler):
    """Answers as its server says."""

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        if len(self.rfile.read(length)) < length:
            self.server.cut_off.set()
            self.close_connection = True
            return
        status = self.server.status
        if status == "stream":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            self.wfile.write(b'data: {"x": 1}\n\ndata: {"error": {"code": 500}}\n\n')
        elif status == "hang":
            time.sleep(2)
            self.send_document(200, {})
        else:
            self.send_document(status, {})


@pytest.fixture
def scripted() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.daemon_threads, server.block_on_close = True, False
    server.status, server.cut_off = 200, threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def outcome(server: Any, leave: Any = "", status: Any = 200) -> str:
    server.status = status

    async def ask() -> str:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.server_port}", timeout=60) as http:
            request = HostileRequest("some", "/v1/completions", ordinary() | {"x": "y" * 100_000}, leave)
            return await send(http, request, random.Random(0))

    return asyncio.run(ask())


def test_outcomes_of_hostile_requests(scripted: Any) -> None:
    assert [outcome(scripted, status=status) for status in (200, 400, 404, 401)] == ["200", "400", "other", "other"]
    assert outcome(scripted, leave="while sending") == "aborted"
    assert scripted.cut_off.wait(60)
    assert outcome(scripted, leave="at once", status="hang") == "aborted"
    assert outcome(scripted, leave="at the first token", status="stream") == "aborted"
    for status in (500, "stream"):
        with pytest.raises(HostileError, match="some, /v1/completions: status 500"):
            outcome(scripted, status=status)


@pytest.fixture
def server(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVLLM]:
    monkeypatch.setattr(soak_module, "SETTLE_S", 0.5)
    monkeypatch.setattr(soak_module, "LEAST", 150)
    with vllm_serving(tokenizer) as server:
        server.gauges, server.status = dict(GAUGES), json.loads(json.dumps(STATUS))
        yield server


def test_a_soak_with_hostile_requests(server: FakeVLLM, tmp_path: Path, sentences: list[str]) -> None:
    documents = tmp_path / "docs"
    documents.mkdir()
    for i in range(14):
        (documents / f"{i}.txt").write_text(" ".join(sentences[6 * i :][:6]))
    arguments = ["bench", "soak", str(documents), "--engine", server.url, "--lmcache-url", server.url, "--tokens", "4"]
    arguments += ["--seconds", "1", "--chunk-tokens", "128", "--hostile", "0.5"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0, result.output
    assert report["sound"]
    assert set(report["hostile"]) >= {"200", "400", "aborted"}
    assert report["failed"] == report["hostile_failed"] == []
    assert sum(report["requests"].values()) > 0, "ordinary requests were sent too"


def test_a_server_hurt_by_hostile_requests_is_unsound(
    server: FakeVLLM, tokenizer: Any, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(self: Hostile, rng: random.Random) -> HostileRequest:
        return HostileRequest("forged", "/v1/completions", self._completion())

    monkeypatch.setattr(Hostile, "draw", draw)
    engine = VLLMEngine(server.url, tokenizer=tokenizer)
    soak = Soak(TracedServer(engine, PromptBuilder(engine.tokenizer, engine.info)), corpus, tokens=4, hostile=1.0)
    soak.full = {each: soak._source.trace(soak._prompt(each), soak_options(), 4) for each in soak._queries}
    server.fail = [500]
    report = soak.run(0.1)
    engine.close()
    assert report.hostile_failed == ["forged, /v1/completions: HostileError: forged, /v1/completions: status 500"]
    assert not report.sound
    assert report.as_dict()["hostile_failed"] == report.hostile_failed


def soak_options() -> Any:
    from lmcache_rag.bench.soak import OPTIONS

    return OPTIONS["unblended"]


@pytest.mark.parametrize(
    ("facts", "sound"),
    [
        ({}, True),
        ({"hostile": Counter({"400": 3, "other": 2})}, True),
        ({"hostile_failed": ["x"]}, False),
        ({"engine_cores": [[7], [7]]}, True),
        ({"engine_cores": [[7], []]}, False),
        ({"engine_cores": [[7], [8]]}, False),
        ({"pauses": [2, 2]}, True),
        ({"pauses": [1, 2]}, False),
    ],
)
def test_what_a_sound_soak_covers(facts: dict[str, Any], sound: bool) -> None:
    report = SoakReport(gauges=dict(AT_REST), **facts)
    assert (report.sound, report.as_dict()["sound"]) == (sound, sound)


# -- processes ------------------------------------------------------------------------------------------------------

LISTENER = """
import socket, sys, time
with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    server.listen()
    print(server.getsockname()[1], flush=True)
    while True:
        time.sleep(0.05)
        sys.stdout.write(".")
        sys.stdout.flush()
"""


def state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc")
def test_a_pause_stops_the_listener_and_lets_it_go_on() -> None:
    with subprocess.Popen([sys.executable, "-c", LISTENER], stdout=subprocess.PIPE, text=True) as child:
        try:
            port = int(child.stdout.readline())
            assert soak_module.listener(port) == child.pid
            assert child.pid in descendants(os.getpid())
            seen = []
            watch = threading.Thread(
                target=lambda: [seen.append(state(child.pid)) or time.sleep(0.05) for _ in range(60)]
            )
            watch.start()
            assert soak_module.pause_listener(port, 1.0)
            watch.join()
            assert "T" in seen, "it was stopped"
            assert state(child.pid) != "T", "it goes on"
        finally:
            child.kill()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert not soak_module.pause_listener(free.getsockname()[1], 1.0, wait_s=0.1)


def test_engine_cores_below_a_process_are_found() -> None:
    code = "import time; time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, "VLLM::EngineCore"]) as child:
        try:
            assert soak_module.engine_cores([os.getpid()]) == [child.pid]
            assert soak_module.engine_cores([child.pid]) == [child.pid]
            assert soak_module.engine_cores([]) == []
        finally:
            child.kill()
