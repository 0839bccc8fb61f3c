"""What the connector does to vLLM's prefix cache, and what it takes from it, on the real one.

See test_internals.py.
"""

from __future__ import annotations

import inspect
import warnings
from array import array
from typing import Any

import pytest
from contract_kit import BLOCK, request

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request

    from lmcache_rag.connector import vllm_internals
    from lmcache_rag.connector.gpu_chunks import ResidentChunks

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def config() -> VllmConfig:
    return VllmConfig()


@pytest.fixture
def hasher(config: VllmConfig) -> Any:
    from vllm.utils.hashing import get_hash_fn_by_name

    function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
    init_none_hash(function)
    return get_request_block_hasher(BLOCK, function)


@pytest.fixture
def manager() -> KVCacheManager:
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    config = KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    options = {
        "max_model_len": 512,
        "scheduler_block_size": BLOCK,
        "hash_block_size": BLOCK,
        "enable_caching": True,
        "max_num_batched_tokens": 512,
    }
    known = inspect.signature(KVCacheManager.__init__).parameters
    return KVCacheManager(config, **{name: value for name, value in options.items() if name in known})


def run(manager: KVCacheManager, one: Request, *, hide_from: int | None = None, decode: int = 0) -> int:
    """Schedule a request as vLLM does; returns how many tokens its own blocks gave it."""
    blocks, local = manager.get_computed_blocks(one)[:2]
    if hide_from is not None:
        vllm_internals.hide_from_prefix_cache(one, hide_from, BLOCK)
    assert manager.allocate_slots(one, one.num_tokens - local, local, blocks) is not None
    one.num_computed_tokens = one.num_tokens
    for token in range(decode):
        one.append_output_token_ids(token)
        assert manager.allocate_slots(one, 1) is not None
        one.num_computed_tokens += 1
    return local


@pytest.mark.parametrize("first", [0, 16, 40, 64, 90])
def test_others_get_no_block_after_approximate_ones(manager: KVCacheManager, hasher: Any, first: int) -> None:
    prompt = list(range(100, 205))
    blended = request("blended", prompt, hasher)
    assert run(manager, blended, hide_from=first, decode=40) == 0
    everything = prompt + list(range(40))
    manager.free(blended)

    other = request("other", [*everything, 1, 2, 3], hasher)
    assert manager.get_computed_blocks(other)[1] == first // BLOCK * BLOCK
    run(manager, other)
    manager.free(other)
    again = request("again", [*everything, 1, 2, 3], hasher)
    assert manager.get_computed_blocks(again)[1] == len(everything) // BLOCK * BLOCK, "exact KV is served as ever"


def test_a_preempted_request_finds_its_approximate_kv(manager: KVCacheManager, hasher: Any) -> None:
    blended = request("blended", list(range(100)), hasher)
    run(manager, blended, hide_from=40, decode=30)
    manager.free(blended)
    blended.num_computed_tokens = 0
    assert manager.get_computed_blocks(blended)[1] == 130 // BLOCK * BLOCK - (130 % BLOCK == 0) * BLOCK


def test_hiding_twice_and_without_prefix_caching(manager: KVCacheManager, hasher: Any) -> None:
    one = request("one", list(range(100)), hasher)
    exact = list(one.block_hashes)
    vllm_internals.hide_from_prefix_cache(one, 64, BLOCK)
    vllm_internals.hide_from_prefix_cache(one, 32, BLOCK)
    assert one.block_hashes[:2] == exact[:2]
    assert len(one.block_hashes) == len(exact)
    assert not set(one.block_hashes[2:]) & set(exact)

    plain = request("plain", list(range(100)), None)
    vllm_internals.hide_from_prefix_cache(plain, 32, BLOCK)
    assert plain.block_hashes == []
    assert manager.block_pool.hash_block_size == BLOCK


def test_ingested_chunks_are_kept_in_vllms_blocks(manager: KVCacheManager, hasher: Any) -> None:
    prefix, first, second = list(range(32)), list(range(100, 148)), list(range(200, 240))
    hot = ResidentChunks(vllm_internals.CachedBlocks(manager.block_pool), BLOCK)
    held = {}
    for name, chunk in (("first", first), ("second", second)):
        ingestion = request(name, prefix + chunk, hasher)
        run(manager, ingestion)
        held[name] = manager.get_block_ids(name)[0]
        hot.remember(array("q", prefix + chunk), ingestion.block_hashes, len(prefix))
        manager.free(ingestion)

    query = request("query", prefix + second + first + [1, 2, 3], hasher)
    places = hot.locate(array("q", query.prompt_token_ids), query.block_hashes, [(32, 72), (72, 120)])
    found = hot.find(places)
    assert [(m.start, m.end, m.old_start, m.block) for m in found] == [
        (32, 48, 32, held["second"][2]),
        (48, 64, 48, held["second"][3]),
        (72, 88, 32, held["first"][2]),
        (88, 104, 48, held["first"][3]),
        (104, 120, 64, held["first"][4]),
    ]
    free = manager.block_pool.get_num_free_blocks()
    hot.pin("query", [match.block for match in found])
    assert manager.block_pool.get_num_free_blocks() == free - 5
    fill = request("fill", list(range(1000, 1500)), hasher)
    run(manager, fill)  # takes the blocks that can be evicted in order
    manager.free(fill)
    assert hot.find(places) == found
    hot.unpin("query")
    assert manager.block_pool.get_num_free_blocks() == free
    assert manager.block_pool.reset_prefix_cache()
    assert hot.find(places) == [], "vLLM has emptied its prefix cache"


def test_removed_blocks_stay_with_their_requests(manager: KVCacheManager, hasher: Any) -> None:
    pool = vllm_internals.CachedBlocks(manager.block_pool)
    twins = [request(name, list(range(100)), hasher) for name in ("one", "two")]
    for twin in twins:  # both are computed: blocks of one hash
        assert manager.allocate_slots(twin, twin.num_tokens) is not None
    free = manager.block_pool.get_num_free_blocks()
    assert pool.remove(twins[0].block_hashes[2:]) == 2 * (100 // BLOCK - 2)
    assert pool.remove(twins[0].block_hashes[2:]) == 0
    assert manager.block_pool.get_num_free_blocks() == free
    other = request("other", list(range(100)), hasher)
    assert manager.get_computed_blocks(other)[1] == 2 * BLOCK
    for twin in twins:
        manager.free(twin)


def test_what_hides_blocks_looks_like_vllms_own_hashes(hasher: Any) -> None:
    one = request("one", list(range(100)), hasher)
    (kind,) = {(type(own), len(own)) for own in one.block_hashes}
    vllm_internals.hide_from_prefix_cache(one, 32, BLOCK)
    assert {(type(own), len(own)) for own in one.block_hashes} == {kind}


def test_a_block_is_found_by_its_key_as_vllm_finds_it(manager: KVCacheManager, hasher: Any) -> None:
    pool = vllm_internals.CachedBlocks(manager.block_pool)
    twins = [request(name, list(range(100)), hasher) for name in ("one", "two")]
    for twin in twins:  # both are computed: blocks of one hash
        assert manager.allocate_slots(twin, twin.num_tokens) is not None
    hashes = [*twins[0].block_hashes, b"x" * 32]
    found = list(pool.get(map(pool.key, hashes)))
    theirs = [manager.block_pool.get_cached_block(own, [0]) for own in hashes]
    assert found == [blocks[0] if blocks else None for blocks in theirs]
    assert found[-1] is None
    assert all(pool.blocks[block.block_id] is block for block in found[:-1])
