"""Blocks with approximate KV in vLLM's real scheduler and pool: never cached, and the first to be used again."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from contract_kit import BLOCK, CHUNK

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm.v1.core.block_pool import BlockPool

    from lmcache_rag.connector import vllm_patches

pytestmark = [pytest.mark.filterwarnings("ignore")]


def hashed(engine: Any, name: str) -> list[bool]:
    """Which of a request's blocks vLLM's prefix cache has."""
    manager = engine.scheduler.kv_cache_manager
    (blocks,) = manager.get_block_ids(name)
    return [manager.block_pool.blocks[block].block_hash is not None for block in blocks]


def test_only_exact_blocks_of_a_blend_are_cached(make: Any) -> None:
    engine = make()
    engine.add("a", 400, 4, exact=CHUNK, outputs=40)
    engine.step()
    exact = engine.connector._scheduler.store_limit("a") // BLOCK
    assert exact >= CHUNK // BLOCK
    for _ in range(30):
        engine.step()
        found = hashed(engine, "a")
        assert found == [True] * exact + [False] * (len(found) - exact)
    engine.to_the_end()


def test_a_request_without_a_blend_is_cached_as_ever(make: Any) -> None:
    engine = make()
    engine.add("a", 400, 0)
    engine.step()
    assert all(hashed(engine, "a")[: 400 // BLOCK])
    engine.to_the_end()


def test_a_blend_in_the_background_is_not_cached(make: Any) -> None:
    engine = make()
    engine.add("other", 100, 0, outputs=30)
    engine.step()
    engine.add("a", 400, 4, exact=CHUNK)
    for _ in range(3):
        engine.step()
    assert engine.beside["a"] == 1
    exact = engine.connector._scheduler.store_limit("a") // BLOCK
    assert hashed(engine, "a")[: exact + 1] == [True] * exact + [False]
    engine.to_the_end()


def test_approximate_blocks_are_used_again_first(make: Any) -> None:
    """Cached blocks that others can find stay, however many blends come after."""
    engine = make()
    tokens = list(range(1000, 1000 + 20 * BLOCK))
    engine.add_tokens("kept", tokens, outputs=1)
    engine.to_the_end()
    for number in range(12):
        engine.add(f"blend {number}", 400, 4)
        engine.to_the_end()
    engine.add_tokens("again", tokens, outputs=1)
    assert engine.step().num_scheduled_tokens == {"again": BLOCK}
    engine.to_the_end()


def test_a_mask_of_blocks_is_cut_with_them() -> None:
    pool = BlockPool(num_gpu_blocks=8, enable_caching=True, hash_block_size=BLOCK)
    taken: list[Any] = []

    def cache(
        request: Any,
        blocks: Any,
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        group: int,
        block_mask: Any,
    ) -> None:
        taken.append((num_cached_blocks, num_full_blocks, block_mask))

    pool.cache_full_blocks = cache
    seen: list[int] = []
    vllm_patches.patch_cache_full_blocks(pool, seen.append, lambda name: 3 * BLOCK + 1)

    class Request:
        request_id = "a"

    pool.cache_full_blocks(Request, pool.blocks, 1, 6, BLOCK, 0, [True, False, True, True, True])
    pool.cache_full_blocks(Request, pool.blocks, 4, 6, BLOCK, 0, block_mask=[True, True])
    assert taken == [(1, 3, [True, False]), (4, 3, [])]
    assert seen == [1, 2]
