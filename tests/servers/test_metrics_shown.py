"""What the dashboard and the alerts name is on the running vLLM's /metrics."""

from __future__ import annotations

import httpx
import metric_lists
from every_metric import names
from vllm_cpu_kit import Servers, needs_vllm_cpu

from lmcache_rag.protocol import BOUNDARY_GAUGE, COST_GAUGE

pytestmark = needs_vllm_cpu


def test_the_running_vllm_shows_what_alerts_name(servers: Servers) -> None:
    shown = names(httpx.get(f"{servers.url}/metrics", timeout=30).text)
    theirs = {name for name in metric_lists.named() if name.startswith("vllm:")}
    assert theirs - set(shown) - {COST_GAUGE, BOUNDARY_GAUGE} == set(), "those two need a GPU"
    kept = metric_lists.kept()["vllm"]
    assert {name: kept[name] for name in theirs & set(shown)} == {name: shown[name] for name in theirs & set(shown)}
