"""vLLM reads its command line and its file of options as `serve` reads them. See test_internals.py."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

from lmcache_rag.serving.commands import ServeOptions, commands
from lmcache_rag.serving.machine import VLLMBuild

OPTIONS = (
    "--host",
    "--port",
    "--max-num-batched-tokens",
    "--gpu-memory-utilization",
    "--scheduling-policy",
    "--kv-transfer-config",
    "--config",
)


@pytest.fixture
def parser() -> FlexibleArgumentParser:
    """As much of vLLM's parser as these tests ask for."""
    parser = FlexibleArgumentParser()
    for name in OPTIONS:
        parser.add_argument(name)
    parser.add_argument("words", nargs="*")
    return parser


def test_vllm_takes_a_file_of_options_as_we_read_it(parser: FlexibleArgumentParser, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("gpu_memory_utilization: 0.5\nport: 9000\n")
    made = commands(ServeOptions("some/model", ("--config", str(file))), {}, VLLMBuild())
    got = parser.parse_args(list(made.vllm))
    assert (got.gpu_memory_utilization, got.port, got.max_num_batched_tokens) == ("0.5", "9000", "8192")
    assert json.loads(got.kv_transfer_config)["kv_connector"] == "CacheBlendConnector"
    assert made.url == "http://127.0.0.1:9000"


def test_vllm_drops_an_option_given_whole_and_in_parts(parser: FlexibleArgumentParser) -> None:
    """So `serve` refuses parts of --kv-transfer-config: the connector would be gone."""
    parts = ["serve", "m", "--kv-transfer-config", '{"a": 1}', "--kv-transfer-config.b", "2"]
    assert "a" not in json.loads(parser.parse_args(parts).kv_transfer_config), "then they need not be refused"
