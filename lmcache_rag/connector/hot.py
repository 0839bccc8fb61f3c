"""Chunks whose exact KV vLLM itself still holds, from an ingestion or an earlier request.

A copy on the GPU instead of a load from LMCache. Blocks of finished requests stay in vLLM's pool until they are
evicted, filed under hashes of everything before them; so the blocks of `prefix + chunk` are found when it is known
where in a prompt the chunks stand. A client says so in kv_transfer_params, see
lmcache_rag.protocol.CHUNKS.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, repeat
from typing import Any, NamedTuple, Protocol

from lmcache_rag.connector import filed as filed_blocks
from lmcache_rag.connector.filed import FiledBlocks
from lmcache_rag.connector.plan import Match

_match: Callable[[tuple[Any, ...]], Match] = partial(tuple.__new__, Match)


class Pool(filed_blocks.Pool, Protocol):
    """What is used of vLLM's BlockPool."""

    @property
    def blocks(self) -> Sequence[Any]:
        """All blocks, by their ids."""
        ...

    def touch(self, blocks: Sequence[Any]) -> None:
        """Keep blocks from being evicted."""
        ...

    def free_blocks(self, blocks: Sequence[Any]) -> None:
        """Let go of them."""
        ...


class Place(NamedTuple):
    """Where a chunk stands in a prompt, where it stood when it was computed, and what its blocks are filed under."""

    start: int
    end: int
    old_start: int
    keys: tuple[Any, ...]


class HotChunks:
    """Finds chunks in vLLM's block pool.

    Args:
        pool: The pool.
        block: Tokens in a block.
        hash_block: (hash of the block before, tokens) -> hash of a block, as vLLM does it.
        filed: What was filed in this step; that is not found.
        remembered: How many chunks' keys are kept: hashing costs more than looking up.
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
        self._pool, self.block, self._hash, self._remembered = pool, block, hash_block, remembered
        self._keys: OrderedDict[tuple[Any, bytes], tuple[Any, ...]] = OrderedDict()
        self._pinned: dict[str, list[Any]] = {}
        self._filed = FiledBlocks(pool, block) if filed is None else filed

    def places(self, tokens: array[int], hashes: Sequence[Any], spans: Sequence[tuple[int, int]]) -> list[Place]:
        """What vLLM calls the blocks of the spans.

        Args:
            tokens: The prompt, as 64-bit numbers.
            hashes: The prompt's own block hashes, as vLLM made them.
            spans: Where the chunks stand; the prefix ends where the first begins, and fills whole blocks.
        """
        prefix = spans[0][0] if spans else 0
        if not prefix or prefix % self.block or prefix // self.block > len(hashes):
            return []
        before = prefix // self.block
        parent, places = hashes[before - 1], []
        for start, end in spans:
            own = hashes[before : end // self.block] if start == prefix else ()
            places.append(Place(start, end, prefix, self._chunk_keys(parent, tokens[start:end], own)))
        return places

    def find(self, places: Sequence[Place]) -> list[Match]:
        """Blocks that hold the chunks' beginnings, each with the place where it was computed."""
        found: list[Match] = []
        for start, _, old, keys in places:
            blocks, size = self._filed.computed(keys), self.block
            here, there = (range(at, at + (len(blocks) + 1) * size, size) for at in (start, old))
            # By way of map and zip, which ends with the blocks: half of the time that 500 calls of Match take.
            found += map(_match, zip(here, here[1:], there, there[1:], repeat(None), blocks, strict=False))
        return found

    def held(self, places: Sequence[Place]) -> int:
        """About how many tokens `find` would find, from the last block of each chunk: much sooner."""
        return sum(end - start for start, end, _, keys in places if keys and self._filed.computed(keys[-1:]))

    def _chunk_keys(self, parent: Any, tokens: array[int], own: Sequence[Any]) -> tuple[Any, ...]:
        """What a chunk's blocks are filed under; `own` are their hashes where it stands right behind the prefix."""
        # By bytes, which are hashed once and not, as a tuple is, with each access.
        name = (parent, tokens.tobytes())
        known = self._keys.get(name)
        if known is not None:
            self._keys.move_to_end(name)
            return known
        size = self.block
        parts = [tuple(tokens[first : first + size]) for first in range(0, len(tokens) - size + 1, size)]
        before = [parent, *own]
        # vLLM's own are of more than the tokens where the request has an adapter: then of each block.
        if len(own) == len(parts) > 0 and self._hash(before[-2], parts[-1]) == own[-1]:
            hashes = before[1:]
        else:
            hashes = list(accumulate(parts, self._hash, initial=parent))[1:]
        self._keys[name] = tuple(map(self._pool.key, hashes))
        if len(self._keys) > self._remembered:
            self._keys.popitem(last=False)
        return self._keys[name]

    def pin(self, request_id: str, block_ids: Sequence[int]) -> None:
        """Keep these blocks until they are unpinned; they replace what was pinned for the request before."""
        every = self._pool.blocks
        blocks = [every[number] for number in block_ids]
        self._pool.touch(blocks)
        self.unpin(request_id)
        self._pinned[request_id] = blocks

    def unpin(self, request_id: str) -> None:
        """Let a request's blocks go. Safe to call when there are none."""
        blocks = self._pinned.pop(request_id, None)
        if blocks:
            self._pool.free_blocks(blocks[::-1])

    @property
    def pinned(self) -> int:
        """Requests that hold blocks."""
        return len(self._pinned)
