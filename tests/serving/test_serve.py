"""serve: the commands it makes, and real process trees that hang, die, resist and are killed.

Neither vLLM nor LMCache runs here: the servers are stand-ins (serve_kit), everything around them is real.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from serve_kit import UNDEFINED, alive, fake_packages, free_ports
from typer.testing import CliRunner

from lmcache_rag.cli.app import app
from lmcache_rag.cli.serve import hoist_own_options
from lmcache_rag.connector.config import ConnectorOptions
from lmcache_rag.errors import ConfigError
from lmcache_rag.serving.commands import ServeOptions, commands
from lmcache_rag.serving.process import descendants

TESTS = Path(__file__).parents[1]
PATIENCE_S = 60.0


def make(*vllm: str, environment: dict[str, str] | None = None, **options: Any) -> Any:
    return commands(ServeOptions("some/model", vllm, **options), environment or {})


def value(command: tuple[str, ...], name: str) -> str:
    assert command.count(name) == 1
    return command[command.index(name) + 1]


# -- the commands -----------------------------------------------------------------------------------------------


def test_lmcache_blends_on_loopback_with_our_options() -> None:
    made = make(
        l1_gb=12.5, chunk_size=128, lmcache_port=7001, lmcache_http_port=7002, l2=("/data/kv", "redis://r:6379")
    )
    assert made.lmcache[0] == "server"
    assert value(made.lmcache, "--engine-type") == "blend"
    assert value(made.lmcache, "--supported-transfer-mode") == "lmcache_driven"
    assert value(made.lmcache, "--chunk-size") == "128"
    assert value(made.lmcache, "--l1-size-gb") == "12.5"
    assert (value(made.lmcache, "--host"), value(made.lmcache, "--port")) == ("localhost", "7001")
    assert (value(made.lmcache, "--http-host"), value(made.lmcache, "--http-port")) == ("127.0.0.1", "7002")
    tiers = [json.loads(made.lmcache[i + 1]) for i, word in enumerate(made.lmcache) if word == "--l2-adapter"]
    assert tiers == [{"type": "fs", "base_path": "/data/kv"}, {"type": "resp", "host": "r", "port": 6379}]
    assert made.lmcache_url == "http://127.0.0.1:7002"


def test_vllm_gets_our_connector_with_its_settings() -> None:
    made = make(policy="hkvd", ratio=0.3, lmcache_port=7001)
    assert made.vllm[:2] == ("serve", "some/model")
    assert value(made.vllm, "--host") == "127.0.0.1"
    transfer = json.loads(value(made.vllm, "--kv-transfer-config"))
    assert transfer["kv_connector"] == "CacheBlendConnector"
    assert transfer["kv_role"] == "kv_both"
    assert transfer["kv_load_failure_policy"] == "recompute"
    assert (TESTS.parent / (transfer["kv_connector_module_path"].replace(".", "/") + ".py")).is_file()
    extra = transfer["kv_connector_extra_config"]
    assert extra["lmcache.mp.port"] == 7001
    read = ConnectorOptions.read(extra.get)
    assert (read.policy, read.ratio, read.blend) == ("hkvd", 0.3, True)
    assert made.blends


@pytest.mark.parametrize("words", [("--gpu-memory-utilization", "0.5"), ("--gpu_memory_utilization=0.5",)])
def test_options_for_vllm_win_and_pass_unchanged(words: tuple[str, ...]) -> None:
    made = make(*words, "--max-model-len", "4096", "-tp", "2")
    assert made.vllm[-len(words) - 4 :] == (*words, "--max-model-len", "4096", "-tp", "2")
    assert sum(word.replace("_", "-").startswith("--gpu-memory-utilization") for word in made.vllm) == 1


def test_another_connector_is_left_alone() -> None:
    made = make("--kv-transfer-config", '{"kv_connector": "NixlConnector"}')
    assert made.vllm.count("--kv-transfer-config") == 1
    assert not made.blends
    assert "nothing is blended" in made.note


def test_unused_options_beside_an_own_config_are_named() -> None:
    made = make("--kv-transfer-config", '{"kv_connector": "CacheBlendConnector"}')
    assert made.blends
    for name in ("--policy", "--ratio", "--step-tokens", "--chunk-size", "--lmcache-port", "--connector"):
        assert name in made.note
    assert make().note == ""
    result = dry_run("some/model", "--dry-run", "--kv-transfer-config", '{"kv_connector": "CacheBlendConnector"}')
    assert "are not used" in result.stderr


@pytest.mark.parametrize("name", ["--kv-transfer-config", "--kv_transfer_config"])
def test_partial_kv_transfer_configs_are_refused(name: str) -> None:
    words = (f"{name}.kv_connector_extra_config.x", "1")
    with pytest.raises(ConfigError, match="not merge them") as caught:
        make(*words)
    assert "--connector KEY=VALUE" in caught.value.remedy


def test_the_connectors_settings_can_be_set_one_by_one() -> None:
    words = ["--connector", "lmcache_rag.overlap=false", "--connector=lmcache.mp.host=tcp://other", "--ratio", "0.3"]
    result = dry_run("some/model", "--dry-run", *words, "--connector", "lmcache_rag.poll=0.5")
    vllm = shlex.split(result.stdout.splitlines()[1])
    extra = json.loads(vllm[vllm.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    assert extra["lmcache.mp.host"] == "tcp://other"
    read = ConnectorOptions.read(extra.get)
    assert (read.overlap, read.poll, read.ratio) == (False, 0.5, 0.3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("overlap", "is not KEY=VALUE"),
        ("=1", "is not KEY=VALUE"),
        ("lmcache_rag.overlapp=false", "there is no lmcache_rag.overlapp"),
        ("lmcache_rag.overlap=no", "must be of type bool"),
        ("lmcache_rag.ratio=2", "between 0 and 1"),
    ],
)
def test_wrong_settings_fail_before_the_start(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        make(connector=(text,))
    assert caught.value.remedy


# -- vLLM's own file of options -----------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "options.yaml").write_text(text)
        return str(tmp_path / "options.yaml")

    return write


def test_vllms_file_of_options_wins_over_ours_too(file: Callable[[str], str]) -> None:
    text = """
gpu_memory_utilization: 0.5
max-num-batched-tokens: 4096
host: 0.0.0.0
port: 9000
api-key: [secret, other]
tensor-parallel-size: 2
enforce-eager: true
"""
    made = make("--config", file(text))
    for name in ("--gpu-memory-utilization", "--max-num-batched-tokens", "--host", "--port"):
        assert name not in made.vllm, "the command line would win over the file"
    assert "--max-cudagraph-capture-size" not in made.vllm
    assert made.vllm.count("--kv-transfer-config") == 1
    assert (made.url, made.api_key) == ("http://127.0.0.1:9000", "secret")
    assert value(made.lmcache, "--max-gpu-workers") == "2"


def test_the_command_line_wins_over_vllms_file(file: Callable[[str], str]) -> None:
    name = file("tensor-parallel-size: 4\nport: 9000\nblock-size: 48\n")
    made = make("--config", name, "-tp", "2", "--block-size", "16")
    assert value(made.lmcache, "--max-gpu-workers") == "2"
    made = make("--config", name, "--block-size", "16", port=7000)
    assert (value(made.vllm, "--port"), made.url) == ("7000", "http://127.0.0.1:7000")
    made = make("--config", name, "--block-size", "16", "--port", "6000", port=7000)
    assert (value(made.vllm, "--port"), made.url) == ("6000", "http://127.0.0.1:6000")
    with pytest.raises(ConfigError, match="multiple of vLLM's block size, 48"):
        make("--config", name)


def test_a_connector_in_vllms_file_is_seen(file: Callable[[str], str]) -> None:
    other = make("--config", file("kv-transfer-config:\n  kv_connector: NixlConnector\n"))
    assert (other.blends, "--kv-transfer-config" in other.vllm) == (False, False)
    ours = make("--config", file("kv-transfer-config:\n  kv_connector: CacheBlendConnector\n"))
    assert (ours.blends, "are not used" in ours.note) == (True, True)
    with pytest.raises(ConfigError, match="not merge them"):
        make("--config", file("kv-transfer-config.kv_role: kv_both\n"))


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", None])
def test_a_file_that_vllm_cannot_read_is_told_at_once(file: Callable[[str], str], tmp_path: Path, text: Any) -> None:
    name = str(tmp_path / "none.yaml") if text is None else file(text)
    with pytest.raises(ConfigError, match="--config") as caught:
        make("--config", name)
    assert "YAML" in caught.value.remedy


@pytest.mark.parametrize(
    ("words", "url"),
    [
        ((), "http://127.0.0.1:8000"),
        (("--port=9000",), "http://127.0.0.1:9000"),
        (("--host", "0.0.0.0"), "http://127.0.0.1:8000"),
        (("--host", "::"), "http://[::1]:8000"),
        (("--ssl-certfile", "cert.pem"), "https://127.0.0.1:8000"),
    ],
)
def test_the_address_is_where_vllm_listens(words: tuple[str, ...], url: str) -> None:
    assert make(*words).url == url


def test_a_gpu_worker_of_lmcache_for_each_rank() -> None:
    assert value(make("--tensor-parallel-size", "4").lmcache, "--max-gpu-workers") == "4"
    assert value(make("-tp", "2").lmcache, "--max-gpu-workers") == "2"
    assert value(make("-tp", "2", "--data-parallel-size=3").lmcache, "--max-gpu-workers") == "6"
    assert "--max-gpu-workers" not in make().lmcache
    assert "--max-gpu-workers" not in make("-tp", "1").lmcache


def test_several_ranks_use_graphs_by_default() -> None:
    assert value(make("-tp", "2").vllm, "--max-cudagraph-capture-size") == "2048"
    assert "--max-cudagraph-capture-size" not in make().vllm, "on one GPU it gains nothing"
    assert "--max-cudagraph-capture-size" not in make("-dp", "2").vllm
    for words in (
        ("--enforce-eager",),
        ("--cudagraph-capture-sizes", "1", "2"),
        ("--compilation-config.mode", "3"),
        ("-cc", '{"max_cudagraph_capture_size": 64}'),
    ):
        assert "--max-cudagraph-capture-size" not in make("-tp", "2", *words).vllm
    assert make("-tp", "2", "--max-cudagraph-capture-size", "64").vllm.count("--max-cudagraph-capture-size") == 1


@pytest.mark.parametrize(
    ("allowed", "added"),
    [
        (None, {}),
        ("", {"VLLM_PLUGINS": "lmcache_rag"}),
        ("a,lmcache_rag", {}),
        ("a", {"VLLM_PLUGINS": "a,lmcache_rag"}),
    ],
)
def test_vllm_plugins_must_let_ours_in(allowed: str | None, added: dict[str, str]) -> None:
    environment = {} if allowed is None else {"VLLM_PLUGINS": allowed}
    assert make(environment=environment).environment == added


@pytest.mark.parametrize("words", [(), ("--block-size", "64")])
def test_a_chunk_must_be_a_multiple_of_the_block(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="multiple of vLLM's block size"):
        make(*words, chunk_size=96 if words else 40)


@pytest.mark.parametrize("options", [{"l1_gb": 0.0}, {"chunk_size": 0}, {"vllm": ("--port", "no")}])
def test_numbers_without_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        commands(ServeOptions("some/model", **options), {})
    assert caught.value.remedy


def test_the_key_is_the_one_that_vllm_asks_for() -> None:
    both = {"VLLM_API_KEY": "vllm's", "LMCACHE_RAG_API_KEY": "ours"}
    assert make(environment=both).api_key == "vllm's"
    assert make(environment={"LMCACHE_RAG_API_KEY": "ours"}).api_key == "ours"


def test_a_shell_gets_the_same_words() -> None:
    variables = {"VLLM_PLUGINS": "a", "LMCACHE_RAG_SECRET_FILE": "/its place"}
    made = make("--chat-template", "a file.jinja", environment=variables, l2=("/data/it's here",))
    lmcache, vllm = made.shell()
    assert tuple(shlex.split(lmcache)) == ("lmcache", *made.lmcache)
    before = ("VLLM_PLUGINS=a,lmcache_rag", "LMCACHE_RAG_SECRET_FILE=/its place")
    assert tuple(shlex.split(vllm)) == (*before, "vllm", *made.vllm)


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


def dry_run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["serve", *arguments])


def test_dry_run_prints_the_two_commands() -> None:
    result = dry_run("some/model", "--dry-run", "-cc.cudagraph_mode=FULL", "--ratio", "0.2", "--l2", "/data/kv")
    assert result.exit_code == 0, result.output
    lmcache, vllm = map(shlex.split, result.stdout.splitlines())
    assert lmcache[:2] == ["lmcache", "server"]
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
    from lmcache_rag.connector.config import ConnectorOptions

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


@pytest.mark.parametrize(
    "wrong", [{"index": "x"}, {"store": "x"}, {"index_size": True}, {"index_size": 0}, {"sise": 1}], ids=str
)
def test_wrong_server_settings_are_named(wrong: dict[str, Any]) -> None:
    from lmcache_rag.connector.lmcache_server.settings import ServerSettings

    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServerSettings.read(wrong)


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


# -- the processes ----------------------------------------------------------------------------------------------

DRIVER = """
import sys
sys.path[:0] = {path!r}
from lmcache_rag.cli import main
from lmcache_rag.cli.run import Services, serve_commands
from lmcache_rag.serving.supervise import Timeouts
kit, folders = {kit!r}, {folders!r}
def commands(options):
    made, _, _ = serve_commands(options)
    return (made, [sys.executable, kit, "lmcache", str(options.lmcache_http_port), folders[0]],
            [sys.executable, kit, "vllm", str(options.port), folders[1]])
timeouts = lambda longest: Timeouts(20, longest, 0.02, 0.1, 1.0, 0.1, 0.5, 3.0)
main(Services(serve_commands=commands, serve_timeouts=timeouts))
"""


def until(what: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := what()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return result


@dataclass
class Serving:
    """`lmcache-rag serve` as a process, with its two stand-ins."""

    process: subprocess.Popen[str]
    folder: Path
    port: int

    @property
    def lmcache(self) -> Path:
        return self.folder / "lmcache"

    @property
    def vllm(self) -> Path:
        return self.folder / "vllm"

    def pids(self, who: Path) -> list[list[int]]:
        """Pids of a server and its two children, a list for each start of it."""
        file = who / "pids"
        return [[int(word) for word in line.split()] for line in file.read_text().splitlines()] if file.exists() else []

    def ready(self) -> str:
        """Wait for the line that says so."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def tree(self) -> list[int]:
        """Everything that runs: guards, servers, their children."""
        found = {
            *descendants(self.process.pid),
            *(pid for who in (self.lmcache, self.vllm) for p in self.pids(who) for pid in p),
        }
        return sorted(pid for pid in found if alive(pid))

    def end(self) -> tuple[int, str]:
        """Wait for the end: (status, stderr)."""
        _, stderr = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, stderr


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    begun: list[Serving] = []

    def run(*options: str, variables: dict[str, str] = {}, **files: str) -> Serving:  # noqa: B006
        """Start it; `files` are made in the servers' folders, as vllm_stubborn="" for example."""
        folders = [tmp_path / "lmcache", tmp_path / "vllm"]
        for folder in folders:
            folder.mkdir()
        for name, text in files.items():
            who, _, file = name.partition("_")
            (tmp_path / who / file).write_text(text)
        ports = free_ports(3)
        code = DRIVER.format(
            path=[str(TESTS.parent)],
            kit=str(TESTS / "support" / "serve_kit.py"),
            folders=[str(folder) for folder in folders],
        )
        flags = [f"--port={ports[0]}", f"--lmcache-port={ports[1]}", f"--lmcache-http-port={ports[2]}"]
        clean = {name: text for name, text in os.environ.items() if not name.startswith(("LMCACHE_RAG_", "VLLM_"))}
        process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", "tiny", *flags, "--log-dir", str(tmp_path / "logs"), *options],
            cwd=tmp_path,
            env={**clean, "PYTHONPATH": str(TESTS.parent), "LMCACHE_RAG_STATE": str(tmp_path / "state"), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begun.append(Serving(process, tmp_path, ports[0]))
        return begun[-1]

    yield run
    for one in begun:
        left = one.tree()
        one.process.kill()
        for pipe in (one.process.stdout, one.process.stderr):
            pipe.close()
        one.process.wait()
        for pid in left:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_one_line_says_where_it_is_and_what_is_on(start: Callable[..., Serving]) -> None:
    serving = start("--l2", "kv")
    line = serving.ready()
    assert f"http://127.0.0.1:{serving.port}/v1 serves tiny" in line
    assert "blending: query at 0.15" in line
    assert "1 second tier" in line
    assert f"logs in {serving.folder / 'logs'}" in line
    serving.process.send_signal(signal.SIGTERM)
    status, stderr = serving.end()
    assert status == 143
    assert "LMCache is healthy" in stderr
    assert "vLLM is healthy" in stderr
    assert "vllm listens" in (serving.folder / "logs" / "vllm.log").read_text()


def test_it_reports_what_the_server_really_does(start: Callable[..., Serving]) -> None:
    serving = start("--policy", "hkvd", vllm_mode="all")
    assert "blending: all at 1;" in serving.ready()
    serving.process.send_signal(signal.SIGTERM)
    serving.end()


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


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_what_to_install() -> None:
    result = dry_run("some/model")
    assert result.exit_code == 2
    assert "Not installed: vLLM, LMCache." in result.stderr
    assert 'pip install "lmcache-rag[gpu]"' in result.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_passes_through_and_nothing_is_left(
    start: Callable[..., Serving], number: signal.Signals, status: int
) -> None:
    serving = start()
    serving.ready()
    tree = serving.tree()
    assert len(tree) == 8  # two guards, two servers, two children of each
    serving.process.send_signal(number)
    assert serving.end()[0] == status
    assert [(who / "signals").read_text().split() for who in (serving.vllm, serving.lmcache)] == [[number.name]] * 2
    assert [pid for pid in tree if alive(pid)] == []


def test_a_signal_while_it_starts_leaves_nothing(start: Callable[..., Serving]) -> None:
    serving = start(vllm_hang="")
    until(lambda: serving.pids(serving.vllm))
    tree = serving.tree()
    serving.process.send_signal(signal.SIGTERM)
    assert serving.end()[0] == 143
    assert [pid for pid in tree if alive(pid)] == []


@pytest.mark.parametrize("files", [{}, {"vllm_stubborn": "", "lmcache_stubborn": ""}], ids=["willing", "stubborn"])
def test_nothing_outlives_a_parent_that_is_killed(start: Callable[..., Serving], files: dict[str, str]) -> None:
    serving = start(**files)
    serving.ready()
    tree = serving.tree()
    assert len(tree) == 8
    serving.process.kill()
    until(lambda: not any(map(alive, tree)), 20)


def test_a_second_signal_kills_a_server_that_resists(start: Callable[..., Serving]) -> None:
    serving = start(vllm_stubborn="")
    serving.ready()
    tree = serving.tree()
    serving.process.send_signal(signal.SIGINT)
    until((serving.vllm / "signals").exists)
    serving.process.send_signal(signal.SIGINT)
    status, stderr = serving.end()
    assert status == 130
    assert "vLLM is killed." in stderr
    assert [pid for pid in tree if alive(pid)] == []


def test_lmcache_is_started_again_and_vllm_goes_on(start: Callable[..., Serving]) -> None:
    serving = start()
    serving.ready()
    for times in (1, 2):
        os.kill(serving.pids(serving.lmcache)[-1][0], signal.SIGKILL)
        until(lambda times=times: len(serving.pids(serving.lmcache)) > times)
    first, second, third = serving.pids(serving.lmcache)
    assert [pid for pid in first + second if alive(pid)] == []
    assert all(map(alive, third))
    assert len(serving.pids(serving.vllm)) == 1
    serving.process.send_signal(signal.SIGTERM)
    status, stderr = serving.end()
    assert status == 143
    assert "LMCache ended with signal SIGKILL." in stderr
    assert "again in 0.1 s" in stderr
    assert "again in 0.2 s" in stderr


def test_lmcache_that_hangs_is_killed_and_restarted(start: Callable[..., Serving]) -> None:
    serving = start()
    serving.ready()
    (serving.lmcache / "hang").touch()
    until(lambda: not any(map(alive, serving.pids(serving.lmcache)[0])))
    (serving.lmcache / "hang").unlink()
    until(lambda: len(serving.pids(serving.lmcache)) > 1)
    assert alive(serving.pids(serving.vllm)[0][0])
    serving.process.send_signal(signal.SIGTERM)
    assert "has not answered for" in serving.end()[1]


@pytest.mark.parametrize("how", ["status 7", "SIGKILL"])
def test_the_end_of_vllm_ends_all_with_its_last_lines(start: Callable[..., Serving], how: str) -> None:
    serving = start()
    serving.ready()
    tree = serving.tree()
    if how == "SIGKILL":
        os.kill(serving.pids(serving.vllm)[0][0], signal.SIGKILL)
    else:
        (serving.vllm / "end").write_text("7")
    status, stderr = serving.end()
    assert status == (137 if how == "SIGKILL" else 7)
    assert f"vLLM ended with {'signal ' * (how == 'SIGKILL')}{how}." in stderr
    assert ("vllm listens" if how == "SIGKILL" else "vllm says its last words") in stderr
    assert [pid for pid in tree if alive(pid)] == []


@pytest.mark.parametrize(("who", "status"), [("vllm", 5), ("lmcache", 3)])
def test_a_server_that_cannot_start_says_why(start: Callable[..., Serving], who: str, status: int) -> None:
    serving = start(**{f"{who}_fail": ""})
    got, stderr = serving.end()
    assert got == status
    assert f"{who} cannot start: no such model" in stderr
    assert serving.tree() == []


def test_a_server_that_never_gets_healthy_is_given_up(start: Callable[..., Serving]) -> None:
    serving = start("--start-timeout", "1", vllm_hang="")
    status, stderr = serving.end()
    assert status == 3
    assert "vLLM was not healthy after 1 s." in stderr
    assert serving.tree() == []


def test_a_port_in_use_is_told_before_anything_starts(start: Callable[..., Serving]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        serving = start(f"--port={taken.getsockname()[1]}")
        status, stderr = serving.end()
    assert status == 3
    assert "is in use" in stderr
    assert serving.pids(serving.lmcache) == []


# -- the document -----------------------------------------------------------------------------------------------


def test_the_document_shows_the_commands_that_are_run() -> None:
    text = (TESTS.parent / "docs" / "serving.md").read_text()
    made = commands(ServeOptions("Qwen/Qwen3-8B", l1_gb=20), {})
    blocks = [part.partition("```")[0] for part in text.split("```")[1::2]]
    (shell,) = (block.removeprefix("shell\n").splitlines() for block in blocks if block.startswith("shell\n"))
    assert shell == made.shell()
    files = (yaml.safe_load(block.removeprefix("yaml\n")) for block in blocks if block.startswith("yaml\n"))
    compose, pod, two = files
    assert compose["services"]["lmcache"]["command"] == ["lmcache", *made.lmcache]
    assert compose["services"]["vllm"]["command"] == ["vllm", *made.vllm]
    program, verb, *words = pod["spec"]["containers"][0]["command"]
    assert program == "lmcache-rag"
    result = CliRunner().invoke(app, [verb, *words, "--dry-run"])
    assert "--host 0.0.0.0" in result.stdout
    anywhere = commands(ServeOptions("Qwen/Qwen3-8B", l1_gb=20, host="0.0.0.0"), {})
    wanted = [["lmcache", *anywhere.lmcache], ["vllm", *anywhere.vllm]]
    assert [container["command"] for container in two["spec"]["containers"]] == wanted


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
