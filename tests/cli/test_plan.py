"""`plan` on the command line: its inputs, what it prints, and its page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import vllm_engine_kit as kit
from cli_kit import document
from openai_kit import vllm_serving
from typer.testing import CliRunner, Result

from lmcache_rag.cli.app import app
from lmcache_rag.plan.economics import MEASURED
from lmcache_rag.trace import Retrieval, write_trace

smollm2_tokenizer = kit.smollm2_tokenizer
LLAMA = ("--layers", 32, "--kv-heads", 8, "--head-size", 128, "--parameters", 6.98)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No store in the working folder."""
    monkeypatch.chdir(tmp_path)


def plan(*arguments: object) -> Result:
    """Run it without a store's models."""
    env = {name: None for name in os.environ if name.startswith("LMCACHE_RAG_")} | {"COLUMNS": "100"}
    return CliRunner(env=env).invoke(app, ["plan", "--questions", "2000", *map(str, arguments)])


def test_without_a_trace_it_says_what_is_assumed() -> None:
    found = document(plan(*LLAMA, "--chunks", 2000, "--chunk-tokens", 512, "--json"))
    assert found["kv"]["bf16"]["bytes_per_token"] == 131_072
    assert found["kv"]["fp8"]["bytes"] == 2000 * 8 * 64 * 65_536
    assert "no trace" in found["trace"]
    assert "seed 0" in found["trace"]
    assert any("popularity of the chunks is assumed" in note for note in found["notes"])
    assert found["times"]["source"].startswith("docs/results: an 8B Llama shape")
    assert not found["times"]["measured_by_this_server"]
    rates = [row["lru"] for row in found["hit_rate"]]
    assert rates == sorted(rates)
    assert all(row["prefixes"] <= row["lru"] for row in found["hit_rate"])
    assert found["recommendation"]["setup"] in (1, 2, 3, 4)
    assert found["replay"] is None


def test_the_same_for_people_with_a_tier() -> None:
    result = plan(*LLAMA, "--chunks", 2000, "--chunk-tokens", 512, "--tier", "disk:500:30", "--l1-gb", 20)
    assert result.exit_code == 0
    for words in ("131.1 KB", "Hit rate by gigabytes", "exact prefixes", "memory and tiers", "A tier pays from", "◂"):
        assert words in result.stdout
    assert "3. A second tier pays." in result.stdout
    assert "$ lmcache-rag serve YOUR_MODEL --l1-gb 20 --store ingest --l2 " in result.stdout
    assert "YOUR_MODEL stands for the folder or Hugging Face name of yours." in result.stdout
    named = plan(*LLAMA, "--chunks", 2000, "--model", "some/model", "--l1-gb", 20).stdout
    assert "serve some/model " in named
    assert "YOUR_MODEL" not in named
    assert "seed 0" in result.stdout


def test_a_trace_decides_the_hit_rate(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(path, [Retrieval("q", tuple("abcdefgh"), tokens=(1024, 512) * 4)] * 10)
    found = document(plan(*LLAMA, "--trace", path, "--json"))
    assert found["corpus"] == {"chunks": 8, "chunk_tokens": 768}
    assert found["hit_rate"][-1] | {"gb": 0} == {"gb": 0, "lru": 0.9, "second use": 0.8, "prefixes": 0.9}
    assert found["recommendation"]["setup"] == 1
    assert found["found_in"]["memory"] == 1, "what fits is computed at ingestion"
    assert "10 questions of" in found["trace"]


def test_tenants_share_no_chunk(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(path, [Retrieval("q", ("a",), tenant=tenant) for tenant in ("one", "other", "one")])
    found = document(plan(*LLAMA, "--trace", path, "--chunk-tokens", 512, "--json"))
    assert found["hit_rate"][-1]["lru"] == pytest.approx(1 / 3)


def test_a_model_is_read_from_its_folder(smollm2_path: Path) -> None:
    found = document(plan("--model", smollm2_path, "--chunks", 1000, "--kv-dtype", "bf16", "--json"))
    assert found["kv"]["bf16"]["bytes_per_token"] == MEASURED["SmolLM2-135M (never-slower-h200-135m.json)"][1]
    assert found["recommendation"]["setup"] == 4
    assert found["break_even"][0]["gb_per_s"] is None


def test_a_servers_own_costs_are_used_and_replayed(smollm2_tokenizer: Any, smollm2_path: Path, tmp_path: Path) -> None:
    path, page = tmp_path / "trace.jsonl", tmp_path / "plan.html"
    write_trace(path, [Retrieval("", (name,), tokens=(128,)) for name in "abcabcaab"])
    with vllm_serving(smollm2_tokenizer) as server:
        words = ("--model", smollm2_path, "--trace", path, "--engine", server.url, "--replay", server.url)
        yellow = plan(*words, "--json")
        assert "has measured no costs yet" in yellow.stderr
        costs = {"prefill_1024": 11.0, "prefill_8192": 88.0}
        lines = "".join(f'vllm:lmcache_rag_cost_ms{{cost="{name}"}} {value}\n' for name, value in costs.items())
        server.metrics = lambda: lines  # type: ignore[method-assign]
        result = plan(*words, "--report", page, "--json")
    found = document(result)
    assert result.exit_code == 0
    assert found["times"] == {"source": f"measured by {server.url} itself", "measured_by_this_server": True}
    assert found["prefill_tokens_per_s"] == pytest.approx(7168 / 77 * 1000)
    assert found["replay"]["measured"] == pytest.approx(6 / 9)
    assert found["replay"]["predicted"] == pytest.approx(6 / 9)
    assert "predicted 66.7%, measured 66.7%" in " ".join(page.read_text(encoding="utf-8").split())


def test_a_replay_that_disagrees_ends_with_status_1(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(path, [Retrieval("", (name,), tokens=(128,)) for name in "abcdabcd"])
    with vllm_serving(smollm2_tokenizer) as server:
        words = ("--trace", path, "--replay", server.url, "--l1-gb", 0.02)  # the server has more than that
        result = plan(*LLAMA, *words)
    assert result.exit_code == 1
    assert "measured 50.0%" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "There is no store"),
        (("--chunks", 5, "--tier", "disk"), "is not NAME:GB:GB/s"),
        (("--chunks", 5, "--tier", "d:1:1", "--tier", "d:2:2"), "the same name"),
        (("--chunks", 5, "--trace", "none.jsonl"), "cannot be read"),
        (("--chunks", 5, "--save-trace", "x.jsonl"), "needs --trace"),
        (("--chunks", 5, "--report", "nowhere/page.html"), "There is no folder"),
        (("--chunks", 5, "--kv-dtype", "int3"), "is not known"),
    ],
)
def test_what_is_wrong_is_named(words: tuple[object, ...], message: str) -> None:
    result = plan(*LLAMA, *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_model_must_be_named_whole() -> None:
    for words, message in (
        ((), "No model is named"),
        (("--layers", 3), "belong together"),
        (("--model", "x/y"), "not on this"),
    ):
        result = plan("--chunks", 5, *words)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_the_page_needs_no_network_and_shows_all(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    words = (
        *LLAMA,
        "--chunks",
        2000,
        "--chunk-tokens",
        512,
        "--tier",
        "<b>disk</b>:500:30",
        "--report",
        page,
        "--json",
    )
    found = json.loads(plan(*words).stdout)
    text = page.read_text(encoding="utf-8")
    assert "http" not in text.replace("http://localhost:8000", "")
    assert "<b>disk" not in text
    assert found["recommendation"]["title"] in text
    assert text.count("<polyline") == 3
