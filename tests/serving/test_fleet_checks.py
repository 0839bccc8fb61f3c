"""doctor over several servers, against stand-ins: what they do not have in common, and whether they share KV."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from doctor_kit import CONFIG
from serve_kit import Cache, FakeServer
from typer.testing import CliRunner

from lmcache_rag import protocol
from lmcache_rag.cli.app import app
from lmcache_rag.serving import fleet, machine
from lmcache_rag.serving.fleet import FACTS, compare

SAME = {name: name[:2] for name in protocol.SERVER_FACTS}
LMCACHE = {"chunk": "64", "hash": "ee", "lmcache": "0.5.6", "lmcache_rag": "0.1.0"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "PAUSE_S", 0.0)
    monkeypatch.setattr(fleet, "FACTS_S", 0.0)
    monkeypatch.setattr(machine, "serves", lambda: False)


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


class Pair:
    """Two servers that share their KV, each with an LMCache server, and a coordinator."""

    def __init__(self, stack: ExitStack, model: str, mode: str = "") -> None:
        def started(role: str, mode: str = "") -> FakeServer:
            return stack.enter_context(FakeServer(role, mode=mode, model=model))

        self.vllm = [started("vllm", mode), started("vllm", mode)]
        self.lmcache = [started("lmcache"), started("lmcache")]
        self.coordinator = started("lmcache")
        self.share()
        for server in self.vllm:
            server.facts = dict(SAME)
        for server in self.lmcache:
            server.facts = dict(LMCACHE)
        places = [{"ip": "127.0.0.1", "http_port": server.http.server_port} for server in self.lmcache]
        names = zip("ab", places, strict=True)
        self.coordinator.instances = [{"instance_id": name, **place} for name, place in names]

    def share(self, *, shared: bool = True) -> None:
        self.vllm[1].cache = self.vllm[0].cache if shared else Cache()

    def examine(self, *options: str) -> tuple[int, dict[str, dict[str, Any]]]:
        """Exit status, and the checks that are about all servers."""
        words = ["doctor", *(server.url for server in self.vllm), *options, "--json"]
        result = CliRunner().invoke(app, words, env={"VLLM_API_KEY": "", "LMCACHE_RAG_API_KEY": ""})
        checks = json.loads(result.stdout)["checks"]
        self.each = [check for check in checks if check["server"]]
        return result.exit_code, {check["name"]: check for check in checks if not check["server"]}


@pytest.fixture
def pair(model: str) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, model)


def test_servers_that_share_kv_are_well(pair: Pair) -> None:
    status, found = pair.examine("--coordinator", pair.coordinator.url)
    assert (status, {name: check["state"] for name, check in found.items()}) == (
        0,
        {"Coordinator": "ok", "Servers": "ok", "Shared KV": "ok", "LMCache servers": "ok"},
    )
    assert found["Coordinator"]["result"].endswith("knows 2 servers (a, b), and 1,234 chunks")
    assert "in another order" in found["Shared KV"]["result"]
    urls = {check["server"] for check in pair.each if check["name"] == "Round trip" and check["state"] == "ok"}
    assert urls == {server.url for server in pair.vllm}, "each is examined as by itself"
    assert sum(check["name"] == "This machine" for check in pair.each) == 1


@pytest.mark.parametrize("fact", sorted(SAME))
def test_each_fact_that_differs_is_named(fact: str) -> None:
    check = compare("Servers", {"http://a": SAME, "http://b": SAME | {fact: "other"}, "http://c": SAME})
    assert check.state == ("warning" if FACTS[fact].harmless else "failed")
    words = f"{FACTS[fact].words} differs ({SAME[fact]} at http://a, http://c; other at http://b): {FACTS[fact].effect}"
    assert check.result == words
    assert check.remedy == FACTS[fact].remedy


def test_every_published_fact_is_compared() -> None:
    assert {*protocol.SERVER_FACTS, *protocol.LMCACHE_FACTS, "model"} == set(FACTS)


def test_servers_with_two_secrets_are_a_failure(pair: Pair) -> None:
    pair.vllm[1].facts["secret"] = "ff"
    pair.share(shared=False)
    status, found = pair.examine()
    assert status == 1
    assert (found["Servers"]["state"], found["Shared KV"]["state"]) == ("failed", "warning")
    assert "the secret (digest) differs (se at" in found["Servers"]["result"]
    assert "--secret-file" in found["Servers"]["remedy"]
    assert "each computes its own KV" in found["Shared KV"]["result"]


def test_lmcache_servers_with_two_hashes_are_a_failure(pair: Pair) -> None:
    pair.lmcache[1].facts["hash"] = "11"
    words = [word for server in pair.lmcache for word in ("--lmcache-url", server.url)]
    status, found = pair.examine(*words)
    assert (status, found["LMCache servers"]["state"]) == (1, "failed")
    assert "PYTHONHASHSEED" in found["LMCache servers"]["remedy"]


def test_with_a_coordinator_kv_must_be_shared(pair: Pair) -> None:
    pair.share(shared=False)
    status, found = pair.examine("--coordinator", pair.coordinator.url)
    assert (status, found["Shared KV"]["state"]) == (1, "failed")
    pair.share()
    pair.coordinator.instances = []
    status, found = pair.examine("--coordinator", pair.coordinator.url)
    assert (status, found["Coordinator"]["state"]) == (1, "failed")


def test_servers_on_cpus_share_exact_prefixes(model: str) -> None:
    with ExitStack() as stack:
        pair = Pair(stack, model, "cpu")
        status, found = pair.examine()
        assert (status, found["Shared KV"]["state"]) == (0, "ok"), found
        assert found["Shared KV"]["result"].endswith("as exact prefixes")
        trips = [check for check in pair.each if check["name"] == "Round trip"]
        assert [check["state"] for check in trips] == ["ok", "ok"]
        assert "an exact prefix: 320 of 320 tokens found again; a server on a CPU blends nothing" in trips[0]["result"]
        pair.share(shared=False)
        assert pair.examine()[1]["Shared KV"]["state"] == "warning", "its own prefix is no proof"


def test_a_server_of_an_older_version_is_a_warning(pair: Pair) -> None:
    pair.vllm[1].facts = {}
    status, found = pair.examine()
    assert (status, found["Servers"]["state"]) == (0, "warning")
    assert pair.vllm[1].url in found["Servers"]["result"]


def test_addresses_from_a_coordinator_get_no_key(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anyone may have registered there."""
    monkeypatch.setenv("LMCACHE_HTTP_API_KEY", "secret")
    pair.lmcache[0].mode = "key"
    words = ("--coordinator", pair.coordinator.url)
    assert "LMCache servers" not in pair.examine(*words)[1]
    assert pair.examine(*words, "--lmcache-url", pair.lmcache[0].url)[1]["LMCache servers"]["state"] == "ok"


def test_the_text_names_the_server_of_each_check(pair: Pair) -> None:
    result = CliRunner().invoke(app, ["doctor", *(server.url for server in pair.vllm)], env={"COLUMNS": "200"})
    lines = result.stdout.splitlines()
    places = [lines.index(title) for title in (pair.vllm[0].url, pair.vllm[1].url, "All of them")]
    assert places == sorted(places)
    assert lines[places[2] + 1].startswith("Servers")
