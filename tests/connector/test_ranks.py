"""Tensor parallelism: two ranks, each with half of the heads, take the same decisions as one with all.

The ranks are processes that talk by gloo; see tests/support/rank_kit.py. On GPUs the collectives are NCCL's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from blend_kit import PREFIX
from models import tiny_model
from rank_kit import RANKS, RULE, SCENARIOS
from worker_kit import World

from lmcache_rag.budget import Budget
from lmcache_rag.connector.job import SMALLEST
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.policies import get_policy, select

Outcome = dict[str, Any]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """What each rank says of each scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).parents[1] / "support" / "rank_kit.py"
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    running = []
    for rank in range(RANKS):
        with (folder / f"rank{rank}.log").open("wb") as log:
            command = [sys.executable, str(script), str(rank), str(RANKS), str(folder)]
            running.append(subprocess.Popen(command, env=surroundings, stdout=log, stderr=subprocess.STDOUT))
    try:
        for rank, process in enumerate(running):
            assert process.wait(900) == 0, (folder / f"rank{rank}.log").read_text()[-4000:]
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def hf() -> HFModel:
    return HFModel.wrap(tiny_model("llama"), None)


def joined(ranks: list[Outcome], name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of all heads."""
    layers = zip(*(rank[name]["kv"] for rank in ranks), strict=True)
    return [tuple(torch.cat(parts) for parts in zip(*layer, strict=True)) for layer in layers]  # type: ignore[misc]


def close(got: list[tuple[torch.Tensor, torch.Tensor]], want: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    pairs = [pair for layers in zip(got, want, strict=True) for pair in zip(*layers, strict=True)]
    return all(torch.allclose(mine, theirs, atol=1e-4, rtol=1e-4) for mine, theirs in pairs)


def full_prefill(world: World) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids, cache = torch.tensor(world.case.ids), world.hf.buffer(len(world.case.ids))
    world.hf.forward(ids[None], torch.arange(len(ids)), cache)
    return [(layer.keys[0, :, : world.end], layer.values[0, :, : world.end]) for layer in cache.layers]


@pytest.mark.parametrize("policy", ["query", "hkvd"])
def test_two_ranks_choose_and_compute_what_one_does(ranks: list[Outcome], hf: HFModel, policy: str) -> None:
    one = World(hf, policy=policy)
    result = one.run()
    want = (result.prefix_tokens, result.reused_tokens, result.recomputed_tokens, result.computed_tokens)
    assert [rank[policy]["counts"] for rank in ranks] == [want] * RANKS
    assert [rank[policy]["failure"] for rank in ranks] == [""] * RANKS
    assert ranks[0][policy]["chosen"] == ranks[1][policy]["chosen"]
    assert len(ranks[0][policy]["chosen"]) == result.recomputed_tokens
    alone = [one.model.read(one.sequence, layer, one.end) for layer in range(hf.layers)]
    assert close(joined(ranks, policy), alone)


@pytest.mark.parametrize(("name", "policy"), [("auto", "query"), ("auto, hkvd", "hkvd")])
def test_two_ranks_take_as_many_as_one_does(
    ranks: list[Outcome], hf: HFModel, name: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_rag.policies.AUTO_RULES", {policy: RULE})
    result = World(hf, policy=policy, ratio="auto").run()
    assert [(rank[name]["counts"][2], rank[name]["reason"]) for rank in ranks] == [
        (result.recomputed_tokens, "scores")
    ] * RANKS
    assert ranks[0][name]["chosen"] == ranks[1][name]["chosen"]
    assert len(ranks[0][name]["chosen"]) == result.recomputed_tokens


@pytest.mark.parametrize("policy", ["query", "hkvd"])
def test_alone_each_rank_would_choose_others(ranks: list[Outcome], hf: HFModel, policy: str) -> None:
    """So the sum over ranks is what makes them agree, and these tests would show its absence."""
    from lmcache_rag.policies import Layout

    layout = Layout.of(World(hf).case.spans, "cpu")

    class Own:
        def __init__(self, scores: torch.Tensor) -> None:
            self.scores = scores

        def suffix_attention(self, **how: Any) -> torch.Tensor:
            return self.scores

        deviation = suffix_attention

    own = []
    for rank in ranks:
        scores = rank[policy]["own scores"]
        scores = scores[layout.cached] if policy == "query" else scores[layout.cached - PREFIX]
        own.append(select(get_policy(policy), Budget(share=0.3), layout, Own(scores)).positions.tolist())  # type: ignore[arg-type]
    assert own[0] != own[1]
    assert ranks[0][policy]["chosen"] not in own


@pytest.mark.parametrize("name", ["dead", "late"])
def test_kv_missing_on_one_rank_is_computed_on_all(ranks: list[Outcome], hf: HFModel, name: str) -> None:
    one = World(hf)
    assert SCENARIOS[name]["fault"] == name
    assert [rank[name]["failure"] for rank in ranks] == [
        "load failed on another rank",
        "no server" if name == "dead" else "load failed",
    ]
    assert [rank[name]["counts"] for rank in ranks] == [(PREFIX, 0, 0, one.end - PREFIX)] * RANKS
    assert [rank[name]["chosen"] for rank in ranks] == [[]] * RANKS
    assert close(joined(ranks, name), full_prefill(one))


@pytest.mark.parametrize("name", ["damaged", "damaged, hkvd"])
def test_damage_on_one_rank_is_reported_by_all(ranks: list[Outcome], name: str) -> None:
    assert [rank[name]["failure"] for rank in ranks] == ["damaged KV"] * RANKS
    assert ranks[0][name]["bad"] == ranks[1][name]["bad"] != []
    assert ranks[0][name]["counts"] == ranks[1][name]["counts"]


def test_damage_on_one_rank_is_repaired_by_all_ranks(ranks: list[Outcome], hf: HFModel) -> None:
    assert [rank["repaired"]["failure"] for rank in ranks] == ["damaged KV"] * RANKS
    assert [rank["repaired"]["bad"] for rank in ranks] == [[]] * RANKS
    assert close(joined(ranks, "repaired"), full_prefill(World(hf)))


def test_in_the_background_two_ranks_equal_one(ranks: list[Outcome], hf: HFModel) -> None:
    one = World(hf)
    result = one.run()
    want = (result.prefix_tokens, result.reused_tokens, result.recomputed_tokens, result.computed_tokens)
    assert [rank["background"]["counts"] for rank in ranks] == [want] * RANKS
    assert close(joined(ranks, "background"), [one.model.read(one.sequence, i, one.end) for i in range(hf.layers)])


@pytest.mark.parametrize("name", ["background, late", "background, damaged"])
def test_a_ranks_background_miss_is_computed_on_all(ranks: list[Outcome], hf: HFModel, name: str) -> None:
    assert all(rank[name]["failure"] for rank in ranks)
    assert [rank[name]["bad"] for rank in ranks] == [[]] * RANKS
    assert close(joined(ranks, name), full_prefill(World(hf)))


@pytest.mark.parametrize("name", ["little memory", "little memory, late", "background, little memory"])
def test_little_memory_on_one_rank_makes_pieces_small(ranks: list[Outcome], hf: HFModel, name: str) -> None:
    why = ["load failed on another rank", "load failed"] if "late" in name else ["out of memory"] * RANKS
    assert [rank[name]["failure"] for rank in ranks] == why
    assert [rank[name]["passes"] for rank in ranks] == [ranks[0][name]["passes"]] * RANKS
    assert max(ranks[0][name]["passes"]) == SMALLEST
    assert [rank[name]["bad"] for rank in ranks] == [[]] * RANKS
    assert close(joined(ranks, name), full_prefill(World(hf)))


def test_a_check_larger_than_a_piece_is_voted_on_too(ranks: list[Outcome], hf: HFModel) -> None:
    """hkvd takes 40 tokens through half of the layers where a piece of 20 goes through all."""
    found = [rank["background, hkvd, memory for its pieces"] for rank in ranks]
    assert [one["failure"] for one in found] == ["out of memory"] * RANKS
    assert max(max(rank["hkvd"]["passes"]) for rank in ranks) > 30 >= max(max(one["passes"]) for one in found)
    assert close(joined(ranks, "background, hkvd, memory for its pieces"), full_prefill(World(hf)))


def test_no_memory_on_one_rank_is_reported_by_all(ranks: list[Outcome]) -> None:
    assert [rank["no memory"]["failure"] for rank in ranks] == ["out of memory"] * RANKS
    assert [rank["no memory"]["passes"] for rank in ranks] == [[]] * RANKS
    assert ranks[0]["no memory"]["bad"] == ranks[1]["no memory"]["bad"] != []


def test_a_rank_out_of_memory_in_a_pass_exits(ranks: list[Outcome]) -> None:
    """They are in the middle of the pass and it cannot join them again; vLLM ends all workers when one raises."""
    assert [rank["memory gone in a pass"] for rank in ranks] == ["out of memory"] * RANKS


def best(scores: list[float], spans: list[tuple[int, int]], count: int, reach: int) -> list[int]:
    """The positions with the highest scores, each the highest of `reach` neighbours on either side in its chunk."""
    places, pooled, first = [], [], 0
    for start, end in spans:
        own = scores[first : first + end - start]
        first += end - start
        places += range(start, end)
        pooled += [max(own[max(0, i - reach) : i + reach + 1]) for i in range(len(own))]
    return sorted(sorted(places, key=lambda place: (-pooled[places.index(place)], place))[:count])


@pytest.mark.parametrize("policy", ["query", "hkvd"])
def test_two_ranks_choose_the_highest_of_their_sums(ranks: list[Outcome], hf: HFModel, policy: str) -> None:
    summed = sum(rank[policy]["own scores"] for rank in ranks)
    spans = World(hf).case.spans
    first = 0 if policy == "query" else PREFIX
    scores = [float(summed[place - first]) for start, end in spans for place in range(start, end)]
    want = best(scores, spans, len(ranks[0][policy]["chosen"]), reach=2 if policy == "query" else 0)
    assert [rank[policy]["chosen"] for rank in ranks] == [want] * RANKS
