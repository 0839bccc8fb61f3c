"""vLLM's CPU build with our connector is started first, LMCache's server later: it serves meanwhile, and finds it.

Then LMCache comes back with room for hardly more than a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from vllm_cpu_kit import CHUNK, Servers, needs_vllm_cpu, until

STORED, FOUND = "lmcache_mp_l1_write_chunks_total", "lmcache_mp_lookup_hit_tokens_total"

SMALL_GB = 0.1  # a chunk of SmolLM2's in float32 takes 3 MB

pytestmark = [pytest.mark.slow, pytest.mark.full, needs_vllm_cpu]


@pytest.fixture
def servers(smollm2_path: Path, tmp_path: Path) -> Iterator[Servers]:
    servers = Servers(smollm2_path, tmp_path, late=True)
    try:
        yield servers
    finally:
        servers.close()


def test_an_absent_or_full_server_changes_no_answer(servers: Servers, tmp_path: Path) -> None:
    prompt = [300 + i * 7 % 4000 for i in range(4 * CHUNK + 9)]
    wanted = servers.tokens(prompt)
    log = (tmp_path / "vllm.log").read_text()
    assert "LMCache does not answer: prompts are computed in full until it does" in log
    servers.start_lmcache()
    assert until(lambda: "resuming normal operation" in (tmp_path / "vllm.log").read_text(), 30)

    def stored() -> bool:
        servers.forget()
        servers.tokens(prompt)
        return servers.lmcache_counter(STORED) >= 4

    assert until(stored, 30)
    servers.forget()
    before = servers.lmcache_counter(FOUND)
    assert servers.tokens(prompt) == wanted
    assert servers.lmcache_counter(FOUND) == before + 4 * CHUNK

    servers.lmcache.kill()
    servers.start_lmcache(SMALL_GB)
    prompts = [[300 + (i * 7 + n * 31) % 4000 for i in range(9 * CHUNK + 5)] for n in range(8)]
    alone = [servers.tokens(prompt, cache_salt=f"alone {n}") for n, prompt in enumerate(prompts)]

    def all_stored() -> bool:
        servers.forget()
        assert [servers.tokens(prompt) for prompt in prompts] == alone
        return servers.lmcache_counter(STORED) >= len(prompts) * 9

    assert until(all_stored, 60)
    held = httpx.get(f"http://127.0.0.1:{servers.http}/status", timeout=5).json()["storage_manager"]["l1_managers"]
    (memory,) = held.values()
    assert memory["total_object_count"] < len(prompts) * 9, "it has no room for all"
    assert memory["read_locked_count"] == memory["write_locked_count"] == 0

    def used() -> bool:
        before = servers.lmcache_counter(FOUND)
        servers.forget()
        assert servers.tokens(prompts[-1]) == alone[-1]
        return servers.lmcache_counter(FOUND) > before

    assert until(used, 20)
