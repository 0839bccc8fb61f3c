"""Our statistics on their way through vLLM: from the scheduler's connector to the log and /metrics.

See test_internals.py.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import msgspec
    import prometheus_client
    from lmcache.integration.vllm import lmcache_mp_connector
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1 import base
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics
    from vllm.v1.metrics.stats import SchedulerStats

    from lmcache_rag import protocol
    from lmcache_rag.connector import connector, metrics
    from lmcache_rag.connector.config import ConnectorOptions
    from lmcache_rag.connector.gpu_chunks import PrefixCache
    from lmcache_rag.connector.metrics import BlendPromMetrics, BlendStats
    from lmcache_rag.connector.scheduler import BlendScheduler
    from lmcache_rag.protocol import CannotBlend, Unsupported

pytestmark = [pytest.mark.filterwarnings("ignore")]

BLENDED: dict[str, Any] = {
    "prefix": 32, "reused": 24, "recomputed": 8, "computed": 36, "hot": 16, "outcome": "blended", "lookup": 0.007,
    "load": 0.02, "blend": 0.05,
}  # fmt: skip
FAILED = metrics.unblended_record(100, 64) | {"fallback": "load failed", "outcome": "computed"}


@pytest.fixture
def config() -> Iterator[Any]:
    """Whatever vLLM registered before is taken back, and whatever is registered here."""
    unregister_vllm_metrics()
    transfer = KVTransferConfig(
        kv_connector="CacheBlendConnector",
        kv_connector_module_path="lmcache_rag.connector.connector",
        kv_role="kv_both",
        kv_connector_extra_config={"lmcache_rag.chunk_size": 256},
    )
    yield VllmConfig(kv_transfer_config=transfer)
    unregister_vllm_metrics()


def sample(name: str, **labels: str) -> float | None:
    return prometheus_client.REGISTRY.get_sample_value(f"vllm:lmcache_rag_{name}", {"model_name": "m", **labels})


def sent(stats: BlendStats) -> dict[str, Any]:
    """The data as it comes out of the other process."""
    payload = stats.to_dict() if hasattr(stats, "to_dict") else stats.data
    carried = msgspec.msgpack.encode(SchedulerStats(kv_connector_stats=payload))
    received = msgspec.msgpack.decode(carried, type=SchedulerStats).kv_connector_stats
    assert received == payload
    return dict(received)


def test_what_a_connector_counts_is_on_vllms_metrics(config: Any) -> None:
    engines: dict[int, list[object]] = {0: ["m", "0"], 1: ["m", "1"]}
    shown = KVConnectorProm(config, ["model_name", "engine"], engines)
    assert isinstance(shown.prom_metrics, BlendPromMetrics)
    assert sample("fallbacks_total", engine="0", reason="load failed") == 0
    assert sample("chunk_tokens", engine="0") == sample("chunk_tokens", engine="1") == 256
    assert protocol.chunk_tokens(prometheus_client.generate_latest().decode()) == 256
    stats = BlendStats()
    stats.records.extend([BLENDED, FAILED])
    stats.record_lookup(0.25)
    shown.observe(sent(stats.clone_and_reset()), 1)
    assert stats.is_empty()
    assert sample("requests_total", engine="1", how="blended") == 1
    tokens = [sample("prompt_tokens_total", engine="1", source=source) for source in metrics.SOURCES]
    assert tokens == [96, 24, 8, 72]
    assert sample("hot_tokens_total", engine="1") == 16
    assert sample("fallbacks_total", engine="1", reason="load failed") == 1
    assert sample("load_seconds_sum", engine="1") == 0.02
    assert sample("load_seconds_bucket", engine="1", le="0.02") == 1
    assert sample("load_seconds_bucket", engine="1", le="0.01") == 0
    assert sample("requests_total", engine="0", how="blended") == 0
    stats.facts.append(dict.fromkeys(protocol.SERVER_FACTS, "x"))
    shown.observe(sent(stats.clone_and_reset()), 1)
    assert stats.is_empty()
    page = prometheus_client.generate_latest().decode()
    assert protocol.server_facts(page) == dict.fromkeys(protocol.SERVER_FACTS, "x"), "as doctor reads them"
    theirs = prometheus_client.REGISTRY.get_sample_value
    assert theirs("vllm:lmcache_mp_lookup_duration_seconds_sum", {"model_name": "m", "engine": "1"}) == 0.25


def test_vllms_log_sums_up_what_came_in_an_interval(config: Any) -> None:
    log = KVConnectorLogging(config.kv_transfer_config)
    kept = []
    for records in ([BLENDED], [FAILED, BLENDED]):
        stats = BlendStats()
        stats.records.extend(records)
        kept.append(sent(stats))
        log.observe(kept[-1])
    said: list[str] = []
    log.log(lambda text, *given: said.append(text % given))
    assert len(said) == 1
    assert "Requests blended=2, Requests not blended=1, Fallbacks=1" in said[0]
    assert "Avg blend (ms)=50.0" in said[0]
    assert [len(data[metrics.RECORDS]) for data in kept] == [1, 2], "what others read was changed"
    log.log(lambda text, *given: said.append(text))
    assert len(said) == 1, "nothing happened since"


def test_ranks_and_scheduler_add_up() -> None:
    workers, own = BlendStats(), BlendStats()
    assert workers.is_empty()
    own.records.append(BLENDED)
    assert not own.is_empty()
    both = workers.aggregate(own)
    assert isinstance(both, BlendStats)
    assert both.records == [BLENDED]


def test_the_connector_hands_records_over_once() -> None:
    one = object.__new__(connector.CacheBlendConnector)
    one._connector_stats, one._role = BlendStats(), base.KVConnectorRole.SCHEDULER
    one._scheduler = BlendScheduler(ConnectorOptions(), 64, SimpleNamespace(), PrefixCache(16))
    one._facts = [{"chunk": "64"}]
    first = one.get_kv_connector_stats()
    assert isinstance(first, BlendStats)
    assert first.facts == [{"chunk": "64"}]
    assert one.get_kv_connector_stats() is None
    statistics = {
        "prefix_tokens": 32,
        "reused_tokens": 24,
        "recomputed_tokens": 8,
        "computed_tokens": 36,
        "hot_tokens": 16,
    }
    times = {"lookup_ms": 7.0, "load_ms": 20.0, "blend_ms": 50.0, "blended": True, "failure": ""}
    one._scheduler._records.append(metrics.record(statistics | times))
    taken = one.get_kv_connector_stats()
    assert isinstance(taken, BlendStats)
    assert taken.records == [BLENDED]
    assert one.get_kv_connector_stats() is None


def test_who_cannot_be_blended_is_counted_as_such() -> None:
    one = BlendScheduler(ConnectorOptions(), 64, SimpleNamespace(), PrefixCache(16))
    trackers = {
        "ran": SimpleNamespace(num_vllm_hit_tokens=16, num_lmcache_hit_tokens=64, num_scheduled_tokens=36),
        "waited": SimpleNamespace(num_vllm_hit_tokens=0, num_lmcache_hit_tokens=0, num_scheduled_tokens=0),
    }
    one.unsupported = Unsupported(CannotBlend.NEEDS_CUDA, "blending needs CUDA")
    told, *others = [
        one.count_unblended(
            SimpleNamespace(request_id=name, prompt_token_ids=[0] * 100, kv_transfer_params=None), trackers.get(name)
        )
        for name in (*trackers, "never asked")
    ]
    assert one.take_records() == [metrics.unblended_record(100, 64)]
    assert others == [None, None]
    assert [told[f"{source}_tokens"] for source in metrics.SOURCES] == [64, 0, 0, 36]
    assert (told["blended"], told["can_blend"], told["failure"]) == (False, False, "blending needs CUDA")
    assert told["reason"] == "needs CUDA"


def test_vllm_asks_for_statistics_when_a_request_ends() -> None:
    text = inspect.getsource(Scheduler.update_from_output)
    assert "self.connector.get_kv_connector_stats()" in text
    assert text.index("_free_request(") < text.index("self.connector.get_kv_connector_stats()")
    source = inspect.getsource(lmcache_mp_connector.LMCacheMPConnector.get_kv_connector_stats)
    assert "self._connector_stats.clone_and_reset()" in source
    for name in ("build_kv_connector_stats", "build_prom_metrics"):
        theirs = inspect.signature(getattr(base.KVConnectorBase_V1, name)).parameters
        assert list(inspect.signature(getattr(connector.CacheBlendConnector, name)).parameters) == list(theirs)


def test_several_api_servers_share_their_counters(tmp_path: Path) -> None:
    """Multi-process mode: each server writes to files of its own, and whoever is asked adds them up."""
    write = """
from prometheus_client import Counter, Histogram
from lmcache_rag.connector import metrics
metrics.Counters(Counter, Histogram, ["engine"], {0: ["0"]}).observe([metrics.unblended_record(100, 64)])
"""
    read = """
from prometheus_client import generate_latest
from vllm.v1.metrics.prometheus import get_prometheus_registry
print(generate_latest(get_prometheus_registry()).decode())
"""
    surroundings = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for program in (write, write, read):
        ran = subprocess.run(
            [sys.executable, "-c", program], env=surroundings, stdout=subprocess.PIPE, text=True, check=True
        )
    assert 'vllm:lmcache_rag_requests_total{engine="0",how="unblended"} 2.0' in ran.stdout
    assert 'vllm:lmcache_rag_prompt_tokens_total{engine="0",source="prefix"} 128.0' in ran.stdout
