"""Hit rates by size: stack distances against a plain LRU, and LMCache's own eviction as it was read."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_rag.errors import ConfigError
from lmcache_rag.plan.cache import (
    EVICTED,
    HEAD,
    MEMORY,
    WATERMARK,
    Place,
    Workload,
    _zipf,
    hit_curve,
    simulate,
    stack_distances,
    zipf_workload,
)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    chunks = draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(1, 5), min_size=chunks, max_size=chunks))
    some = st.lists(st.integers(0, chunks - 1), min_size=1, max_size=4, unique=True).map(tuple)
    return Workload(draw(st.lists(some, min_size=1, max_size=40)), sizes)


def plain_lru(work: Workload, room: int, admission: int = 1, ingested: tuple[int, ...] = (), skip: int = 0) -> float:
    """The hit rate of one size, by keeping the chunks in a list."""
    held: OrderedDict[int, None] = OrderedDict()
    seen, hits, uses = dict.fromkeys(ingested, 9), 0, 0

    def store(number: int) -> None:
        held[number] = None
        held.move_to_end(number)
        while sum(work.sizes[each] for each in held) > room:
            held.popitem(last=False)

    for number in ingested:
        store(number)
    for at, request in enumerate(work.requests):
        for number in request:
            hit = number in held
            seen[number] = seen.get(number, 0) + 1
            if hit or seen[number] >= admission:
                store(number)
            if at >= skip:
                hits, uses = hits + hit, uses + 1
    return hits / uses if uses else 0.0


@given(workloads(), st.integers(1, 2), st.integers(0, 5))
def test_one_pass_finds_what_a_plain_lru_finds(work: Workload, admission: int, skip: int) -> None:
    curve = hit_curve(work, admission=admission, skip=skip)
    for room in range(1, work.footprint + 2):
        assert curve.rate(room) == plain_lru(work, room, admission, skip=skip)
    assert curve.most == curve.rate(work.footprint)


@given(workloads(), st.lists(st.integers(0, 11), unique=True))
def test_ingested_chunks_are_there_from_the_start(work: Workload, numbers: list[int]) -> None:
    ingested = tuple(number for number in numbers if number < len(work.sizes))
    curve = hit_curve(work, ingested=ingested)
    for room in range(1, work.footprint + 2):
        assert curve.rate(room) == plain_lru(work, room, ingested=ingested)


def test_many_uses_need_the_table_more_than_once() -> None:
    uses = [(7 * number) % 61 for number in range(9000)]  # more than the table has places
    distances = list(stack_distances(uses, [2] * 61))
    assert distances[:61] == [0] * 61
    assert set(distances[61:]) == {2 * 61}


def test_a_curve_rises_and_ends_at_the_repeats() -> None:
    work = zipf_workload(500, 2000, top_k=3, exponent=0.8, size=4, seed=3)
    curve = hit_curve(work)
    rates = [curve.rate(size) for size in range(0, work.footprint + 1, 40)]
    assert rates == sorted(rates)
    uses = sum(map(len, work.requests))
    assert curve.rate(work.footprint) == (uses - len(set(work.uses))) / uses


def test_admission_is_at_the_first_or_second_use() -> None:
    with pytest.raises(ConfigError, match="first or second"):
        hit_curve(Workload([(0,)], [1]), admission=3)


# LMCache


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("admission", [1, 2])
def test_the_middle_of_both_marks_is_lmcaches_rate(share: float, admission: int) -> None:
    work = zipf_workload(3000, 5000, top_k=5, exponent=0.9, size=8, seed=1)
    memory = round(share * work.footprint)
    found = simulate(work, memory, skip=2500, admission=admission)
    curve = hit_curve(work, skip=2500, admission=admission)
    assert abs(curve.lmcache_rate(memory) - found.rate) < 0.01
    assert curve.rate(memory * WATERMARK * (1 - EVICTED)) <= found.rate <= curve.rate(memory * WATERMARK) + 1e-9


def test_nothing_is_evicted_below_the_mark() -> None:
    work = Workload([(0,), (1,), (0,), (1,)], [39, 40])
    assert simulate(work, 100).rate == 0.5
    full = Workload([(0,), (1,), (0,), (1,)], [40, 40])  # 80 of 100: a fifth of the objects is deleted
    found = simulate(full, 100)
    assert [request.get(MEMORY, 0) for request in found.requests] == [0, 0, 24, 24]


def test_a_passages_end_is_evicted_first() -> None:
    work = Workload([(0,), (1,), (0, 1)], [50, 40], chained=True)
    found = simulate(work, 100)  # 18 of 90 objects are deleted: the last ones of the first chunk
    assert found.requests[2] == {MEMORY: 32, "": 58}  # what is after a gap is no exact prefix
    assert simulate(Workload(work.requests, work.sizes), 100).requests[2] == {MEMORY: 72, "": 18}


def test_memory_that_fills_in_a_second_stores_nothing() -> None:
    work = Workload([(0,), (1,), (2,), (2,)], [40, 40, 36])
    at_once = simulate(work, 100, times=[0.0, 0.1, 0.2, 0.3])
    assert (at_once.refused, at_once.requests[3]) == (72, {"": 36})
    slowly = simulate(work, 100, times=[0.0, 1.0, 2.0, 3.0])
    assert (slowly.refused, slowly.requests[3]) == (0, {MEMORY: 36})


def test_what_a_tier_holds_returns_only_if_retained() -> None:
    requests = [(number,) for number in [*range(10), 0, 0]]
    work, tier = Workload(requests, [10] * 10), [Place("disk")]
    for retain, last in ((False, "disk"), (True, MEMORY)):
        found = simulate(work, 60, tier, retain=retain)
        assert found.requests[10] == {"disk": 10}
        assert found.requests[11] == {last: 10}
    assert simulate(work, 60).requests[10] == {"": 10}


def test_a_tier_with_a_limit_evicts_too() -> None:
    requests = [(number,) for number in [*range(10), 0, 9]]
    found = simulate(Workload(requests, [10] * 10), 60, [Place("disk", 70)])
    assert found.requests[10] == {"": 10}
    assert found.requests[11] == {MEMORY: 10}
    assert found.refused == 0


def test_vllms_own_cache_is_a_tier_in_front() -> None:
    work = Workload([(0,), (1,), (0,), (2,), (0,)], [10, 10, 10])
    found = simulate(work, 0, gpu=20)
    assert [request.get("gpu", 0) for request in found.requests] == [0, 0, 10, 0, 10]


def test_the_prefix_takes_room_of_its_own() -> None:
    work = Workload([(0,), (1,), (0,)], [39, 40])
    assert simulate(work, 100).requests[2] == {MEMORY: 39}
    assert simulate(work, 100, shared=1).requests[2] == {MEMORY: 23, "": 16}


# Workloads


def test_in_exact_prefixes_the_chunks_before_count() -> None:
    rows = [(["a", "b"], [2, 3]), (["b", "a"], [3, 2]), (["a", "b"], [2, 3]), (["a", "a"], [2, 2])]
    assert Workload.of(rows) == Workload([(0, 1), (1, 0), (0, 1), (0,)], [2, 3])
    chained = Workload.of(rows, chained=True)
    assert chained.requests == [(0, 1), (2, 3), (0, 1), (0, 4)]
    assert chained.sizes == [2, 3, 3, 2, 2]


def test_zipf_is_seeded_and_steeper_with_its_exponent() -> None:
    def draw(exponent: float, seed: int = 0) -> Workload:
        return zipf_workload(2000, 400, top_k=4, exponent=exponent, seed=seed)

    assert draw(0.9) == draw(0.9) != draw(0.9, 1)
    assert all(len(set(request)) == len(request) == 4 for request in draw(0.9).requests)
    kinds = [len(draw(exponent).sizes) for exponent in (0.0, 1.0, 2.5)]
    assert kinds == sorted(kinds, reverse=True)
    assert len(set(kinds)) == 3
    assert [sorted(each) for each in zipf_workload(2, 3, top_k=5, exponent=1).requests] == [[0, 1]] * 3
    with pytest.raises(ConfigError, match="above 0"):
        zipf_workload(0, 1, top_k=1, exponent=1)


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.2])
def test_a_corpus_of_a_billion_is_drawn_alike(exponent: float) -> None:
    """Beyond HEAD by an integral: as often above the middle of the law as below it."""
    chunks, dice = 10 * HEAD, random.Random(1)
    draw = _zipf(dice, chunks, exponent)
    ranks = sorted(draw() for _ in range(4000))
    weights = list(accumulate(rank**-exponent for rank in range(1, chunks + 1)))
    for share in (0.25, 0.5, 0.9, 0.99):
        rank = bisect_left(weights, share * weights[-1]) + 1  # so many draws are at or below it
        assert bisect_right(ranks, rank) / len(ranks) == pytest.approx(share, abs=0.03)
    assert 1 <= ranks[0] <= ranks[-1] <= chunks
    assert len(zipf_workload(10**9, 100, top_k=5, exponent=exponent, seed=2).sizes) <= 500
