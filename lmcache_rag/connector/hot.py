"""Chunks whose exact KV vLLM itself still holds, from an ingestion or an earlier request.

A copy on the GPU instead of a load from LMCache. Blocks of finished requests stay in vLLM's pool until they are
evicted, filed under hashes of everything before them; so the blocks of `prefix + chunk` are found when it is known
where in a prompt the chunks stand. A client says so in kv_transfer_params: `"lmcache_rag.chunks": [[start, end], ...]`.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lmcache_rag.connector import filed as filed_blocks
from lmcache_rag.connector.filed import FiledBlocks
from lmcache_rag.connector.plan import Match


class Pool(filed_blocks.Pool, Protocol):
    """What is used of vLLM's BlockPool."""

    def touch(self, blocks: Sequence[Any]) -> None:
        """Keep blocks from being evicted."""
        ...

    def free_blocks(self, blocks: Sequence[Any]) -> None:
        """Let go of them."""
        ...


class HotChunks:
    """Finds chunks in vLLM's block pool.

    Args:
        pool: The pool.
        block: Tokens in a block.
        hash_block: (hash of the block before, tokens) -> hash of a block, as vLLM does it.
        filed: What was filed in this step; that is not found.
        remembered: How many chunks' hashes are kept: hashing costs more than looking up.
    """

    def __init__(
        self,
        pool: Pool,
        block: int,
        hash_block: Callable[[Any, tuple[int, ...]], Any],
        *,
        filed: FiledBlocks | None = None,
        remembered: int = 4096,
    ) -> None:
        self._pool, self._block, self._hash, self._remembered = pool, block, hash_block, remembered
        self._hashes: OrderedDict[tuple[Any, bytes], tuple[Any, ...]] = OrderedDict()
        self._pinned: dict[str, list[Any]] = {}
        self._filed = FiledBlocks(pool, block) if filed is None else filed

    def find(
        self, tokens: Sequence[int], hashes: Sequence[Any], spans: Sequence[tuple[int, int]]
    ) -> list[tuple[Match, Any]]:
        """Blocks that hold parts of the spans, with the place where each was computed.

        Args:
            tokens: The prompt.
            hashes: The prompt's own block hashes, at least over its prefix.
            spans: Where the chunks stand; the prefix ends where the first begins, and fills whole blocks.
        """
        if not spans:
            return []
        prefix = spans[0][0]
        if prefix % self._block or prefix // self._block > len(hashes) or prefix == 0:
            return []
        parent, size = hashes[prefix // self._block - 1], self._block
        found = []
        for start, end in spans:
            at, old = start, prefix
            for block in self._filed.all_computed(self._chunk_hashes(parent, tokens[start:end])):
                found.append((Match(at, at + size, old, old + size, None, block.block_id), block))
                at, old = at + size, old + size
        return found

    def held(self, tokens: Sequence[int], hashes: Sequence[Any], spans: Sequence[tuple[int, int]]) -> int:
        """About how many tokens of the spans `find` would find, from the last block of each: much sooner."""
        prefix = spans[0][0] if spans else 0
        if not prefix or prefix % self._block or prefix // self._block > len(hashes):
            return 0
        parent = hashes[prefix // self._block - 1]
        count = 0
        for start, end in spans:
            own = self._chunk_hashes(parent, tokens[start:end])
            if own and self._filed.computed(own[-1]) is not None:
                count += end - start
        return count

    def _chunk_hashes(self, parent: Any, tokens: Sequence[int]) -> tuple[Any, ...]:
        # By bytes, which are hashed once and not, as a tuple is, with each access.
        key = (parent, array("q", tokens).tobytes())
        known = self._hashes.get(key)
        if known is not None:
            self._hashes.move_to_end(key)
            return known
        hashes: list[Any] = []
        for first in range(0, len(tokens) - self._block + 1, self._block):
            parent = self._hash(parent, tuple(tokens[first : first + self._block]))
            hashes.append(parent)
        self._hashes[key] = tuple(hashes)
        if len(self._hashes) > self._remembered:
            self._hashes.popitem(last=False)
        return self._hashes[key]

    def pin(self, request_id: str, blocks: Sequence[Any]) -> None:
        """Keep these blocks until they are unpinned; they replace what was pinned for the request before."""
        self._pool.touch(blocks)
        self.unpin(request_id)
        self._pinned[request_id] = list(blocks)

    def unpin(self, request_id: str) -> None:
        """Let a request's blocks go. Safe to call when there are none."""
        blocks = self._pinned.pop(request_id, None)
        if blocks:
            self._pool.free_blocks(list(reversed(blocks)))

    @property
    def pinned(self) -> int:
        """Requests that hold blocks."""
        return len(self._pinned)


def named_spans(params: dict[str, Any] | None, prompt: int) -> list[tuple[int, int]]:
    """Where the chunks stand in a prompt of that length, by the request's own word; empty when it makes no sense."""
    given = (params or {}).get("lmcache_rag.chunks")
    if not isinstance(given, list):
        return []
    spans: list[tuple[int, int]] = []
    for item in given:
        if not (isinstance(item, list | tuple) and len(item) == 2 and all(type(n) is int for n in item)):
            return []
        start, end = item
        if not (spans[-1][1] if spans else 0) <= start < end <= prompt:
            return []
        spans.append((start, end))
    return spans
