"""What an engine's work takes, from its own measurements."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_rag.costs import (
    EXPLORE,
    KEEP,
    LEAST,
    LIMIT,
    RECHECK,
    USED,
    CostModel,
    Exploration,
    Forecast,
    Recheck,
    Work,
    non_negative_least_squares,
)

SIZES = (64, 256, 1024, 4096, 8192)


def true_prefill(tokens: float, context: float) -> float:
    """A GPU: nothing below 300 tokens costs more than one, then 12 us a token, and attention."""
    return 4 + max(0.0, tokens - 300) * 0.012 + tokens * (context + tokens / 2) * 2e-7


def true_passes(tokens: float, context: float, selects: float) -> float:
    return selects * (2 + context * 2e-4) + (tokens > 0) * 4 + max(0.0, tokens - 400) * 0.015


def measured(*, noise: float = 0.0, seed: int = 1, **more: Any) -> CostModel:
    """All costs of that GPU, each size measured three times, too long by up to `noise`."""
    dice, costs = random.Random(seed), CostModel(**more)

    def seen(ms: float) -> float:
        return ms * (1 + dice.random() * noise)

    for size, _ in itertools.product(SIZES, range(3)):
        costs.prefill.observe((size, 0, 0), seen(true_prefill(size, 0)))
        costs.lookup.observe((size,), seen(1 + size * 7e-4))
        costs.load.observe((0, size, 0), seen(3 + size * 2.5e-3))
        costs.load.observe((size, 0, 0), seen(0.2 + size * 1e-4))
        for selects, context in ((0, 4096), (1, 4096), (1, 16384)):
            if size <= context:
                costs.observe_passes(
                    "query", size, context, seen(true_passes(size, context, selects)), selects=bool(selects)
                )
    costs.prefill.observe((512, 8192, 0), seen(true_prefill(512, 8192)))
    return costs


def all_cached(prompt: int, tier: str = "l1", computed: int = 300) -> Work:
    return Work(prompt, placed={tier: prompt - 64}, computed=computed, looked_up=tier != "hot")


# -- one cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [100, 400, 1500, 3000, 8000])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_cost_between_observed_sizes_is_predicted(tokens: int, noise: float) -> None:
    costs = measured(noise=noise)
    assert costs.prefill_ms(tokens, served=False) == pytest.approx(true_prefill(tokens, 0), rel=0.15 + noise)
    assert costs.passes_ms("query", tokens, 16384) == pytest.approx(true_passes(tokens, 16384, 1), rel=0.2 + noise)
    assert costs.lookup_ms(tokens) == pytest.approx(1 + tokens * 7e-4, rel=0.05 + noise)


def test_a_long_prefill_is_a_sum_of_steps() -> None:
    costs = measured(step_tokens=4096)
    want = sum(true_prefill(4096, first) for first in range(0, 16384, 4096))
    assert costs.prefill_ms(16384) == pytest.approx(want, rel=0.15)


@given(
    st.lists(st.tuples(st.integers(1, 20_000), st.integers(0, 30_000), st.floats(0, 1e4)), min_size=1, max_size=40),
    st.lists(st.integers(1, 40_000), min_size=2, max_size=6),
    st.integers(0, 30_000),
)
def test_no_price_is_negative_whatever_was_observed(
    seen: list[tuple[int, int, float]], sizes: list[int], context: int
) -> None:
    costs = CostModel(8192)
    for tokens, before, ms in seen:
        costs.prefill.observe((tokens, before, 1), ms)
        costs.observe_passes("query", tokens, before, ms)
        costs.load.observe((0, tokens, 0), ms)
        costs.lookup.observe((tokens,), ms)
    rows = [
        [costs.prefill_ms(size, context) for size in sorted(sizes)],
        [costs.passes_ms("query", size, context) for size in sorted(sizes)],
        [costs.load_ms("l1", size) for size in sorted(sizes)],
        [costs.lookup_ms(size) for size in sorted(sizes)],
    ]
    for row in rows:
        known = [ms for ms in row if ms is not None]
        assert all(ms >= 0 for ms in known)
        assert known == pytest.approx(sorted(known)), "more tokens are predicted to take less time"
        assert row == [*known, *[None] * (len(row) - len(known))], "only the longest may be unknown"


@given(st.floats(1.5, 1e6), st.integers(0, len(SIZES) - 1), st.integers(0, 1000))
def test_an_outlier_changes_little(factor: float, at: int, seed: int) -> None:
    usual, shaken = measured(noise=0.05, seed=seed), measured(noise=0.05, seed=seed)
    shaken.prefill.observe((SIZES[at], 0, 0), true_prefill(SIZES[at], 0) * factor)
    shaken.lookup.observe((SIZES[at],), (1 + SIZES[at] * 7e-4) * factor)
    for size in SIZES:
        assert shaken.prefill_ms(size) == pytest.approx(usual.prefill_ms(size), rel=0.12)
        assert shaken.lookup_ms(size) == pytest.approx(usual.lookup_ms(size), rel=0.12)


def test_a_first_time_that_compiles_is_forgotten() -> None:
    costs = CostModel()
    for ms in (700.0, 3.0, 3.0):
        assert costs.lookup_ms(600) is None, "one time alone says nothing"
        costs.lookup.observe((600,), ms)
    assert costs.lookup_ms(600) == pytest.approx(3.0, rel=0.01)


def test_between_two_sizes_lies_a_line() -> None:
    costs = CostModel()
    for short, long in ((129, 1363), (155, 1410), (110, 1250)):  # ms of prefills by SmolLM2-135M on two CPU cores
        costs.prefill.observe((31, 1034, 0), short)
        costs.prefill.observe((1065, 0, 0), long)
    between = costs.prefill_ms(623, 306, served=False) or 0.0
    assert 780 < between < 1000, "it took 891 ms"


def test_prices_are_not_fitted_after_each_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, fits, rng = measured(), [], random.Random(1)
    fit = costs.prefill._fit
    monkeypatch.setattr(costs.prefill, "_fit", lambda: fits.append(1) or fit())
    for number in range(300):
        costs.prefill.observe((100 + 10 * (number % 80), 0, 1), rng.uniform(1, 30))
        costs.prefill_ms(500)
    assert 3 < len(fits) < 100


def test_a_blend_recomputes_what_the_latest_ones_did() -> None:
    costs = CostModel()
    assert costs.recomputed("query", 400) == 400, "unknown: all that it may"
    for _ in range(USED):
        costs.observe_recomputed("query", 400, 400)
    for _ in range(USED):
        costs.observe_recomputed("query", 100, 400)
    assert costs.recomputed("query", 800) == 200
    assert costs.recomputed("hkvd", 800) == 800
    costs.observe_recomputed("query", 500, 400)
    costs.observe_recomputed("query", 0, 0)
    assert costs.recomputed("query", 800) == 200, "what cannot be is ignored"


def test_a_lasting_change_is_followed() -> None:
    costs = measured()
    for _ in range(2 * KEEP):
        for size in SIZES:
            costs.lookup.observe((size,), 51 + size * 7e-4)
    assert costs.lookup_ms(1024) == pytest.approx(51.7, rel=0.05)
    for _ in range(2 * KEEP):
        costs.lookup.observe((1024,), 1.7)
    assert costs.lookup_ms(1024) == pytest.approx(1.7, rel=0.6), "sizes that are not seen any more fade"


def test_a_single_size_shows_no_price_per_token() -> None:
    costs = CostModel()
    for _ in range(3):
        costs.load.observe((0, 500, 0), 5.0)
    assert costs.load_ms("l1", 8000) == pytest.approx(5.0, rel=0.01), "or a long prompt would never be tried"
    costs.load.observe((0, 8000, 0), 25.0)
    assert costs.load_ms("l1", 16000) == pytest.approx(46, rel=0.1)


@pytest.mark.parametrize("ms", [float("nan"), float("inf"), -1.0])
def test_a_time_that_cannot_be_is_ignored(ms: float) -> None:
    costs = CostModel()
    costs.lookup.observe((500,), ms)
    assert costs.count == 0
    assert costs.lookup_ms(500) is None


def test_a_prefill_far_above_all_observed_is_unknown() -> None:
    costs = CostModel()
    for _ in range(LEAST):
        costs.prefill.observe((100, 0, 1), 5.0)
    assert costs.prefill_ms(400) is not None
    assert costs.prefill_ms(401) is None


def test_least_squares_are_exact_where_they_can_be() -> None:
    rows = [((1.0, float(x), float(x * x)), 2 + 3.0 * x, 1.0) for x in range(1, 6)]
    assert non_negative_least_squares(rows, (0,)) == pytest.approx((2, 3, 0), rel=0.02, abs=0.02)
    rows = [((1.0, float(x)), 10.0 - x, 1.0) for x in range(5)]
    assert non_negative_least_squares(rows, (0,)) == pytest.approx((8, 0), rel=0.01), "a falling line would be negative"


# -- both ways to the first token -------------------------------------------------------------------------------------


def test_short_prompts_are_computed_long_ones_blended() -> None:
    costs = measured()
    short, long = costs.forecast(all_cached(256)), costs.forecast(all_cached(8192))
    assert short is not None
    assert long is not None
    assert not short.gains(0.1)
    assert long.gains(0.1)
    assert long.compute_ms == pytest.approx(true_prefill(8192, 0) + 1 + 8192 * 7e-4, rel=0.1), "it was looked up too"


def test_a_slower_lookup_moves_the_boundary() -> None:
    fast, slow = measured(), measured()
    for size, _ in itertools.product(SIZES, range(2 * KEEP)):
        slow.lookup.observe((size,), 51 + size * 7e-4)
    near, far = (costs.boundary(lambda placed: 300, 0.1) for costs in (fast, slow))
    assert near is not None
    assert far is not None
    assert 256 < near < far
    hot = [costs.boundary(lambda placed: 300, 0.1, tier="hot") for costs in (fast, slow)]
    assert hot[0] == hot[1], "what the engine itself holds is not looked up"
    assert hot[0] is not None
    assert hot[0] < near


def test_a_higher_gain_is_reached_later() -> None:
    costs = measured()
    first = [costs.boundary(lambda placed: round(0.15 * placed), gain) for gain in (0.0, 0.1, 0.3)]
    assert None not in first
    assert first == sorted(first, key=lambda each: each or 0)
    assert costs.boundary(lambda placed: placed, 0.1) is None, "all of it computed once more is never faster"


def test_an_exact_prefix_counts_for_both() -> None:
    costs = measured()
    bare = costs.forecast(Work(8192, placed={"l1": 8000}, computed=400))
    most = costs.forecast(Work(8192, local=7600, exact=7600, placed={"l1": 500}, computed=150))
    assert bare is not None
    assert most is not None
    assert bare.gains(0.1)
    assert not most.gains(0.1), "a rest of 592 tokens is computed as fast"
    loaded = costs.compute_ms(Work(8192, exact=7600))
    assert loaded == pytest.approx(most.compute_ms + 3 + 7600 * 2.5e-3, rel=0.05)
    assert (costs.compute_ms(Work(8192, exact=7600), looked_up=False) or 0) > 90, "without a look-up it is not found"


def test_under_load_only_the_gpu_counts() -> None:
    costs = measured()
    for _, size in itertools.product(range(4 * KEEP), SIZES):
        costs.lookup.observe((size,), 500.0)
    alone, busy = costs.forecast(all_cached(4096), looked_up=False), costs.gpu_forecast(all_cached(4096))
    assert alone is not None
    assert busy is not None
    assert not alone.gains(0.1)
    assert busy.gains(0.1), "the wait for the look-up delays no other request"
    assert busy.compute_ms < true_prefill(4096, 0), "a prefill shares steps that run anyway"


def test_an_unknown_cost_counts_as_nothing() -> None:
    costs = measured()
    other = costs.forecast(Work(4096, placed={"l1": 4000}, policy="hkvd"))
    assert other is not None
    assert not other.known
    assert other.gains(0.1), "so it is tried"
    dear = costs.forecast(Work(4096, placed={"l1": 4000}, computed=4000, rest=1))
    assert dear is not None
    costs.load = CostModel().load
    assert (costs.forecast(Work(4096, placed={"l1": 4000}, computed=4000)) or dear).gains(0.1) is False
    assert CostModel().forecast(all_cached(4096)) is None
    assert CostModel().gpu_forecast(all_cached(4096)) is None
    assert CostModel().boundary(lambda placed: 0, 0.1) is None
    assert CostModel().free_tokens(4096) == 0


def test_no_token_is_free_as_long_as_one_size_was_seen() -> None:
    costs = CostModel()
    for _ in range(6):
        costs.observe_passes("query", 200, 900, 700.0)
    assert costs.passes_ms("query", 600, 900) is not None
    assert costs.free_tokens(900) == 0
    for _ in range(6):
        costs.observe_passes("query", 10, 900, 690.0)
    assert 0 < costs.free_tokens(900) <= 200, "not more than were observed"


def test_what_takes_time_in_a_prefill_is_not_free() -> None:
    """Blends of 16 to 4,000 tokens took 40 ms on a GPU that others used; 1,000 more tokens of a prefill take 10."""
    costs = CostModel()
    for size in (16, 200, 1000, 4000) * KEEP:
        costs.observe_passes("query", size, 8000, 40.0)
    assert costs.free_tokens(8000) == 4000
    for size in (16, 200, 1000, 4000) * KEEP:
        costs.prefill.observe((size, 0, 0), 5 + size / 100)
    assert 150 < costs.free_tokens(8000) < 300, "2 ms more are 5% of a blend"


@pytest.mark.parametrize("context", [4096, 16384])
def test_free_tokens_end_where_a_pass_takes_longer(context: int) -> None:
    assert 100 < measured().free_tokens(context) < 650, "400 are free on that GPU"


# -- measuring again --------------------------------------------------------------------------------------------------


@given(st.floats(0.1, 500), st.floats(0.1, 500))
def test_measuring_again_costs_a_bounded_share(blend: float, compute: float) -> None:
    exploration, forecast = Exploration(), Forecast(blend, compute)
    requests = 40 * EXPLORE
    explored = sum(exploration.is_due(1000, forecast) for _ in range(requests))
    assert explored * max(blend - compute, 0.0) <= requests * compute / EXPLORE * 1.01
    assert explored <= requests / EXPLORE
    if blend <= 2 * compute:
        assert explored == requests / EXPLORE


def test_each_size_is_measured_again() -> None:
    exploration, forecast = Exploration(), Forecast(10, 10)
    turns = [exploration.is_due(size, forecast) for _ in range(EXPLORE) for size in (100, 1000)]
    assert sum(turns) == 2


# -- kept state -------------------------------------------------------------------------------------------------------


def test_costs_survive_a_restart() -> None:
    costs, later = measured(noise=0.1, step_tokens=4096), CostModel(4096)
    assert later.update(json.loads(json.dumps(costs.as_dict())))
    assert later.figures() == pytest.approx(costs.figures(), rel=0.05), "fitted a few observations apart"
    assert later.free_tokens(4096) == pytest.approx(costs.free_tokens(4096), rel=0.05)


@pytest.mark.parametrize(
    "state",
    [None, {}, {"version": 0, "costs": {}}, {"version": 1, "costs": {"other": []}}, {"version": 1, "costs": [1]}]
    + [{"version": 1, "costs": {"lookup": bins}} for bins in (3, [[1]], [[1, [[5]]]], [[1, [["x", 5]]]])],
)
def test_a_damaged_state_is_ignored(state: Any) -> None:
    costs = CostModel()
    assert not costs.update(state)
    assert costs.count == 0


def test_figures_name_only_what_is_known() -> None:
    costs = CostModel()
    assert costs.figures() == {}
    for _ in range(LEAST):
        costs.load.observe((512, 0, 0), 2.0)
    assert set(costs.figures()) == {"load_hot_1024", "load_hot_8192"}
    shown = measured().figures()
    assert {"prefill_1024", "prefill_8192", "lookup_8192", "load_l1_1024", "recompute_100_query"} <= set(shown)
    assert shown["recompute_100_query"] == pytest.approx(1.5, rel=0.2)


def test_an_observation_is_limited_by_the_prediction() -> None:
    costs = CostModel()
    for _ in range(3):
        costs.lookup.observe((500,), 2.0)
    for _ in range(3):
        costs.lookup.observe((500,), 1000.0)
    assert (costs.lookup_ms(500) or 0) <= LIMIT * 2.0 * 1.01


def test_computing_is_measured_where_all_is_blended() -> None:
    recheck, close = Recheck(), Forecast(40.0, 60.0)
    assert [recheck.is_due(4000, close) for _ in range(RECHECK)] == [False] * RECHECK
    assert recheck.is_due(4000, close)
    assert not recheck.is_due(4000, close), "one is enough, even if its time is not observed"
    assert not recheck.is_due(500, close), "another size"
    found = [recheck.is_due(4000, close) for _ in range(RECHECK - 2)]
    recheck.on_computed(3000)
    assert not any([*found, recheck.is_due(4000, close), recheck.is_due(4000, close)]), "it is known again"


def test_what_is_much_faster_blended_is_never_computed() -> None:
    recheck = Recheck()
    assert not any(recheck.is_due(16_000, Forecast(20.0, 61.0)) for _ in range(3 * RECHECK))
