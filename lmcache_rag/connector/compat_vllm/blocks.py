"""Blocks of KV: how vLLM names them, and when it files them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any


class CachedBlocks:
    """vLLM's blocks by the keys that its prefix cache files them under.

    Its own get_cached_block makes the key from the hash each time, and a list for each block: six times as long.
    """

    def __init__(self, pool: Any) -> None:
        from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

        self._pool, self._key = pool, make_block_hash_with_group_id

    def key(self, block_hash: Any) -> Any:
        """The key of a block with that hash."""
        return self._key(block_hash, 0)

    def get(self, keys: Iterable[Any]) -> Iterator[Any]:
        """The block under each key; None where there is none."""
        return map(self._pool.cached_block_hash_to_block.get_one_block, keys)  # a reset puts another map there

    @property
    def blocks(self) -> Sequence[Any]:
        """All blocks, by their ids."""
        blocks: Sequence[Any] = self._pool.blocks
        return blocks

    def touch(self, blocks: Sequence[Any]) -> None:
        """Keep blocks from being evicted."""
        self._pool.touch(blocks)

    def free_blocks(self, blocks: Sequence[Any]) -> None:
        """Let go of them."""
        self._pool.free_blocks(blocks)

    def remove(self, hashes: Iterable[Any]) -> int:
        """Take every block with one of these hashes out of the prefix cache; requests that use one keep it.

        Returns:
            How many.
        """
        removed = 0
        for block_hash in hashes:
            key = self.key(block_hash)
            # One hash may have several blocks. One that stays would be found again and again.
            while (block := self._pool.cached_block_hash_to_block.get_one_block(key)) is not None:
                self._pool.evict_blocks({block.block_id})
                if self._pool.cached_block_hash_to_block.contain(key, block.block_id):
                    break
                removed += 1
        return removed


def hide_from_prefix_cache(request: Any, first_token: int, hash_block: int) -> None:
    """Make every block from the one that holds `first_token` on unreachable for other requests, decoded ones too.

    vLLM files blocks under the request's chained hashes. Random ones in the place of those of the blocks that are full
    by now make all later hashes random too; a preempted request still finds its own blocks.
    """
    first = first_token // hash_block
    if not request.block_hashes and getattr(request, "_block_hasher", None) is None:
        return  # prefix caching is off
    del request.block_hashes[first:]
    full = request.num_tokens // hash_block
    # Not one and the others chained to it by vLLM: at 7 us each that is 13 ms in a prompt of 30,900 tokens.
    random = os.urandom(32 * max(full - first, 0))
    request.block_hashes.extend([random[at : at + 32] for at in range(0, len(random), 32)])


def watch_filed_blocks(pool: Any, filed: Callable[[int], None]) -> None:
    """Tell of each block, by its id, that vLLM files under a hash. It does so before the block's KV is computed."""
    file = pool.cache_full_blocks
    signature = inspect.signature(file)

    def cache_full_blocks(*args: Any, **kwargs: Any) -> None:
        file(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        for block in given["blocks"][given["num_cached_blocks"] : given["num_full_blocks"]]:
            filed(block.block_id)

    pool.cache_full_blocks = cache_full_blocks
