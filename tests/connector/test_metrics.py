"""What the connector counts. tests/contracts/test_metrics.py ties it to vLLM and Prometheus."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scheduler_kit import Once

from lmcache_rag import protocol
from lmcache_rag.budget import Budget
from lmcache_rag.connector import metrics
from lmcache_rag.connector.metadata import BlendResult


class Shelf:
    """Metrics by name and labels, made as prometheus_client makes them."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], list[float]] = defaultdict(list)
        self.names: dict[str, list[str]] = {}

    def make(
        self,
        *,
        name: str,
        documentation: str,
        labelnames: list[str],
        buckets: Any = None,
        multiprocess_mode: str = "",
    ) -> Any:
        assert name.startswith("vllm:lmcache_rag_"), "vLLM would not take it back"
        assert name not in self.names
        assert documentation.endswith(".")
        self.names[name] = labelnames
        shelf = self

        class Metric:
            def labels(self, *given: Any) -> Any:
                assert len(given) == len(labelnames)
                values = shelf.values[(name.removeprefix("vllm:lmcache_rag_"), *map(str, given))]

                class Labelled:
                    def inc(self, amount: float = 1) -> None:
                        values.append(amount)

                    observe = set = inc

                return Labelled()

        return Metric()

    def read(self, *key: str) -> float:
        return sum(self.values[key])


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


LABELS, ENGINES = ["model_name", "engine"], {0: ["m", 0], 3: ["m", 3]}


def meters(shelf: Shelf) -> metrics.Counters:
    return metrics.Counters(shelf.make, shelf.make, LABELS, ENGINES)


def counted(*results: BlendResult | None, **options: Any) -> list[dict[str, Any]]:
    """Records of requests that ran, each with what its worker did."""
    once = Once(**options)
    for number, result in enumerate(results):
        request = once.request(str(number), cached=(32, Once.MATCHES) if result else (32, ()))
        more = once.side.match(request, 0) or 0
        once.side.on_allocated(request, list(range(13)), more, None)
        once.side.build_plans()
        once.server.give_back(str(number), 0, 32)
        once.side.on_results([result] if result else [])
        assert once.finish(request) is not None
    return once.side.take_records()


BLENDED = BlendResult("0", 32, 24, 8, 12, 1.5, 2.5, hot_tokens=16, budget_reason="scores")
FAILED = BlendResult("1", 0, 0, 0, 76, 5000.0, 80.0, "load failed")


def test_a_record_is_plain_and_its_tokens_add_up() -> None:
    records = counted(BLENDED, FAILED, None)
    assert json.loads(json.dumps(records)) == records
    for record in records:
        assert sum(record[source] for source in metrics.SOURCES) == 100
        assert record["outcome"] in metrics.OUTCOMES
    first, second, third = records
    assert (first["outcome"], first["reused"], first["recomputed"], first["hot"]) == ("blended", 24, 8, 16)
    assert (first["load"], first["blend"]) == (0.0015, 0.0025)
    assert "fallback" not in first
    assert (second["outcome"], second["fallback"], second["computed"], second["load"]) == (
        "computed",
        "load failed",
        100,
        5.0,
    )
    assert third["outcome"] == "computed"
    assert "load" not in third, "no worker told of a load"


def test_each_request_moves_its_engines_counters_once(shelf: Shelf) -> None:
    both = meters(shelf)
    both.observe(counted(BLENDED, FAILED), 3)
    both.observe([metrics.unblended_record(100, 64)])
    assert shelf.read("requests", "m", "3", "blended") == shelf.read("requests", "m", "3", "computed") == 1
    assert shelf.read("requests", "m", "0", "unblended") == 1
    tokens = {source: shelf.read("prompt_tokens", "m", "3", source) for source in metrics.SOURCES}
    assert tokens == {"prefix": 32, "reused": 24, "recomputed": 8, "computed": 136}
    assert shelf.read("prompt_tokens", "m", "0", "prefix") == 64
    assert shelf.read("hot_tokens", "m", "3") == 16
    assert shelf.read("fallbacks", "m", "3", "load failed") == 1
    assert shelf.read("fallbacks", "m", "0", "cannot blend") == 1
    assert shelf.read("budgets", "m", "3", "scores") == 1
    assert sum(sum(counts) for (name, *_), counts in shelf.values.items() if name == "budgets") == 1
    assert shelf.values["load_seconds", "m", "3"] == [0.0015, 5.0]
    assert shelf.values["blend_seconds", "m", "3"] == [0.0025, 0.08]
    assert len(shelf.values["lookup_seconds", "m", "3"]) == 2
    assert shelf.values["lookup_seconds", "m", "0"] == []


def test_what_never_moved_reads_zero_and_not_nothing(shelf: Shelf) -> None:
    meters(shelf)
    labelled = {key[0:1] + key[3:] for key in shelf.values}
    assert {("fallbacks", reason) for reason in metrics.REASONS} <= labelled
    assert {("requests", outcome) for outcome in metrics.OUTCOMES} <= labelled


def test_an_unlisted_reason_is_counted_as_other(shelf: Shelf) -> None:
    [record] = counted(BlendResult("0", 0, 0, 0, 76, 1.0, 1.0, "request 7 broke the moon"))
    assert record["fallback"] == "other"
    meters(shelf).observe([record])
    assert shelf.read("fallbacks", "m", "0", "other") == 1


def test_the_schedulers_reasons_are_listed() -> None:
    """A reason under OTHER tells an operator nothing; tests/connector/test_worker.py has the workers'."""
    once = Once(lookup_deadline=0.0)
    late, absent = once.request("late", polls=3), once.request("absent")
    once.side.match(late, 0)
    once.side.client = SimpleNamespace(look_up=lambda request: None)
    once.side.match(absent, 0)
    for request in (late, absent):
        once.side.on_allocated(request, list(range(13)), 0, None)
        once.side.finish(request)
    assert [record["fallback"] for record in once.side.take_records()] == ["look-up deadline", "no server"]


def test_a_request_that_never_ran_is_not_counted() -> None:
    once, found = Once(), []
    once.side.count = found.append
    request = once.request(polls=5)
    assert once.side.match(request, 0) is None
    once.finish(request)
    assert found == []


def test_the_servers_chunk_is_told_for_each_engine(shelf: Shelf) -> None:
    metrics.publish_chunk_size(shelf.make, LABELS, ENGINES, 256)
    assert shelf.values["chunk_tokens", "m", "0"] == shelf.values["chunk_tokens", "m", "3"] == [256]


def test_what_servers_have_in_common_is_published(shelf: Shelf) -> None:
    facts = {name: f"{name}!" for name in protocol.SERVER_FACTS} | {"unknown": "x"}
    metrics.ServerInfo(shelf.make, LABELS, ENGINES).observe([facts], 3)
    assert shelf.values["server_info", "m", "3", *(f"{name}!" for name in protocol.SERVER_FACTS)] == [1]
    labels = ",".join(f'{name}="{value}"' for name, value in {"model_name": "m", **facts}.items())
    del facts["unknown"]
    assert protocol.server_facts(f"# HELP x\n{protocol.SERVER_GAUGE}{{{labels}}} 1.0\n") == facts
    assert protocol.server_facts(f"{protocol.SERVER_GAUGE}{{{labels}}} 0.0\n") == protocol.server_facts("") == {}


def test_the_chunk_is_read_from_a_metrics_page() -> None:
    page = (
        "# HELP vllm:lmcache_rag_chunk_tokens Tokens of an LMCache chunk.\n"
        "# TYPE vllm:lmcache_rag_chunk_tokens gauge\n"
        'vllm:lmcache_rag_chunk_tokens{engine="0",model_name="m"} 256.0\n'
    )
    assert protocol.chunk_tokens(page) == 256
    assert protocol.chunk_tokens(page.replace("256.0", "NaN")) == 0
    assert protocol.chunk_tokens("") == 0


def test_the_documents_name_what_there_is(shelf: Shelf) -> None:
    meters(shelf)
    metrics.publish_chunk_size(shelf.make, LABELS, ENGINES, 64)
    metrics.CostGauges(shelf.make, LABELS, ENGINES)
    metrics.ServerInfo(shelf.make, LABELS, ENGINES)
    text = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    named = {name.removesuffix("_total") for name in re.findall(r"vllm:lmcache_rag_\w+", text)}
    assert named == set(shelf.names)
    for value in (*metrics.REASONS, *metrics.OUTCOMES, *metrics.SOURCES, *metrics.DECISIONS):
        assert f"`{value}`" in text
    (example,) = re.findall(r"```json\n(\{\"prompt_tokens\".*?)```", text, re.DOTALL)
    told, own = json.loads(example), metrics.reuse_statistics(100, "query", Budget(), spans=[])
    assert list(told) == list(own)
    assert sum(told[f"{source}_tokens"] for source in metrics.SOURCES) == told["prompt_tokens"]
    assert sum(b - a for a, b in told["spans"]) == told["reused_tokens"] + told["recomputed_tokens"]


def test_the_log_sums_an_interval_up() -> None:
    said = metrics.summary([*counted(BLENDED, FAILED), metrics.unblended_record(10, 10)])
    assert (said["Requests blended"], said["Requests not blended"], said["Fallbacks"]) == (1, 2, 2)
    assert said["Tokens prefix"] == 32 + 9, "the last token of a prompt is always computed"
    assert said["Avg load (ms)"] == 2500.75
    assert metrics.summary([]) == {}
