"""`lmcache-rag plan --replay` against real servers with little memory: predicted and measured hit rates agree."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from vllm_cpu_kit import CHUNK, Servers, needs_vllm_cpu, until

from lmcache_rag.engines.vllm_client import VLLMClient
from lmcache_rag.plan.cache import Place, zipf_workload
from lmcache_rag.plan.geometry import read_config
from lmcache_rag.plan.replay import WITHIN, Replayed, Server, replay

pytestmark = [pytest.mark.slow, pytest.mark.full, needs_vllm_cpu]

GIB = 1 << 30
MEMORY = 0.25  # GiB: 90 LMCache chunks of this model in float32


@pytest.fixture(scope="module")
def small(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Servers with little memory; vLLM's own cache is off, so that only LMCache can hit."""
    folder = tmp_path_factory.mktemp("small")
    servers = Servers(smollm2_path, folder, "--no-enable-prefix-caching", gigabytes=MEMORY)
    yield servers
    servers.close()


@pytest.mark.parametrize(("exponent", "top_k"), [(1.0, 1), (0.0, 1), (0.8, 2)])
def test_the_hit_rate_is_as_predicted(small: Servers, exponent: float, top_k: int) -> None:
    work = zipf_workload(60, 240 // top_k, top_k=top_k, exponent=exponent, seed=7)
    requests = [([str(number) for number in each], [2 * CHUNK + 9] * len(each)) for each in work.requests]
    model = read_config(str(small.model), dtype="fp32")
    with VLLMClient(small.url) as client:
        found = replay(client, Server.of(client), requests, model, memory_bytes=int(MEMORY * GIB))
    print(found)
    assert not found.blends
    assert found.left_out == 0
    assert 0.05 < found.predicted < 0.95
    assert abs(found.measured - found.predicted) <= WITHIN


LOADS = "lmcache_mp_l2_prefetch_load_completed_chunks_total"


@pytest.mark.parametrize("policy", ["default", "retain"])
def test_what_a_tier_holds_returns_if_retained(smollm2_path: Path, tmp_path: Path, policy: str) -> None:
    """LMCache's two policies, as the simulation has them; `lmcache-rag serve` sets `retain`."""
    tier = json.dumps({"type": "fs", "base_path": str(tmp_path / "kv")})
    (tmp_path / "kv").mkdir()
    more = ("--l2-adapter", tier, "--l2-prefetch-policy", policy)
    servers = Servers(smollm2_path, tmp_path, "--no-enable-prefix-caching", gigabytes=MEMORY, lmcache=more)
    try:
        model, memory = read_config(str(smollm2_path), dtype="fp32"), int(MEMORY * GIB)
        with VLLMClient(servers.url) as client:
            server = Server.of(client)

            def ask(names: Iterable[int]) -> Replayed:
                requests = [([str(name)], [2 * CHUNK]) for name in names]
                disk = [Place("disk")]
                return replay(
                    client,
                    server,
                    requests,
                    model,
                    memory_bytes=memory,
                    tiers=disk,
                    retain=policy == "retain",
                    seed="s",
                )

            assert ask([*range(50), *range(10)]).agrees  # the second time they are found, in the tier
            assert ask([11]).measured == 1
            loads = servers.lmcache_counter(LOADS)
            assert loads > 0
            assert ask([11]).measured == 1
            again = until(lambda: servers.lmcache_counter(LOADS) > loads, 15)
            assert again == (policy == "default")
    finally:
        servers.close()
