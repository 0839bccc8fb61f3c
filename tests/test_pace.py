"""When blends run: within a step, beside others, or later."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmcache_rag.connector.admission import Pace


def test_an_idle_engine_blends_within_the_step_and_only_one() -> None:
    pace = Pace(100, 1000)
    assert pace.way(1000) == "now"
    pace.claim("a", "now", 1000)
    pace.begun("a")
    assert pace.way(1) == "beside"
    pace.claim("b", "beside", 1)
    pace.begun("b")
    allowance = pace.step({"a"})
    assert (allowance.tokens, allowance.idle) == (0, False), "the step is full"
    assert pace.way(1) == "beside", "a runs"
    pace.ended("a")
    assert pace.way(1) == "beside", "b is under way"
    pace.done("b")
    assert pace.way(1) == "now"


def test_a_blend_that_would_take_long_runs_beside_even_when_nobody_else_does() -> None:
    assert Pace(100, 1000).way(1001) == "beside"


def test_nothing_need_ever_run_within_a_step() -> None:
    assert Pace(100, 0).way(1) == "beside"


def test_others_are_held_up_by_so_many_tokens_at_most() -> None:
    pace = Pace(100, 1000)
    assert pace.step({"runs"}).tokens == 100
    assert pace.step(()).tokens == 100, "who comes meanwhile waits no longer than others would have"
    assert pace.step(()).idle


def test_no_more_than_some_are_under_way() -> None:
    pace = Pace(100, 1000, at_once=2)
    pace.step({"runs"})
    for name in ("a", "b"):
        assert pace.way(10) == "beside"
        pace.claim(name, "beside", 10)
    assert pace.way(10) == "later", "claims count before they are allocated"
    pace.begun("a")
    pace.step({"runs"})
    assert pace.way(10) == "beside", "b got no blocks"


def test_without_overlap_a_step_takes_one_or_what_it_may() -> None:
    pace = Pace(100, 1000, overlap=False)
    pace.step({"runs"})
    assert pace.way(5000) == "now"
    pace.claim("a", "now", 60)
    assert pace.way(40) == "now"
    assert pace.way(41) == "later"


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 2000), st.booleans(), st.booleans()), max_size=60),
    st.booleans(),
)
def test_whoever_runs_is_never_held_up_for_longer(events: list[tuple[str, int, bool, bool]], overlap: bool) -> None:
    pace = Pace(100, 1000, overlap=overlap)
    running: set[str] = set()
    now: list[tuple[str, int]] = []
    for name, tokens, step, allocated in events:
        if name not in running and name not in [one for one, _ in now]:
            way = pace.way(tokens)
            if way != "later":
                pace.claim(name, way, tokens)
                if allocated:
                    pace.begun(name)
                if way == "now" and allocated:
                    now.append((name, tokens))
        if step:
            allowance = pace.step(running | {one for one, _ in now})
            held_up = sum(size for _, size in now) + allowance.tokens
            if overlap and running:
                assert not now
                assert held_up <= 100
            elif overlap:
                assert held_up <= 1000
            running = (running | {one for one, _ in now}) - {"a", "b"}
            pace.ended("a")
            pace.ended("b")
            now = []
