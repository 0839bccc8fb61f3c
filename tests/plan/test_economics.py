"""Times, break-even bandwidths, and which of four set-ups it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lmcache_rag.errors import ConfigError
from lmcache_rag.plan.cache import MEMORY, Place, hit_curve, simulate, zipf_workload
from lmcache_rag.plan.economics import (
    GIB,
    MEASURED,
    Corpus,
    Costs,
    Plan,
    Setup,
    Tier,
    advise,
    by_tier,
    known_costs,
    server_costs,
    tier_json,
    worth_keeping,
)
from lmcache_rag.plan.geometry import Geometry, from_numbers

RESULTS = Path(__file__).parents[2] / "docs" / "results"
LLAMA = Geometry("8B", 32, 2048, 6_979_321_856)


def test_the_figures_are_those_of_docs_results() -> None:
    for name, (_, _, figures) in MEASURED.items():
        file = name.partition("(")[2].rstrip(")")
        known = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        assert dict(figures) in [each["costs_ms"] for each in known.get("runs", [known])], file


def test_a_known_model_keeps_its_figures_others_scale() -> None:
    same, half = known_costs(LLAMA), known_costs(Geometry("4B", 32, 1024, 3_489_660_928))
    assert same.source == "docs/results: an 8B Llama shape (never-slower-h200-8b-4.json), one H200"
    assert half.source.startswith("scaled by 0.5 from docs/results")
    assert half.prefill_ms(4000) == pytest.approx(same.prefill_ms(4000) / 2)
    assert half.load_ms("l1", 4000) == pytest.approx(same.load_ms("l1", 4000) / 2)
    assert half.lookup_ms(4000) == same.lookup_ms(4000)
    assert known_costs(Geometry("?", 32, 2048)).prefill_ms(4000) == same.prefill_ms(4000)  # by the size of its KV


def test_a_given_rate_decides_all_computing() -> None:
    costs = known_costs(LLAMA, 20_000)
    assert costs.tokens_per_second == pytest.approx(20_000)
    assert costs.prefill_ms(4000) == pytest.approx(200)
    slower = costs.figures["recompute_100_query"] / known_costs(LLAMA).figures["recompute_100_query"]
    assert slower == pytest.approx(known_costs(LLAMA).tokens_per_second / 20_000)
    assert "--prefill-tokens-per-s 20000" in costs.source


def test_both_measured_lengths_are_met_exactly() -> None:
    for _, _, figures in MEASURED.values():
        costs = Costs(figures, "test")
        assert costs.prefill_ms(1024) == pytest.approx(figures["prefill_1024"])
        assert costs.prefill_ms(8192) == pytest.approx(figures["prefill_8192"])
        times = [costs.prefill_ms(tokens) for tokens in range(0, 20_000, 500)]
        assert times == sorted(times)
        assert times[0] == 0


def test_a_servers_own_costs_are_used_once_it_has_any() -> None:
    assert server_costs({}, "http://s") is None
    assert server_costs({"prefill_1024": 5.0}, "http://s") is None
    found = server_costs({"prefill_1024": 5.0, "prefill_8192": 50.0}, "http://s")
    assert found is not None
    assert (found.measured, found.blends, found.source) == (True, False, "measured by http://s itself")
    with pytest.raises(ConfigError, match="not known"):
        Costs({"prefill_1024": 5.0}, "nobody")


# Break-even

PLAIN = {"prefill_1024": 102.4, "prefill_8192": 819.2}  # 0.1 ms a token: 10,000 tokens a second


def test_the_break_even_is_kv_bytes_times_prefill_rate() -> None:
    model = from_numbers(32, 8, 128)
    setup = Setup(model, Costs(PLAIN, "test"))
    assert setup.break_even(1000) == pytest.approx(131_072 * 10_000 / 1e9)  # GB/s
    assert Setup(model.with_dtype("fp8"), setup.costs).break_even(1000) == pytest.approx(131_072 * 10_000 / 2e9)


def test_a_load_at_break_even_takes_as_long_as_compute() -> None:
    costs = Costs({**PLAIN, "load_l1_1024": 30.0, "load_l1_8192": 240.0}, "test")
    setup = Setup(from_numbers(32, 8, 128), costs)
    tier = Tier("disk", 0, setup.break_even(1000))
    to_gpu = 1000 * (240.0 - 30.0) / 7168
    assert setup.read_ms(tier, 1000) + to_gpu == pytest.approx(1000 * 0.1)


def test_a_blend_counts_what_it_recomputes_of_a_chunk() -> None:
    blending = {**PLAIN, "blend_query": 10.0, "recompute_100_query": 5.0}  # half a prefill's time
    setup = Setup(from_numbers(32, 8, 128), Costs(blending, "test"))
    saved = (1000 - 50) * 0.05  # 50 tokens of each chunk are recomputed at least
    assert setup.break_even(1000) == pytest.approx(1000 * 131_072 / saved / 1e6)
    assert setup.break_even(50) == math.inf  # all of it is recomputed
    assert setup.break_even(400) > setup.break_even(4000)


# One prompt


def test_a_prompt_without_hits_takes_as_long_as_ever() -> None:
    setup = Setup(LLAMA, known_costs(LLAMA))
    assert setup.with_ms({"": 4096}, 8) == setup.without_ms(4096)


def test_more_in_memory_never_takes_longer() -> None:
    setup = Setup(LLAMA, known_costs(LLAMA), (Tier("disk", 0, 20),))
    times = [setup.with_ms({MEMORY: n * 512, "": 8192 - n * 512}, 16) for n in range(17)]
    assert times[0] > times[8] > times[16]
    assert setup.with_ms({"disk": 8192}, 16) > setup.with_ms({MEMORY: 8192}, 16)
    # Measured over HTTP, which is not counted here: 85.7 ms, 0.42 of stock vLLM's (docs/results/never-slower-h200.md).
    assert 0.7 * 85.7 < times[16] < 85.7
    assert times[16] / setup.without_ms(8192) == pytest.approx(0.42, abs=0.08)


def test_a_slow_tier_is_no_worse_than_computing() -> None:
    setup = Setup(LLAMA, known_costs(LLAMA), (Tier("tape", 0, 0.01),))
    assert setup.with_ms({"tape": 8192}, 16) == setup.without_ms(8192)


def test_without_blending_only_the_rest_is_computed() -> None:
    setup = Setup(LLAMA, Costs(PLAIN, "test"), blends=False, question=0)
    assert setup.with_ms({MEMORY: 3000, "": 1000}, 4) == pytest.approx(100)


# The whole plan


def make(
    chunks: int = 2000, gigabytes: float = 20, tiers: tuple[Tier, ...] = (), tokens: int = 512, **setup: Any
) -> Plan:
    model = setup.pop("model", LLAMA)
    one = Setup(model, setup.pop("costs", known_costs(model)), tiers)
    size = tokens // 64
    work = zipf_workload(chunks, 1500, top_k=8, exponent=0.9, size=size, seed=1)
    each = model.object_bytes()
    memory = int(gigabytes * GIB / each)
    places = [Place(tier.name, int(tier.gigabytes * 1e9 / each) or None) for tier in tiers]
    curves = {"lru": hit_curve(work), "second use": hit_curve(work, admission=2)}
    found = simulate(work, memory, places, retain=True)
    return Plan(one, Corpus(chunks, tokens), "test", gigabytes, curves, found, simulate(work, memory), 8.0)


def test_bytes_and_hours_of_the_whole_corpus() -> None:
    plan = make(chunks=2000, tokens=1000)
    assert plan.corpus_bytes == 2000 * 15 * 64 * 131_072
    assert plan.gpu_hours == pytest.approx(2000 * 1000 / plan.setup.costs.tokens_per_second / 3600)
    rows = plan.rates()
    assert [size for size, _ in rows] == sorted(size for size, _ in rows)
    assert 20 in [size for size, _ in rows]
    assert rows[-1][1]["lru"] == plan.curves["lru"].most
    assert sum(by_tier(plan.found, ()).values()) == pytest.approx(1)
    assert plan.curves["lru"].rate(worth_keeping(plan.curves["lru"])) >= 0.9 * plan.curves["lru"].most


def test_a_corpus_that_fits_is_computed_at_ingestion() -> None:
    advice = advise(make(chunks=200, gigabytes=20), "M")
    assert advice.number == 1
    assert advice.commands[0] == "lmcache-rag serve M --l1-gb 20"
    assert advise(make(chunks=270, gigabytes=20), "M").number != 1  # 18.1 GB: above LMCache's mark


def test_the_hot_part_is_kept_where_all_tiers_are_slow() -> None:
    plan = make(gigabytes=40, tiers=(Tier("disk", 0, 1),))
    advice = advise(plan, "M")
    assert advice.number == 2
    assert "disk reads 1 GB/s, below the break-even" in advice.reasons[2]
    assert "--l2" not in advice.commands[0]


def test_a_fast_tier_pays() -> None:
    advice = advise(make(gigabytes=20, tiers=(Tier("valkey", 500, 40),)), "M")
    assert advice.number == 3
    assert '"type": "valkey"' in advice.commands[0]
    assert '"max_capacity_gb": 466' in advice.commands[0]  # LMCache counts GiB


def test_precomputing_does_not_pay_for_a_small_model() -> None:
    small = Geometry("135M", 30, 384, 106_168_320)
    advice = advise(make(model=small), "M")
    assert advice.number == 4
    assert "Even with all KV in memory" in advice.reasons[0]


def test_nor_where_hardly_anything_is_found() -> None:
    advice = advise(make(chunks=200_000, gigabytes=0.5), "M")
    assert advice.number == 4
    assert "are found" in advice.reasons[0]
    assert "at their second use only" in advice.reasons[1]


def test_a_tier_is_read_from_its_text() -> None:
    assert Tier.parse("disk:2000:6.5") == Tier("disk", 2000, 6.5)
    for text in (
        "disk",
        "disk:1",
        ":1:2",
        "disk:x:1",
        "disk:-1:2",
        "disk:1:0",
        "disk:1:nan",
        "disk:1:2:3",
        "memory:1:2",
    ):
        with pytest.raises(ConfigError, match="--tier"):
            Tier.parse(text)
    assert json.loads(tier_json(Tier("disk", 0, 1), "/kv")) == {"type": "fs_native", "base_path": "/kv"}
    assert json.loads(tier_json(Tier("disk", 1000, 1), "/kv"))["eviction"] == {"eviction_policy": "LRU"}
