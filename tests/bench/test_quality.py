"""bench quality: every arm on real engines, a run that continues, differences, the gate, the page."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from embedded_server_kit import EngineBackend
from fake_vllm import FakeVLLM, running
from openai_kit import vllm_serving
from rich.console import Console
from typer.testing import CliRunner

from lmcache_rag import protocol
from lmcache_rag.bench.quality.arms import EmbeddedAnswers, ServerAnswers, parse_arms
from lmcache_rag.bench.quality.conversation import by_turn
from lmcache_rag.bench.quality.data import Sample
from lmcache_rag.bench.quality.results import Record, ResultFile, digest
from lmcache_rag.bench.quality.runner import QualityRun
from lmcache_rag.bench.quality.scores import (
    POOLED,
    Interval,
    Score,
    f1,
    hit,
    main_arm,
    normalize_answer,
    recommendation,
    scores,
    verdict,
)
from lmcache_rag.bench.quality.tasks import Cell, make_samples
from lmcache_rag.cli.app import app
from lmcache_rag.cli.bench_quality import score_table
from lmcache_rag.cli.run import Services
from lmcache_rag.engines.base import Sampling
from lmcache_rag.engines.vllm import VLLMEngine
from lmcache_rag.errors import ConfigError, ContextLengthError, EngineError
from lmcache_rag.prompt import PromptBuilder, PromptFormat, Turn
from lmcache_rag.settings import Settings
from lmcache_rag.workspace import Workspace

ARMS = "none,query:0.15,all"


@pytest.fixture
def samples(smollm2_engine: Any) -> list[Sample]:
    builder = PromptBuilder(smollm2_engine.tokenizer, smollm2_engine.info)
    return make_samples(Cell(3, 64), 4, builder.encode, tasks=["fact", "needle"])


def run_of(engine: Any, source: Any, arms: str = ARMS, **changes: Any) -> QualityRun:
    run = QualityRun(engine, source, PromptFormat(), "", tuple(parse_arms(arms)), max_tokens=6)
    return replace(run, **changes)


def asked(run: QualityRun, samples: list[Sample], path: Path) -> dict[tuple[str, str], Record]:
    with ResultFile(path, {"arms": [arm.name for arm in run.arms]}) as out:
        run.run(samples, out)
        return dict(out.records)


# The embedded engine


def test_arms_of_the_embedded_engine_answer_as_it_does(smollm2_engine: Any, tmp_path: Path) -> None:
    form = PromptFormat(neutral=())  # after neutral passages all answers would be the full prefill's
    builder = PromptBuilder(smollm2_engine.tokenizer, smollm2_engine.info, format=form)
    samples = make_samples(Cell(3, 64), 2, builder.encode, tasks=["fact", "needle"], seed=7)
    run = run_of(smollm2_engine, EmbeddedAnswers(smollm2_engine), max_tokens=16, format=form)
    records = asked(run, samples, tmp_path / "r.jsonl")
    texts = [(each.arms["full"]["text"], each.arms["none"]["text"]) for each in records.values()]
    assert any(a != b and a[:8] == b[:8] for a, b in texts), texts  # one differs in the middle
    for sample in samples:
        arms = records[sample.cell, sample.sample_id].arms
        prompt = builder.query(sample.passages, sample.question)
        for arm in run.arms:
            done = smollm2_engine.generate(prompt, Sampling(max_tokens=16), arm.options())
            assert arms[arm.name]["text"] == done.text
            assert arms[arm.name]["ttft_ms"] > 0
            if arm.blends:
                assert arms[arm.name]["counts"] == {key: getattr(done.stats, key) for key in protocol.COUNTS}
        assert arms["all"]["equal"] is True
        assert arms["all"]["along_kl"] == pytest.approx(0.0, abs=1e-4)
        assert arms["all"]["gold_nll"] == pytest.approx(arms["full"]["gold_nll"], abs=1e-3)
        assert arms["none"]["along_kl"] > 1e-3
        assert arms["full"]["first_kl"] == 0.0


def test_the_answers_likelihood_is_the_models_own(
    smollm2_engine: Any, smollm2_plain: Any, samples: list[Sample], tmp_path: Path
) -> None:
    import torch

    sample = samples[0]
    run = run_of(smollm2_engine, EmbeddedAnswers(smollm2_engine), "")
    found = asked(run, [sample], tmp_path / "r.jsonl")[sample.cell, sample.sample_id].arms["full"]["gold_nll"]
    builder = PromptBuilder(smollm2_engine.tokenizer, smollm2_engine.info)
    prompt = list(builder.query(sample.passages, sample.question).token_ids)
    gold = builder.encode(sample.answers[0])
    with torch.inference_mode():
        rows = smollm2_plain(torch.tensor([prompt + gold])).logits[0].log_softmax(-1)
    wanted = [-float(rows[len(prompt) - 1 + i, token]) for i, token in enumerate(gold)]
    assert found == pytest.approx(sum(wanted) / len(wanted), abs=1e-3)


def test_question_before_the_passages_is_blended_too(smollm2_engine: Any, tmp_path: Path) -> None:
    builder = PromptBuilder(smollm2_engine.tokenizer, smollm2_engine.info)
    around = make_samples(Cell(3, 64, "around"), 2, builder.encode, tasks=["fact"])
    for record in asked(run_of(smollm2_engine, EmbeddedAnswers(smollm2_engine)), around, tmp_path / "r.jsonl").values():
        assert record.arms["all"]["equal"] is True
        assert record.arms["none"]["counts"]["reused_tokens"] == 3 * 64  # the first chunk is not exact here


def test_a_too_long_prompt_is_refused_before_any_runs(smollm2_engine: Any, tmp_path: Path) -> None:
    run = run_of(smollm2_engine, EmbeddedAnswers(smollm2_engine))
    many = tuple(f"Passage number {i} with its own words. " * 60 for i in range(30))
    long = [Sample("a", "x", "x", "Q?", ("a",), many[:1]), Sample("b", "30x1024", "x", "Q?", ("a",), many)]
    with pytest.raises(ContextLengthError, match="30x1024") as problem:
        asked(run, long, tmp_path / "r.jsonl")
    assert "Leave that cell out" in problem.value.remedy
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1


# A server


def test_arms_of_a_server_share_no_exact_kv(tokenizer: Any, samples: list[Sample], tmp_path: Path) -> None:
    with vllm_serving(tokenizer) as server:
        engine = VLLMEngine(server.url)
        run = run_of(engine, ServerAnswers(engine, "r1", timed=True), f"prefix,{ARMS}")
        records = asked(run, samples, tmp_path / "r.jsonl")
        engine.close()
    questions = [body for body in server.seen if not body["kv_transfer_params"].get(protocol.INGEST)]
    by_salt: dict[str, list[dict[str, Any]]] = {}
    for body in questions:
        by_salt.setdefault(body.get("cache_salt", ""), []).append(body)
    blended = by_salt.pop("")
    assert len(blended) == 3 * len(samples)
    assert [body["kv_transfer_params"][protocol.POLICY] for body in blended[:3]] == ["none", "query", "all"]
    assert all(body["temperature"] == 0 and isinstance(body["prompt"][0], int) for body in questions)
    prefix = next(salt for salt in by_salt if salt.endswith("prefix"))
    assert len(by_salt.pop(prefix)) == len(samples)
    assert [len(bodies) for bodies in by_salt.values()] == [1] * len(samples)  # the full prefills
    for body in (body for bodies in by_salt.values() for body in bodies):
        assert body["kv_transfer_params"][protocol.BLEND] == "off"
        assert body["kv_transfer_params"][protocol.MAX_OFFLOAD_TOKENS] == 0
    first = next(iter(records.values())).arms
    assert first["full"]["gold_nll"] is None
    assert first["none"]["ttft_ms"] > 0


def test_only_auto_lets_the_server_decide(tokenizer: Any, samples: list[Sample], tmp_path: Path) -> None:
    with vllm_serving(tokenizer) as server:
        engine = VLLMEngine(server.url)
        run = run_of(engine, ServerAnswers(engine, "r1", timed=True), "auto,query:auto,query:0.1")
        asked(run, samples[:1], tmp_path / "r.jsonl")
        engine.close()
    bodies = [body["kv_transfer_params"] for body in server.seen if "cache_salt" not in body]
    blended = [body for body in bodies if not body.get(protocol.INGEST)]
    always = protocol.ALWAYS_BLEND[protocol.BLEND]
    assert [body[protocol.RATIO] for body in blended] == ["auto", 0.1, "auto"]
    assert [body[protocol.BLEND] == always for body in blended] == [True, True, False], "auto last: it may compute"


def test_several_questions_at_once_give_no_times(tokenizer: Any, samples: list[Sample], tmp_path: Path) -> None:
    with vllm_serving(tokenizer) as server:
        engine = VLLMEngine(server.url)
        source = ServerAnswers(engine, "r1", timed=False)
        records = asked(run_of(engine, source, concurrency=3), samples, tmp_path / "r.jsonl")
        engine.close()
    assert sorted(records) == sorted((s.cell, s.sample_id) for s in samples)
    arms = next(iter(records.values())).arms
    assert arms["none"]["ttft_ms"] is None
    assert arms["none"]["first_kl"] == pytest.approx(0.0, abs=1e-6)  # of the stand-in's log-probabilities
    found = scores(records.values())
    assert all(score.faster is None for score in found)


def test_a_server_gives_the_embedded_engines_answers(
    smollm2_engine: Any, make_engine: Any, samples: list[Sample], tmp_path: Path
) -> None:
    backend = EngineBackend(make_engine(tmp_path / "kv"))
    own = asked(run_of(smollm2_engine, EmbeddedAnswers(smollm2_engine)), samples[:2], tmp_path / "own.jsonl")
    with running(FakeVLLM(backend)) as server:
        engine = VLLMEngine(server.url)
        source = ServerAnswers(engine, "r1", timed=True)
        found = asked(run_of(engine, source), samples[:2], tmp_path / "server.jsonl")
        engine.close()
    for name, record in own.items():
        assert {arm: each["text"] for arm, each in record.arms.items()} == {
            arm: each["text"] for arm, each in found[name].arms.items()
        }
        assert found[name].arms["none"]["blended"] is True


def test_stock_is_asked_at_its_own_server(tokenizer: Any, samples: list[Sample], tmp_path: Path) -> None:
    with vllm_serving(tokenizer) as server, vllm_serving(tokenizer) as other:
        other.connector = False
        engine, stock = VLLMEngine(server.url), VLLMEngine(other.url)
        run = run_of(engine, ServerAnswers(engine, "r1", timed=True, stock=stock), "stock,none")
        records = asked(run, samples, tmp_path / "r.jsonl")
        engine.close()
        stock.close()
    assert len(other.seen) == len(samples)
    assert not any(body.get("kv_transfer_params") for body in other.seen)
    assert len({body["cache_salt"] for body in other.seen}) == 1  # its own prefix cache helps, not an earlier run's
    assert not any(body.get("cache_salt", "").endswith("stock") for body in server.seen)
    [pooled] = [s for s in scores(records.values()) if (s.arm, s.cell, s.task) == ("stock", POOLED, POOLED)]
    assert (pooled.blended, pooled.faster is not None) == (None, True)
    assert not ServerAnswers(engine, "r1", timed=True).supports(parse_arms("stock")[1])


def test_earlier_turns_follow_the_passages(tokenizer: Any, tmp_path: Path) -> None:
    with vllm_serving(tokenizer) as server:
        engine = VLLMEngine(server.url)
        builder = PromptBuilder(tokenizer, engine.info)
        talk = make_samples(Cell(3, 64, task="conversation"), 2, builder.encode, turns=3)
        records = asked(run_of(engine, ServerAnswers(engine, "r1", timed=True), "none"), talk, tmp_path / "r.jsonl")
        engine.close()
    prompts = [tuple(body["prompt"]) for body in server.seen if not body["kv_transfer_params"].get(protocol.INGEST)]
    third = talk[2]
    history = [Turn(role, text) for role, text in zip(["user", "assistant"] * 2, third.history, strict=True)]
    assert builder.query(third.passages, third.question, history).token_ids == prompts[2 * 2]
    turns = by_turn(list(records.values()))
    assert [(t.turn, t.arm, t.questions) for t in turns] == [(n, arm, 2) for n in (1, 2, 3) for arm in ("full", "none")]
    assert all(t.cell == "3x64:conversation" and t.ttft_ms is not None for t in turns)
    assert turns[0].prompt_tokens < turns[2].prompt_tokens < turns[4].prompt_tokens
    assert by_turn([record()]) == []


# ContextPilot, in its own environment


def contextpilot(path: Path, body: str) -> str:
    """A stand-in for that environment's Python: the package itself has a hundred dependencies."""
    module = path / "contextpilot.py"
    module.write_text(
        f"class ContextPilot:\n    def __init__(self, **options): pass\n    def reorder(self, c): {body}\n"
    )
    program = path / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return str(program)


def test_contextpilot_is_asked_in_its_own_order(tokenizer: Any, samples: list[Sample], tmp_path: Path) -> None:
    turned = "return [c[i][::-1] for i in (2, 3, 0, 1)], [2, 3, 0, 1]"
    with vllm_serving(tokenizer) as server:
        engine = VLLMEngine(server.url)
        source = ServerAnswers(engine, "r1", timed=True)
        run = run_of(engine, source, "contextpilot", contextpilot=contextpilot(tmp_path, turned))
        records = asked(run, samples, tmp_path / "r.jsonl")
        engine.close()
    assert all(set(record.arms) == {"full", "contextpilot"} for record in records.values())
    bodies = [body for body in server.seen if body.get("cache_salt", "").endswith("contextpilot")]
    builder = PromptBuilder(tokenizer, engine.info)
    for body, index in zip(bodies, (2, 3, 0, 1), strict=True):
        prompt = builder.query(samples[index].passages[::-1], samples[index].question)
        assert tuple(body["prompt"]) == prompt.token_ids
    [pooled] = [s for s in scores(records.values()) if (s.arm, s.cell, s.task) == ("contextpilot", POOLED, POOLED)]
    assert (pooled.first_kl, pooled.equal) == (None, None)  # another prompt
    assert pooled.hit_difference is not None


@pytest.mark.parametrize(
    ("body", "words"), [("raise ValueError('no room')", "no room"), ("return c, [1, 0, 2, 3]", "other passages")]
)
def test_contextpilot_that_fails_ends_the_run(
    tokenizer: Any, samples: list[Sample], tmp_path: Path, body: str, words: str
) -> None:
    with vllm_serving(tokenizer) as server:
        engine = VLLMEngine(server.url)
        source = ServerAnswers(engine, "r1", timed=True)
        run = run_of(engine, source, "contextpilot", contextpilot=contextpilot(tmp_path, body))
        with pytest.raises(EngineError, match=words) as problem:
            asked(run, samples, tmp_path / "r.jsonl")
        engine.close()
    assert problem.value.remedy


# A run that continues


def record(name: str = "a", **arms: dict[str, Any]) -> Record:
    return Record(name, "c", "t", "Q?", ("x",), 10, arms)


def test_a_killed_run_continues(smollm2_engine: Any, samples: list[Sample], tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run = run_of(smollm2_engine, EmbeddedAnswers(smollm2_engine), "none")
    seen: list[tuple[int, int]] = []

    def kill(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ResultFile(path, {}) as out:
        run.run(samples, out, kill)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # the last line was cut off
    with ResultFile(path, {}) as out:
        assert len(out.records) == 1
        run.run(samples, out, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == [1, 2, 3, 4]
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + len(samples)
    assert len({json.loads(line)["sample_id"] for line in lines[1:]}) == len(samples)
    with ResultFile(path, {}) as out:  # nothing is left to do
        run.run(samples, out)
    assert path.read_text().splitlines() == lines


@pytest.mark.parametrize("cut", range(0, 120, 7))
def test_a_file_cut_anywhere_is_read(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl"
    with ResultFile(path, {"seed": 1}) as out:
        out.add(record("a", full={"text": "x"}))
        out.add(record("b", full={"text": "y"}))
    content = path.read_bytes()
    path.write_bytes(content[: max(0, len(content) - cut)])
    with ResultFile(path, {"seed": 1}) as out:
        kept = set(out.records)
        assert path.read_bytes().endswith(b"\n")
        for name in "ab":
            if ("c", name) not in kept:
                out.add(record(name, full={"text": name}))
    with ResultFile(path, {"seed": 1}) as out:
        assert len(out.records) == 2


def test_another_runs_file_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with ResultFile(path, {"seed": 1, "arms": ["full"]}) as out:
        out.add(record())
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="seed") as problem:
        ResultFile(path, {"seed": 2, "arms": ["full"]})
    assert "--out" in problem.value.remedy
    path.write_text("something else\n")
    with pytest.raises(ConfigError, match="no results"):
        ResultFile(path, {"seed": 1, "arms": ["full"]})
    assert path.read_text() == "something else\n"
    assert before.count(b"\n") == 2


def test_arms_of_two_passes_are_one_record(tmp_path: Path) -> None:
    with ResultFile(tmp_path / "r.jsonl", {}) as out:
        out.add(record("a", full={"text": "x"}))
        out.add(record("a", contextpilot={"text": "y"}))
    with ResultFile(tmp_path / "r.jsonl", {}) as out:
        assert set(out.records["c", "a"].arms) == {"full", "contextpilot"}


def test_other_questions_have_another_digest() -> None:
    one = Sample("a", "c", "t", "Q?", ("x",))
    assert digest([one]) == digest([one]) != digest([replace(one, answers=("y",))])


# Scores


def test_answers_are_scored_as_squad_does() -> None:
    assert normalize_answer("The  Quick, brown-fox!") == "quick brownfox"
    assert hit("It is the Eiffel Tower.", ["eiffel tower"]) == 1.0
    assert hit("It is 4821.", ["482"]) == 0.0
    assert hit("Saint‑Rémy", ["Saint-Rémy"]) == 1.0
    assert hit("", ["x"]) == hit("anything", ["", "the"]) == 0.0
    assert f1("the old town of Rome", ["Rome"]) == pytest.approx(2 * 1 / (4 + 1))
    assert f1("Rome", ["Paris", "Rome"]) == 1.0
    assert f1("", ["x"]) == 0.0
    assert hit("Ответ: 70666.", ["70666"]) == 1.0
    assert hit("Архитектор «Ветров».", ["Ветров"]) == 1.0


def answer(text: str, ttft_ms: float | None = 10.0, **more: Any) -> dict[str, Any]:
    fields = {"equal": None, "first_kl": None, "along_kl": None, "gold_nll": None, "counts": {}, "failure": ""}
    return {"text": text, "parsed": text, "ttft_ms": ttft_ms, "blended": None, **fields, **more}


def records_of(rights: dict[str, list[int]], *, cell: str = "c", times: dict[str, float] | None = None) -> list[Record]:
    size = len(next(iter(rights.values())))
    return [
        Record(
            f"{cell}{i}",
            cell,
            "t",
            "Q?",
            ("right",),
            100,
            {arm: answer("right" if own[i] else "no", (times or {}).get(arm, 10.0)) for arm, own in rights.items()},
        )
        for i in range(size)
    ]


def test_differences_are_paired_with_the_full_prefill() -> None:
    found = scores(records_of({"full": [1, 0] * 50, "none": [0, 0] * 50, "all": [1, 0] * 50}))
    by_arm = {score.arm: score for score in found}
    assert (by_arm["full"].hit, by_arm["none"].hit, by_arm["full"].hit_difference) == (0.5, 0.0, None)
    assert by_arm["all"].hit_difference == Interval(0.0, 0.0, 0.0)
    lost = by_arm["none"].hit_difference
    assert lost is not None
    assert -0.62 < lost.low < -0.5 + 1e-9
    assert lost.mean == -0.5
    assert -0.5 < lost.high < -0.38


def test_scores_are_grouped_by_cell_and_task() -> None:
    found = scores([*records_of({"full": [1] * 4}, cell="a"), *records_of({"full": [0] * 4}, cell="b")])
    assert {(s.cell, s.task): s.hit for s in found} == {("all", "all"): 0.5, ("a", "all"): 1.0, ("b", "all"): 0.0}


def test_the_gate_takes_mean_lower_end_and_each_cell() -> None:
    def judged(mean: float, low: float, high: float, cell_high: float = 0.0, limit: float = 0.02) -> tuple[str, ...]:
        pooled = Score("auto", POOLED, POOLED, 200, 0.5, 0.5, Interval(mean, low, high))
        cell = Score("auto", "8x160", POOLED, 20, 0.5, 0.5, Interval(-0.1, -0.2, cell_high))
        return verdict([pooled, cell], "auto", limit).reasons

    assert judged(-0.009, -0.019, 0.01) == ()
    assert "mean" in judged(-0.01, -0.019, 0.01)[0]
    assert "lower end" in judged(-0.005, -0.02, 0.01)[0]
    assert "8x160" in judged(0.0, -0.01, 0.01, cell_high=-0.021)[0]
    assert judged(-0.01, -0.02, 0.01, limit=0.05) == ()
    assert verdict([], "auto", 0.02).passed is False


def test_the_gate_ignores_reported_questions() -> None:
    kept = records_of({"full": [1] * 50, "auto": [1] * 50}, cell="8x160")
    lost = [replace(r, gated=False) for r in records_of({"full": [1] * 50, "auto": [0] * 50}, cell="8x160:russian")]
    found = scores([*kept, *lost])
    assert {(s.cell, s.gated): s.questions for s in found if s.arm == "auto"} == {
        (POOLED, True): 50,
        ("8x160", True): 50,
        ("8x160:russian", False): 50,
    }
    assert verdict(found, "auto", 0.02).passed
    assert "On your 50 questions, auto loses nothing" in recommendation(found, "auto", 0.02)
    assert not verdict(scores(lost), "auto", 0.02).passed  # nothing else was asked


def test_the_recommendation_is_a_sentence() -> None:
    times = {"full": 100.0, "auto": 25.0, "query:0.3": 40.0}
    even = [1] * 200
    rights = {"full": even, "auto": [0] * 30 + [1] * 170, "query:0.3": even}
    found = scores(records_of(rights, times=times))
    assert recommendation(found, "auto", 0.02) == (
        "On your 200 questions, auto loses 15.0 points [-20.0, -10.5] and starts 4.0 times as fast as a full prefill; "
        "query:0.3 would lose nothing [+0.0, +0.0] and start 2.5 times as fast as a full prefill."
    )
    assert "no faster arm stays within 2 points." in recommendation(found, "query:0.3", 0.02)
    worse = scores(records_of({"full": even, "auto": [0] * 200}, times=times))
    assert recommendation(worse, "auto", 0.02).endswith("compute such questions in full.")
    hopeless = scores(records_of({"full": [0] * 50, "auto": [0] * 50}, times=times))
    assert recommendation(hopeless, "auto", 0.02).endswith(
        "A full prefill answers 0% of them right, so little could be lost."
    )
    slower = scores(records_of({"full": even, "auto": even}, times={"full": 10.0, "auto": 12.0}))
    assert recommendation(slower, "auto", 0.02).endswith("compute such questions in full.")


def test_the_gate_judges_auto_or_the_first_that_blends() -> None:
    assert main_arm(["full", "query:0.15", "auto"]) == "auto"
    assert main_arm(["full", "prefix", "hkvd:0.3", "none"]) == "hkvd:0.3"
    assert main_arm(["full", "prefix"]) == ""


# The command


@pytest.fixture
def call(make_engine: Any, embedder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command in this process, with the one loaded model."""
    monkeypatch.chdir(tmp_path)

    def open_workspace(settings: Settings, *, create: bool) -> Workspace:
        return Workspace(settings, create=create, engine=make_engine(settings.store / "kv"), embedder=embedder)

    runner = CliRunner(env={name: None for name in os.environ if name.startswith("LMCACHE_RAG_")})
    return lambda *words: runner.invoke(app, [str(w) for w in words], obj=Services(open_workspace=open_workspace))


SMALL = ("--cells", "2x64", "--items", 2, "--tasks", "fact", "--arms", "query:0.15,none", "--max-tokens", 4)


def test_the_command_ends_with_a_recommendation(call: Callable[..., Any], tmp_path: Path) -> None:
    done = call("bench", "quality", *SMALL, "--arms", "prefix,query:0.15,none", "--report", "page.html")
    assert done.exit_code == 0, done.output
    assert "Left out, since they need a server: prefix." in done.output
    assert re.search(r"On your 2 questions, query:0\.15 (loses|gains)", " ".join(done.output.split()))
    page = (tmp_path / "page.html").read_text()
    assert "What does it cost me?" in page
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)


def test_the_gate_decides_the_exit_status(call: Callable[..., Any]) -> None:
    passed = call("bench", "quality", *SMALL, "--gate", 1.5, "--json")
    assert passed.exit_code == 0, passed.output
    assert json.loads(passed.stdout)["gate"]["passed"] is True
    failed = call("bench", "quality", *SMALL, "--gate", 0, "--json")  # a loss of nothing is not above minus nothing
    assert (failed.exit_code, json.loads(failed.stdout)["gate"]["passed"]) == (1, False)


def test_questions_without_passages_use_the_store(call: Callable[..., Any], tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for number in range(3):
        (docs / f"{number}.txt").write_text(f"The lamp of harbour {number} is lit at {number + 5} o'clock. " * 12)
    assert call("ingest", docs, "--store", tmp_path / "store").exit_code == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "kv").rglob("*") if path.is_file()}
    (tmp_path / "q.jsonl").write_text('{"question": "When is the lamp of harbour 2 lit?", "answers": ["7"]}\n')
    words = ("q.jsonl", "--store", tmp_path / "store", "--top-k", 2, "--arms", "none", "--max-tokens", 4)
    done = call("bench", "quality", *words, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["scores"][0]["questions"] == 1
    line = json.loads((tmp_path / "bench-quality.jsonl").read_text().splitlines()[1])
    assert line["arms"]["none"]["counts"]["reused_tokens"] > 0
    kept = {path for path in (tmp_path / "store" / "kv").rglob("*") if path.is_file()}
    assert kept >= set(files)  # the user's own KV stays


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("--arms", "contextpilot"), "--contextpilot"),
        (("--cells", "8"), "8x160"),
        (("--style", "none"), "plain"),
        (("--report", "no-folder/page.html"), "Make it"),
        (("--tasks", "facts"), "two-hop"),
        (("--arms", "stock"), "--baseline"),
        (("--cells", "2x64:russian", "--gate", 0.02), "Leave out --gate"),
    ],
)
def test_wrong_options_are_refused_with_a_remedy(call: Callable[..., Any], words: tuple[str, ...], remedy: str) -> None:
    done = call("bench", "quality", *words)
    assert done.exit_code == 2
    assert remedy in " ".join(done.output.split())


def test_the_command_shows_a_conversation_by_turn(call: Callable[..., Any], tmp_path: Path) -> None:
    words = ("--cells", "2x64:conversation", "--items", 1, "--turns", 2, "--arms", "none", "--max-tokens", 2)
    done = call("bench", "quality", *words, "--report", "page.html")
    assert done.exit_code == 0, done.output
    assert "2x64:conversation: hits, and TTFT in ms, by turn" in " ".join(done.output.split())
    page = (tmp_path / "page.html").read_text()
    assert "Does it last through a conversation?" in page
    assert page.count("<polyline") == 2
    again = json.loads(call("bench", "quality", *words, "--json").stdout)
    assert [(t["turn"], t["arm"]) for t in again["turns"]] == [(1, "full"), (1, "none"), (2, "full"), (2, "none")]


@pytest.mark.parametrize(("width", "shown"), [(80, "times as fast"), (120, "recomputed"), (200, "KL first")])
def test_a_narrow_terminal_shows_fewer_measures(width: int, shown: str) -> None:
    interval = Interval(-0.1, -0.2, 0.1)
    own = Score("query:0.15", POOLED, POOLED, 20, 0.5, 0.5, *[interval] * 5, 0.2, 1607.0, 2.46, 1.0, 158.0)
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(score_table("Title", [own], width))
    assert "…" not in out.getvalue()
    assert "query:0.15" in out.getvalue()
    assert shown in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= width
    assert ("--json has all" in out.getvalue()) == (width < 200)


# The page


def test_the_page_shows_a_models_words_as_text(tmp_path: Path) -> None:
    from lmcache_rag.bench.quality.report import write_report

    evil = "<script>alert(1)</script>"
    records = [
        Record("a", "c", "t", evil, (evil,), 10, {"full": answer("right " + evil), "none": answer("no")}),
        Record("b", "c", "t", "Why?", ("x",), 10, {"full": answer("no"), "none": answer("x")}),
    ]
    found = scores(records)
    facts = {"model": evil, "engine": "vllm", "version": "1"}
    path = tmp_path / "page.html"
    write_report(path, records, found, facts, "Advice.", verdict(found, "none", 0.02))
    page = path.read_text()
    assert page.count("<script>") == 1  # the page's own
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<details") == 2
    assert 'data-marks="none=lost"' in page
    assert 'data-marks="none=gained"' in page
    assert page.index("none=lost") < page.index("none=gained")
    assert page.count("<svg") >= 3
