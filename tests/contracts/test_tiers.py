"""LMCache's adapters for second tiers, and real ones: a folder, Valkey, moto's S3. See test_server.py."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from contract_kit import CHUNK
from lmcache_server_kit import TOKENS, LMCacheServer, made_servers, text
from tier_kit import KINDS
from vllm_cpu_kit import until

from lmcache_rag.connector.lmcache_server.tier_check import SERDE, TRAILER

pytestmark = [pytest.mark.filterwarnings("ignore")]

Make = Callable[..., LMCacheServer]


@pytest.fixture(params=["fs", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("fs_native", "valkey", "s3"))])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    made: Any = KINDS[request.param](tmp_path)
    yield made
    made.close()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.touch(0o600)
    file.write_text("0123456789abcdef" * 4)
    return file


@pytest.fixture
def make(secret: Path) -> Iterator[Make]:
    serde = {"type": SERDE, "secret_file": str(secret)}
    with made_servers() as made:
        yield lambda tier, **kwargs: made(l2=tier.settings | {"serde": serde}, **kwargs)


def stored(server: LMCacheServer, tier: Any, draw: random.Random) -> list[int]:
    """Three chunks after a prefix, in the second tier and no more in memory."""
    prompt = text(draw, 4)
    before = len(tier.names())
    server.store(prompt, ingest=True)
    assert until(lambda: len(tier.names()) == before + 4)
    assert until(lambda: server.evict() or server.in_memory(prompt) == 0)
    return prompt


def loaded(server: LMCacheServer, prompt: list[int]) -> list[int]:
    """Where a look-up finds chunks of a prompt behind seven tokens. What is loaded is what was stored."""
    asked, found = server.hold([5] * 7 + prompt[CHUNK:])
    assert server.in_memory(prompt) >= len(found.non_prefix_segments)
    assert server.sound(prompt)
    server.release(asked, found)
    return [each.cur_st for each in found.non_prefix_segments]


def named(tier: Any, server: LMCacheServer, prompt: list[int], chunk: int) -> str:
    """The name of a chunk's object in the tier."""
    wanted = server.keys(prompt)[chunk].chunk_hash.hex()
    return next(name for name in tier.names() if wanted in name)


def test_kv_comes_back_from_a_tier(make: Make, draw: random.Random, tier: Any) -> None:
    server = make(tier)
    prompt = stored(server, tier, draw)
    assert len(tier.read(named(tier, server, prompt, 1))) == CHUNK * TOKENS + TRAILER
    assert loaded(server, prompt) == [7, 7 + CHUNK, 7 + 2 * CHUNK]


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "another chunk's", "without a digest", "another secret's"])
def test_damaged_and_foreign_bytes_are_a_miss(
    make: Make, draw: random.Random, tier: Any, damage: str, secret: Path
) -> None:
    """The other chunks that are loaded with it are used, and the object can be stored again."""
    server = make(tier)
    prompt = stored(server, tier, draw)
    name = named(tier, server, prompt, 2)
    data = tier.read(name)
    if damage == "another secret's":
        from lmcache_rag.connector.lmcache_server.tier_check import MAGIC, Digest

        sealed = MAGIC + Digest(bytes(32)).of(server.keys(prompt)[2], data[:-TRAILER])
        changed = data[:-TRAILER] + sealed
    else:
        changed = {
            "a bit": data[:1000] + bytes([data[1000] ^ 1]) + data[1001:],
            "cut": data[:-1],
            "empty": b"",
            "another chunk's": tier.read(named(tier, server, prompt, 3)),
            "without a digest": data[:-TRAILER],
        }[damage]
    tier.write(name, changed)
    assert loaded(server, prompt) == [7, 7 + 2 * CHUNK]
    if len(changed) < len(data):  # it cannot be read, as when the tier is away: not deleted at once
        assert until(lambda: server.evict() or server.in_memory(prompt) == 0)
        assert loaded(server, prompt) == [7, 7 + 2 * CHUNK]
    assert sum(each.damaged for each in server.guard.tiers) in (1, 2)  # twice if it is not deleted yet
    assert until(lambda: name not in tier.names()), "it is deleted"
    assert until(lambda: server.evict() or server.in_memory(prompt) == 0)
    server.store(prompt, ingest=True)
    assert until(lambda: name in tier.names() and tier.read(name) == data)
    assert until(lambda: server.evict() or server.in_memory(prompt) == 0)
    assert len(loaded(server, prompt)) == 3


@pytest.mark.parametrize("tier", ["fs", pytest.param("valkey", marks=pytest.mark.full)], indirect=True)
def test_a_tier_that_is_away_is_a_miss(make: Make, draw: random.Random, tier: Any) -> None:
    """Not S3: Amazon's client, which LMCache has, tries again for more than ten seconds before a load has failed."""
    server = make(tier)
    prompt = stored(server, tier, draw)
    tier.stop()
    for _ in range(3):
        assert loaded(server, prompt) == []
    assert server.look_up(prompt).prefix_coverage_tokens == 0
    other = text(draw, 3)
    assert server.store(other, ingest=True)
    assert len(loaded(server, other)) == 2, "memory works on"
    tier.start()
    assert until(lambda: len(loaded(server, prompt)) == 3, 30), "it is back"


@pytest.mark.full
def test_a_full_tier_stores_no_more(make: Make, draw: random.Random, tmp_path: Path) -> None:
    tier = KINDS["valkey"](tmp_path)
    try:
        server = make(tier)
        prompt = stored(server, tier, draw)
        tier.fill()
        other = text(draw, 3)
        assert server.store(other, ingest=True)
        assert server.chunks([5] * 7 + other[CHUNK:]) == 2
        time.sleep(0.5)
        assert len(tier.names()) == 4
        assert until(lambda: server.evict() or server.in_memory(other) == 0)
        assert server.chunks([5] * 7 + other[CHUNK:]) == 0
        assert len(loaded(server, prompt)) == 3, "what it has is read"
    finally:
        tier.close()


def test_what_others_deleted_leaves_the_index(make: Make, draw: random.Random, tmp_path: Path) -> None:
    """Not while the tier may be away: see above."""
    tier = KINDS["fs"](tmp_path)
    server = make(tier)
    prompt, other = stored(server, tier, draw), stored(server, tier, draw)
    for name in tier.names():
        if any(each.chunk_hash.hex() in name for each in server.keys(prompt)):
            (tier.place / name).unlink()
    for _ in range(2):
        assert loaded(server, prompt) == []
    assert len(server.guard.index) == 6
    assert len(loaded(server, other)) == 3
    for _ in range(2):
        assert loaded(server, prompt) == []
    assert len(server.guard.index) == 3
    assert len(loaded(server, other)) == 3
