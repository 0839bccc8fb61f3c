"""`serve --coordinator`: what servers and a coordinator are started with, and how it is supervised."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from commands_kit import dry_run, make, value
from serve_kit import free_ports

from lmcache_rag.errors import ConfigError
from lmcache_rag.serving.coordinator import CHECKPOINT_S, TIMEOUT_S
from lmcache_rag.serving.lmcache_checks import answers
from lmcache_rag.serving.process import Server
from lmcache_rag.serving.supervise import Supervisor, Timeouts

KIT = Path(__file__).parents[1] / "support" / "serve_kit.py"


def test_a_server_reports_to_it_and_asks_it() -> None:
    made = make(coordinator="http://10.0.0.5:9300/", l2=("redis://r:6379",), lmcache_port=7001)
    assert value(made.lmcache, "--coordinator-url") == "http://10.0.0.5:9300"
    assert "--coordinator-event-reporting" in made.lmcache
    assert float(value(made.lmcache, "--coordinator-blend-timeout")) == TIMEOUT_S
    assert value(made.lmcache, "--instance-id").endswith("-7001")
    assert json.loads(value(made.lmcache, "--l2-adapter"))["shared"] is True
    assert made.coordinator_words() == []
    assert made.note == ""
    assert made.secret_file is not None, "the secret outlives vLLM"


def test_names_of_servers_differ_on_one_machine() -> None:
    names = {value(make(coordinator="start", lmcache_port=port).lmcache, "--instance-id") for port in (7001, 7002)}
    assert len(names) == 2
    assert value(make(coordinator="start", instance_id="gpu-3").lmcache, "--instance-id") == "gpu-3"


def test_a_started_one_has_our_chunk_size_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_RAG_STATE", str(tmp_path / "state"))
    made = make(coordinator="start", chunk_size=128)
    words = tuple(made.coordinator_words())
    assert words[:2] == ("lmcache", "coordinator")
    assert "--enable-blend-lookup" in words
    assert value(words, "--chunk-size") == "128"
    assert (value(words, "--host"), value(words, "--port")) == ("127.0.0.1", "9300")
    assert value(words, "--checkpoint-interval") == str(CHECKPOINT_S)
    files = [Path(value(words, name)) for name in ("--checkpoint-path", "--metadata-path")]
    assert {file.parent for file in files} == {tmp_path / "state"}
    assert value(made.lmcache, "--coordinator-url") == "http://127.0.0.1:9300"
    assert made.coordinator_run()[0] == sys.executable
    made.coordinator.prepare()
    assert (tmp_path / "state").is_dir()
    assert "cannot be loaded" in made.note, "there is no second tier"


def test_one_that_others_reach_is_warned_of() -> None:
    made = make(coordinator="start", coordinator_listen="0.0.0.0:9400", l2=("redis://r:6379",))
    assert value(made.lmcache, "--coordinator-url") == "http://127.0.0.1:9400"
    assert "asks for no key" in made.note
    made = make(coordinator="start", coordinator_listen="[::1]:9400", l2=("redis://r:6379",))
    assert value(made.lmcache, "--coordinator-url") == "http://[::1]:9400"
    assert made.note == ""


def test_without_one_nothing_changes() -> None:
    assert not [word for word in make(l2=("redis://r:6379",)).lmcache if "coordinator" in word or "instance" in word]
    assert "shared" not in json.loads(value(make(l2=("redis://r:6379",)).lmcache, "--l2-adapter"))
    assert value(make(instance_id="gpu-3").lmcache, "--instance-id") == "gpu-3"


def test_the_variable_of_lmcache_names_it_too() -> None:
    made = make(environment={"LMCACHE_COORDINATOR_URL": "http://c:9300"})
    assert value(made.lmcache, "--coordinator-url") == "http://c:9300"
    assert "--coordinator-event-reporting" in made.lmcache, "without it LMCache shares nothing"
    own = make(coordinator="http://d:1", environment={"LMCACHE_COORDINATOR_URL": "http://c:9300"})
    assert value(own.lmcache, "--coordinator-url") == "http://d:1"


@pytest.mark.parametrize("where", ["c:9300", "ftp://c", "http://", "http://u:p@c:9300", "http://c:x", "stop"])
def test_what_is_no_coordinator_is_refused(where: str) -> None:
    with pytest.raises(ConfigError, match="neither start nor the address"):
        make(coordinator=where)


@pytest.mark.parametrize("listen", ["9300", "host:", ":9300", "host:0", "host:99999"])
def test_a_place_to_listen_is_checked(listen: str) -> None:
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        make(coordinator="start", coordinator_listen=listen)
    with pytest.raises(ConfigError, match="--coordinator start"):
        make(coordinator="http://c:9300", coordinator_listen="127.0.0.1:9300")
    with pytest.raises(ConfigError, match="--coordinator start"):
        make(coordinator_listen="127.0.0.1:9300")


def test_dry_run_prints_three_commands() -> None:
    lines = dry_run("some/model", "--dry-run", "--coordinator", "start").stdout.splitlines()
    assert [line.startswith("lmcache ") for line in lines] == [True, True, False]
    document = json.loads(dry_run("some/model", "--dry-run", "--json", "--coordinator", "start").stdout)
    assert document["coordinator"][:2] == ["lmcache", "coordinator"]
    assert "coordinator" not in json.loads(dry_run("some/model", "--dry-run", "--json").stdout)


def test_one_that_dies_is_started_again(tmp_path: Path) -> None:
    """Real processes; stand-ins for the servers."""
    roles, ports = ("coordinator", "lmcache", "vllm"), free_ports(3)
    servers = {}
    for role, port in zip(roles, ports, strict=True):
        (tmp_path / role).mkdir()
        command = [sys.executable, str(KIT), "vllm" if role == "vllm" else "lmcache", str(port), str(tmp_path / role)]
        path = "/health" if role == "vllm" else "/healthcheck"
        url = f"http://127.0.0.1:{port}"
        servers[role] = Server(
            role, command, lambda url=url, path=path: answers(url, path), tmp_path / f"{role}.log", 2
        )
    lines: list[str] = []
    timeouts = Timeouts(20, 20, 0.02, 0.1, 1.0, 0.1, 0.5, 3.0)
    supervisor = Supervisor(
        servers["lmcache"], servers["vllm"], lines.append, timeouts, coordinator=servers["coordinator"]
    )

    def ready() -> None:
        os.kill(int((tmp_path / "coordinator" / "pids").read_text().split()[0]), signal.SIGKILL)
        threading.Thread(target=end_later).start()

    def end_later() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and "coordinator is healthy again." not in lines:
            time.sleep(0.02)
        (tmp_path / "vllm" / "end").write_text("3")

    assert supervisor.run(ready) == 3
    assert [line for line in lines if line.startswith("coordinator")] == [
        lines[1],
        "coordinator ended with signal SIGKILL.",
        "coordinator is started again in 0.1 s. Each server blends what it knows itself.",
        "coordinator is healthy again.",
    ]
    assert lines[0].startswith("Starting coordinator"), "before LMCache, which asks it"
    assert not any(server.runs for server in servers.values())
