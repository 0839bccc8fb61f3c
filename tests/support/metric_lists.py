"""The metrics that vLLM, LMCache and its coordinator show, as kept in tests/data/metrics.json.

python metric_lists.py     print vLLM's with our connector (in an environment that has vLLM)
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import yaml
from every_metric import names

MONITORING = Path(__file__).parents[2] / "examples" / "kubernetes" / "lmcache-rag" / "monitoring"
FILE = Path(__file__).parents[1] / "data" / "metrics.json"
GENERAL = ("python_", "process_", "target_info")  # of any Python program


def kept() -> dict[str, dict[str, list[str]]]:
    """By program: the names with their labels."""
    return {program: dict(found) for program, found in json.loads(FILE.read_text()).items()}


def write(program: str, found: dict[str, list[str]]) -> None:
    """Replace one program's list in the file."""
    FILE.write_text(json.dumps(kept() | {program: found}, indent=1, sort_keys=True) + "\n")


def own(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Those of the program itself."""
    return {name: labels for name, labels in found.items() if not name.startswith(GENERAL)}


def expressions() -> Iterator[tuple[str, str]]:
    """(alert or panel, its PromQL), with Grafana's variables as they might be."""
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield (
                panel["title"],
                target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*").replace("$instance", ".*"),
            )


def named() -> set[str]:
    """The metrics that alerts and dashboard name."""
    return {name for _, expression in expressions() for name in re.findall(r"\b(?:vllm:|lmcache_)\w+", expression)}


def vllm(model: Path) -> dict[str, list[str]]:
    """What vLLM's own logger registers at its start with our connector, and the gauges that a worker fills later."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import prometheus_client
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.metrics.loggers import PrometheusStatLogger

        from lmcache_rag.connector import metrics
        from lmcache_rag.protocol import BOUNDARY_GAUGE, COST_GAUGE
    connector = {
        "kv_connector": "CacheBlendConnector",
        "kv_connector_module_path": "lmcache_rag.connector.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache_rag.chunk_size": 64},
    }
    config = EngineArgs(
        model=str(model), max_model_len=512, block_size=32, kv_transfer_config=connector
    ).create_engine_config()
    logger = PrometheusStatLogger(config, [0])
    figures = [[COST_GAUGE, "prefill_1024", 1.0], [BOUNDARY_GAUGE, "l1", 1.0]]
    logger.kv_connector_prom.observe({metrics.RECORDS: [], metrics.COSTS: figures}, 0)
    return own(names(prometheus_client.generate_latest().decode()))


if __name__ == "__main__":
    print(json.dumps(vllm(Path(sys.argv[1]))))
