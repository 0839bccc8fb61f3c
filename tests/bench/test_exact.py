"""bench exact: how far blended answers are from a full prefill's, measured with a real engine."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from openai_kit import vllm_serving
from typer.testing import CliRunner

from lmcache_rag.bench.exact import (
    Trace,
    TracedEmbeddedEngine,
    bootstrap,
    compare,
    cover,
    difference,
    divergence,
    permutations,
    questions,
)
from lmcache_rag.cli.app import app
from lmcache_rag.engines.base import BlendOptions, ChunkSpan, QueryPrompt
from lmcache_rag.prompt import PromptBuilder


def test_all_recomputed_is_equal_and_none_is_not(make_engine, corpus, tmp_path):
    engine = make_engine(tmp_path)
    source = TracedEmbeddedEngine(engine, PromptBuilder(engine.tokenizer, engine.info))
    source.keep(corpus)
    steps: list[int] = []
    arms = {"all": BlendOptions("query", 1.0), "none": BlendOptions("none", 0.0)}
    found = compare(source, questions(corpus, 4), arms, tokens=8, again=True, on_step=lambda: steps.append(1))
    everything, nothing, again = found
    assert (again.arm, again.equal, again.kl) == ("again, exact", 4, 0.0)
    assert (everything.equal, everything.unexplained, len(steps)) == (4, 0, 4)
    assert everything.kl < 1e-6 < 1e-4 < nothing.kl
    low, high = nothing.kl_interval
    assert low <= nothing.kl <= high
    assert everything.as_dict()["least_cover"] is None  # the embedded engine's statistics are no part of this


def test_the_full_prefill_comes_last(make_engine, corpus, tmp_path, monkeypatch):
    """A server goes on from the exact KV of a prompt that it has computed in full: nothing would be blended."""
    engine = make_engine(tmp_path)
    source = TracedEmbeddedEngine(engine, PromptBuilder(engine.tokenizer, engine.info))
    asked: list[bool] = []
    real = source.trace
    monkeypatch.setattr(
        source, "trace", lambda prompt, blend, n: (asked.append(blend.enabled), real(prompt, blend, n))[1]
    )
    arms = {"all": BlendOptions("query", 1.0), "none": BlendOptions("none", 0.0)}
    compare(source, questions(corpus, 2), arms, tokens=1)
    assert asked == [True, True, False] * 2


def test_questions_and_orders_repeat_and_differ() -> None:
    chunks = [f"Passage {i} says something of its own, at some length." for i in range(20)]
    asked = questions(chunks, 30, seed=3)
    assert asked == questions(chunks, 30, seed=3) != questions(chunks, 30, seed=4)
    assert all(4 <= len(each.chunks) == len(set(each.chunks)) <= 8 for each in asked)
    orders = permutations(chunks[:10], 20)
    assert all(sorted(each.chunks) == sorted(chunks[:10]) for each in orders)
    assert len({each.chunks for each in orders}) == 20


@pytest.mark.parametrize(
    ("gap", "explained"), [(0.0, True), (0.125, True), (0.25, True), (0.26, False), (None, False)], ids=str
)
def test_a_difference_is_explained_by_a_near_tie_only(gap: float | None, explained: bool) -> None:
    there = {1: -0.7, 2: -0.7 - (gap or 0.0)} if gap is not None else {1: -0.7, 3: -5.0}
    full = Trace((5, 1), ({5: -0.1}, there))
    got = Trace((5, 2), ({5: -0.1}, {2: -0.6, 1: -0.9}))
    found = difference(full, got)
    assert (found.place, found.near_tie) == (1, explained)
    assert difference(full, full).place is None


def test_divergence_is_zero_for_equals_and_grows() -> None:
    rng = random.Random(0)
    weights = [rng.random() for _ in range(20)]
    full = {i: math.log(w / sum(weights) * 0.9) for i, w in enumerate(weights)}
    moved = dict(zip(full, [*list(full.values())[1:], full[0]], strict=True))
    assert divergence(full, full) == pytest.approx(0.0, abs=1e-9)
    assert divergence(full, moved) > 0.05
    two, other = {0: math.log(0.5), 1: math.log(0.5)}, {0: math.log(0.75), 1: math.log(0.25)}
    assert divergence(two, other) == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), rel=1e-4)


def test_the_cover_counts_whole_blocks_only() -> None:
    prompt = QueryPrompt(tuple(range(400)), 64, (ChunkSpan(64, 200, "a"), ChunkSpan(202, 330, "b")), 330, "f")
    told = {"prefix_tokens": 128, "reused_tokens": 150, "recomputed_tokens": 42}
    assert cover(prompt, told, 64) == pytest.approx((64 + 150 + 42) / 256)
    assert cover(prompt, {}, 64) is None


def test_the_interval_holds_the_mean() -> None:
    values = [0.0] * 50 + [1.0] * 50
    low, high = bootstrap(values)
    assert 0.35 < low < 0.5 < high < 0.65


def test_the_default_budget_is_the_servers_own(tokenizer: Any, tmp_path: Path, sentences: list[str]) -> None:
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(" ".join(sentences[3 * i :][:3]))
    with vllm_serving(tokenizer) as server:
        words = ["bench", "exact", str(tmp_path), "--engine", server.url, "--prompts", "1", "--tokens", "2"]
        result = CliRunner().invoke(app, [*words, "--orders", "2", "--json"])
        asked = [body.get("kv_transfer_params") or {} for body in server.seen]
        shown = CliRunner().invoke(app, [*words, "--orders", "2"], env={"COLUMNS": "200"})
    assert result.exit_code == shown.exit_code == 0, result.output
    assert "orders" in shown.stdout
    found = json.loads(result.stdout)
    assert [row["arm"] for row in found["server"]] == ["query 1", "query auto", "hkvd auto", "none", "again, exact"]
    assert [row["arm"] for row in found["orders"]] == ["query auto"]
    assert {each.get("lmcache_rag.ratio") for each in asked} == {None, 0.0, 1.0, "auto"}


def test_no_server_is_said_with_its_remedy(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "exact", str(tmp_path), "--engine", "http://127.0.0.1:9"])
    assert result.exit_code != 0
    assert "lmcache-rag serve" in " ".join(result.output.split())


def test_the_embedded_engine_needs_a_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "exact", str(tmp_path), "--embedded"])
    assert result.exit_code == 2
    assert "--model" in result.output
