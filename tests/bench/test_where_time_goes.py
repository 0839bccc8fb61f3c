"""benchmarks/where_time_goes.py: what it makes of a server's histograms and statistics."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "where_time_goes.py"
PAGE = """# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_bucket{engine="0",le="0.3",model_name="m"} 3.0
vllm:request_queue_time_seconds_count{engine="0",model_name="m"} 3.0
vllm:request_queue_time_seconds_sum{engine="0",model_name="m"} 0.5
vllm:request_queue_time_seconds_count{engine="1",model_name="m"} 1.0
vllm:request_queue_time_seconds_sum{engine="1",model_name="m"} 2.5e-01
vllm:request_prefill_time_seconds_count 4.0
vllm:request_prefill_time_seconds_sum 1.0
"""
STATISTICS = {"lookup_ms": 5.0, "load_ms": 20.0, "select_ms": 6.0, "blend_ms": 30.0, "decision": "blended"}


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("where_time_goes", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_histogram_is_read_over_all_engines(script: Any) -> None:
    assert script.histogram(PAGE, "vllm:request_queue_time_seconds") == (4.0, 0.75)
    assert script.histogram(PAGE, "vllm:request_prefill_time_seconds") == (4.0, 1.0)
    assert script.histogram("", "vllm:request_prefill_time_seconds") == (0.0, 0.0)


def test_one_requests_times_are_the_difference(script: Any) -> None:
    later = PAGE.replace("count 4.0", "count 5.0").replace("sum 1.0", "sum 1.25").replace('"m"} 3.0', '"m"} 4.0')
    pages = iter([PAGE, PAGE, later])
    server = script.Server.__new__(script.Server)

    class Client:
        def metrics(self) -> str:
            return next(pages)

    server._client = Client()
    server.begin()
    found = server.end()
    assert found == {"queue_ms": 0.0, "prefill_ms": pytest.approx(250)}


def test_the_stages_add_up_to_the_time_of_the_client(script: Any) -> None:
    found = script.stages(80.0, {"queue_ms": 7.0, "prefill_ms": 60.0}, STATISTICS)
    assert sum(found[name] for name in script.STAGES if name != "lookup_ms") == pytest.approx(80.0)
    assert (found["recompute_ms"], found["step_ms"], found["http_ms"]) == (24.0, 10.0, 13.0)
    assert "step_ms" not in script.stages(80.0, {}, STATISTICS)


def test_the_arms_are_stock_and_each_budget_twice(script: Any) -> None:
    arms = script.arms("http://e", "http://b", ["auto", "0.15"])
    assert [(arm.url, arm.hot) for arm in arms] == [("http://b", False)] + [("http://e", False)] * 2 + [
        ("http://e", True)
    ] * 2
    assert arms[1].params == {"lmcache_rag.ratio": "auto"}, "the server decides whether to blend"
    assert arms[2].params == {"lmcache_rag.ratio": 0.15, "lmcache_rag.blend": "always"}
    assert len(script.arms("http://e", None, ["auto"])) == 2


def test_a_table_shows_stock_without_stages_of_a_blend(script: Any) -> None:
    times = script.stages(80.0, {"queue_ms": 7.0, "prefill_ms": 60.0}, STATISTICS)
    ours = script.row("ours", 8600, [{"ttft_ms": 80.0, **times, "statistics": STATISTICS}], 200.0)
    plain = script.stages(200.0, {"queue_ms": 1.0, "prefill_ms": 190.0}, {})
    stock = script.row("stock", 8600, [{"ttft_ms": 200.0, **plain, "statistics": {}}], 200.0)
    lines = script.shown([stock, ours]).splitlines()
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert lines[2] == "| 8,600 | stock | 200.0 | 1.00 | 9.0 | 1.0 |  |  |  |  | 190.0 |  |  |  |  |"
    assert (
        lines[3]
        == "| 8,600 | ours | 80.0 | 2.50 | 13.0 | 7.0 | 5.0 | 20.0 | 6.0 | 24.0 | 10.0 | 0 | 0 | 0 | blended 1 |"
    )
