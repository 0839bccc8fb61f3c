"""Two replicas of vLLM for CPUs that share one LMCache server. See test_vllm.py."""

from __future__ import annotations

import random

import pytest
from vllm_cpu_kit import CHUNK, Servers, needs_vllm_cpu, until

pytestmark = [pytest.mark.slow, pytest.mark.full, needs_vllm_cpu]

LOADED, STORED = "vllm:external_prefix_cache_hits_total", "lmcache_mp_l1_write_chunks_total"


def test_what_one_replica_computed_the_other_reuses(replicas: Servers) -> None:
    rng = random.Random(0)
    prompt = [rng.randrange(300, 40_000) for _ in range(4 * CHUNK + 9)]
    by_first = replicas.tokens(prompt, replica=0)
    assert until(lambda: replicas.lmcache_counter(STORED) >= 4)
    assert replicas.vllm_counter(LOADED, engine="1") == 0
    assert replicas.tokens(prompt, replica=1) == by_first
    assert replicas.vllm_counter(LOADED, engine="1") == 4 * CHUNK
    assert replicas.vllm_counter(LOADED, engine="0") == 0


def test_tenants_are_the_same_on_both_replicas(replicas: Servers) -> None:
    rng = random.Random(1)
    prompt = [rng.randrange(300, 40_000) for _ in range(4 * CHUNK + 9)]
    stored, loaded = replicas.lmcache_counter(STORED), replicas.vllm_counter(LOADED, engine="1")
    mine = replicas.tokens(prompt, replica=0, cache_salt="mine")
    assert until(lambda: replicas.lmcache_counter(STORED) >= stored + 4)
    assert replicas.tokens(prompt, replica=1, cache_salt="yours") == mine
    assert replicas.vllm_counter(LOADED, engine="1") == loaded
