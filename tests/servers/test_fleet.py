"""Two LMCache servers, a coordinator and a second tier as processes, and each of them killed.

Only the copy from a GPU is replaced; see fleet_kit.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_cpu_kit import needs_vllm_cpu, until

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.filterwarnings("ignore"), needs_vllm_cpu]

AWAY = "The coordinator does not answer"


class Fleet:
    """A coordinator, a tier, and servers a and b."""

    def __init__(self, folder: Path, kind: str) -> None:
        import json

        from fleet_kit import CoordinatorProcess, Node
        from tier_kit import KINDS

        self.tier: Any = KINDS[kind](folder)
        self.coordinator = CoordinatorProcess(folder)
        self.nodes: list[Any] = []
        try:
            self.coordinator.start()
            for name in ("a", "b"):
                settings = self.tier.settings | {"serde": {"type": "lmcache_rag"}, "shared": True}
                self.nodes.append(Node(folder, name, self.coordinator.url, json.dumps(settings)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for node in self.nodes:
            node.kill()
        self.coordinator.kill()
        self.tier.close()


@pytest.fixture(params=["valkey", "fs", "s3"])
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path, request.param)
    yield made
    made.close()


def test_what_a_ingested_b_finds_through_all_restarts(fleet: Fleet) -> None:
    draw = random.Random(0)

    def text(chunks: int) -> list[int]:
        return [draw.randrange(1 << 32) for _ in range(64 * chunks)]

    a, b = fleet.nodes
    prefix, chunk, question = text(1), text(3), text(2)
    order = [5] * 7 + chunk
    a.store(prefix + question, question=True)
    assert a.store(prefix + chunk)
    assert a.chunks(order) == 3, "at once, where it was ingested"
    assert b.finds(order, 3), "and by others after a second"
    assert b.counter("lmcache_rag_chunks_found_elsewhere_total") == 3
    assert b.chunks([5] * 7 + question) == 0, "nobody ingested it"

    b.restart()
    assert b.finds(order, 3), "its memory and its index are empty"

    assert until(lambda: len(fleet.tier.names()) == 6)
    for node in (a, b):
        node.kill()
    fleet.coordinator.kill()
    fleet.coordinator.start()
    b.start()
    assert b.finds(order, 3), "everything was started again, and A is not there"

    fleet.coordinator.kill()
    for _ in range(10):
        assert b.chunks(order) == 3, "it knows them by now"
    late = text(2)
    b.store(prefix + late)
    assert b.chunks([5] * 7 + late) == 2
    assert b.counter("lmcache_rag_coordinator_answers") == 0
    assert len(b.lines(AWAY)) == 1
    fleet.coordinator.start()
    a.start()
    assert a.finds([5] * 7 + late, 2), "ingested while the coordinator was away"
    assert a.finds(order, 3)
    assert until(lambda: b.counter("lmcache_rag_coordinator_answers") == 1)

    fleet.coordinator.pause(stopped=True)
    try:
        for _ in range(5):
            assert a.chunks(order) == 3
        assert len(a.lines(AWAY)) == 1
    finally:
        fleet.coordinator.pause(stopped=False)
    assert until(lambda: a.counter("lmcache_rag_coordinator_answers") == 1)
    assert a.counter("lmcache_rag_tier_damaged_total") == b.counter("lmcache_rag_tier_damaged_total") == 0


def test_damage_in_the_tier_is_counted_and_not_used(fleet: Fleet) -> None:
    draw = random.Random(1)
    a, b = fleet.nodes
    prompt = [draw.randrange(1 << 32) for _ in range(64 * 4)]
    a.store(prompt)
    assert until(lambda: len(fleet.tier.names()) == 4)
    for name in fleet.tier.names():
        data = fleet.tier.read(name)
        fleet.tier.write(name, data[:-100] + bytes(100))
    a.restart()
    assert until(lambda: b.look_up([5] * 7 + prompt[64:]) and b.counter("lmcache_rag_tier_damaged_total") >= 3)
    assert b.chunks([5] * 7 + prompt[64:]) == 0
    assert until(lambda: len(fleet.tier.names()) <= 1)
    assert a.store(prompt)
    assert b.finds([5] * 7 + prompt[64:], 3), "stored again"
