"""When blends run: within a step, beside others, or later."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmcache_rag.connector.admission import Admission, BlendBudget


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
