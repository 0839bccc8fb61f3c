"""What workers tell the scheduler, in the forms that vLLM carries."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorWorkerMetadata

from lmcache_rag.connector.plan import BlendResult


@dataclass
class Readiness(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What a worker tells the scheduler at start: why it cannot blend, empty when it can."""

    why_not: str


@dataclass
class BlendResults(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What the workers did in a step."""

    results: list[BlendResult] = field(default_factory=list)
    late: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # (request, blocks), of each rank
    over: list[str] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Results of several ranks are the same but for their times; what is late is not."""
        if not isinstance(other, BlendResults):
            return self
        return BlendResults(self.results or other.results, self.late + other.late, self.over + other.over)
