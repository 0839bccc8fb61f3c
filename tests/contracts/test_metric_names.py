"""Alerts and the dashboard name metrics that vLLM, LMCache and its coordinator really have. See test_internals.py.

With LMCACHE_RAG_WRITE_METRICS=1 the lists in tests/data/metrics.json are written anew.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import metric_lists
import pytest
from every_metric import names
from vllm_cpu_kit import free_port

SUPPORT = Path(metric_lists.__file__).parent
MODULE = json.dumps({"module_path": "lmcache_rag.connector.server_guard"})


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, list[str]]]]:
    """What a server with a second tier and a coordinator show, of real processes."""
    folder = tmp_path_factory.mktemp("metrics")
    server, http, coordinator = free_port(), free_port(), free_port()
    sizes = ["--engine-type", "blend", "--chunk-size", "64", "--l1-size-gb", "0.1", "--eviction-policy", "LRU"]
    places = ["--host", "localhost", "--port", str(server), "--http-host", "127.0.0.1", "--http-port", str(http)]
    tier = ["--l2-adapter", json.dumps({"type": "fs", "base_path": str(folder / "kv")}), "--server-module", MODULE]
    joins = ["--coordinator-url", f"http://127.0.0.1:{coordinator}", "--coordinator-event-reporting"]
    commands = {
        "lmcache": (http, ["server", *sizes, *places, *tier, *joins]),
        "coordinator": (coordinator, ["coordinator", "--host", "127.0.0.1", "--port", str(coordinator)]),
    }
    with ExitStack() as stack:
        running: dict[str, subprocess.Popen[bytes]] = {}
        for name, (_, words) in commands.items():
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            command = [sys.executable, str(SUPPORT / "every_metric.py"), *words]
            running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(running[name].wait, 60)
            stack.callback(running[name].kill)
        yield {
            name: metric_lists.own(names(_page(port, running[name], folder / f"{name}.log")))
            for name, (port, _) in commands.items()
        }


def _page(port: int, process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + 180
    while True:
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < end, log.read_text()[-4000:]
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10)
        except httpx.HTTPError:
            time.sleep(0.25)
            continue
        if answer.status_code == 200 and "lmcache_" in answer.text:
            return answer.text
        time.sleep(0.25)


def same(program: str, found: dict[str, list[str]]) -> None:
    """The list that is kept; a label that a metric shows only once it has moved is no difference."""
    if os.environ.get("LMCACHE_RAG_WRITE_METRICS"):
        metric_lists.write(program, found)
    assert list(metric_lists.kept()[program]) == list(found)


def test_lmcache_shows_what_alerts_name(shown: Any) -> None:
    theirs = {name for name in metric_lists.named() if name.startswith("lmcache_")}
    assert theirs - set(shown["lmcache"]) - set(shown["coordinator"]) == set()
    assert len(theirs) > 10


def test_lists_of_lmcaches_metrics_are_its_own(shown: Any) -> None:
    if importlib.metadata.version("lmcache") != "0.5.6":
        return  # the list is that of the version that the extra [gpu] takes
    for program, found in shown.items():
        same(program, found)


@pytest.mark.full  # of the running pair: tests/servers/test_metrics_shown.py
@pytest.mark.own_version
def test_vllm_has_what_dashboard_and_alerts_name(smollm2_path: Path) -> None:
    command = [sys.executable, str(SUPPORT / "metric_lists.py"), str(smollm2_path)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    found = json.loads(ran.stdout.splitlines()[-1])
    same("vllm", found)
    assert {name for name in metric_lists.named() if name.startswith("vllm:")} - set(found) == set()
