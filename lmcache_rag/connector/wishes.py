"""What a request may ask for in kv_transfer_params, and what is wrong with what it asks for."""

from __future__ import annotations

from typing import Any

from lmcache_rag.connector.plan import request_options

OURS = "lmcache_rag."
KEYS = ("policy", "ratio", "blend", "chunks", "prefix", "ingest")


def wrong(params: Any) -> str:
    """What is wrong, in words for whoever asked; "" when nothing is. Keys of others are not looked at."""
    if not isinstance(params, dict):
        return ""
    found = [
        f"{key!r} is not known (there are {', '.join(OURS + name for name in KEYS)})" for key in params if _odd(key)
    ]
    *_, complaints = request_options(params, "query", 0.15)
    found += [complaint.partition(";")[0] for complaint in complaints]
    spans = params.get("lmcache_rag.chunks", [])
    if not isinstance(spans, list) or not all(_span(span) for span in spans):
        found.append("lmcache_rag.chunks is no list of [start, end], in tokens of the prompt")
    prefix = params.get("lmcache_rag.prefix", 0)
    if not isinstance(prefix, int) or isinstance(prefix, bool) or prefix < 0:
        found.append(f"lmcache_rag.prefix {prefix!r} is no number of tokens")
    if not isinstance(params.get("lmcache_rag.ingest", False), bool):
        found.append("lmcache_rag.ingest is neither true nor false")
    return "; ".join(found)


def _odd(key: Any) -> bool:
    return isinstance(key, str) and key.startswith(OURS) and key.removeprefix(OURS) not in KEYS


def _span(span: Any) -> bool:
    return (
        isinstance(span, list)
        and len(span) == 2
        and all(isinstance(at, int) and not isinstance(at, bool) for at in span)
        and 0 <= span[0] < span[1]
    )
