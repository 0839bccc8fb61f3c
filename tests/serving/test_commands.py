"""The commands of vLLM and LMCache that `serve` makes of its options, vLLM's own, and a file of them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands_kit import dry_run, make, value
from typer.testing import CliRunner

from lmcache_rag.cli.app import app
from lmcache_rag.connector.config import ConnectorOptions
from lmcache_rag.connector.lmcache_server.settings import ServerSettings
from lmcache_rag.errors import ConfigError
from lmcache_rag.serving.commands import CONNECTOR, CPU_L1_SHARE, FILLS_IN, ServeOptions, commands
from lmcache_rag.serving.machine import VLLMBuild
from lmcache_rag.serving.tiers import TIMEOUT_S

TESTS = Path(__file__).parents[1]


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
    checked = {"type": "lmcache_rag", "secret_file": str(made.secret_file)}
    assert [tier.pop("serde") for tier in tiers] == [checked, checked]
    assert tiers == [
        {"type": "fs", "base_path": "/data/kv"},
        {"type": "valkey", "startup_nodes": "r:6379", "request_timeout": TIMEOUT_S},
    ]
    assert made.lmcache_url == "http://127.0.0.1:7002"
    assert value(made.lmcache, "--l2-prefetch-policy") == "retain", "what is read from a tier stays in memory"
    assert "--l2-prefetch-policy" not in make().lmcache


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


def test_a_build_for_cpus_gets_what_fits_it() -> None:
    made = make("--max-model-len", "4096", build=VLLMBuild(cpu=True, has_command=False))
    assert value(made.lmcache, "--supported-transfer-mode") == "auto"
    assert made.vllm[:2] == ("--model", "some/model")
    assert made.vllm[-2:] == ("--max-model-len", "4096")
    assert value(made.vllm, "--block-size") == "32"
    assert float(value(made.vllm, "--gpu-memory-utilization")) + CPU_L1_SHARE < 0.7, "both use the same memory"
    assert made.vllm_run()[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert made.shell()[1].startswith("python -m vllm.entrypoints.openai.api_server --model some/model")
    assert not made.blends
    assert "nothing is blended" in made.note
    assert "embedded engine" in made.note
    assert "nothing is blended" in make("--kv-transfer-config", json.dumps(CONNECTOR), build=made.build).note
    assert value(make("--block-size", "64", build=made.build).vllm, "--block-size") == "64"
    assert "--max-cudagraph-capture-size" not in make("-tp", "2", build=made.build).vllm
    with pytest.raises(ConfigError, match="multiple of vLLM's block size, 32"):
        make(chunk_size=80, build=made.build)
    named_vllm = make(build=VLLMBuild(cpu=True))
    assert named_vllm.vllm[:2] == ("serve", "some/model")
    assert named_vllm.shell()[1].startswith("vllm serve some/model")


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
    assert tuple(shlex.split(lmcache)) == ("python", "-m", FILLS_IN, *made.lmcache)
    before = ("VLLM_PLUGINS=a,lmcache_rag", "LMCACHE_RAG_SECRET_FILE=/its place")
    assert tuple(shlex.split(vllm)) == (*before, "vllm", *made.vllm)


def test_a_recurrent_model_gets_a_prefix_cache_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3NextForCausalLM"]}')

    def made(*vllm: str) -> Any:
        return commands(ServeOptions(str(tmp_path), vllm, l2=("/data",)), {}, VLLMBuild())

    found = made()
    assert (found.lmcache, found.lmcache_words(), found.blends, found.secret_file) == ((), [], False, None)
    assert {"--enable-prefix-caching", "--enable-prompt-tokens-details"} < set(found.vllm)
    assert "--kv-transfer-config" not in found.vllm, "LMCache's connector does not take such a cache"
    assert found.note.startswith("Qwen3NextForCausalLM has recurrent layers")
    assert "stable order" in found.note
    assert [tuple(shlex.split(line)) for line in found.shell()] == [("vllm", *found.vllm)]
    assert "--enable-prefix-caching" not in made("--no-enable-prefix-caching").vllm, "the user's option wins"
    assert made("--kv-transfer-config", "{}").lmcache, "a connector of the user's is the user's choice"


def test_the_document_shows_the_commands_that_are_run() -> None:
    text = (TESTS.parent / "docs" / "serving.md").read_text()
    made = commands(ServeOptions("Qwen/Qwen3-8B", l1_gb=20), {}, VLLMBuild())
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
    anywhere = commands(ServeOptions("Qwen/Qwen3-8B", l1_gb=20, host="0.0.0.0"), {}, VLLMBuild())
    wanted = [["lmcache", *anywhere.lmcache], ["vllm", *anywhere.vllm]]
    assert [container["command"] for container in two["spec"]["containers"]] == wanted


def test_ingestion_yields_unless_told_otherwise(file: Callable[[str], str]) -> None:
    assert value(make().vllm, "--scheduling-policy") == "priority"
    own = make("--scheduling-policy", "fcfs").vllm
    assert (own.count("--scheduling-policy"), value(own, "--scheduling-policy")) == (1, "fcfs")
    assert "--scheduling-policy" not in make("--config", file("scheduling-policy: fcfs\n")).vllm


def test_second_use_and_age_reach_both_servers() -> None:
    made = make(keeps=ServerSettings(store="second", kv_ttl=3600.0))
    assert json.loads(value(made.lmcache, "--server-module"))["config"] == {"store": "second", "kv_ttl": 3600.0}
    extra = json.loads(value(made.vllm, "--kv-transfer-config"))["kv_connector_extra_config"]
    assert extra["lmcache_rag.store"] == "second"
    assert "lmcache_rag.store" not in value(make().vllm, "--kv-transfer-config")
