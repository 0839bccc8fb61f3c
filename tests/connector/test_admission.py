"""When blends run: within a step, beside others, or later; and whether a request is blended, by predicted times."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_kit import Once, Request

from lmcache_rag.budget import Budget
from lmcache_rag.connector import admission
from lmcache_rag.connector.admission import EVERY, SHORT, Admission, BlendBudget, BlendGate
from lmcache_rag.connector.metadata import (
    BlendHandshakeMetadata,
    BlendResult,
    BlendWorkerMetadata,
    Claim,
    StepShape,
    StepTime,
)
from lmcache_rag.connector.request_state import RequestState
from lmcache_rag.costs import EXPLORE, KEEP, RECHECK, CostModel
from lmcache_rag.protocol import BLEND, BOUNDARY_GAUGE, COST_GAUGE, Decision


def test_an_idle_engine_blends_one_within_the_step() -> None:
    budget = BlendBudget(100, 1000)
    assert budget.admit(1000) == Admission.SYNC
    budget.claim("a", Admission.SYNC, 1000)
    budget.on_allocated("a")
    assert budget.admit(1) == Admission.ASYNC
    budget.claim("b", Admission.ASYNC, 1)
    budget.on_allocated("b")
    allowance = budget.on_step({"a"})
    assert (allowance.tokens, allowance.idle) == (0, False), "the step is full"
    assert budget.admit(1) == Admission.ASYNC, "a runs"
    budget.on_finished("a")
    assert budget.admit(1) == Admission.ASYNC, "b is under way"
    budget.on_blended("b")
    assert budget.admit(1) == Admission.SYNC


def test_a_long_blend_is_async_even_when_idle() -> None:
    assert BlendBudget(100, 1000).admit(1001) == Admission.ASYNC


def test_nothing_need_ever_run_within_a_step() -> None:
    assert BlendBudget(100, 0).admit(1) == Admission.ASYNC


def test_others_are_held_up_by_so_many_tokens_at_most() -> None:
    budget = BlendBudget(100, 1000)
    assert budget.on_step({"runs"}).tokens == 100
    assert budget.on_step(()).tokens == 100, "who comes meanwhile waits no longer than others would have"
    assert budget.on_step(()).idle


def with_adapter(name: str, number: int) -> Any:
    made = Once().request(name)
    made.lora_request = SimpleNamespace(lora_int_id=number) if number else None
    return made


def test_a_background_blend_keeps_its_adapters_slot() -> None:
    """vLLM does not count the adapters of requests that wait for their KV: it would give the slot to another."""
    budget = BlendBudget(100, 1000, slots=2)
    for name, number in (("runs", 1), ("blends", 2)):
        assert budget.has_slot(with_adapter(name, number))
    budget.claim("blends", Admission.ASYNC, 10)
    budget.on_allocated("blends")
    budget.on_step({"runs"})
    assert not budget.has_slot(with_adapter("third", 3))
    assert budget.has_slot(with_adapter("of the base model", 0))
    assert budget.has_slot(with_adapter("of the same", 2))
    budget.on_finished("runs")
    budget.on_step({"of the same"})
    assert budget.has_slot(with_adapter("third", 3))
    assert not budget.has_slot(with_adapter("fourth", 4)), "the third may run in this step"
    budget.on_step({"third"})
    assert not budget.has_slot(with_adapter("fourth", 4))
    budget.on_blended("blends")
    assert budget.has_slot(with_adapter("fourth", 4)), "vLLM counts those that run"


def test_few_of_the_short_steps_are_measured() -> None:
    budget = BlendBudget(100, 1000)
    shapes = {"short": StepShape(SHORT - 1, 0), "long": StepShape(SHORT, 0), "blend": StepShape(1, 0, blended=True)}
    measured = {
        name: [budget.on_step({"a"}, shape).timed is shape for _ in range(2 * EVERY)] for name, shape in shapes.items()
    }
    assert all(measured["long"])
    assert all(measured["blend"]), "each tells what blending takes"
    assert measured["short"] == [step % EVERY == 0 for step in range(2 * EVERY)]


def test_no_more_than_some_are_under_way() -> None:
    budget = BlendBudget(100, 1000, max_background=2)
    budget.on_step({"runs"})
    for name in ("a", "b"):
        assert budget.admit(10) == Admission.ASYNC
        budget.claim(name, Admission.ASYNC, 10)
    assert budget.admit(10) == Admission.DEFER, "claims count before they are allocated"
    budget.on_allocated("a")
    budget.on_step({"runs"})
    assert budget.admit(10) == Admission.ASYNC, "b got no blocks"


def test_without_overlap_a_step_has_one_or_its_budget() -> None:
    budget = BlendBudget(100, 1000, overlap=False)
    budget.on_step({"runs"})
    assert budget.admit(5000) == Admission.SYNC
    budget.claim("a", Admission.SYNC, 60)
    assert budget.admit(40) == Admission.SYNC
    assert budget.admit(41) == Admission.DEFER


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 2000), st.booleans(), st.booleans()), max_size=60),
    st.booleans(),
)
def test_whoever_runs_is_never_held_up_for_longer(events: list[tuple[str, int, bool, bool]], overlap: bool) -> None:
    budget = BlendBudget(100, 1000, overlap=overlap)
    running: set[str] = set()
    now: list[tuple[str, int]] = []
    for name, tokens, step, allocated in events:
        if name not in running and name not in [one for one, _ in now]:
            way = budget.admit(tokens)
            if way != Admission.DEFER:
                budget.claim(name, way, tokens)
                if allocated:
                    budget.on_allocated(name)
                if way == Admission.SYNC and allocated:
                    now.append((name, tokens))
        if step:
            allowance = budget.on_step(running | {one for one, _ in now})
            held_up = sum(size for _, size in now) + allowance.tokens
            if overlap and running:
                assert not now
                assert held_up <= 100
            elif overlap:
                assert held_up <= 1000
            running = (running | {one for one, _ in now}) - {"a", "b"}
            budget.on_finished("a")
            budget.on_finished("b")
            now = []


SIZES = (20, 100, 400)


def costs(*, prefill: float = 1.0, lookup: float = 0.01, passes: float = 0.01, load: float = 0.01) -> CostModel:
    """Milliseconds for each token. The prompts have 100 tokens, and chunks of 32 in them."""
    made = CostModel()
    for size in SIZES:
        for _ in range(KEEP):
            made.prefill.observe((size, 0, 1), size * prefill)
            made.prefill.observe((size, 0, 0), size * prefill)
            made.lookup.observe((size,), size * lookup)
            made.load.observe((0, size, 0), size * load)
            made.load.observe((size, 0, 0), size * load)
            made.observe_passes("query", size, 100, size * passes)
            made.observe_passes("query", 1, 100, passes)
    return made


FAST, SLOW = {"passes": 0.01}, {"passes": 3.0}


def once(known: CostModel | None, **options: Any) -> Once:
    made = Once(**options)
    made.side.gate.costs = known or CostModel()
    return made


def run(world: Once, request: Request, result: BlendResult | None = None) -> dict[str, Any]:
    """A request on an idle engine, to its end."""
    more = world.side.match(request, 0) or 0
    world.side.on_allocated(request, list(range(13)), more, None)
    plans, _ = world.side.build_plans()
    for plan in plans:
        if plan.exact:
            world.server.give_back(request.request_id, 0, plan.exact)
    for plan in plans:
        done = BlendResult(plan.request_id, 32, 24, 8, 12, 1.5, 2.5)
        exact = BlendResult(plan.request_id, plan.exact, 0, 0, 0, 0.3, 0.0)
        world.side.on_results([result or (done if plan.matches else exact)])
    statistics = world.finish(request)
    assert statistics is not None
    return statistics


def test_a_blend_that_is_faster_is_made() -> None:
    found = run(world := once(costs(**FAST)), world.request())
    assert (found["decision"], found["blended"]) == ("blended", True)
    assert found["predicted_blend_ms"] < 0.9 * found["predicted_compute_ms"]


def test_a_blend_that_is_not_faster_is_not_made() -> None:
    world = once(costs(prefill=1.0, passes=3.0))
    request = world.request()
    found = run(world, request)
    assert (found["decision"], found["blended"], found["failure"]) == ("computed: not faster", False, "")
    assert found["predicted_blend_ms"] > 0.9 * found["predicted_compute_ms"]
    assert request.hidden == [], "its KV is exact, for everybody"
    (record,) = world.side.take_records()
    assert (record["outcome"], record["decision"]) == ("prefix", "computed: not faster")
    assert "fallback" not in record


def test_a_computed_request_uses_its_exact_prefix() -> None:
    world = once(costs(prefill=1.0, passes=3.0))
    request = world.request()
    assert world.side.match(request, 0) == 32
    world.side.on_allocated(request, list(range(13)), 32, None)
    ((plan,), _) = world.side.build_plans()
    assert (plan.exact, plan.matches, plan.end) == (32, (), 32)
    world.server.give_back("a", 0, 32)
    world.finish(request)
    assert not world.server.held["a"]


@pytest.mark.parametrize(("load", "loaded"), [(0.1, 32), (2.0, 0)])
def test_an_exact_prefix_that_loads_slowly_is_computed(load: float, loaded: int) -> None:
    world = once(costs(prefill=1.0, load=load))
    world.side.gate.skips_lookup = lambda *_, **__: False  # type: ignore[method-assign] # what it finds is not foreseen
    request = world.request(cached=(32, ()))
    assert world.side.match(request, 0) == loaded
    if loaded:
        world.side.on_allocated(request, list(range(13)), loaded, None)
        world.side.build_plans()
        world.server.give_back("a", 0, loaded)
    world.finish(request)


def test_a_short_exact_prefix_is_no_reason_to_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look-ups of 100 tokens cost as much as computing 40, and find 32."""
    on_found = BlendGate.on_found  # those of this test take no time
    monkeypatch.setattr(BlendGate, "on_found", lambda gate, state, *, idle: on_found(gate, state, idle=False))
    world = once(costs(prefill=1.0, passes=30.0, lookup=0.4))
    for number in range(4 * EXPLORE):
        run(world, world.request(str(number), cached=(32, ())))
    assert len(world.lookups) < 2 * EXPLORE
    longer = once(costs(prefill=1.0, passes=30.0, lookup=0.2))
    for number in range(4 * EXPLORE):
        run(longer, longer.request(str(number), cached=(32, ())))
    assert len(longer.lookups) == 4 * EXPLORE


def test_without_blending_a_useless_lookup_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    on_found = BlendGate.on_found  # those of this test take no time
    monkeypatch.setattr(BlendGate, "on_found", lambda gate, state, *, idle: on_found(gate, state, idle=False))

    def off(world: Once, name: str, cached: Any) -> dict[str, Any]:
        request = world.request(name, cached=cached)
        request.kv_transfer_params = {BLEND: "off"}
        return run(world, request)

    world = once(costs(prefill=1.0, lookup=0.2))
    for number in range(4 * EXPLORE):
        assert "decision" not in off(world, str(number), (0, ())), "there was nothing to decide"
    assert EXPLORE / 8 < len(world.lookups) < 2 * EXPLORE, "now and then one is looked up"
    found = once(costs(prefill=1.0, lookup=0.2))
    for number in range(4 * EXPLORE):
        off(found, str(number), (32, ()))
    assert len(found.lookups) == 4 * EXPLORE, "they find what is worth them"


def test_what_is_unknown_is_tried() -> None:
    found = run(world := once(None), world.request())
    assert (found["decision"], found["blended"]) == ("blended: costs unknown", True)
    assert "predicted_blend_ms" not in found


@pytest.mark.parametrize("how", ["request", "server"])
def test_always_means_whatever_it_takes(how: str) -> None:
    world = once(costs(prefill=0.001, passes=3.0), min_gain=None if how == "server" else 0.1)
    request = world.request()
    request.kv_transfer_params = {"lmcache_rag.blend": "always"} if how == "request" else None
    found = run(world, request)
    assert (found["decision"], found["blended"]) == ("blended: always", True)


def test_a_request_that_names_a_policy_is_decided_too() -> None:
    world = once(costs(prefill=1.0, passes=3.0))
    request = world.request()
    request.kv_transfer_params = {"lmcache_rag.policy": "query", "lmcache_rag.ratio": 0.3, "lmcache_rag.blend": "on"}
    assert run(world, request)["decision"] == "computed: not faster"


def test_without_blending_there_is_nothing_to_decide() -> None:
    world = once(costs(prefill=1.0, passes=3.0))
    request = world.request()
    request.kv_transfer_params = {"lmcache_rag.blend": "off"}
    assert "decision" not in run(world, request)
    nothing = once(costs(**FAST))
    assert "decision" not in run(nothing, nothing.request(cached=(0, ())))


def test_a_hopeless_request_is_not_looked_up() -> None:
    world = once(costs(prefill=0.01, lookup=1.0))
    found = run(world, world.request())
    assert world.lookups == [], "it starts as on stock vLLM"
    assert (found["decision"], found["lookup_ms"], found["prefix_tokens"]) == ("computed: not faster", 0, 0)


def test_a_slower_lookup_moves_the_boundary() -> None:
    fast, slow = costs(prefill=0.1), costs(prefill=0.1)
    for size in SIZES * 4 * KEEP:
        slow.lookup.observe((size,), 50.0)
    decided = [run(world := once(known), world.request())["decision"] for known in (fast, slow)]
    assert decided == ["blended", "computed: not faster"]


def test_what_vllm_holds_is_known_before_the_answer() -> None:
    """The look-up is sent before vLLM searches its own cache, which then has nearly everything."""
    world = once(costs(prefill=0.2, lookup=0.05))
    request = world.request(polls=3)
    world.side.start_early(request)
    assert len(world.lookups) == 1
    assert world.side.match(request, 96) == 0, "it does not wait for the answer"
    world.side.on_allocated(request, list(range(13)), 0, None)
    assert world.finish(request)["decision"] == "computed: not faster"  # type: ignore[index]
    while world.side.aborted_lookups:
        world.side.build_plans()
    assert not world.server.held["a"]


def test_lookups_go_on_where_they_find_exact_prefixes() -> None:
    """A blend is hopeless, but what look-ups find of whole prompts is worth them."""
    world = once(costs(prefill=1.0, passes=30.0))
    for number in range(EXPLORE):
        found = run(world, world.request(str(number)), BlendResult(str(number), 32, 0, 0, 0, 0.3, 0.0))
        assert found["decision"] in ("computed: not faster", "blended: costs measured again")
    assert len(world.lookups) == EXPLORE
    for number in range(4 * EXPLORE):
        run(world, world.request(f"other {number}", cached=(0, Once.MATCHES)))
    assert len(world.lookups) < 4 * EXPLORE, "they found none for a long time"


def test_costs_are_measured_again_once_in_a_while() -> None:
    world = once(costs(prefill=0.01, lookup=0.1))
    decided = [run(world, world.request(str(number)))["decision"] for number in range(30 * EXPLORE)]
    again = decided.count(Decision.MEASURED)
    assert 1 <= again <= 4, "a blend takes ten times as long here"
    assert set(decided) == {Decision.MEASURED, Decision.NOT_FASTER}


def test_a_server_that_becomes_fast_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = once(costs(prefill=1.0, lookup=1.5))
    assert run(world, world.request("first"))["decision"] == "computed: not faster"
    for number in range(20 * EXPLORE):  # the double answers at once
        if run(world, world.request(str(number)))["decision"] == "blended":
            break
    else:
        pytest.fail("never blended again")


def test_while_others_run_the_gpus_time_decides() -> None:
    """The look-up takes long, which delays no other request; the passes take less than a prefill."""
    known = costs(prefill=1.0, lookup=20.0)
    alone, beside = once(known), once(known)
    assert run(alone, alone.request())["decision"] == "computed: not faster"
    other = beside.request("other", cached=(0, ()))
    beside.side.match(other, 0)
    beside.side.on_allocated(other, list(range(13)), 0, None)
    beside.side.build_plans({"other": 1})
    request = beside.request("a")
    assert (beside.side.match(request, 0) or 0) > 0
    assert beside.side._states["a"].decision == "blended"


def test_slow_prefills_of_the_past_are_noticed() -> None:
    """Computing took 1 ms for each token while something else used the GPU, and takes 0.05 now."""
    world = once(costs(prefill=1.0, passes=0.5))
    for number in range(RECHECK):
        assert run(world, world.request(str(number)))["decision"] == "blended"
    request = world.request("once")
    assert run(world, request)["decision"] == "computed: costs measured again"
    for _ in range(10 * KEEP):
        world.side.gate.on_steps([StepTime(StepShape(size, 0), size / 20) for size in (*SIZES, 68)])
    assert run(world, world.request("last"))["decision"] == "computed: not faster"


def test_a_deferred_request_is_decided_once() -> None:
    world = once(costs(**FAST))
    gate, state = world.side.gate, RequestState("query", Budget(share=0.15), blend=True)
    claimed = world.side._find_claim(state, 100, 0, list(Once.MATCHES))
    first = state.decision
    gate.costs = costs(prefill=1.0, passes=30.0)
    assert world.side._find_claim(state, 100, 0, list(Once.MATCHES)) == claimed
    assert state.decision == first == "blended"


def test_a_request_alone_shows_what_its_parts_take() -> None:
    world = once(None)
    for number in range(3):
        run(world, world.request(str(number)), BlendResult(str(number), 32, 24, 8, 12, 1.5, 2.5, "", 16))
    known = world.side.gate.costs
    assert known.load.predict((16, 16 + 32, 0)) == pytest.approx(1.5, rel=0.01)
    assert known.passes_ms("query", 20, 100) == pytest.approx(2.5, rel=0.01)
    assert (known.lookup_ms(100) or 0) >= 0
    assert known.lookup.count == 3


def test_auto_counts_what_blends_recompute() -> None:
    gate = BlendGate(costs(), 0.1)
    budget = {"auto": Budget(), "share": Budget(share=0.5)}
    most = {name: gate._recomputed("query", each, 2000, 4) for name, each in budget.items()}
    for name, each in budget.items():
        state = RequestState("query", each, blend=True, most=most[name])
        gate.on_result(state, BlendResult(name, 0, 1900, 100, 12, 1.5, 2.5))
    assert gate._recomputed("query", budget["auto"], 2000, 4) == 100 < most["auto"]
    assert gate._recomputed("query", budget["share"], 2000, 4) == most["share"] == 1000


def test_a_blend_is_predicted_with_its_recomputation() -> None:
    world = once(costs(prefill=1.0, passes=1.0))
    gate = world.side.gate
    claimed = Claim(0, tuple(Once.MATCHES), 99)

    def predicted() -> float:
        state = RequestState("query", Budget(), blend=True)
        gate.blends(state, claimed, 100, busy=False)
        assert state.forecast is not None
        return state.forecast.blend_ms

    before = predicted()
    gate.costs.observe_recomputed("query", 1, 10)
    assert predicted() < before


def test_a_failure_shows_nothing() -> None:
    world = once(None)
    run(world, world.request(), BlendResult("a", 0, 0, 0, 76, 5000.0, 2.5, "load failed"))
    assert world.side.gate.costs.load.count == 0
    assert world.side.gate.costs.passes == {}


def test_a_blend_in_the_background_shows_nothing() -> None:
    world = once(None)
    state = RequestState("query", Budget(share=0.15), blend=True, background=True)
    world.side.gate.on_result(state, BlendResult("a", 0, 24, 8, 12, 500.0, 2.5))
    assert world.side.gate.costs.count == 0, "its times are those of the steps of others"


def test_a_lookup_beside_others_is_not_timed() -> None:
    world = once(None)
    other = world.request("other", cached=(0, ()))
    world.side.match(other, 0)
    world.side.on_allocated(other, list(range(13)), 0, None)
    world.side.build_plans({"other": 1})
    count = world.side.gate.costs.lookup.count
    world.side.match(world.request("a"), 0)
    assert world.side.gate.costs.lookup.count == count


@pytest.mark.parametrize(
    ("scheduled", "shape"),
    [({"a": 24}, StepShape(24, 76, blended=True)), ({"a": 24, "b": 1}, None), ({}, None)],
)
def test_a_step_of_one_request_is_timed(scheduled: dict[str, int], shape: StepShape | None) -> None:
    world = once(None)
    request = world.request()
    world.side.on_allocated(request, list(range(13)), world.side.match(request, 0) or 0, None)
    _, allowance = world.side.build_plans(scheduled)
    assert allowance.timed == shape


def test_a_prefills_pieces_are_timed_with_their_start() -> None:
    world = once(None)
    request = world.request(cached=(0, ()))
    world.side.on_allocated(request, list(range(13)), world.side.match(request, 8) or 0, None)
    shapes = [world.side.build_plans({"a": tokens})[1].timed for tokens in (2000, 1500, 1)]
    assert shapes == [StepShape(2000, 8), StepShape(1500, 2008), None], "the last is no prefill"


def test_measured_steps_reach_the_costs() -> None:
    world = once(None)
    steps = [StepTime(StepShape(400, 100), 12.0), StepTime(StepShape(1, 500, blended=True), 3.0)] * 3
    world.side.take_worker_metadata(BlendWorkerMetadata(steps=steps))
    known = world.side.gate.costs
    assert known.prefill_ms(400, 100) == pytest.approx(12.0, rel=0.01)
    assert known.finish.predict((1,)) == pytest.approx(3.0, rel=0.01)


def test_ranks_report_a_step_once() -> None:
    one, other = (BlendWorkerMetadata(steps=[StepTime(StepShape(400, 0), ms)]) for ms in (12.0, 13.0))
    merged = one.aggregate(other)
    assert isinstance(merged, BlendWorkerMetadata)
    assert [step.ms for step in merged.steps] == [12.0]


def test_costs_of_the_workers_start_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    world = once(None)
    world.side.set_handshake_metadata({0: BlendHandshakeMetadata(None, None, costs().as_dict())})
    assert world.side.gate.costs.prefill_ms(100) == pytest.approx(100, rel=0.1)
    assert caplog.text == ""
    world.side.set_handshake_metadata({0: BlendHandshakeMetadata(None, None, {"version": 0})})
    assert "cannot be read" in caplog.text


def test_costs_are_kept_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "KEEP_S", 0.05)
    gate, file = BlendGate(CostModel(), 0.1), tmp_path / "costs" / "a.json"
    gate.take(costs().as_dict(), str(file))
    gate.on_steps([])
    later = CostModel()
    assert later.update(json.loads(file.read_text()))
    assert later.prefill_ms(100) == pytest.approx(gate.costs.prefill_ms(100), rel=0.01)
    written = file.stat().st_mtime_ns
    time.sleep(0.1)
    gate.on_steps([])
    assert file.stat().st_mtime_ns == written, "nothing was observed since"
    gate.on_steps([StepTime(StepShape(400, 100), 12.0)])
    assert file.stat().st_mtime_ns > written


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    gate = BlendGate(CostModel(), 0.1)
    gate.take(costs().as_dict(), str(tmp_path / "file" / "a.json"))
    gate.on_steps([])
    assert gate._kept[0] == gate.costs.count > 0, "it tried"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_figures_are_published_when_they_change() -> None:
    gate = BlendGate(costs(), 0.1)
    figures = gate.take_figures("query", Budget(share=0.15))
    names = {(gauge, name) for gauge, name, _ in figures}
    assert {(COST_GAUGE, "prefill_1024"), (COST_GAUGE, "lookup_8192"), (COST_GAUGE, "load_l1_1024")} <= names
    assert {(BOUNDARY_GAUGE, "l1"), (BOUNDARY_GAUGE, "hot")} <= names
    assert gate.take_figures("query", Budget(share=0.15)) == []
    assert {gauge for gauge, _, _ in BlendGate(costs(), None).take_figures("query", Budget(share=0.15))} == {COST_GAUGE}
