"""Pinned chunks and budgets of tenants in LMCache's memory: its real storage and eviction, with our module in it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from contract_kit import CHUNK
from lmcache_server_kit import TOKENS, LMCacheServer, made_servers, text

from lmcache_rag.connector.lmcache_client import read_counts
from lmcache_rag.connector.lmcache_server import retention
from lmcache_rag.connector.metadata import Match

pytestmark = [pytest.mark.filterwarnings("ignore")]
Make = Callable[..., LMCacheServer]
OBJECT = CHUNK * TOKENS  # bytes
BUDGET = 8  # objects


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr(retention, "INTERVAL_S", 3600.0)  # a test calls step() itself
    with made_servers() as made:
        yield made


@pytest.fixture
def draw() -> random.Random:
    return random.Random(3)


def gigabytes(objects: int) -> float:
    return objects * OBJECT / retention.GIB


def pin(server: LMCacheServer, tokens: list[int], salt: str = "", *, on: bool = True, **configs: Any) -> dict[str, int]:
    """Pin a prompt's chunk; returns what the client is told."""
    answer = server.look_up(tokens, salt, pin=on, prefix=CHUNK, **configs)
    return read_counts((0, tuple(Match(0, 0, 0, 0, each) for each in answer.non_prefix_segments)))


def pressure(server: LMCacheServer) -> None:
    """Evict all that can be evicted."""
    for _ in range(60):
        server.make_room()


# -- pins -------------------------------------------------------------------------------------------------------------


def test_a_pinned_chunk_survives_memory_pressure(make: Make, draw: random.Random) -> None:
    server = make()
    prefix, chunk, other = text(draw, 1), text(draw, 2), text(draw, 2)
    assert pin(server, prefix + chunk)["pinned"] == 1, "before it is stored"
    server.store(prefix + chunk, ingest=True)
    server.store(prefix + other, ingest=True)
    server.store(text(draw, 5))
    pressure(server)
    assert server.in_memory(prefix + chunk) == 3, "with its prefix"
    assert server.in_memory(prefix + other) == 1
    assert server.chunks([5] * 7 + chunk) == 2, "it can be blended"
    assert pin(server, prefix + chunk, on=False) == {
        "pinned": 0,
        "used": 0,
        "limit": server.guard.pins.limit,
        "tenant": 0,
    }
    pressure(server)
    assert server.in_memory(prefix + chunk) == 0


def test_pins_beyond_memory_are_refused(make: Make, draw: random.Random) -> None:
    server = make()
    prefix, pinned, most = text(draw, 1), [], server.guard.pins.limit // OBJECT
    for _ in range(most // 50 + 1):
        chunk = text(draw, 50)
        found = pin(server, prefix + chunk)
        if not found["pinned"]:
            break
        pinned.append(chunk)
    assert len(pinned) == (most - 1) // 50
    assert found == {
        "pinned": 0,
        "used": (1 + 50 * len(pinned)) * OBJECT,
        "limit": server.guard.pins.limit,
        "tenant": 0,
    }
    for each in pinned:
        server.store(prefix + each, ingest=True)
    for _ in range(20):  # three times what is left
        server.store(text(draw, 60))
        server.make_room()
    assert [server.in_memory(prefix + each) for each in pinned] == [51] * len(pinned)
    last = text(draw, 3)
    pressure(server)
    assert server.store(last), "there is room for others"


def test_what_is_forgotten_is_not_pinned(make: Make, draw: random.Random) -> None:
    server = make()
    prefix, chunk, other = text(draw, 1), text(draw, 2), text(draw, 2)
    for each in (chunk, other):
        server.store(prefix + each, ingest=True)
        pin(server, prefix + each)
        pin(server, prefix + each)
    assert server.guard.pins.used == 5 * OBJECT, "the prefix once"
    server.look_up(prefix + chunk, forget=True, prefix=CHUNK)
    assert (server.guard.pins.used, server.in_memory(prefix + chunk)) == (3 * OBJECT, 1)
    pressure(server)
    assert server.in_memory(prefix + other) == 3


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_a_tenant_beyond_its_budget_evicts_its_own(make: Make, draw: random.Random) -> None:
    server = make({"budgets": {"acme": gigabytes(BUDGET)}})
    budgets = server.guard.budgets
    assert budgets is not None
    ours, theirs, free = text(draw, 3), text(draw, 20), text(draw, 20)
    server.store(ours, "one prefix", tenant="acme", ingest=True)
    server.store(theirs, "theirs", tenant="other")
    server.store(free, "free")
    assert budgets.step() == 0, "within its budget"
    asked = [text(draw, 2) for _ in range(5)]
    for each in asked:
        server.store(each, "another prefix", tenant="acme")
    assert budgets.figures() == {"acme": (13 * OBJECT, BUDGET * OBJECT)}
    server.look_up(asked[0], "another prefix", tenant="acme")
    assert budgets.step() == 5
    assert budgets.figures() == {"acme": (BUDGET * OBJECT, BUDGET * OBJECT)}
    left = [server.in_memory(each, "another prefix") for each in asked]
    assert sum(left) == 5, "ingested chunks are evicted last"
    assert left[4] == 2, "the oldest first"
    assert server.in_memory(ours, "one prefix") == 3
    assert server.in_memory(theirs, "theirs") == server.in_memory(free, "free") == 20
    assert dict(budgets.evicted) == {"acme": 5}


def test_memory_is_taken_from_whom_is_beyond(make: Make, draw: random.Random) -> None:
    server = make({"budgets": {"acme": gigabytes(BUDGET), "*": gigabytes(100)}})
    theirs, ours = [text(draw, 20) for _ in range(3)], text(draw, 30)
    for each in theirs:  # the least recently used
        server.store(each, "theirs", tenant="other")
    server.store(ours, "ours", tenant="acme")
    server.make_room()
    assert server.in_memory(ours, "ours") == BUDGET
    assert [server.in_memory(each, "theirs") for each in theirs] == [20] * 3
    server.make_room()
    assert server.in_memory(ours, "ours") == BUDGET
    assert sum(server.in_memory(each, "theirs") for each in theirs) < 60, "nobody is beyond a budget"


def test_pins_of_a_tenant_fit_its_budget(make: Make, draw: random.Random) -> None:
    server = make({"budgets": {"acme": gigabytes(BUDGET)}})
    prefix, chunk, other = text(draw, 1), text(draw, 5), text(draw, 5)
    assert pin(server, prefix + chunk, "ours", tenant="acme")["pinned"] == 1
    refused = pin(server, prefix + other, "ours", tenant="acme")
    assert refused == {"pinned": 0, "used": 6 * OBJECT, "limit": BUDGET * OBJECT, "tenant": 1}
    assert pin(server, prefix + other, "theirs", tenant="other")["pinned"] == 1
    server.store(prefix + chunk, "ours", tenant="acme", ingest=True)
    server.store(text(draw, 20), "ours", tenant="acme", ingest=True)
    assert server.guard.budgets is not None
    server.guard.budgets.step()
    assert server.in_memory(prefix + chunk, "ours") == 6


def test_lmcaches_quotas_know_the_tenants(make: Make, draw: random.Random) -> None:
    """They are of namespaces, and for second tiers with the policy IsolatedLRU; an unknown one may keep nothing."""
    tier = {"type": "mock", "max_size_gb": 1, "mock_bandwidth_gb": 10, "eviction": {"eviction_policy": "IsolatedLRU"}}
    server = make({"budgets": {"acme": gigabytes(BUDGET)}}, l2=tier)
    for salt, tenant in (("first", {}), ("first", {"tenant": "acme"}), ("second", {"tenant": "acme"}), ("free", {})):
        server.store(text(draw, 1), salt, **tenant)
    quotas = server.storage.quota_manager
    limits = {salt: quotas.get_limit_bytes(salt) for salt in ("first", "second")}
    assert limits == dict.fromkeys(("first", "second"), BUDGET * OBJECT)
    assert quotas.get_limit_bytes("free") > 1 << 40


def test_without_budgets_lmcache_has_no_quotas(make: Make, draw: random.Random) -> None:
    server = make()
    server.store(text(draw, 1), "ours", tenant="acme")
    assert server.guard.budgets is None
    assert server.storage.quota_manager.list_quotas() == []
