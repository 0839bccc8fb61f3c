"""What passes take, measured at start on a real model's layers over a paged cache."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checked_kit import CheckedModel
from models import tiny_model

from lmcache_rag.connector import start_costs
from lmcache_rag.connector.start_costs import costs_file, measure_costs, measured
from lmcache_rag.costs import CostModel
from lmcache_rag.engines.hf_model import HFModel

CONFIG: Any = SimpleNamespace(model_config=SimpleNamespace(max_model_len=600))


@pytest.fixture(scope="module")
def model() -> HFModel:
    return HFModel.wrap(tiny_model("llama", vocab_size=2000), None)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_costs, "CONTEXTS", (512,))
    monkeypatch.setattr(start_costs, "TIMES", 1)


def everywhere(fine: bool) -> bool:
    return fine


def test_prefill_selection_and_recomputation_are_timed(model: HFModel) -> None:
    costs = measured(CheckedModel(model), longest=600, on_all_ranks=everywhere, most_s=600)
    for tokens in (16, 200, 512):
        assert (costs.prefill_ms(tokens, served=False) or 0) > 0
        assert (costs.passes_ms("query", tokens, 512) or 0) > (
            costs.passes_ms("query", tokens, 512, selects=False) or 0
        )
    assert costs.lookup_ms(512) is None, "LMCache took no part"


def test_the_cache_is_left_empty(model: HFModel) -> None:
    checked = CheckedModel(model)
    measured(checked, longest=600, on_all_ranks=everywhere, most_s=600)
    assert all(not bool(cache[1:33].any()) for pair in checked.caches for cache in pair)
    assert bool(torch.isnan(checked.caches[0][0][0]).all()), "vLLM's null block is not touched"


def test_no_size_is_begun_after_the_time_is_over(model: HFModel) -> None:
    votes: list[bool] = []

    def vote(fine: bool) -> bool:
        votes.append(fine)
        return fine and len(votes) < 3

    checked = CheckedModel(model)
    measured(checked, longest=600, on_all_ranks=vote, most_s=600)
    assert len(votes) == 3, "all ranks end at the same size"
    assert votes == [True, True, True]


def test_costs_that_are_kept_are_not_measured_again(model: HFModel, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    costs = CostModel()
    costs.lookup.observe((500,), 3.0)
    file.write_text(json.dumps(costs.as_dict()))
    assert measure_costs(CONFIG, None, file, everywhere) == costs.as_dict()  # type: ignore[arg-type]
    file.write_text("{")
    fresh = measure_costs(CONFIG, CheckedModel(model), file, everywhere)
    assert fresh is not None
    assert set(fresh["costs"]) == {"prefill", "passes.query"}


def test_a_rank_without_the_file_has_all_measure(model: HFModel, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(CostModel().as_dict()))
    votes = iter([False])
    fresh = measure_costs(CONFIG, CheckedModel(model), file, lambda fine: next(votes, fine))
    assert fresh is not None
    assert fresh["costs"]


def test_a_failed_measurement_lets_the_server_start(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert measure_costs(CONFIG, None, None, everywhere) is None  # type: ignore[arg-type]
    assert "learned from requests" in caplog.text


def test_each_model_on_each_gpu_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_costs, "check_name", lambda config: config)
    assert costs_file("a") != costs_file("b")
    assert costs_file("") is None


def test_a_pass_without_memory_is_not_begun(model: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = CheckedModel(model)
    monkeypatch.setattr(checked, "has_memory", lambda tokens, length: False)
    assert measured(checked, longest=600, on_all_ranks=everywhere, most_s=600).count == 0
    assert checked.passes == []
