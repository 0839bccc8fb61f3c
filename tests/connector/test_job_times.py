"""Times of a worker's steps, from which the scheduler learns what prefills and blends take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
from models import tiny_model
from worker_kit import World

from lmcache_rag.budget import Budget
from lmcache_rag.connector import job, metrics
from lmcache_rag.connector.admission import Allowance
from lmcache_rag.connector.job import StepTimer
from lmcache_rag.connector.metadata import BlendResult, StepShape
from lmcache_rag.engines.hf_model import HFModel

PREFILL, BLENDED = StepShape(400, 0), StepShape(1, 400, blended=True)


class Timer:
    """A timer whose GPU takes a while."""

    made: ClassVar[list[Timer]] = []

    def __init__(self) -> None:
        self.is_done, self.marks = False, list[str]()
        self.made.append(self)

    def __getattr__(self, name: str) -> Any:
        return lambda: self.marks.append(name)

    def read(self) -> tuple[float, float]:
        assert self.is_done, "it would wait for the GPU"
        return 0.0, 50.0


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[Timer]:
    monkeypatch.setattr(Timer, "made", [])
    monkeypatch.setattr(job, "CudaTimer", Timer)
    return Timer.made


@pytest.fixture(scope="module")
def hf() -> HFModel:
    return HFModel.wrap(tiny_model("llama"), None)


def step(timer: StepTimer, shape: StepShape | None, *blends: BlendResult) -> None:
    timer.begin(shape)
    timer.mark_end()
    timer.end(blends)


def test_a_step_is_read_when_the_gpu_is_done(timers: list[Timer]) -> None:
    timer = StepTimer()
    step(timer, PREFILL)
    assert timer.take() == [], "nothing waits for it"
    step(timer, PREFILL)
    timers[0].is_done = True
    assert [(each.shape, each.ms) for each in timer.take()] == [(PREFILL, 50.0)]
    timers[1].is_done = True
    assert len(timer.take()) == 1
    assert timer.take() == []
    assert timers[0].marks == ["loaded", "begin", "end"]


def test_other_steps_are_not_timed(timers: list[Timer]) -> None:
    timer = StepTimer()
    step(timer, None)
    timer.mark_end()
    timer.end([])
    assert timers == []
    assert timer.take() == []


def test_of_a_blended_step_the_blend_is_subtracted(timers: list[Timer]) -> None:
    timer = StepTimer()
    step(timer, BLENDED, BlendResult("a", 0, 300, 50, 49, 12.0, 30.0))
    step(timer, BLENDED, BlendResult("b", 0, 300, 50, 49, 40.0, 30.0))
    step(timer, BLENDED, BlendResult("c", 0, 0, 0, 399, 12.0, 30.0, "load failed"))
    for each in timers:
        each.is_done = True
    assert [each.ms for each in timer.take()] == [8.0, 0.0], "never below zero; what failed is left out"


@pytest.mark.parametrize("shape", [BLENDED, None])
def test_a_worker_reports_its_steps(hf: HFModel, shape: StepShape | None) -> None:
    world = World(hf)
    world.worker.begin_step(Allowance(timed=shape))
    world.run()
    assert [each.shape for each in world.worker.take_steps()] == [shape] * (shape is not None)
    assert world.worker.take_steps() == []
    world.worker.begin_step(None)


# -- the selection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "selects"), [("query", True), ("none", False)])
@pytest.mark.parametrize("pieces", [False, True])
def test_the_selection_is_a_part_of_the_blend(hf: HFModel, pieces: bool, policy: str, selects: bool) -> None:
    world = World(hf, "", policy, 0.3, chunk_size=20)
    world.plan = replace(world.plan, background=pieces)
    world.worker.run([world.plan], Allowance(20))
    world.worker.finish()
    while not (results := world.worker.take_results()):
        world.worker.run([], Allowance(20))
        world.worker.finish()
    (result,) = results
    assert not result.failure
    assert 0 < result.select_ms < result.blend_ms
    assert (result.recomputed_tokens > 0) == selects
    statistics = metrics.reuse_statistics(100, policy, Budget(), local=0, result=result)
    assert statistics["select_ms"] == pytest.approx(result.select_ms, abs=1e-3)


def test_parts_before_the_end_of_the_selection_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 2.0, 5.0, 7.0, 8.0, 12.0])
    monkeypatch.setattr(job.CudaTimer, "_mark", lambda self: next(now))
    timer = job.CudaTimer()
    timer.loaded()
    timer._cuda = False
    timer.begin()
    timer.end()  # 2 to 5
    timer.begin()
    timer.selected()  # 7 to 8
    timer.end()
    assert (timer.read_selection(), timer.read()) == (4000.0, (1000.0, 8000.0))


def test_a_job_that_fails_has_no_selection(hf: HFModel) -> None:
    world = World(hf, "late", "query", 0.3)
    world.worker.run([world.plan], Allowance(20))
    world.worker.finish()
    (result,) = world.worker.take_results()
    assert (bool(result.failure), result.select_ms) == (True, 0.0)
