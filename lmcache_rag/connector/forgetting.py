"""Requests that ask for a chunk's KV to be removed (lmcache_rag.protocol.FORGET): prompts of prefix + chunk.

vLLM's own blocks of the chunk become unreachable at once. LMCache's server is asked by a look-up, whose key holds the
request, and the request waits for its answer. KV that the request itself computes is stored nowhere.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from typing import Any

from lmcache_rag.connector.gpu_chunks import BlockPool, PrefixCache, ResidentChunks
from lmcache_rag.connector.lookup import AbortedLookups, LookupClient
from lmcache_rag.connector.request_state import Lookup, has_embeddings
from lmcache_rag.protocol import FORGET, named_prefix

MAX_IN_FLIGHT = 32  # look-ups: LMCache's server removes in the worker that also looks up


@dataclass
class _Request:
    prefix: int
    lookup: Lookup | None = None
    asked_at: float | None = None
    closed: bool = False
    forgotten: bool = False


@dataclass
class Forgetting:
    """The requests that ask for it.

    Args:
        client: Starts look-ups.
        prefix_cache: Hides the request's own blocks.
        aborted: Takes over look-ups whose requests do not wait any more.
        deadline: Longest that a request waits for LMCache, in seconds.
        pool: vLLM's blocks; None without prefix caching.
        resident: Chunks that are known to be in them.
    """

    client: LookupClient
    prefix_cache: PrefixCache
    aborted: AbortedLookups
    deadline: float
    pool: BlockPool | None = None
    resident: ResidentChunks | None = None
    _requests: dict[str, _Request] = field(default_factory=dict)

    def on_new_request(self, request: Any) -> bool:
        """Take a new request, if it asks for this; returns whether it does."""
        params = request.kv_transfer_params
        if not params or params.get(FORGET) is not True or has_embeddings(request):
            return False
        prompt = request.prompt_token_ids
        prefix = named_prefix(params, len(prompt))
        known = self._requests[request.request_id] = _Request(prefix, closed=not 0 < prefix < len(prompt))
        if known.closed:
            return True
        hashes = list(request.block_hashes)
        self.prefix_cache.hide(request, prefix)  # first of all: it must not be found by its own blocks
        if self.resident is not None:
            self.resident.forget(array("q", prompt), hashes, prefix)
        if self.pool is not None:
            self.pool.remove(hashes[prefix // self.prefix_cache.block_size :])
        return True

    def has(self, request_id: str) -> bool:
        """Whether a request is one of these."""
        return request_id in self._requests

    def poll(self, request: Any) -> bool:
        """Whether the request can run: LMCache has answered, or its deadline has passed."""
        known = self._requests[request.request_id]
        if known.closed:
            return True
        now = time.perf_counter()
        known.asked_at = now if known.asked_at is None else known.asked_at
        if known.lookup is None:
            if sum(other.lookup is not None for other in self._requests.values()) < MAX_IN_FLIGHT:
                known.lookup = self.client.look_up(request)
                known.closed = known.lookup is None
        elif known.lookup.poll(0.0):
            known.closed = known.forgotten = True
            self._abort(known)
        if not known.closed and now - known.asked_at > self.deadline:
            known.closed = True
            self._abort(known)
        return known.closed

    def on_finished(self, request_id: str) -> bool:
        """The request ended. Returns whether the chunk's KV was removed."""
        known = self._requests.pop(request_id)
        self._abort(known)
        return known.forgotten

    def _abort(self, known: _Request) -> None:
        lookup, known.lookup = known.lookup, None
        if lookup is not None:
            self.aborted.add(lookup, time.perf_counter(), 0.0)

    def __len__(self) -> int:
        return len(self._requests)
