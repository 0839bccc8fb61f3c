"""Every private part of LMCache that we touch; tests/test_connector_contract*.py check each against LMCache.

Written for LMCache 0.5.6 and 0.5.7, which are imported in the functions. The server sends no answer at all when a call
fails, so each wait has a deadline.
"""

from lmcache_rag.connector.compat_lmcache.adapters import (
    LaterReleases,
    LaterReports,
    address,
    bound,
    bound_client,
    chunk_tokens,
    keep_out,
    loading,
    renumber_tokens,
)
from lmcache_rag.connector.compat_lmcache.loads import WorkerLink
from lmcache_rag.connector.compat_lmcache.lookup import BlendLookup, session_goes_on
from lmcache_rag.connector.compat_lmcache.server import (
    Registration,
    ensure_heartbeat,
    handshake,
    has_ended,
    is_absent,
    may_be_absent,
    registering,
    same_chunks,
    watch,
)
from lmcache_rag.connector.compat_lmcache.stores import Stores
from lmcache_rag.connector.compat_lmcache.trackers import empty_step, plain_tracker, to_be_loaded

__all__ = [
    "BlendLookup",
    "LaterReleases",
    "LaterReports",
    "Registration",
    "Stores",
    "WorkerLink",
    "address",
    "bound",
    "bound_client",
    "chunk_tokens",
    "empty_step",
    "ensure_heartbeat",
    "handshake",
    "has_ended",
    "is_absent",
    "keep_out",
    "loading",
    "may_be_absent",
    "plain_tracker",
    "registering",
    "renumber_tokens",
    "same_chunks",
    "session_goes_on",
    "to_be_loaded",
    "watch",
]
