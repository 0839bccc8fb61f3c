"""vLLM's CPU build with our connector is started first, LMCache's server later: it serves meanwhile, and finds it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_cpu_kit import CHUNK, Servers, needs_vllm_cpu, until

STORED, FOUND = "lmcache_mp_l1_write_chunks_total", "lmcache_mp_lookup_hit_tokens_total"

pytestmark = [pytest.mark.slow, needs_vllm_cpu]


@pytest.fixture
def servers(smollm2_path: Path, tmp_path: Path) -> Iterator[Servers]:
    servers = Servers(smollm2_path, tmp_path, late=True)
    try:
        yield servers
    finally:
        servers.close()


def test_a_server_that_is_absent_at_start_is_used_when_it_comes(servers: Servers, tmp_path: Path) -> None:
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
