"""The checks of `doctor` at an LMCache server: its health, its engine, its ranks, its index, and what is pinned."""

from __future__ import annotations

from collections import Counter
from typing import Any

import httpx

from lmcache_rag import protocol
from lmcache_rag._utils import clean
from lmcache_rag.credentials import LMCACHE_KEY_REMEDY, lmcache_headers
from lmcache_rag.errors import EngineError, LMCacheRAGError
from lmcache_rag.serving.machine import Check

PAGE_SECONDS = 3.0  # for a page of LMCache's HTTP API
NEARLY_FULL = 0.9
_TENANTS = 8


def lmcache_checks(url: str, *, needed: bool, on_gpu: bool = True) -> tuple[list[Check], dict[str, Any]]:
    """Check LMCache's server: returns (checks, its status; empty if it does not answer).

    Args:
        url: Its HTTP address.
        needed: Whether it is a failure if it does not answer.
        on_gpu: False where vLLM is known to compute on a CPU: no worker registers there.
    """
    if not answers(url, "/healthcheck"):
        remedy = "lmcache-rag serve MODEL starts it. On another machine or port: --lmcache-url."
        return [Check("LMCache", "failed" if needed else "skipped", f"{url} does not answer", remedy)], {}
    try:
        status = get_json(url, "/status")
    except LMCacheRAGError as problem:
        return [Check("LMCache", "failed", problem.message, problem.remedy)], {}
    if status is None:
        return [Check("LMCache", "failed", f"{url}/status does not answer", "See its log.")], {}
    checks = []
    healthy = bool(status.get("is_healthy"))
    chunk = status.get("chunk_size")
    checks.append(
        Check(
            "LMCache",
            "ok" if healthy else "failed",
            f"{url} is {'healthy' if healthy else 'not healthy'}; chunks of {chunk} tokens",
            "" if healthy else f"See {url}/status.",
        )
    )
    # Only the blend engine reports rotary tables.
    tables = status.get("registered_cb_rope_instances")
    if tables is None:
        remedy = "Start it with --engine-type blend, as lmcache-rag serve does."
        checks.append(Check("Blend engine", "failed", "this server does not blend", remedy))
        return checks, status
    checks.append(Check("Blend engine", "ok", "on"))
    workers = len(status.get("registered_gpu_ids") or ())
    if not on_gpu:
        checks.append(Check("RoPE", "skipped", "vLLM computes on a CPU, and blends nothing"))
    elif tables:
        some = len(tables) < workers
        remedy = 'The others do not blend; their vLLM\'s log has the reason after "KV is not blended".' if some else ""
        result = f"registered by {len(tables)} of {workers} workers"
        checks.append(Check("RoPE", "warning" if some else "ok", result, remedy))
    elif workers:
        remedy = 'vLLM\'s log has the reason after "KV is not blended"; is kv_connector CacheBlendConnector?'
        checks.append(Check("RoPE", "failed", f"not registered, though {workers} workers are there", remedy))
    else:
        state: Any = "failed" if needed else "skipped"
        checks.append(Check("RoPE", state, "no vLLM worker is registered", "Is vLLM up, and with our connector?"))
    checks += rank_checks(status)
    metrics = get_text(url, "/metrics")
    checks.append(index_check(metrics))
    checks += retention_checks(metrics)
    return checks, status


def index_check(metrics: str) -> Check:
    """How full the index of chunks is, and how many of the chunks looked up were found."""
    entries, asked, found, size = (
        protocol.lmcache_number(metrics, name)
        for name in (protocol.INDEX_ENTRIES, protocol.INDEX_ASKED, protocol.INDEX_FOUND, protocol.INDEX_SIZE)
    )
    if entries is None:
        return Check("Chunk index", "skipped", "LMCache's /metrics does not report it")
    result = f"{entries:,} chunks" + (f" of at most {size:,}" if size else "")
    if asked:
        result += f"; {found or 0:,} of {asked:,} chunks of prompts were found"
    if size and entries >= NEARLY_FULL * size:
        remedy = "New chunks replace the least recently used ones: serve --index-size makes room for more."
        return Check("Chunk index", "warning", f"{result}: it is nearly full", remedy)
    return Check("Chunk index", "ok", result)


def retention_checks(metrics: str) -> list[Check]:
    """How much of memory is pinned, and which tenants are beyond their budgets; no check where neither is used."""
    checks = []
    pinned, most = (protocol.lmcache_number(metrics, name) for name in (protocol.PINNED_BYTES, protocol.PIN_LIMIT))
    if pinned and most:
        full = pinned >= NEARLY_FULL * most
        remedy = "More is refused: end pins with `lmcache-rag warm --no-pin`, or raise serve's --l1-gb."
        result = f"{pinned / 1e9:,.2f} GB of the {most / 1e9:,.2f} GB that may be pinned"
        checks.append(Check("Pinned chunks", "warning" if full else "ok", result, remedy if full else ""))
    if budgets := protocol.tenant_bytes(metrics, protocol.TENANT_BUDGET):
        used = protocol.tenant_bytes(metrics, protocol.TENANT_BYTES)
        evicted = protocol.tenant_bytes(metrics, protocol.TENANT_EVICTED)
        words = [
            f"{clean(tenant) or 'no tenant'} {used.get(tenant, 0) / 1e9:,.2f} of {budget / 1e9:,.2f} GB"
            + (f" ({evicted[tenant]:,.0f} objects evicted)" if evicted.get(tenant) else "")
            for tenant, budget in sorted(budgets.items())
        ]
        shown = ", ".join(words[:_TENANTS]) + (f" and {len(words) - _TENANTS} more" if len(words) > _TENANTS else "")
        checks.append(Check("Tenant budgets", "ok", shown))
    return checks


def rank_checks(status: dict[str, Any]) -> list[Check]:
    """Check that all tensor-parallel ranks of each vLLM are registered; no check if no vLLM has several.

    If one is missing, every prompt is computed in full on all ranks: no rank may blend alone.
    """
    sizes: Counter[tuple[str, int]] = Counter()
    for one in (status.get("cache_context_meta") or {}).values():
        sizes[str(one.get("model_name")), int(one.get("world_size") or 1)] += 1
    checks = []
    for (model, size), found in sorted(sizes.items()):
        if size == 1:
            continue
        result = f"{found} registered for {model}, which is served by {size}"
        if found % size:
            remedy = "KV is blended by all ranks or by none: see vLLM's log for the worker that could not register."
            checks.append(Check("Ranks", "failed", result, remedy))
        else:
            checks.append(Check("Ranks", "ok", result))
    return checks


def get_json(url: str, path: str, *, key: bool = True) -> dict[str, Any] | None:
    """A JSON document from an LMCache server, with its key if there is one; None if there is no valid answer.

    Raises:
        EngineError: It requires a key.
    """
    headers = lmcache_headers(url) if key else {}
    try:
        response = httpx.get(url + path, timeout=PAGE_SECONDS, verify=False, trust_env=False, headers=headers)  # noqa: S501
        if response.status_code in (401, 403):
            raise EngineError(f"{url}{path} requires a key.", remedy=LMCACHE_KEY_REMEDY)
        document = response.raise_for_status().json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None
    return document if isinstance(document, dict) else None


def get_text(url: str, path: str, *, key: bool = True) -> str:
    """A page of an LMCache server, with its key if there is one; "" if there is no valid answer."""
    headers = lmcache_headers(url) if key else {}
    try:
        response = httpx.get(url + path, timeout=PAGE_SECONDS, verify=False, trust_env=False, headers=headers)  # noqa: S501
        return response.raise_for_status().text
    except (httpx.HTTPError, httpx.InvalidURL):
        return ""


def answers(url: str, path: str) -> bool:
    """Whether a server answers this path with 200."""
    try:
        # Certificates are not checked: this asks only whether a server on this machine is up.
        return httpx.get(url + path, timeout=PAGE_SECONDS, verify=False, trust_env=False).status_code == 200  # noqa: S501
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
