"""What workers send to the scheduler, in the forms that vLLM carries."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorWorkerMetadata

from lmcache_rag.connector.metadata import BlendResult
from lmcache_rag.protocol import SelfCheck, Unsupported


@dataclass
class Readiness(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What a worker reports to the scheduler at start.

    Attributes:
        why_not: Why it cannot blend; None when it can.
        self_check: What came of the comparison with a full prefill.
    """

    why_not: Unsupported | None
    self_check: SelfCheck | None = None


@dataclass
class BlendResults(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What the workers did in a step.

    Attributes:
        results: Of the plans.
        late: (request, blocks) of each rank's loads that were given up.
        over: Requests whose loads that were given up are over.
        lmcache: What LMCache's own connector reports: receipts of stores, events.
    """

    results: list[BlendResult] = field(default_factory=list)
    late: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    over: list[str] = field(default_factory=list)
    lmcache: KVConnectorWorkerMetadata | None = None

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Results of several ranks are the same but for their times; late loads and LMCache's reports are not."""
        if not isinstance(other, BlendResults):
            other = BlendResults(lmcache=other)
        lmcache = self.lmcache or other.lmcache
        if self.lmcache is not None and other.lmcache is not None:
            lmcache = self.lmcache.aggregate(other.lmcache)
        return BlendResults(self.results or other.results, self.late + other.late, self.over + other.over, lmcache)
