"""Times of a worker's steps, from which the scheduler learns what prefills and blends take."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from models import tiny_model
from worker_kit import World

from lmcache_rag.connector import job
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
