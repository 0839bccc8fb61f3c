"""The worker side in the background: pieces beside other steps, and the same KV in the end as within one step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from blend_kit import PREFIX
from models import tiny_model
from worker_kit import BLOCK, World

from lmcache_rag.connector import job, metrics
from lmcache_rag.connector.admission import Allowance
from lmcache_rag.connector.job import NULL_BLOCK, Throttle
from lmcache_rag.connector.metadata import BlendResult
from lmcache_rag.engines.hf_model import HFModel

BUSY, IDLE = Allowance(20), Allowance(200, idle=True)


@pytest.fixture(scope="module")
def hf(tokenizer: Any) -> HFModel:
    return HFModel.wrap(tiny_model("llama"), tokenizer)


class Background(World):
    """As the world, with the request's plan in the background."""

    def __init__(self, hf: HFModel, fault: str = "", policy: str = "query", ratio: float = 0.3, **options: Any) -> None:
        super().__init__(hf, fault, policy, ratio, chunk_size=options.pop("chunk_size", 20), **options)
        self.plan = replace(self.plan, background=True)
        self.coming = False  # its KV is still under way
        self.link.deadline = 0.0 if fault == "late" else 60.0  # type: ignore[misc]
        self.link.there = lambda future: not self.coming and fault != "late"  # type: ignore[method-assign]
        self.link.answered = lambda future, seconds: not self.coming and fault != "late"  # type: ignore[method-assign]

    def step(self, allowance: Allowance = BUSY, *, begins: bool = False) -> int:
        """A step; returns how many tokens were computed in it."""
        before = len(self.model.passes)
        self.worker.run([self.plan] if begins else [], allowance)
        self.worker.finish()
        return sum(self.model.passes[before:])

    def to_the_end(self, allowance: Allowance = BUSY) -> tuple[BlendResult, list[int]]:
        steps = [self.step(allowance, begins=True)]
        while not (received := self.worker.take_received()):
            assert self.worker.receiving == {"r"}
            assert self.worker.take_results() == []
            steps.append(self.step(allowance))
            assert len(steps) < 100
        assert received == {"r"}
        assert self.worker.receiving == ({"r"} if self.link.fault == "late" else set()), "it may still be written to"
        assert self.worker.take_bad_blocks() == set()
        (result,) = self.worker.take_results()
        assert not result.failure or result.failure in metrics.REASONS
        return result, steps


@pytest.mark.parametrize("policy", ["query", "hkvd", "head", "none", "all"])
def test_pieces_come_to_what_one_step_does(hf: HFModel, policy: str) -> None:
    at_once, pieces = World(hf, policy=policy), Background(hf, policy=policy)
    want, (got, steps) = at_once.run(), pieces.to_the_end()
    times = {"load_ms": 0, "blend_ms": 0, "select_ms": 0}
    assert replace(got, **times) == replace(want, **times)
    assert len([tokens for tokens in steps if tokens]) > 1
    for layer in range(hf.layers):
        for mine, theirs in zip(
            pieces.model.read(pieces.sequence, layer, pieces.end),
            at_once.model.read(at_once.sequence, layer, at_once.end),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_ratio_one_is_a_full_prefill(hf: HFModel) -> None:
    world = Background(hf, ratio=1.0)
    result, steps = world.to_the_end()
    assert result.reused_tokens == 0
    assert world.is_full_prefill()
    assert max(steps) <= 20, "others wait for no more than they were told"


def test_the_check_of_hkvd_is_cut_into_pieces_too(hf: HFModel) -> None:
    world = Background(hf, policy="hkvd")
    _, steps = world.to_the_end()
    # Its check runs half of the model's four layers: 40 tokens take as long as 20 through all of them.
    assert max(steps) <= 40, "others wait for no more than they were told"
    assert steps.count(40) == 3, "130 tokens are checked"


@pytest.mark.parametrize("policy", ["all", "hkvd", "query", "none"])
def test_a_step_takes_no_more_than_it_may(hf: HFModel, policy: str) -> None:
    """Several blends, whose last pieces leave room for a part of the next one's."""
    world, allowance = Background(hf, policy=policy, ratio=0.5, chunk_size=100), Allowance(100)
    names = ["r", "s", "t"]
    plans = [replace(world.plan, request_id=name, policy=policy) for name in names]
    steps: list[int] = []
    received: set[str] = set()
    while received != set(names):
        before = len(world.model.passes)
        world.worker.run(plans if not steps else [], allowance)
        world.worker.finish()
        sizes = world.model.passes[before:]
        if policy == "hkvd":  # its check runs half of the layers
            sizes = [size // 2 if size > 100 else size for size in sizes]
        steps.append(sum(sizes))
        received |= world.worker.take_received()
        assert len(steps) < 30
    assert max(steps) <= 100
    assert {result.failure for result in world.worker.take_results()} == {""}
    if policy == "all":
        assert steps == [100, 41, 100, 41, 100, 41], "a pass over less than 64 tokens would take as long as one of 64"


def test_a_step_with_nothing_else_to_do_takes_more(hf: HFModel) -> None:
    _, busy = Background(hf).to_the_end(BUSY)
    _, idle = Background(hf).to_the_end(IDLE)
    assert len(idle) < len(busy)


def test_nothing_waits_for_kv_that_is_under_way(hf: HFModel) -> None:
    world = Background(hf)
    world.coming = True
    assert [world.step(begins=True), world.step(), world.step(IDLE)] == [0, 0, 0]
    assert world.link.asked == ["matches"], "it was asked for at once"
    world.coming = False
    assert world.step() > 0


def test_a_loaded_job_waits_for_no_unloaded_one(hf: HFModel) -> None:
    world = Background(hf)
    real, futures = world.link.submit_matches, iter(("slow", "fast"))
    world.link.submit_matches = lambda *asked: (real(*asked), next(futures))[1]  # type: ignore[method-assign]
    world.link.there = lambda future: future == "fast"  # type: ignore[method-assign]
    second = replace(world.plan, request_id="s")
    world.worker.run([world.plan, second], Allowance(1000))
    world.worker.finish()
    assert world.worker.take_received() == {"s"}
    assert world.worker.receiving == {"r"}


@pytest.mark.parametrize("fault", ["dead", "late"])
def test_without_the_kv_everything_is_computed(hf: HFModel, fault: str) -> None:
    world = Background(hf, fault)
    result, _ = world.to_the_end()
    assert (result.reused_tokens, result.computed_tokens) == (0, world.end - PREFIX)
    assert result.failure == ("no server" if fault == "dead" else "load failed")
    assert world.is_full_prefill()


@pytest.mark.parametrize("policy", ["query", "hkvd", "none"])
@pytest.mark.parametrize("fault", ["damaged key", "damaged value", "damaged last value"])
def test_damage_is_repaired_before_blocks_are_reported(hf: HFModel, fault: str, policy: str) -> None:
    world = Background(hf, fault, policy)
    result, steps = world.to_the_end()
    assert result.failure == "damaged KV"
    assert world.is_full_prefill()
    assert max(steps) <= 120 + 20, "at most a selection and a piece"


def test_out_of_memory_in_a_piece_means_computing(hf: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    world = Background(hf)
    real, calls = world.model.forward, iter(range(1000))

    def forward(*given: Any) -> torch.Tensor:
        if next(calls) == 2:
            raise torch.OutOfMemoryError
        return real(*given)

    monkeypatch.setattr(world.model, "forward", forward)
    result, _ = world.to_the_end()
    assert result.failure == "out of memory"
    assert world.is_full_prefill()


@pytest.mark.parametrize("begun", [False, True])
def test_an_aborted_request_keeps_blocks_until_loaded(hf: HFModel, begun: bool) -> None:
    world = Background(hf)
    world.coming = not begun
    world.step(begins=True)
    world.worker.cancel({"r", "another"})
    if not begun:
        assert world.step() == 0
        assert world.worker.receiving == {"r"}, "the KV is still being written"
        world.coming = False
    assert world.step() == 0
    assert world.worker.take_received() == {"r"}
    assert [result.request_id for result in world.worker.take_results()] == ["r"], "what is pinned is let go"


def test_damage_of_an_ended_request_is_not_repaired(hf: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.CudaTimer, "is_done", False)
    world = Background(hf, "damaged key")
    world.step(Allowance(1000), begins=True)
    assert world.worker.receiving == {"r"}, "all of its work is queued, and nothing was looked at"
    world.worker.cancel({"r"})
    assert world.step(IDLE) == 0
    assert (world.worker.take_received(), world.worker.receiving) == ({"r"}, set())


def test_the_last_token_looks_though_it_has_no_block(hf: HFModel) -> None:
    """Blocks are there for what is claimed: all but the last token."""
    world = Background(hf)
    blocks = 9
    plan = replace(
        world.plan,
        token_ids=world.plan.token_ids[: blocks * BLOCK + 1],
        matches=world.plan.matches[:2],
        end=blocks * BLOCK,
        block_ids=world.plan.block_ids[:blocks],
    )
    looked: list[tuple[int, int]] = []
    real = world.model.forward

    def forward(ids: Any, positions: Any, slots: Any, attention: Any) -> torch.Tensor:
        looked.extend(zip(positions.tolist(), slots.tolist(), strict=True))
        return real(ids, positions, slots, attention)

    world.model.forward = forward  # type: ignore[method-assign]
    world.plan = plan
    result, _ = world.to_the_end(IDLE)
    assert not result.failure
    assert (plan.end, NULL_BLOCK * BLOCK) in looked
    assert all(slot >= BLOCK for position, slot in looked if position < plan.end)


def test_no_step_waits_for_the_gpu_unless_idle(hf: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.CudaTimer, "is_done", False)
    world = Background(hf)
    world.step(Allowance(1000), begins=True)
    world.step(BUSY)
    assert (world.worker.take_received(), world.worker.receiving) == (set(), {"r"})
    world.step(IDLE)
    assert (world.worker.take_received(), world.worker.receiving) == ({"r"}, set())

    world = Background(hf)
    world.step(Allowance(1000), begins=True)
    monkeypatch.setattr(job.CudaTimer, "is_done", True)
    world.step(BUSY)
    assert world.worker.take_received() == {"r"}


def test_loads_are_submitted_before_a_blend_begins(hf: HFModel) -> None:
    world = Background(hf)
    asked_when: list[int] = []
    real = world.link.submit_matches

    def submit(*asked: Any) -> str:
        asked_when.append(len(world.model.passes))
        return real(*asked)

    world.link.submit_matches = submit  # type: ignore[method-assign]
    world.worker.run([world.plan, replace(world.plan, request_id="now", background=False)], Allowance())
    assert asked_when == [0, 0]
    world.worker.finish()
    assert [result.request_id for result in world.worker.take_results()] == ["now"]
    assert world.worker.receiving == {"r"}


def test_the_host_is_one_piece_ahead_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []

    class Event:
        made = 0

        def __init__(self) -> None:
            Event.made += 1
            self.number = Event.made

        def record(self) -> None:
            """Queued."""

        def synchronize(self) -> None:
            waited.append(self.number)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    throttle = Throttle()
    for _ in range(4):
        throttle.before()
        throttle.after()
    assert waited == [1, 2]
