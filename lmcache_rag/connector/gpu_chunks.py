"""Ingested chunks whose exact KV vLLM itself still holds.

A copy on the GPU instead of a load from LMCache. Blocks of finished requests stay in vLLM's pool until they are
evicted, filed under hashes of everything before them; so the blocks of `prefix + chunk` are found when it is known
where in a prompt the chunks are. A client says so in kv_transfer_params, see lmcache_rag.protocol.CHUNKS.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple, Protocol

from lmcache_rag.connector import filed as filed_blocks
from lmcache_rag.connector.filed import FiledBlocks
from lmcache_rag.connector.metadata import Match

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
    """Where a chunk is in a prompt, where it was when it was computed, and what its blocks are filed under."""

    start: int
    end: int
    old_start: int
    keys: tuple[Any, ...]


class HotChunks:
    """Finds ingested chunks in vLLM's block pool.

    Only chunks that were ingested here are known: their block hashes are vLLM's own, so that nothing is hashed block by
    block, and what a query names costs one hash of each chunk's tokens.

    Args:
        pool: The pool.
        block: Tokens in a block.
        filed: What was filed in this step; that is not found.
        remembered: How many tokens of chunks are known; more than the pool holds would be of no use.
    """

    def __init__(self, pool: Pool, block: int, *, filed: FiledBlocks | None = None, remembered: int = 1 << 22) -> None:
        self._pool, self.block, self._remembered = pool, block, remembered
        self._known: OrderedDict[tuple[Any, bytes], tuple[Any, ...]] = OrderedDict()
        self._tokens = 0  # of the blocks that are known
        self._pinned: dict[str, list[Any]] = {}
        self._filed = FiledBlocks(pool, block) if filed is None else filed

    def remember(self, tokens: array[int], hashes: Sequence[Any], prefix: int) -> None:
        """Know a chunk from now on, by the request that computed it.

        Args:
            tokens: Its prompt, prefix + chunk, as 64-bit numbers.
            hashes: The prompt's block hashes, as vLLM made them.
            prefix: Tokens of the prefix, which fills whole blocks.
        """
        before = self._blocks_before(hashes, prefix)
        own = hashes[before : len(tokens) // self.block]
        if not before or not own:
            return
        name = self._name(hashes[before - 1], tokens[prefix:])
        self._forget(name)
        self._known[name] = tuple(map(self._pool.key, own))
        self._tokens += len(own) * self.block
        while self._tokens > self._remembered and len(self._known) > 1:
            self._forget(next(iter(self._known)))

    def forget(self, tokens: array[int], hashes: Sequence[Any], prefix: int) -> None:
        """Do not know it any more; the arguments are those of `remember`."""
        if before := self._blocks_before(hashes, prefix):
            self._forget(self._name(hashes[before - 1], tokens[prefix:]))

    def places(self, tokens: array[int], hashes: Sequence[Any], spans: Sequence[tuple[int, int]]) -> list[Place]:
        """What vLLM calls the blocks of those spans that are known.

        Args:
            tokens: The prompt, as 64-bit numbers.
            hashes: The prompt's own block hashes, as vLLM made them.
            spans: Where the chunks are; the prefix ends where the first begins, and fills whole blocks.
        """
        prefix = spans[0][0] if spans else 0
        before = self._blocks_before(hashes, prefix) if self._known else 0
        if not before:
            return []
        parent, places = hashes[before - 1], []
        for start, end in spans:
            name = self._name(parent, tokens[start:end])
            if (keys := self._known.get(name)) is not None:
                self._known.move_to_end(name)
                places.append(Place(start, end, prefix, keys))
        return places

    def _blocks_before(self, hashes: Sequence[Any], prefix: int) -> int:
        """Blocks of the prefix; 0 where there is none that can be known."""
        return prefix // self.block if prefix % self.block == 0 and prefix // self.block <= len(hashes) else 0

    def _name(self, parent: Any, tokens: array[int]) -> tuple[Any, bytes]:
        return parent, hashlib.blake2b(tokens, digest_size=16).digest()

    def _forget(self, name: tuple[Any, bytes]) -> None:
        self._tokens -= len(self._known.pop(name, ())) * self.block

    @property
    def tokens(self) -> int:
        """Tokens of the blocks that are known."""
        return self._tokens

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
        """About how many tokens `find` would find, from the last block of each chunk: much faster."""
        return sum(end - start for start, end, _, keys in places if self._filed.computed(keys[-1:]))

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
