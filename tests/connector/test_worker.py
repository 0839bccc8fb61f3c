"""The worker side: whatever LMCache does, the request's KV is right or vLLM is told which blocks are not."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Any

import pytest
import torch
from blend_kit import PREFIX
from models import tiny_model
from paged_kit import drained
from worker_kit import BLOCK, World

from lmcache_rag.connector import blend_pass, job
from lmcache_rag.connector.admission import Allowance
from lmcache_rag.engines.hf_model import HFModel

NO_TIMES = {"load_ms": 0, "blend_ms": 0, "select_ms": 0}


@pytest.fixture(scope="module")
def hf(tokenizer: Any) -> HFModel:
    return HFModel.wrap(tiny_model("llama"), tokenizer)


def test_a_blend_says_what_it_did(hf: HFModel) -> None:
    world = World(hf)
    result = world.run()
    assert not result.failure
    assert result.recomputed_tokens == round(0.3 * 120)
    parts = (result.prefix_tokens, result.reused_tokens, result.recomputed_tokens, result.computed_tokens)
    assert parts == (PREFIX, 84, 36, 3 + 7 + 11)
    assert sum(parts) == world.end
    assert not world.is_full_prefill()
    assert world.worker.take_bad_blocks() == set()


def test_at_debug_level_a_rank_says_what_it_selected(hf: HFModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="lmcache_rag")
    for ratio, fault in ((0.3, ""), (0.3, ""), (0.2, ""), (0.3, "dead")):
        World(hf, fault, ratio=ratio).run()
    said = [record.getMessage() for record in caplog.records if record.levelname == "DEBUG"]
    assert said[0] == said[1]
    assert re.fullmatch("request r on rank 0: 36 tokens selected, digest [0-9a-f]{12}", said[0])
    assert said[0].split()[-1] != said[2].split()[-1]
    assert said[3] == "request r on rank 0: no server"


def test_ratio_one_is_a_full_prefill(hf: HFModel) -> None:
    world = World(hf, ratio=1.0)
    assert world.run().reused_tokens == 0
    assert world.is_full_prefill()


def test_a_blend_begun_before_the_step_ends_the_same(hf: HFModel) -> None:
    early, within = World(hf), World(hf)
    result = early.run(early=True)
    assert dataclasses.replace(result, **NO_TIMES) == dataclasses.replace(within.run(), **NO_TIMES)
    for got, want in zip(early.model.caches, within.model.caches, strict=True):
        torch.testing.assert_close(got, want, atol=0, rtol=0, equal_nan=True)  # blocks of nobody are NaN


@pytest.mark.parametrize("fault", ["", "dead"])
@pytest.mark.parametrize("early", [False, True])
def test_a_blends_passes_run_with_its_adapter(hf: HFModel, early: bool, fault: str) -> None:
    world, adapter = World(hf, fault), object()
    world.plan = dataclasses.replace(world.plan, adapter=adapter)
    forward, seen = world.model.forward, []

    def watched(*given: Any) -> Any:
        seen.append(world.model.adapter)
        return forward(*given)

    world.model.forward = watched  # type: ignore[method-assign]
    world.run(early=early)
    assert seen
    assert set(seen) == {adapter}
    assert world.model.adapter is None


def test_an_adapter_without_a_slot_waits(hf: HFModel) -> None:
    """The step's own adapters fill all slots: a blend in the background goes on when the step needs fewer, or none."""
    for idle in (False, True):
        world = World(hf)
        world.model.slots = False
        world.plan = dataclasses.replace(world.plan, adapter=object(), background=True)
        world.worker.run([world.plan], Allowance(4096, idle=False))
        assert not world.model.passes
        world.model.slots = not idle
        world.worker.run([], Allowance(4096, idle=idle))
        assert world.model.passes


@pytest.mark.parametrize("fault", ["dead", "late"])
@pytest.mark.parametrize("early", [False, True])
def test_without_the_kv_everything_is_computed(
    hf: HFModel, fault: str, early: bool, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(hf, fault)
    results = [world.run(early=early), world.run(early=early)]
    assert all(r.failure and r.reused_tokens == 0 and r.computed_tokens == world.end - PREFIX for r in results)
    assert world.is_full_prefill()
    assert (world.link.asked == []) == (fault == "dead")
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1


def test_an_unrequested_exact_prefix_is_returned(hf: HFModel) -> None:
    world = World(hf, "dead")
    world.plan = dataclasses.replace(world.plan, local=PREFIX - BLOCK)
    assert world.run().failure == "no server"
    assert world.link.asked == ["give back"]


def test_a_plan_that_failed_is_computed_in_full(hf: HFModel) -> None:
    """The scheduler claimed it, and then could not say what to place where."""
    world = World(hf)
    world.plan = dataclasses.replace(world.plan, matches=(), failure="request error")
    result = world.run()
    assert (result.failure, result.computed_tokens, world.link.asked) == ("request error", world.end - PREFIX, [])
    assert world.is_full_prefill()


def test_blocks_of_a_timed_out_load_are_reported(hf: HFModel) -> None:
    world = World(hf, "late")
    world.run()
    blocks = world.plan.block_ids[PREFIX // BLOCK :]
    assert world.worker.take_timed_out() == ({"r": blocks}, [])
    assert world.worker.receiving == {"r"}
    assert world.worker.take_timed_out() == ({}, [])
    world.link.fault = ""
    assert world.worker.take_timed_out() == ({}, ["r"])
    assert world.worker.receiving == set()
    other = World(hf)
    other.run()
    assert other.worker.take_timed_out() == ({}, [])


@pytest.mark.parametrize("policy", ["query", "hkvd", "head", "none"])
@pytest.mark.parametrize("fault", ["damaged key", "damaged value", "damaged last value"])
@pytest.mark.parametrize("early", [False, True])
def test_damaged_kv_is_reported(hf: HFModel, fault: str, policy: str, early: bool) -> None:
    world = World(hf, fault, policy)
    result = world.run(early=early)
    assert result.failure == "damaged KV"
    assert result.reused_tokens == 0
    bad = world.worker.take_bad_blocks()
    assert bad == set(range(2 + PREFIX // BLOCK, 2 + -(-world.end // BLOCK)))


@pytest.mark.parametrize("fault", ["damaged key", "damaged value", "damaged last value"])
def test_damage_is_repaired_where_vllm_would_fail(hf: HFModel, fault: str) -> None:
    world = World(hf, fault, vllm_recomputes_bad_blocks=False)
    assert world.run().failure == "damaged KV"
    assert world.is_full_prefill()
    assert world.worker.take_bad_blocks() == set()


@pytest.mark.parametrize("policy", ["query", "hkvd", "none"])
def test_soundness_is_read_before_recomputation_starts(
    hf: HFModel, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """Whoever waits for it need not wait for what takes most of the time."""
    world, done = World(hf, policy=policy), []
    forward, number = world.model.forward, job.AsyncScalar

    def noted(ids: Any, *given: Any) -> torch.Tensor:
        done.append(len(ids))
        return forward(ids, *given)

    monkeypatch.setattr(world.model, "forward", noted)
    monkeypatch.setattr(job, "AsyncScalar", lambda value: done.append("look") or number(value))
    assert not world.run().failure
    selection = {"query": 1, "hkvd": 1, "none": 0}[policy]
    assert done.index("look") == selection < len(done) - 1


def test_what_is_computed_anyway_is_not_looked_at(hf: HFModel) -> None:
    world = World(hf, "damaged value", ratio=1.0, vllm_recomputes_bad_blocks=False)
    assert not world.run().failure
    assert world.is_full_prefill()


@pytest.mark.parametrize("vllm_recomputes_bad_blocks", [True, False])
@pytest.mark.parametrize(
    ("policy", "ratio"), [("query", 1.0), ("query", 0.3), ("all", 0.3), ("none", 0.0), ("hkvd", 1.0)]
)
def test_damage_in_an_exact_prefix_is_always_found(
    hf: HFModel, policy: str, ratio: float, vllm_recomputes_bad_blocks: bool
) -> None:
    world = World(hf, policy=policy, ratio=ratio, vllm_recomputes_bad_blocks=vllm_recomputes_bad_blocks)
    world.plan = dataclasses.replace(world.plan, local=0)
    kept, place = [[part[2].clone() for part in pair] for pair in world.model.caches], world.link._place

    def damaged() -> None:
        place()
        for _, values in world.model.caches:
            values[2, 3, 0, 0] = float("nan")

    world.link._place = damaged
    assert world.run().failure == "damaged KV"
    if vllm_recomputes_bad_blocks:
        assert 2 in world.worker.take_bad_blocks()
    else:
        assert world.is_full_prefill()
        now = [part[2] for pair in world.model.caches for part in pair]
        torch.testing.assert_close(now, [part for pair in kept for part in pair], atol=1e-3, rtol=1e-3)


def test_out_of_memory_in_the_pass_means_computing(hf: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(hf)

    def out_of_memory(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(blend_pass.BlendPass, "select", out_of_memory)
    assert world.run().failure == "out of memory"
    assert world.is_full_prefill()


@pytest.mark.parametrize("place", ["select", "recompute"])
def test_any_fault_in_a_pass_means_computing(
    hf: HFModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    world = World(hf)

    def fault(*args: Any, **kwargs: Any) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(blend_pass.BlendPass, place, fault)
    assert world.run().failure == "other"
    assert world.is_full_prefill()
    assert "A blend failed; request r is computed in full" in caplog.text


def alone(world: World) -> World:
    """vLLM's step computes the request's last token and nothing else."""
    world.plan = dataclasses.replace(world.plan, alone=True)
    return world


@pytest.mark.parametrize("piece", [0, 20])
@pytest.mark.parametrize("policy", ["query", "hkvd", "none", "all"])
def test_a_lone_last_token_is_computed_with_the_blend(hf: HFModel, policy: str, piece: int) -> None:
    apart, along = World(hf, policy=policy, chunk_size=piece), alone(World(hf, policy=policy, chunk_size=piece))
    one, other = apart.run(), along.run()
    assert dataclasses.replace(one, **NO_TIMES) == dataclasses.replace(other, **NO_TIMES)
    assert apart.worker.take_hidden() is None
    last = torch.arange(apart.end, apart.end + 1)
    steps = blend_pass.BlendPass(apart.model, apart.sequence).compute(
        torch.tensor(apart.plan.token_ids), last, len(apart.plan.token_ids)
    )
    want = drained(steps)
    got = along.worker.take_hidden()
    assert got.shape == want.shape == (1, hf.model.config.hidden_size)
    assert torch.allclose(got, want, atol=1e-4, rtol=1e-4)
    assert along.worker.take_hidden() is None, "it is this step's"
    for layer in range(hf.layers):  # its KV too
        for mine, theirs in zip(
            along.model.read(along.sequence, layer, along.end + 1),
            apart.model.read(apart.sequence, layer, apart.end + 1),
            strict=True,
        ):
            assert torch.allclose(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fault", ["dead", "late"])
def test_vllm_computes_the_last_token_without_a_blend(hf: HFModel, fault: str) -> None:
    world = alone(World(hf, fault))
    assert world.run().failure
    assert world.worker.take_hidden() is None
    assert world.is_full_prefill()


def test_damaged_kv_is_never_answered_from(hf: HFModel) -> None:
    world = alone(World(hf, "damaged value", vllm_recomputes_bad_blocks=False))
    assert world.run().failure == "damaged KV"
    assert world.worker.take_hidden() is None
    assert world.is_full_prefill()
    reported = alone(World(hf, "damaged value"))
    assert reported.run().failure == "damaged KV"
    assert reported.worker.take_bad_blocks(), "vLLM computes these again, and drops what came of the step"


def test_the_last_token_needs_a_block(hf: HFModel) -> None:
    world = alone(World(hf))
    blocks = 9
    world.plan = dataclasses.replace(
        world.plan,
        token_ids=world.plan.token_ids[: blocks * BLOCK + 1],
        matches=world.plan.matches[:2],
        end=blocks * BLOCK,
        block_ids=world.plan.block_ids[:blocks],
    )
    assert not world.run().failure
    assert world.worker.take_hidden() is None


class Later:
    """A number that is not back from the GPU yet; as lmcache_rag.connector.attention.AsyncScalar."""

    reads = 0

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def read(self) -> float:
        Later.reads += 1
        return float(self.value)


def test_the_host_waits_after_vllm_prepared_its_step(hf: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "AsyncScalar", Later)
    monkeypatch.setattr(Later, "reads", 0)
    world = alone(World(hf, vllm_recomputes_bad_blocks=False))
    world.worker.run_now([world.plan])
    assert Later.reads == 0, "vLLM prepares its step while the GPU blends"
    assert world.worker.take_hidden() is None, "it is not known yet whether the KV was sound"
    world.worker.run([], Allowance())
    assert Later.reads == 1
    assert world.worker.take_hidden() is not None
    world.worker.finish()
    assert Later.reads == 1, "once is enough"
    (result,) = world.worker.take_results()
    assert not result.failure
    assert world.worker.take_bad_blocks() == set()


@pytest.mark.parametrize("fault", ["damaged key", "damaged value", "damaged last value"])
def test_damage_is_repaired_before_the_forward_pass(hf: HFModel, fault: str) -> None:
    world = alone(World(hf, fault, vllm_recomputes_bad_blocks=False))
    world.worker.run_now([world.plan])
    assert not world.is_full_prefill()
    world.worker.run([], Allowance())  # what vLLM calls right before its pass
    assert world.is_full_prefill()
    assert world.worker.take_hidden() is None
    world.worker.finish()
    (result,) = world.worker.take_results()
    assert result.failure == "damaged KV"
    assert world.worker.take_bad_blocks() == set()


def test_late_checked_damage_is_reported_all_the_same(hf: HFModel) -> None:
    world = World(hf, "damaged value", vllm_recomputes_bad_blocks=False)
    world.worker.run_now([world.plan])
    world.worker.finish()
    assert world.worker.take_bad_blocks() != set()


def forgetful(world: World, monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Memory for so many tokens in a pass; returns the sizes of those that went through."""
    real, fine = world.model.forward, []

    def forward(ids: Any, *given: Any) -> torch.Tensor:
        if len(ids) > most:
            raise torch.OutOfMemoryError
        fine.append(len(ids))
        return real(ids, *given)

    monkeypatch.setattr(world.model, "forward", forward)
    return fine


@pytest.mark.parametrize("vllm_recomputes_bad_blocks", [True, False])
@pytest.mark.parametrize("fault", ["", "late"])
def test_pieces_shrink_when_memory_runs_out_again(
    hf: HFModel, monkeypatch: pytest.MonkeyPatch, fault: str, vllm_recomputes_bad_blocks: bool
) -> None:
    monkeypatch.setattr(job, "SMALL", 80)
    world = alone(World(hf, fault, "none", vllm_recomputes_bad_blocks=vllm_recomputes_bad_blocks))
    sizes = forgetful(world, monkeypatch, 20)
    assert world.run().failure == ("load failed" if fault else "out of memory")
    assert set(sizes[:-1]) == {20}, "80 and 40 do not go through"
    assert world.is_full_prefill()
    assert world.worker.take_bad_blocks() == set()
    assert world.worker.take_hidden() is None


def test_where_there_is_no_memory_at_all_vllm_is_told(hf: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    world = alone(World(hf))
    forgetful(world, monkeypatch, 0)
    assert world.run().failure == "out of memory"
    assert world.worker.take_bad_blocks() == set(range(2 + PREFIX // BLOCK, 2 + -(-world.end // BLOCK)))
    assert world.worker.take_hidden() is None
    world = World(hf, vllm_recomputes_bad_blocks=False)
    forgetful(world, monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        world.run()


def test_a_failed_pass_is_forgotten_before_the_next(hf: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is being handled keeps what its pass had allocated; then there is no memory for another."""
    world = World(hf)
    kept: list[Any] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: kept.append(sys.exception()))
    forgetful(world, monkeypatch, 40)
    assert world.run().failure == "out of memory"
    assert set(kept) == {None}


def test_trouble_that_comes_again_is_told_again(hf: HFModel, caplog: pytest.LogCaptureFixture) -> None:
    world = World(hf)

    def warnings(fault: str, *, again: int = 1) -> int:
        caplog.clear()
        world.link.fault, world.link.is_healthy = fault, fault != "dead"
        for _ in range(again):
            world.run()
        return len(caplog.records)

    assert [warnings("dead", again=3), warnings(""), warnings("dead")] == [1, 0, 1]
    assert [warnings("damaged value"), warnings("damaged value"), warnings(""), warnings("damaged value")] == [
        1, 0, 0, 1,
    ]  # fmt: skip


def test_what_needs_no_server_does_not_end_its_outage(hf: HFModel, caplog: pytest.LogCaptureFixture) -> None:
    """Else requests by turns would fill the log."""
    world = World(hf, "dead")
    loads, nothing = world.plan, dataclasses.replace(world.plan, matches=(), end=PREFIX)
    for world.plan in (loads, nothing, loads):
        world.worker.run([world.plan], Allowance())
        world.worker.finish()
    failures = [result.failure for result in world.worker.take_results()]
    assert failures == ["no server", "", "no server"]
    assert len(caplog.records) == 1
