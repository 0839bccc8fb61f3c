"""Blocks of KV: how vLLM names them, and when it files them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any


def block_hash(vllm_config: Any) -> Callable[[Any, tuple[int, ...]], Any]:
    """How vLLM hashes a block of tokens behind another block; not for a sequence's first, which holds the salt."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import hash_block_tokens

    function = get_hash_fn_by_name(vllm_config.cache_config.prefix_caching_hash_algo)
    return lambda parent, tokens: hash_block_tokens(function, parent, tokens, None)


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
    hashes, random = type_of_hash(), os.urandom(32 * max(full - first, 0))
    request.block_hashes.extend(hashes(random[at : at + 32]) for at in range(0, len(random), 32))


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


def type_of_hash() -> Any:
    """The type of a block hash in vLLM (bytes)."""
    from vllm.v1.core.kv_cache_utils import BlockHash

    return BlockHash
