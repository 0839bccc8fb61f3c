"""The connector's records as vLLM carries them (KVConnectorStats) and shows them (KVConnectorPromMetrics).

Both stand on LMCache's own, whose look-up times stay as they are. vLLM makes these classes in the API server's process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmcache.integration.vllm.lmcache_mp_metrics import LMCacheMPConnectorStats, LMCacheMPPromMetrics

from lmcache_rag.connector import metrics
from lmcache_rag.connector.config import ConnectorOptions


@dataclass
class BlendStats(LMCacheMPConnectorStats):  # type: ignore[misc]
    """LMCache's observations of an interval, and one record for each request that ended in it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data.setdefault(metrics.RECORDS, [])

    @property
    def records(self) -> list[dict[str, Any]]:
        """See lmcache_rag.connector.metrics.record."""
        found: list[dict[str, Any]] = self.data[metrics.RECORDS]
        return found

    def clone_and_reset(self) -> BlendStats:
        """What was observed; a new interval begins."""
        taken = BlendStats(data=self.data)
        self.reset()
        return taken

    def reset(self) -> None:
        """Forget all."""
        super().reset()
        self.data[metrics.RECORDS] = []

    def aggregate(self, other: Any) -> BlendStats:
        """Add another interval's, or another rank's."""
        super().aggregate(other)
        self.records.extend(other.data.get(metrics.RECORDS, ()))
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log."""
        return {**super().reduce(), **metrics.summary(self.records)}

    def is_empty(self) -> bool:
        """Whether nothing was observed."""
        return bool(super().is_empty()) and not self.records


class BlendPromMetrics(LMCacheMPPromMetrics):  # type: ignore[misc]
    """LMCache's metrics and ours."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[Any]]
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._meters = metrics.Meters(self._counter_cls, self._histogram_cls, labelnames, per_engine_labelvalues)
        options = ConnectorOptions.read(vllm_config.kv_transfer_config.get_from_extra_config)
        if options.chunk_size:
            metrics.show_chunk(self._gauge_cls, labelnames, per_engine_labelvalues, options.chunk_size)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Count what ended in a step."""
        super().observe(transfer_stats_data, engine_idx)
        self._meters.observe(transfer_stats_data.get(metrics.RECORDS, ()), engine_idx)
