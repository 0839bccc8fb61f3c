"""What vLLM and LMCache report when nothing is in flight."""

from __future__ import annotations

from typing import Any

from lmcache_rag.bench import soak as soak_module

GAUGES = dict.fromkeys(soak_module.VLLM_GAUGES, 0.0)


MEMORY = {"read_locked_count": 0, "write_locked_count": 0, "memory_used_bytes": 4096}


PREFETCH = ("in_flight_request_count", "submission_queue_size", "pending_queue_size", "completed_results_count")


STATUS: dict[str, Any] = {  # of LMCache 0.5.6 at rest, as far as it matters here
    "is_healthy": True,
    "active_sessions": 0,
    "active_prefetch_jobs": 0,
    "active_cb_lookups": 0,
    "storage_manager": {"l1_managers": {"_default": MEMORY}, "prefetch_controller": dict.fromkeys(PREFETCH, 0)},
}


AT_REST = dict.fromkeys(soak_module.GAUGES, 0.0)
