"""Scheduler side of hot chunks: which of a request's chunks vLLM still holds, pinned while they are in use.

Blocks are pinned when they are claimed, since the allocation that follows may evict what nobody holds. What was claimed
and not allocated in the same step is let go again; after two such steps a request does without, or pins and allocation
might wait for each other for ever in a small pool.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmcache_rag.connector.gpu_chunks import HotChunks, Place
from lmcache_rag.connector.metadata import Match
from lmcache_rag.protocol import named_prefix, named_spans

_ATTEMPTS = 2


@dataclass
class _Hot:
    places: list[Place]
    tokens: int  # of all chunks
    attempts: int = 0


@dataclass
class HotSide:
    """Hot chunks of the requests in the scheduler.

    Args:
        chunks: Finds them.
        share: So much of a request's chunks must be hot to do without LMCache's look-up.
    """

    chunks: HotChunks
    share: float = 0.9
    _requests: dict[str, _Hot] = field(default_factory=dict)
    _loose: set[str] = field(default_factory=set)  # pinned in this step, not allocated yet

    def begin(self, request: Any, tokens: array[int]) -> None:
        """Note where a new request's chunks are in its prompt."""
        spans = named_spans(request.kv_transfer_params, len(tokens))
        places = self.chunks.places(tokens, request.block_hashes, spans)
        if places:
            self._requests[request.request_id] = _Hot(places, sum(end - start for start, end in spans))

    def ingested(self, request: Any) -> None:
        """Remember the chunk of an ingestion request that has been computed."""
        prompt = request.prompt_token_ids or ()
        prefix = named_prefix(request.kv_transfer_params, len(prompt))
        if 0 < prefix < len(prompt) <= request.num_computed_tokens:
            self.chunks.remember(array("q", prompt), request.block_hashes, prefix)

    def promising(self, request: Any) -> bool:
        """Whether so much seems to be hot that LMCache need not be asked."""
        hot = self._requests.get(request.request_id)
        return hot is not None and self.chunks.held(hot.places) >= self.share * hot.tokens

    def find(self, request: Any) -> list[Match]:
        """What is hot right now."""
        hot = self._requests.get(request.request_id)
        if hot is None or hot.attempts >= _ATTEMPTS:
            return []
        found = self.chunks.find(hot.places)
        if not found:  # evicted: it is not looked for again in each step that the request waits
            del self._requests[request.request_id]
        return found

    def enough(self, request: Any, matches: Sequence[Match]) -> bool:
        """Whether so much is hot that LMCache need not be asked."""
        hot = self._requests.get(request.request_id)
        return hot is not None and len(matches) * self.chunks.block >= self.share * hot.tokens

    def claim(self, request_id: str, matches: Sequence[Match]) -> None:
        """Pin the hot ones among the matches that are claimed."""
        blocks = [match.block for match in matches if match.block >= 0]
        if blocks:
            self.chunks.pin(request_id, blocks)
            self._loose.add(request_id)

    def keep(self, request_id: str) -> None:
        """A plan holds the blocks now, until `done`."""
        self._loose.discard(request_id)

    def step_ends(self) -> None:
        """Let go of what was claimed and not allocated."""
        for request_id in self._loose:
            self.chunks.unpin(request_id)
            if hot := self._requests.get(request_id):
                hot.attempts += 1
        self._loose.clear()

    def done(self, request_id: str) -> None:
        """A plan was carried out, or is not going to be."""
        self.chunks.unpin(request_id)
        self._loose.discard(request_id)

    def forget(self, request_id: str) -> None:
        """The request is gone; a plan that is under way keeps its blocks."""
        self._requests.pop(request_id, None)


def without_overlap(matches: Sequence[Match], hot: Sequence[Match], prompt: int) -> list[Match]:
    """The hot matches, and the others as far as they touch none of them."""
    if not matches or not hot:
        return [*hot, *matches]
    covered = bytearray(prompt)
    for match in hot:
        covered[match.start : match.end] = b"\1" * (match.end - match.start)
    return [*hot, *(m for m in matches if not any(covered[m.start : m.end]))]
