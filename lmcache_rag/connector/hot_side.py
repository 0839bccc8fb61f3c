"""Scheduler side of hot chunks: which of a request's chunks vLLM still holds, pinned while they are in use.

Blocks are pinned when they are claimed, since the allocation that follows may evict what nobody holds. What was claimed
and not allocated in the same step is let go again; after two such steps a request does without, or pins and allocation
might wait for each other for ever in a small pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmcache_rag.connector.hot import HotChunks, named_spans
from lmcache_rag.connector.plan import Match

_ATTEMPTS = 2


@dataclass
class _Hot:
    spans: list[tuple[int, int]]
    attempts: int = 0
    blocks: dict[int, Any] = field(default_factory=dict)  # by the position where each match starts


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

    def begin(self, request: Any) -> None:
        """Remember where a new request's chunks stand."""
        spans = named_spans(request.kv_transfer_params, len(request.prompt_token_ids or ()))
        if spans:
            self._requests[request.request_id] = _Hot(spans)

    def promising(self, request: Any) -> bool:
        """Whether so much seems to be hot that LMCache need not be asked."""
        hot = self._requests.get(request.request_id)
        if hot is None:
            return False
        held = self.chunks.held(request.prompt_token_ids, request.block_hashes, hot.spans)
        return held >= self.share * sum(end - start for start, end in hot.spans)

    def find(self, request: Any) -> list[Match]:
        """What is hot right now."""
        hot = self._requests.get(request.request_id)
        if hot is None or hot.attempts >= _ATTEMPTS:
            return []
        found = self.chunks.find(request.prompt_token_ids, request.block_hashes, hot.spans)
        hot.blocks = {match.start: block for match, block in found}
        return [match for match, _ in found]

    def enough(self, request: Any, matches: Sequence[Match]) -> bool:
        """Whether so much is hot that LMCache need not be asked."""
        hot = self._requests.get(request.request_id)
        if hot is None:
            return False
        return sum(m.end - m.start for m in matches) >= self.share * sum(end - start for start, end in hot.spans)

    def claim(self, request_id: str, matches: Sequence[Match]) -> None:
        """Pin the hot ones among the matches that are claimed."""
        hot = self._requests.get(request_id)
        if hot is None:
            return
        blocks = [hot.blocks[match.start] for match in matches if match.block >= 0]
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
