"""`serve` on the command line: its options, its help, and what it checks before anything starts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from commands_kit import dry_run
from serve_kit import UNDEFINED, fake_packages, free_ports
from typer.testing import CliRunner

from lmcache_rag.cli.app import app
from lmcache_rag.cli.serve import hoist_own_options
from lmcache_rag.connector.config import ConnectorOptions

TESTS = Path(__file__).parents[1]
PATIENCE_S = 60.0


def test_our_options_may_stand_behind_the_model() -> None:
    flags = {"--dry-run": True, "--l2": False, "--port": False}
    given = ["M", "--l2", "/a", "-tp", "2", "--dry-run", "--port=1", "--x", "y", "--", "--port", "2"]
    assert hoist_own_options(given, flags) == [
        "--l2",
        "/a",
        "--dry-run",
        "--port=1",
        "M",
        "-tp",
        "2",
        "--x",
        "y",
        "--port",
        "2",
    ]


def test_dry_run_prints_the_two_commands() -> None:
    result = dry_run("some/model", "--dry-run", "-cc.cudagraph_mode=FULL", "--ratio", "0.2", "--l2", "/data/kv")
    assert result.exit_code == 0, result.output
    lmcache, vllm = map(shlex.split, result.stdout.splitlines())
    assert lmcache[:4] == ["python", "-m", "lmcache_rag.serving.lmcache_server", "server"]
    assert dry_run("some/model", "--dry-run").stdout.startswith("lmcache server ")
    assert vllm.pop(0).startswith("LMCACHE_RAG_SECRET_FILE=/")
    assert vllm[:3] == ["vllm", "serve", "some/model"]
    assert vllm[-1] == "-cc.cudagraph_mode=FULL"
    transfer = json.loads(vllm[vllm.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector_extra_config"]["lmcache_rag.ratio"] == 0.2
    assert "lmcache_rag.step_tokens" not in transfer["kv_connector_extra_config"]


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [("--step-tokens", "step_tokens", 512), ("--chunk-size", "chunk_size", 256)],
)
def test_what_the_connector_must_know_is_told_to_it(option: str, name: str, value: int) -> None:
    result = dry_run("some/model", "--dry-run", option, str(value))
    vllm = shlex.split(result.stdout.splitlines()[1])
    extra = json.loads(vllm[vllm.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    assert getattr(ConnectorOptions.read(lambda key, default: extra.get(key, default)), name) == value


def test_index_and_store_modes_reach_both_servers() -> None:
    from lmcache_rag.connector.lmcache_server.settings import ServerSettings

    made = dry_run("some/model", "--dry-run", "--index", "all", "--store", "ingest", "--index-size", "1000")
    lmcache, vllm = map(shlex.split, made.stdout.splitlines())
    module = json.loads(lmcache[lmcache.index("--server-module") + 1])
    assert ServerSettings.read(module["config"]) == ServerSettings("all", "ingest", 1000)
    extra = json.loads(vllm[vllm.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    assert extra["lmcache_rag.store"] == "ingest"
    usual = dry_run("some/model", "--dry-run").stdout
    assert '"config"' not in usual
    assert ServerSettings.read({}) == ServerSettings("declared", "all")
    for wrong in (["--index", "some"], ["--store", "none"], ["--index-size", "0"]):
        assert dry_run("some/model", "--dry-run", *wrong).exit_code == 2


def test_budgets_of_tenants_reach_both_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_RAG_TENANT_BUDGET", "other=1,*=2")
    for words, wanted in ((("--tenant-budget", "acme=40"), {"acme": 40.0}), ((), {"other": 1.0, "*": 2.0})):
        lmcache, vllm = map(shlex.split, dry_run("some/model", "--dry-run", *words).stdout.splitlines())
        module = json.loads(lmcache[lmcache.index("--server-module") + 1])
        assert module["config"] == {"budgets": wanted}
        extra = json.loads(vllm[vllm.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
        assert ConnectorOptions.read(lambda key, default, extra=extra: extra.get(key, default)).tenants
    assert "TENANT=GB" in dry_run("some/model", "--dry-run", "--tenant-budget", "acme").stderr
    monkeypatch.delenv("LMCACHE_RAG_TENANT_BUDGET")
    assert "lmcache_rag.tenants" not in dry_run("some/model", "--dry-run").stdout


def test_dry_run_in_json() -> None:
    document = json.loads(dry_run("some/model", "--dry-run", "--json", "--port", "9000").stdout)
    assert document["url"] == "http://127.0.0.1:9000"
    assert document["vllm"][:3] == ["vllm", "serve", "some/model"]


@pytest.mark.parametrize("verb", ["serve", "doctor"])
def test_the_help_has_examples_and_fits_80_columns(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert f"lmcache-rag {verb}" in result.stdout.partition("Examples")[2]
    assert max(map(len, result.stdout.splitlines())) <= 80
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    assert [p.name for p in command.params if not p.help] == []


def test_wrong_use_is_told() -> None:
    assert dry_run("some/model", "--dry-run", "--chunk-size", "50").exit_code == 2
    assert dry_run("some/model", "--dry-run", "--ratio", "2").exit_code == 2


@pytest.mark.parametrize("fits", [True, False])
def test_unfit_cuda_code_is_reported_and_it_serves(tmp_path: Path, fits: bool) -> None:
    for name in ("lmcache", "vllm"):
        (tmp_path / name).mkdir()
    packages = fake_packages(tmp_path, code="" if fits else f"raise ImportError({UNDEFINED!r})")
    ports = free_ports(3)
    flags = [f"--port={ports[0]}", f"--lmcache-port={ports[1]}", f"--lmcache-http-port={ports[2]}"]
    clean = {name: text for name, text in os.environ.items() if not name.startswith(("LMCACHE_RAG_", "VLLM_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "lmcache_rag.cli", "serve", "tiny", *flags, "--log-dir", str(tmp_path / "logs")],
        cwd=tmp_path,
        env={**clean, "PYTHONPATH": os.pathsep.join([str(packages), str(TESTS.parent)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "blending: query at 0.15" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143
    said = "LMCache's CUDA code does not fit PyTorch 2.13.0+cu130, so nothing is blended: ImportError: cuda_ops.so"
    assert (said in stderr) == (not fits)
    assert ('pip install "vllm==0.32.0"' in stderr) == (not fits)
    assert ("vLLM may not start" in stderr) == (shutil.which("nvidia-smi") is None)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_what_to_install() -> None:
    result = dry_run("some/model")
    assert result.exit_code == 2
    assert "Not installed: vLLM, LMCache." in result.stderr
    assert 'pip install ".[gpu]"' in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_no_model_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("lmcache_rag.weights.find.find_served", asked.append)
    result = CliRunner().invoke(app, ["serve", "some/model"])
    assert (result.exit_code, asked) == (2, [])
    assert "Not installed" in result.stderr


def test_the_document_has_every_option_and_right_sizes() -> None:
    text = (TESTS.parent / "docs" / "serving.md").read_text()
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    for parameter in command.params:
        if parameter.name not in ("json", "verbose", "served_model", "vllm", "help"):
            assert f"`{parameter.opts[0]}`" in text
    rows = [
        row.strip("| ").replace(",", "").split(" | ") for row in text.splitlines() if re.match(r"\| [\w.-]+ \| \d", row)
    ]
    assert len(rows) == 13
    for _, layers, heads, size, nbytes, tokens in rows:
        assert int(nbytes) == 2 * int(layers) * int(heads) * int(size) * 2
        assert int(tokens) == 20 * 2**30 // int(nbytes)
