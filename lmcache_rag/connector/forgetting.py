"""Requests that ask for a chunk's KV to be removed (lmcache_rag.protocol.FORGET): prompts of prefix + chunk.

vLLM's own blocks of the chunk become unreachable at once; LMCache's server is asked by a look-up, whose key says so,
and the request waits for its answer. What the request itself computes is kept nowhere.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lmcache_rag.connector.abandoned import Lookup
from lmcache_rag.connector.hot import HotChunks
from lmcache_rag.connector.request_state import is_embedded
from lmcache_rag.protocol import FORGET, named_prefix

AT_ONCE = 32  # of LMCache's server, which removes in the worker that also looks up


class Pool(Protocol):
    """What is used of vLLM's blocks; see vllm_internals.CachedBlocks."""

    def remove(self, hashes: Iterable[Any]) -> int:
        """Take every block with one of these hashes out of the prefix cache."""
        ...


@dataclass
class _Request:
    prefix: int
    lookup: Lookup | None = None
    asked: float | None = None
    over: bool = False
    forgotten: bool = False


@dataclass
class Forgetting:
    """The requests that ask for it.

    Args:
        block: Tokens in a block of vLLM's.
        look_up: Starts a look-up for a request; None when LMCache cannot be reached.
        hide: Makes a request's blocks from a token on unreachable for other requests.
        abandon: Sees to a look-up that is not waited for any more.
        deadline: Longest that a request waits for LMCache, in seconds.
        pool: vLLM's blocks; None without prefix caching.
        chunks: Chunks that are known to be in them.
    """

    block: Callable[[], int]
    look_up: Callable[[Any], Lookup | None]
    hide: Callable[[Any, int], None]
    abandon: Callable[[Lookup], None]
    deadline: float
    pool: Pool | None = None
    chunks: HotChunks | None = None
    _requests: dict[str, _Request] = field(default_factory=dict)

    def arrived(self, request: Any) -> bool:
        """Take a new request, if it asks for this; whether it does."""
        params = request.kv_transfer_params
        if not params or params.get(FORGET) is not True or is_embedded(request):
            return False
        prompt = request.prompt_token_ids
        prefix = named_prefix(params, len(prompt))
        known = self._requests[request.request_id] = _Request(prefix, over=not 0 < prefix < len(prompt))
        if known.over:
            return True
        hashes = list(request.block_hashes)
        self.hide(request, prefix)  # first of all: it must not be found by its own blocks
        if self.chunks is not None:
            self.chunks.forget(array("q", prompt), hashes, prefix)
        if self.pool is not None:
            self.pool.remove(self._own(hashes, prefix))
        return True

    def _own(self, hashes: Sequence[Any], prefix: int) -> Sequence[Any]:
        return hashes[prefix // self.block() :]

    def asks(self, request_id: str) -> bool:
        """Whether a request is one of these."""
        return request_id in self._requests

    def done(self, request: Any) -> bool:
        """Whether LMCache has answered, or is not waited for any more: the request can run."""
        known = self._requests[request.request_id]
        if known.over:
            return True
        now = time.perf_counter()
        known.asked = now if known.asked is None else known.asked
        if known.lookup is None:
            if sum(other.lookup is not None for other in self._requests.values()) < AT_ONCE:
                known.lookup = self.look_up(request)
                known.over = known.lookup is None
        elif known.lookup.poll(0.0):
            known.over = known.forgotten = True
            self._close(known)
        if not known.over and now - known.asked > self.deadline:
            known.over = True
            self._close(known)
        return known.over

    def finished(self, request_id: str) -> bool:
        """The request ended: whether the chunk's KV was removed."""
        known = self._requests.pop(request_id)
        self._close(known)
        return known.forgotten

    def _close(self, known: _Request) -> None:
        lookup, known.lookup = known.lookup, None
        if lookup is not None:
            self.abandon(lookup)

    def __len__(self) -> int:
        return len(self._requests)
