"""The smallest client of docs/wire-format.md with a real vLLM and LMCache. Without CUDA nothing is blended."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_cpu_kit import CHUNK, Servers, needs_vllm_cpu

from lmcache_rag import protocol

pytestmark = [pytest.mark.slow, needs_vllm_cpu]
PAGE = (Path(__file__).parents[2] / "docs" / "wire-format.md").read_text(encoding="utf-8")


def test_the_smallest_client_is_answered(servers: Servers) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    client = block.replace("http://localhost:8000", servers.url)
    client += "\nimport json\nprint(json.dumps([len(prompt), len(prefix), statistics]))"
    done = subprocess.run([sys.executable, "-c", client], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    length, prefix, statistics = json.loads(done.stdout.splitlines()[-1])
    assert prefix % CHUNK == 0
    assert statistics[protocol.CAN_BLEND] is False
    assert sum(statistics[name] for name in protocol.COUNTS) == statistics["prompt_tokens"] == length
    assert [name for name in statistics if f"`{name}`" not in PAGE] == []
