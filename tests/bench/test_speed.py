"""The speed benchmark, against a real HTTP server that counts what it is asked."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from openai_kit import vllm_serving
from typer.testing import CliRunner

from lmcache_rag.bench.client import Timed, Workload
from lmcache_rag.bench.speed import Arm, Pairs, SpeedBench, under_load
from lmcache_rag.cli.app import app


@pytest.mark.parametrize("number", [1, 2])
def test_a_workload_s_spans_hold_the_ingested_chunks(number: int) -> None:
    work = Workload(chunk=100, chunks=7)
    prompt, spans = work.prompt(700, number), work.spans(700, number)
    stored = {tuple(work.ingest(i)) for i in range(7)}
    assert len(spans) == 5
    for start, end in spans:
        assert tuple(prompt[:64] + prompt[start:end]) in stored
    assert work.prompt(700, number) == prompt
    assert work.prompt(700, number + 1) != prompt


def test_every_arm_is_measured_and_drawn(tokenizer: Any, tmp_path: Path) -> None:
    plot = tmp_path / "ttft.png"
    with vllm_serving(tokenizer) as server:
        arguments = ["bench", "speed", "--engine", server.url, "--tokens", "2300", "--repeats", "2", "--chunks", "3"]
        result = CliRunner().invoke(app, [*arguments, "--json", "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    rows = {row["arm"]: row for row in json.loads(result.stdout)}
    assert list(rows) == ["full prefill", "query auto", "hot query auto"]
    assert all(len(row["ttft_ms"]) == 2 and row["median_ms"] > 0 for row in rows.values())
    assert rows["full prefill"]["steps"]["reused_tokens"] == 0
    assert rows["query auto"]["steps"]["reused_tokens"] > 500
    assert plot.read_bytes().startswith(b"\x89PNG")
    named = [body for body in server.seen if "lmcache_rag.chunks" in (body.get("kv_transfer_params") or {})]
    assert len(named) == 4


def test_every_policy_is_measured_at_every_ratio(tokenizer: Any) -> None:
    with vllm_serving(tokenizer) as server:
        arguments = ["bench", "speed", "--engine", server.url, "--tokens", "1300", "--repeats", "1", "--chunks", "1"]
        wanted = ["--policy", "hkvd", "--policy", "query", "--policy", "hkvd", "--at", "0.1", "--at", "0.2"]
        result = CliRunner().invoke(app, [*arguments, *wanted, "--json"])
    assert result.exit_code == 0, result.output
    kinds = [(policy, ratio) for policy in ("hkvd", "query") for ratio in (0.1, 0.2)]
    names = [f"{hot}{policy} {ratio}" for policy, ratio in kinds for hot in ("", "hot ")]
    assert [row["arm"] for row in json.loads(result.stdout)] == ["full prefill", *names]
    asked = [body.get("kv_transfer_params") or {} for body in server.seen]
    told = Counter(
        (each["lmcache_rag.policy"], each["lmcache_rag.ratio"]) for each in asked if "lmcache_rag.policy" in each
    )
    assert told == dict.fromkeys(kinds, 2 * 3)  # from LMCache and named; two to warm up


def test_a_ratio_has_all_its_forms(tokenizer: Any) -> None:
    with vllm_serving(tokenizer) as server:
        arguments = ["bench", "speed", "--engine", server.url, "--tokens", "1300", "--repeats", "1", "--chunks", "1"]
        result = CliRunner().invoke(app, [*arguments, "--at", "auto", "--at", "tokens=400", "--json"])
    assert result.exit_code == 0, result.output
    names = [f"{hot}query {ratio}" for ratio in ("auto", "tokens=400") for hot in ("", "hot ")]
    assert [row["arm"] for row in json.loads(result.stdout)] == ["full prefill", *names]
    asked = [(body.get("kv_transfer_params") or {}).get("lmcache_rag.ratio") for body in server.seen]
    assert asked.count("auto") == asked.count({"tokens": 400}) == 2 * 3
    assert CliRunner().invoke(app, [*arguments, "--at", "1.5"]).exit_code == 2


def test_an_unknown_policy_fails_before_measuring() -> None:
    result = CliRunner().invoke(app, ["bench", "speed", "--engine", "http://127.0.0.1:9", "--policy", "best"])
    assert result.exit_code == 2
    assert "hkvd" in result.output


async def test_prompts_begin_with_whole_server_chunks(tokenizer: Any) -> None:
    with vllm_serving(tokenizer) as server:
        server.chunk = 256
        bench = SpeedBench([Arm("a", server.url)], Workload(chunk=100, chunks=3))
        await bench.open()
        await bench.ingest(server.url)
        await bench.close()
    assert bench.workload.prefix == 256
    assert {len(body["prompt"]) for body in server.seen} == {356}
    assert bench.workload.spans(700, 1)[0][0] == 256


def test_no_server_is_said_with_its_remedy() -> None:
    result = CliRunner().invoke(app, ["bench", "speed", "--engine", "http://127.0.0.1:9"])
    assert result.exit_code != 0
    assert "lmcache-rag serve" in " ".join(result.output.split())


# -- under load, and what the server costs where nothing is blended ---------------------------------------------------


def test_arrivals_are_equal_for_all_and_keep_the_rate() -> None:
    moments = Workload(seed=1).arrivals(4.0, 2000)
    assert moments == Workload(seed=2).arrivals(4.0, 2000)  # a new workload of the same rate is comparable
    assert moments[0] == 0
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.1)  # exponential: as wide as its mean


def test_a_fresh_prompt_begins_like_no_other() -> None:
    work = Workload(chunks=3)
    prompts = [work.fresh(size, number) for number in (1, 2) for size in (16, 2300)] + [work.prompt(2300, 1)]
    assert [len(prompt) for prompt in prompts[:4]] == [16, 2300, 16, 2300]
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 3  # both lengths of a number begin alike
    assert Workload(chunks=3, seed="other").fresh(16, 1) != prompts[0]


def test_load_is_told_in_percentiles() -> None:
    done = [Timed(float(i), (float(i), 2.0), 0.0, {"hot_tokens": i}) for i in range(1, 101)]
    found = under_load(done)
    assert found["ttft_ms_median"] == 50.5
    assert found["ttft_ms_p99"] == 100
    assert (found["gap_ms_p50"], found["gap_ms_p90"], found["gap_ms_p99"], found["gap_ms_max"]) == (2, 81, 99, 100)
    assert found["steps"]["hot_tokens"] == 50.5
    assert under_load([Timed(3.0, (), 3.0)])["gap_ms_max"] == 0  # answers of one token have no gaps


def test_pairs_are_compared_as_medians_and_one_by_one() -> None:
    pairs = Pairs("nothing cached", 8400, (100.0, 200.0, 400.0), (101.0, 210.0, 404.0))
    assert pairs.of_medians == pytest.approx(0.05)
    assert pairs.of_pairs == pytest.approx(0.01)
    assert pairs.as_dict()["ours_median_ms"] == 210


async def test_requests_keep_their_rate_when_answers_lag(tokenizer: Any) -> None:
    with vllm_serving(tokenizer) as server:
        arm = Arm("one", server.url)
        bench = SpeedBench([arm], Workload(chunk=128, chunks=3))
        await bench.open()
        server.hang, server.pause = 0.5, 0.03
        found = await bench.rate(arm, 400, 12, per_second=40.0, answer=4)
        await bench.close()
    assert found["requests"] == 12 and found["per_second"] == 40
    assert server.most_active > 6
    assert found["ttft_ms_median"] >= 500
    assert 25 < found["gap_ms_p50"] <= found["gap_ms_p90"] <= found["gap_ms_p99"] <= found["gap_ms_max"]
    assert len({tuple(body["prompt"]) for body in server.seen}) == 12
    assert found["late_ms_max"] >= 0


def test_everything_is_measured_beside_a_baseline(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr("lmcache_rag.cli.run.Bars.update", lambda self, name, *step: steps.append(step))
    everything = ["--throughput", "--rate", "0", "--ingestion", "--nothing-cached", "--floor"]
    with vllm_serving(tokenizer) as ours, vllm_serving(tokenizer) as stock:
        stock.connector = False
        ours.hang = 0.08
        arguments = ["bench", "speed", "--engine", ours.url, "--baseline", stock.url, "--tokens", "2300"]
        numbers = ["--repeats", "3", "--chunks", "3", "--requests", "17", "--in-flight", "4"]
        result = CliRunner().invoke(app, [*arguments, *numbers, *everything, "--json"])
    assert result.exit_code == 0, result.output
    assert steps[-1][0] == steps[-1][1] == len(steps) == len(ours.seen) + len(stock.seen)

    rows = json.loads(result.stdout)
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["measure"], []).append(row)
    assert list(found) == ["ttft", "throughput", "rate", "ingestion", "nothing cached", "floor"]
    arms = ["full prefill", "query auto", "hot query auto"]
    assert [row["arm"] for row in found["throughput"]] == [row["arm"] for row in found["rate"]] == arms
    assert [row["at_once"] for row in found["throughput"]] == [4, 4, 4]
    rate = 0.8 * found["throughput"][0]["requests_per_second"]
    assert [row["per_second"] for row in found["rate"]] == [pytest.approx(rate)] * 3
    assert len(found["rate"][0]["ttft_ms"]) == 17 and len(found["rate"][0]["gaps_ms"]) == 17 * 15
    assert found["rate"][1]["steps"]["reused_tokens"] > 500 and found["rate"][0]["steps"] == {}

    rates = {row["arm"]: row for row in found["ingestion"]}
    assert all(len(row["tokens_per_second"]) == 2 for row in rates.values())
    assert rates["full prefill"]["of_base"] == 1 and rates["engine"]["of_base"] < 1
    ingested = [tuple(body["prompt"]) for body in ours.seen if len(body["prompt"]) == 64 + 1024 and not body["stream"]]
    assert len(ingested) == len(set(ingested)) == 3 + 3 * 48  # the chunks, and three times as many new ones

    (nothing,) = found["nothing cached"]
    assert len(nothing["base_ms"]) == len(nothing["ours_ms"]) == 3
    assert nothing["ours_median_ms"] > nothing["base_median_ms"] and nothing["of_pairs"] > 0
    whole = [tuple(body["prompt"]) for body in ours.seen if len(body["prompt"]) == 2300]
    assert Counter(Counter(whole).values()) == {1: 5, 5: 1}  # never twice; and one prompt again and again
    assert [row["prompt"] for row in found["floor"]] == ["16 tokens", "2300 tokens again"]
    assert all(row["ours_median_ms"] >= 80 for row in found["floor"])


def test_everything_is_shown_in_tables(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr("lmcache_rag.cli.run.Bars.update", lambda self, name, *step: steps.append(step))
    with vllm_serving(tokenizer) as server:
        arguments = ["bench", "speed", "--engine", server.url, "--tokens", "1300", "--repeats", "1", "--chunks", "2"]
        more = ["--rate", "50", "--requests", "3", "--ingestion", "--nothing-cached", "--floor"]
        result = CliRunner().invoke(app, [*arguments, *more])
    assert result.exit_code == 0, result.output
    assert steps[-1] == (len(server.seen), len(server.seen))  # the throughput was not needed
    assert 1 < server.most_active <= 16
    titles = ("Time to the first token", "At 50.00 requests a second", "Ingestion, 16 in", "Nothing cached", "HTTP and")
    assert [title for title in titles if title not in result.stdout] == []
    assert "Throughput" not in result.stdout  # its rate was named
    bodies = [body.get("kv_transfer_params") or {} for body in server.seen]
    assert bodies.count({}) == 2 * 3 + 3  # as a client without ours asks: two kinds of floor, and nothing cached


def test_a_server_that_fails_under_load_is_named(tokenizer: Any) -> None:
    with vllm_serving(tokenizer) as server:
        arguments = ["bench", "speed", "--engine", server.url, "--tokens", "1300", "--repeats", "1", "--chunks", "2"]
        told = server.backend.statistics

        def failing(number: int, body: dict[str, Any]) -> dict[str, Any] | None:
            if body["stream"]:
                server.fail = [500] * 3
            return told(number, body)

        server.backend.statistics = failing  # type: ignore[method-assign]
        result = CliRunner().invoke(app, [*arguments, "--rate", "10", "--requests", "4"])
    assert result.exit_code != 0
    assert server.url in result.output and "500" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "option", ["--policy", "--at", "--rate", "--throughput", "--ingestion", "--nothing-cached", "--floor"]
)
def test_help_names_every_measure(option: str) -> None:
    assert option in CliRunner().invoke(app, ["bench", "speed", "--help"], env={"COLUMNS": "160"}).output


def test_a_plot_that_cannot_be_drawn_fails_first(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["bench", "speed", "--engine", "http://127.0.0.1:9", "--plot", str(tmp_path / "no" / "x.png")]
    )
    assert result.exit_code == 2
    assert "no folder" in " ".join(result.output.split())
