"""What of a prompt is claimed, and how the connector's settings are read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_rag.budget import Budget
from lmcache_rag.connector.config import ConnectorOptions
from lmcache_rag.connector.metadata import BlendPlan, Match, claim
from lmcache_rag.errors import LMCacheRAGError

CHUNK = 16


def at(start: int, end: int, old: int = 1000) -> Match:
    return Match(start, end, old, old + end - start)


@st.composite
def matches(draw: st.DrawFn) -> list[Match]:
    """Pieces anywhere, in any order, overlapping too: more than LMCache ever sends."""
    starts = draw(st.lists(st.integers(0, 400), max_size=12))
    return [at(start, start + draw(st.integers(1, 64))) for start in starts]


@given(st.integers(2, 400), st.integers(0, 400), st.integers(0, 25), matches(), st.integers(0, 200), st.integers(0, 99))
def test_a_claim_has_all_that_was_found_but_a_token(
    prompt: int, local: int, chunks: int, found: list[Match], least: int, tail: int
) -> None:
    local, prefix = min(local, prompt - 1), min(chunks, prompt // CHUNK) * CHUNK
    made = claim(prompt, local, prefix, found, least=least, tail=tail)

    assert local <= made.exact <= made.end <= prompt - 1
    assert made.exact == min(max(local, prefix), prompt - 1)
    assert set(made.matches) <= set(found)
    last = made.exact
    for match in made.matches:
        assert match.start >= last, "matches overlap, or reach into the exact prefix"
        last = match.end
    rest = prompt - 1 - last
    assert made.end == (prompt - 1 if made.matches and rest <= tail else last)
    assert made.reused == sum(match.end - match.start for match in made.matches)
    assert not made.matches or made.reused >= max(least, 1)


@given(st.integers(0, 60), st.lists(st.tuples(st.integers(0, 30), st.integers(1, 64)), max_size=8))
def test_nothing_that_can_be_reused_is_left_out(exact: int, pieces: list[tuple[int, int]]) -> None:
    found, here = [], exact
    for gap, length in pieces:
        found.append(at(here + gap, here + gap + length))
        here += gap + length
    made = claim(here + 1, exact, 0, found[::-1], least=1)
    assert made.matches == tuple(found)
    assert made.end == (here if found else exact)


def test_a_nested_match_does_not_let_a_third_overlap() -> None:
    made = claim(500, 0, 0, [at(0, 100), at(5, 10), at(12, 20)], least=1)
    assert made.matches == (at(0, 100),)
    assert made.end == 100


def test_a_fully_cached_prompt_leaves_its_last_token() -> None:
    made = claim(64, 0, 64, [], least=1)
    assert (made.exact, made.matches, made.end) == (63, (), 63)
    made = claim(64, 0, 32, [at(32, 64)], least=1)
    assert (made.exact, made.matches, made.end) == (32, (), 32), "the last match would leave nothing to compute"


def test_only_matches_after_computed_tokens_count() -> None:
    made = claim(400, 100, 64, [at(64, 128), at(128, 192)], least=64)
    assert (made.exact, made.matches, made.end) == (100, (at(128, 192),), 192)


def test_adjacent_matches_merge_if_adjacent_in_cache() -> None:
    pieces = (Match(0, 16, 32, 48), Match(16, 32, 48, 64), Match(32, 48, 0, 16), Match(60, 76, 16, 32))
    plan = BlendPlan("r", tuple(range(80)), 0, 0, pieces, 76, (0,), "query", Budget())
    assert plan.spans == [(0, 32), (32, 48), (60, 76)]


# -- settings -----------------------------------------------------------------------------------------------------


def read(**values: Any) -> ConnectorOptions:
    config = {f"lmcache_rag.{name}": value for name, value in values.items()}
    return ConnectorOptions.read(config.get)


def test_settings_are_read_and_given_their_types() -> None:
    options = read(policy="hkvd", ratio=1, blend=False, deadline=2, least_tokens=0, step_tokens=4096)
    assert options == ConnectorOptions("hkvd", 1.0, False, 2.0, least_tokens=0, step_tokens=4096)
    assert isinstance(options.ratio, float)
    assert read() == ConnectorOptions()
    assert read(min_gain=None).min_gain is read(min_gain="off").min_gain is None
    assert read(min_gain=0).min_gain == 0.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", "best"),
        ("policy", 3),
        ("ratio", 1.5),
        ("min_gain", 1.0),
        ("min_gain", "on"),
        ("min_gain", float("nan")),
        ("ratio", -0.1),
        ("ratio", float("nan")),
        ("ratio", True),
        ("ratio", "0.1"),
        ("ratio", {"tokens": -1}),
        ("blend", "off"),
        ("blend", 1),
        ("deadline", -1),
        ("lookup_deadline", -1),
        ("poll", None),
        ("least_tokens", 1.5),
        ("least_tokens", True),
        ("tail_tokens", -1),
        ("step_tokens", 0),
        ("overlap", 1),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(LMCacheRAGError, match="policy" if name == "policy" else f"lmcache_rag.{name}"):
        read(**{name: value})
