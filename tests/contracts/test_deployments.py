"""Commands of examples/kubernetes, which tests/repository compares with those of `serve`, are taken by the programs."""

from __future__ import annotations

import argparse
import json
import warnings
from typing import Any

import pytest
from chart_kit import CASES, COORDINATOR, platforms, ray_engine, served

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lmcache.cli.commands.coordinator import CoordinatorCommand
    from lmcache.cli.commands.server import ServerCommand
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

pytestmark = [pytest.mark.filterwarnings("ignore")]

LINES = {name: served(case) for name, case in CASES.items()}


def lmcache(command: Any, words: list[str]) -> Any:
    parser = argparse.ArgumentParser(exit_on_error=False)
    command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(scope="module")
def vllm() -> FlexibleArgumentParser:
    """vLLM's own parser of `vllm serve`."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser  # elsewhere in other versions

    return make_arg_parser(FlexibleArgumentParser(exit_on_error=False))


@pytest.mark.own_version
@pytest.mark.parametrize("name", LINES)
def test_vllm_takes_the_charts_command(name: str, vllm: FlexibleArgumentParser) -> None:
    got = vllm.parse_args(["Qwen/Qwen3-8B", *LINES[name].vllm[2:]])
    assert got.kv_transfer_config.kv_connector == "CacheBlendConnector"
    assert got.kv_transfer_config.kv_connector_module_path == "lmcache_rag.connector.connector"
    assert got.kv_transfer_config.kv_connector_extra_config["lmcache_rag.chunk_size"] in (64, 256)
    assert got.max_num_batched_tokens == 8192


@pytest.mark.parametrize("name", LINES)
def test_lmcache_takes_the_charts_command(name: str) -> None:
    coordinator = ["--coordinator-url", "http://c:9300", "--coordinator-event-reporting"]
    coordinator += ["--coordinator-blend-timeout", "0.25", "--instance-id", "docs-lmcache-rag-0"]
    got = lmcache(ServerCommand(), [*LINES[name].lmcache[1:], *coordinator])
    assert got.engine_type == "blend"
    assert got.chunk_size == (256 if name == "larger chunks" else 64)
    assert (got.coordinator_url, got.coordinator_event_reporting) == ("http://c:9300", True)
    assert got.coordinator_blend_timeout == 0.25


def test_lmcache_takes_the_coordinators_command() -> None:
    got = lmcache(CoordinatorCommand(), list(COORDINATOR[2:]))
    assert (got.enable_blend_lookup, got.chunk_size, got.port) == (True, 64, 9300)
    assert (got.checkpoint_path, got.metadata_path) == ("/state/checkpoint", "/state/metadata")


@pytest.mark.own_version
@pytest.mark.parametrize("name", [name for name, found in platforms().items() if "vllm" in found])
def test_vllm_takes_other_platforms_options(name: str, vllm: FlexibleArgumentParser) -> None:
    got = vllm.parse_args(["Qwen/Qwen3-8B", *platforms()[name]["vllm"]])
    assert got.kv_transfer_config.kv_connector == "CacheBlendConnector"


@pytest.mark.parametrize("name", [name for name, found in platforms().items() if "lmcache" in found])
def test_lmcache_takes_other_platforms_options(name: str) -> None:
    found = platforms()[name]
    got = lmcache(ServerCommand(), found["lmcache"])
    assert (got.engine_type, got.chunk_size, got.supported_transfer_mode) == ("blend", 64, "lmcache_driven")
    assert json.loads(got.server_module[0] if isinstance(got.server_module, list) else got.server_module)
    if "coordinator" in found:
        assert lmcache(CoordinatorCommand(), found["coordinator"]).chunk_size == 64


@pytest.mark.own_version
def test_vllm_takes_rays_engine_arguments() -> None:
    made = AsyncEngineArgs(model="Qwen/Qwen3-8B", **ray_engine()).kv_transfer_config
    assert (made["kv_connector"] if isinstance(made, dict) else made.kv_connector) == "CacheBlendConnector"
