"""What servers still hold when every request has come to its end, and how much memory processes use."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx

from lmcache_rag.credentials import lmcache_headers

# What vLLM says on /metrics: requests, and used blocks that no prefix cache explains.
VLLM = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
# What LMCache 0.5.6 says on /status, by its place there; "*" is each of its memories, which are added up. Its locks end
# by themselves after minutes, so that what is left of a request shows for long enough. Its sessions are not among
# these: a store that comes behind its request's end opens one anew, which holds no lock and ends in ten minutes.
LMCACHE = (
    "active_prefetch_jobs",
    "active_cb_lookups",
    "storage_manager.l1_managers.*.read_locked_count",
    "storage_manager.l1_managers.*.write_locked_count",
    "storage_manager.prefetch_controller.in_flight_request_count",
    "storage_manager.prefetch_controller.submission_queue_size",
    "storage_manager.prefetch_controller.pending_queue_size",
    "storage_manager.prefetch_controller.completed_results_count",
)
ALL = (*VLLM, *(f"lmcache:{place}" for place in LMCACHE))
SETTLE_S = 15.0  # for what goes on behind the last answer: KV is stored there, and aborted requests are taken apart


async def settled(vllm: httpx.AsyncClient, lmcache_url: str, *, seconds: float) -> dict[str, float | None]:
    """Every name of ALL with its value, once all are 0 or so many seconds are over; None: the server does not say."""
    end = time.monotonic() + seconds
    headers = lmcache_headers(lmcache_url)
    # Not vllm: that one sends vLLM's key.
    async with httpx.AsyncClient(base_url=lmcache_url, timeout=10, headers=headers) as lmcache:
        while True:
            found = await _vllm(vllm) | await _lmcache(lmcache)
            if all(value == 0 for value in found.values()) or time.monotonic() >= end:
                return found
            await asyncio.sleep(0.5)


async def _vllm(http: httpx.AsyncClient) -> dict[str, float | None]:
    try:
        text = (await http.get("/metrics")).raise_for_status().text
    except httpx.HTTPError:
        text = ""
    found: dict[str, float | None] = {}
    for name in VLLM:
        lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        found[name] = sum(float(line.rsplit(" ", 1)[1]) for line in lines) if lines else None
    return found


async def _lmcache(http: httpx.AsyncClient) -> dict[str, float | None]:
    try:
        status = (await http.get("/status")).raise_for_status().json()
    except (httpx.HTTPError, ValueError):
        status = None
    return {f"lmcache:{place}": _at(status, place.split(".")) for place in LMCACHE}


def _at(status: Any, place: list[str]) -> float | None:
    """The number at that place of a document."""
    if not place:
        return float(status) if isinstance(status, int | float) else None
    if not isinstance(status, dict):
        return None
    if place[0] != "*":
        return _at(status.get(place[0]), place[1:])
    found = [value for each in status.values() if (value := _at(each, place[1:])) is not None]
    return sum(found) if found and len(found) == len(status) else None


def resident_mb(process: int) -> float:
    """Resident memory of a process in megabytes; 0 where it is gone or the system has no /proc."""
    try:
        with open(f"/proc/{process}/status") as status:  # noqa: PTH123
            line = next(line for line in status if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return 0.0
    return int(line.split()[1]) / 1024
