"""doctor, against stand-ins of vLLM and LMCache that are all well or have one fault each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import doctor_kit
import pytest
from doctor_kit import CONFIG
from openai_kit import vllm_serving
from serve_kit import CHUNK, FakeServer, fake_packages
from typer.testing import CliRunner, Result

from lmcache_rag import protocol
from lmcache_rag.cli.app import app
from lmcache_rag.engines.vllm_client import VLLMClient
from lmcache_rag.errors import EngineError
from lmcache_rag.serving import doctor, machine
from lmcache_rag.serving.doctor import IDS, Answer, Outcome, Prompts, ask, cost_checks, judge, round_trip
from lmcache_rag.tokenizer import open_tokenizer

gpu_machine = doctor_kit.gpu_machine


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path / "model")


@pytest.fixture
def cpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without vLLM and LMCache."""
    monkeypatch.setattr(machine, "serves", lambda: False)


def run(*arguments: str, **keys: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"VLLM_API_KEY": "", "LMCACHE_RAG_API_KEY": "", **keys})


def examine(model: str, vllm: str = "", lmcache: str = "", **files: Any) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit status and checks by name, against stand-ins in these modes."""
    with FakeServer("vllm", mode=vllm, model=model) as engine, FakeServer("lmcache", mode=lmcache) as cache:
        result = run(engine.url, "--lmcache-url", cache.url, "--json")
    document = json.loads(result.stdout)
    failed = [check for check in document["checks"] if check["state"] == "failed"]
    assert document["healthy"] == (not failed)
    assert all(check["remedy"] for check in failed)
    return result.exit_code, {check["name"]: check for check in document["checks"]}


def test_lmcache_that_asks_for_a_key_gets_it(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LMCACHE_RAG_STATE", str(tmp_path))
    for name in ("LMCACHE_API_KEY", "LMCACHE_HTTP_API_KEY", "LMCACHE_API_KEY_FILE", "LMCACHE_HTTP_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    _, checks = examine(model, lmcache="key")
    assert checks["LMCache"]["state"] == "failed"
    assert "requires a key" in checks["LMCache"]["result"]
    assert "LMCACHE_HTTP_API_KEY" in checks["LMCache"]["remedy"]
    monkeypatch.setenv("LMCACHE_HTTP_API_KEY", "secret")
    _, checks = examine(model, lmcache="key")
    assert checks["LMCache"]["state"] == "ok"
    assert checks["Chunk index"]["state"] == "ok", "its /metrics ask for the key as well"


def test_a_recurrent_model_needs_a_prefix_cache(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NemotronHForCausalLM"]}')
    for mode, state in (("cached", "ok"), ("uncached", "failed"), ("", "skipped")):
        _, checks = examine(str(tmp_path), vllm=mode)
        assert checks["Prefix cache"]["state"] == state
        assert checks["Model"]["state"] == "warning"
        assert "order=auto puts passages into a stable order" in checks["Model"]["result"]
        assert "Round trip" not in checks, "no chunk can be blended"


# -- the round trip ---------------------------------------------------------------------------------------------


def test_prompts_hold_the_same_chunks_in_another_order() -> None:
    prompts = Prompts.draw(CHUNK, seed=1)
    assert all(len(prompt) % CHUNK == 0 and prompt[:CHUNK] == list(prompts.prefix) for prompt in prompts.ingest())
    assert len({len(chunk) for chunk in prompts.chunks}) == 3
    query, again = prompts.query(), prompts.query()
    assert query[:CHUNK] == list(prompts.prefix)
    assert query[CHUNK:] != again[CHUNK:]  # separators and question are new: what an attempt leaves helps no other
    places = [",".join(map(str, query)).index(",".join(map(str, chunk))) for chunk in prompts.chunks]
    assert places == sorted(places, reverse=True)
    assert set(query) <= set(IDS)
    assert Prompts.draw(CHUNK) != Prompts.draw(CHUNK)


def test_a_short_context_gets_short_prompts() -> None:
    assert len(Prompts.draw(CHUNK, 512).query()) + 16 < 512


def trip(mode: str = "") -> tuple[Outcome, list[dict[str, Any]]]:
    with FakeServer("vllm", mode=mode) as engine, VLLMClient(engine.url, attempts=1) as server:
        return round_trip(server, server.first_model(), CHUNK, pause=lambda _: None), engine.requests


def test_a_round_trip_ingests_unblended_then_asks() -> None:
    outcome, requests = trip()
    assert outcome.hit
    assert outcome.reused is not None
    assert outcome.reused["reused_tokens"] + outcome.reused["recomputed_tokens"] == 9 * CHUNK
    assert outcome.agrees
    params = [request["kv_transfer_params"] for request in requests]
    assert [p.get("lmcache_rag.blend") for p in params] == ["off"] * 3 + ["always", "always", "off"]
    assert [p.get("lmcache.max_offload_tokens") for p in params] == [None] * 3 + [CHUNK] * 3
    assert [p.get("lmcache_rag.ratio") for p in params] == [None] * 4 + [1.0, None]
    assert requests[4]["prompt"] == requests[5]["prompt"]
    assert requests[3]["prompt"] != requests[4]["prompt"]


def test_a_server_that_recomputes_all_by_default_is_ok() -> None:
    outcome, _ = trip("all")
    assert (outcome.hit, outcome.agrees, outcome.queries) == (True, True, 1)
    assert outcome.reused is not None
    assert (outcome.reused["reused_tokens"], outcome.reused["recomputed_tokens"]) == (0, 9 * CHUNK)
    assert [(check.name, check.state) for check in judge(outcome)] == [
        ("Self-check", "ok"),
        ("Round trip", "ok"),
        ("Ratio 1", "ok"),
    ]


def test_a_server_that_cannot_blend_is_asked_once() -> None:
    assert trip("unable")[0].queries == 1


@pytest.mark.parametrize(
    ("code", "name", "words"),
    [
        ("plugin not loaded", "Round trip", "VLLM_PLUGINS"),
        ("needs CUDA", "Round trip", "NVIDIA GPU"),
        ("LMCache rotary table", "Round trip", "lmcache-rag serve"),
        ("speculative decoding", "Round trip", "unsupported option"),
        ("sleep mode", "Round trip", "--enable-sleep-mode"),
        ("MultiConnector", "Round trip", "--kv-transfer-config"),
        ("self-check failed", "Self-check", "report"),
        ("self-check could not run", "Self-check", "lmcache_rag.self_check=false"),
        ("a code of a later version", "Round trip", "vLLM's log"),
        ("", "Round trip", "vLLM's log"),
    ],
)
def test_each_reason_not_to_blend_has_a_remedy(code: str, name: str, words: str) -> None:
    """The remedy comes from the code, whatever the sentence says."""
    detail = "the CUDA plugin of the LMCache server"
    (check,) = judge(Outcome({"can_blend": False, "failure": detail, **({"reason": code} if code else {})}, 1))
    assert (check.name, check.state) == (name, "failed")
    assert detail in check.result
    assert words in check.remedy


@pytest.mark.parametrize(
    ("vllm", "state", "words"),
    [
        ("", "ok", "equals a full prefill"),
        ("not checked", "warning", "were not compared"),
        ("unchecked", "skipped", "does not report it"),
    ],
)
def test_what_came_of_the_self_check_is_shown(model: str, vllm: str, state: str, words: str) -> None:
    _, found = examine(model, vllm)
    assert found["Self-check"]["state"] == state
    assert words in found["Self-check"]["result"]


@pytest.mark.parametrize(
    ("lmcache", "state", "words"),
    [
        ("", "ok", "40 chunks of at most 4,096; 1,500 of 2,000 chunks of prompts were found"),
        ("full", "warning", "nearly full"),
        ("no index", "skipped", "does not report it"),
    ],
)
def test_how_full_the_index_is_is_shown(model: str, lmcache: str, state: str, words: str) -> None:
    _, found = examine(model, "", lmcache)
    assert found["Chunk index"]["state"] == state
    assert words in found["Chunk index"]["result"]


@pytest.mark.parametrize(("lmcache", "state", "gigabytes"), [("pinned", "ok", "2.50"), ("full", "warning", "9.70")])
def test_pins_and_budgets_are_shown(model: str, lmcache: str, state: str, gigabytes: str) -> None:
    _, found = examine(model, "", lmcache)
    assert found["Pinned chunks"]["state"] == state
    assert found["Pinned chunks"]["result"] == f"{gigabytes} GB of the 10.00 GB that may be pinned"
    assert found["Tenant budgets"]["result"] == 'ac"me 4.00 of 5.00 GB (7 objects evicted)'
    assert not {"Pinned chunks", "Tenant budgets"} & set(examine(model, "", "")[1])


def test_a_round_trip_retries_before_reporting_a_miss() -> None:
    outcome, requests = trip("empty")
    assert not outcome.hit
    assert outcome.queries == 5
    assert len({tuple(request["prompt"]) for request in requests}) == len(requests)


@pytest.mark.parametrize(("mode", "agrees", "same"), [("", True, 16), ("wrong", False, 3), ("tie", True, 3)])
def test_ratio_1_must_give_the_same_tokens_or_a_tie(mode: str, agrees: bool, same: int) -> None:
    outcome, _ = trip(mode)
    assert (outcome.agrees, outcome.same, outcome.compared) == (agrees, same, 16)


def test_a_tie_needs_the_probabilities_of_both_tokens() -> None:
    from lmcache_rag.serving.doctor import _near_tie

    plain = Answer((1, 2), ({1: -0.1}, {2: -0.7, 3: -0.8}))
    assert _near_tie(plain, Answer((1, 3)), 1)
    assert not _near_tie(plain, Answer((1, 4)), 1)
    assert not _near_tie(plain, Answer((1, 2)), 2)


def test_ratio_1_without_recomputation_proves_nothing() -> None:
    reused = {"reused_tokens": 1, "policy": "query", "ratio": 0.15}
    outcome = Outcome(reused, 1, {"recomputed_tokens": 0, "failure": "evicted"}, 16, 16)
    assert [(c.name, c.state) for c in judge(outcome)][1:] == [("Round trip", "ok"), ("Ratio 1", "failed")]


# -- servers ----------------------------------------------------------------------------------------------------


def test_all_is_well(model: str, gpu_machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "IMPORT_S", 30)
    monkeypatch.setenv("PYTHONPATH", str(fake_packages(tmp_path)))
    status, found = examine(model)
    # Where vLLM is not really installed the connector cannot be imported; that is the one thing that may fail.
    failed = found.pop("Connector")["state"] == "failed"
    assert {name: check["state"] for name, check in found.items() if check["state"] != "ok"} == {}
    assert status == int(failed)
    assert found["GPU 0"]["result"] == "NVIDIA H100, driver 580.65.06, compute capability 9.0"
    assert found["GPU 0 memory"]["result"] == "12,000 of 81,559 MiB free"
    assert found["LMCache's CUDA code"]["result"] == "fits PyTorch 2.13.0+cu130"
    assert found["Versions"]["result"] == "vLLM 0.25.1 with LMCache 0.5.6: tested"
    assert found["Chunk and block"]["result"] == "chunks of 64 tokens, blocks of 16"
    assert "reused" in found["Round trip"]["result"]
    assert found["Ratio 1"]["result"] == "16 of 16 tokens equal a run without reuse"
    assert found["Hit counters"]["state"] == "ok"
    assert found["Hit counters"]["result"].endswith("tokens more on /metrics")
    assert (
        "prefill of 1,024 / 8,192 tokens: 14.2 / 105.0 ms; look-up of 8,192 tokens: 7.1 ms" in found["Costs"]["result"]
    )
    words = "from LMCache's memory: 1,880 tokens; from vLLM's own cache: never"
    assert found["Blends from"]["result"] == words


def test_a_server_that_reports_no_costs_is_no_failure() -> None:
    assert [(check.name, check.state) for check in cost_checks("")] == [("Costs", "skipped")]
    page = f'{protocol.COST_GAUGE}{{cost="prefill_1024",engine="0"}} 14.0\n'
    assert [(check.name, check.state) for check in cost_checks(page)] == [("Costs", "ok"), ("Blends from", "skipped")]


def test_further_queries_teach_the_server_its_costs() -> None:
    with FakeServer("vllm") as fake, VLLMClient(fake.url, attempts=1) as server:
        outcome = round_trip(server, server.first_model(), CHUNK, compare=False, more=2, pause=lambda _: None)
        asked = [request["kv_transfer_params"].get("lmcache_rag.blend") for request in fake.requests]
    assert outcome.hit
    assert asked == ["off"] * 3 + ["always"] * 3


@pytest.mark.parametrize(
    ("vllm", "lmcache", "name", "words"),
    [
        ("bare", "", "Round trip", "our connector is not loaded"),
        ("unable", "", "Round trip", "cannot blend: sliding window attention is not supported"),
        ("empty", "", "Round trip", "nothing was reused in 5 queries: the server is full"),
        ("wrong", "", "Ratio 1", "3 of 16 tokens"),
        ("stuck", "", "Hit counters", "0 tokens more on /metrics"),
        ("misfit", "", "Chunk and block", "blocks of 48"),
        ("strange", "", "vLLM", "lists no model"),
        ("key", "", "Round trip", "rejected the ingest key or the API key"),
        ("", "unblended", "Blend engine", "does not blend"),
        ("", "unregistered", "RoPE", "not registered"),
        ("", "ill", "LMCache", "not healthy"),
        ("", "one of two ranks", "Ranks", "1 registered for some/model, which is served by 2"),
    ],
)
def test_each_fault_is_found(
    model: str, vllm: str, lmcache: str, name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_rag.serving.doctor.PAUSE_S", 0.0)
    status, found = examine(model, vllm, lmcache)
    assert status == 1
    assert found[name]["state"] == "failed"
    assert words in found[name]["result"]


def test_counters_that_are_switched_off_are_no_fault(model: str) -> None:
    _, found = examine(model, "uncounted")
    assert (found["Round trip"]["state"], found["Hit counters"]["state"]) == ("ok", "skipped")


def test_a_tie_is_no_fault(model: str) -> None:
    _, found = examine(model, "tie")
    assert found["Ratio 1"]["state"] == "ok"
    assert "equally likely within rounding" in found["Ratio 1"]["result"]


def test_a_worker_that_does_not_blend_is_a_warning(model: str) -> None:
    _, found = examine(model, "", "half")
    assert found["RoPE"]["state"] == "warning"
    assert found["RoPE"]["result"] == "registered by 1 of 2 workers"


def test_ranks_are_told_where_there_are_several(model: str) -> None:
    _, found = examine(model, "", "two ranks")
    assert (found["Ranks"]["state"], found["Ranks"]["result"]) == (
        "ok",
        "2 registered for some/model, which is served by 2",
    )
    assert "Ranks" not in examine(model)[1]


def test_a_clients_machine_is_not_judged(model: str, cpu_machine: None) -> None:
    with FakeServer("vllm", mode="long", model=model) as engine:
        result = run(engine.url, "--json")
    found = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert result.exit_code == 0
    assert {name for name, check in found.items() if check["state"] == "skipped"} == {"This machine", "LMCache"}
    assert "container" in found["This machine"]["result"]
    assert not {"GPU", "Versions", "LMCache's CUDA code", "Connector", "Plugin"} & found.keys()
    assert found["Round trip"]["state"] == found["vLLM"]["state"] == "ok"
    gone = run("http://gone.invalid:8000", "--json")  # another machine, which does not answer
    checks = {check["name"]: check["state"] for check in json.loads(gone.stdout)["checks"]}
    assert checks == {"This machine": "skipped", "LMCache": "skipped", "vLLM": "failed"}


def test_a_server_on_a_cpu_is_not_asked_for_a_gpu(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.VLLMBuild, "installed", lambda: machine.VLLMBuild(cpu=True))
    monkeypatch.setattr(machine, "serves", lambda: True)
    _, found = examine(model, "unable", "unregistered")
    assert found["GPU"]["state"] == found["RoPE"]["state"] == "skipped"
    assert "blends nothing" in found["GPU"]["result"]
    assert found["Round trip"]["state"] == "failed"


def test_servers_that_are_not_there() -> None:
    with FakeServer("vllm") as gone:
        pass
    result = run(gone.url, "--lmcache-url", gone.url, "--json")
    found = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert result.exit_code == 1
    assert found["vLLM"]["state"] == found["LMCache"]["state"] == "failed"
    assert "cannot be reached" in found["vLLM"]["result"]
    assert "Round trip" not in found


def test_without_lmcache_vllm_gives_the_chunk_size(model: str) -> None:
    with FakeServer("lmcache") as gone:
        pass
    with FakeServer("vllm", mode="long", model=model) as engine:
        result = run(engine.url, "--lmcache-url", gone.url, "--json")
    found = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert found["LMCache"]["state"] == "failed"
    assert found["Chunk and block"]["result"] == "chunks of 256 tokens, blocks of 16"
    assert found["Round trip"]["state"] == found["Ratio 1"]["state"] == "ok"


def test_a_key_is_sent(model: str) -> None:
    with FakeServer("vllm", mode="key", model=model) as engine, VLLMClient(engine.url, api_key="secret") as server:
        assert ask(server, "tiny", [1, 2], params={}).tokens
        with VLLMClient(engine.url, attempts=1) as other, pytest.raises(EngineError, match="rejected the API key"):
            ask(other, "tiny", [1, 2], params={})


@pytest.mark.parametrize(
    ("keys", "state"),
    [
        ({"VLLM_API_KEY": "secret"}, "ok"),
        ({"LMCACHE_RAG_API_KEY": "secret"}, "ok"),
        ({"VLLM_API_KEY": "secret", "LMCACHE_RAG_API_KEY": "other"}, "ok"),
        ({"VLLM_API_KEY": "other", "LMCACHE_RAG_API_KEY": "secret"}, "failed"),
    ],
)
def test_the_key_comes_from_vllms_variable_or_ours(model: str, keys: dict[str, str], state: str) -> None:
    with FakeServer("vllm", mode="key", model=model) as engine, FakeServer("lmcache") as cache:
        result = run(engine.url, "--lmcache-url", cache.url, "--json", **keys)
    found = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert found["Round trip"]["state"] == state
    if state == "failed":
        assert all(name in found["Round trip"]["remedy"] for name in keys)


def test_an_address_without_meaning_is_wrong_use() -> None:
    assert run("localhost:8000").exit_code == 2
    assert run("http://127.0.0.1:99999").exit_code == 2


def test_the_table_names_what_failed_and_the_remedy(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with FakeServer("vllm", mode="bare", model=model) as engine, FakeServer("lmcache") as cache:
        result = run(engine.url, "--lmcache-url", cache.url)
    assert result.exit_code == 1
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("Round trip"))
    assert "failed" in line
    assert "lmcache-rag serve" in line


def test_a_server_of_another_environment_is_a_warning(model: str) -> None:
    with FakeServer("vllm", model=model) as engine, VLLMClient(engine.url, attempts=1) as server:
        for here, state in (("0.25.1", "ok"), ("0.25.1+cpu", "ok"), ("", "ok"), ("0.32.0", "warning")):
            ((check,), _) = doctor.vllm_checks(server, here)
            assert check.state == state
    assert "vLLM 0.25.1; this environment has vLLM 0.32.0" in check.result


def test_adapters_of_a_server_are_named(smollm2_path: Path) -> None:
    with vllm_serving(open_tokenizer(smollm2_path)) as server, VLLMClient(server.url, attempts=1) as client:
        (check,) = doctor.adapter_checks(client)
        assert check.result == "1 (an-adapter), each with KV of its own"
        server.backend.adapters = tuple(f"a{number}" for number in range(9))
        (check,) = doctor.adapter_checks(client)
        assert check.result == "9 (a0, a1, a2, a3, a4, a5, a6, a7, ...), each with KV of its own"
        server.backend.adapters = ()
        assert doctor.adapter_checks(client) == []


# -- this machine and its embedded engine -------------------------------------------------------------------------


def local(*arguments: str, **env: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit status and checks by name, without a URL."""
    result = run(*arguments, "--json", **env)
    return result.exit_code, {check["name"]: check for check in json.loads(result.stdout)["checks"]}


def test_a_cpu_machine_is_fine(cpu_machine: None, smollm2_path: Path, embedder_path: Path, tmp_path: Path) -> None:
    status, found = local("--store", str(tmp_path / "none"), "--model", str(smollm2_path))
    assert status == 0
    assert {name: check["state"] for name, check in found.items()} == {
        "Embedded engine": "ok",
        "Store": "skipped",
        "Disk": "ok",
        "Model": "ok",
        "Embedder": "ok",
        "vLLM": "skipped",
    }
    assert "lmcache-rag ingest" in found["Store"]["remedy"]
    assert "GB free" in found["Disk"]["result"]
    assert not (tmp_path / "none").exists()


def test_the_store_is_checked(cpu_machine: None, tmp_path: Path, embedder: Any) -> None:
    from lmcache_rag import Workspace

    (tmp_path / "weir.txt").write_text("The weir is closed in frost.")
    store = tmp_path / "s"
    with Workspace.open(store, embedder=embedder) as workspace:
        workspace.ingestor.ingest([tmp_path / "weir.txt"], kv=False)
    assert local("--store", str(store))[1]["Store"]["result"] == f"{store}: 1 documents, 1 chunks"
    (tmp_path / "weir.txt").unlink()
    status, found = local("--store", str(store))
    assert (status, found["Store"]["state"], found["Store"]["remedy"]) == (0, "warning", "lmcache-rag remove --missing")
    for name in ("store.db-wal", "store.db-shm"):
        (store / name).unlink(missing_ok=True)
    (store / "store.db").write_bytes(b"no database" * 500)
    status, found = local("--store", str(store))
    assert (status, found["Store"]["state"]) == (1, "failed")
    assert found["Store"]["remedy"]


def test_a_model_that_is_not_whole_fails(cpu_machine: None, tmp_path: Path) -> None:
    status, found = local("--model", str(tmp_path), "--store", str(tmp_path / "none"))
    assert (status, found["Model"]["state"]) == (1, "failed")


def test_a_model_that_is_not_here_is_skipped(cpu_machine: None, tmp_path: Path) -> None:
    status, found = local("--model", "acme/not-here", "--store", str(tmp_path / "none"))
    assert (status, found["Model"]["state"]) == (0, "skipped")


def test_without_the_extra_it_is_named(cpu_machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.version
    monkeypatch.setattr(machine, "version", lambda name: "" if name == "torch" else real(name))
    _, found = local("--store", str(tmp_path / "none"))
    assert found["Embedded engine"]["state"] == "skipped"
    assert ".[embedded]" in found["Embedded engine"]["remedy"]


def test_a_nearly_full_disk_is_a_warning(cpu_machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LEAST_FREE_GB", 10.0**9)
    status, found = local("--store", str(tmp_path / "none"))
    assert (status, found["Disk"]["state"]) == (0, "warning")
