"""What is wrong with a request's kv_transfer_params, for the API server, which answers with status 400."""

from __future__ import annotations

from typing import Any

from lmcache_rag import protocol


def wrong(params: Any) -> str:
    """One message with everything that is wrong; "" when nothing is. Keys of others are not looked at."""
    return protocol.joined(protocol.complaints(params))
