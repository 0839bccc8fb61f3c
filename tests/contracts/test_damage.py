"""Damage in KV that a request's own step uses, and vLLM's scheduler: when it takes back what came of it.

See test_scheduler.py.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import vllm_scheduler_kit as kit
    from vllm.v1.core.sched.scheduler import Scheduler

pytestmark = [pytest.mark.filterwarnings("ignore")]
GOOD, BAD = 7, 666


@pytest.fixture(autouse=True)
def unwrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests read vLLM's own method, which the connector wraps."""
    monkeypatch.setattr(Scheduler, "update_from_output", Scheduler.update_from_output)


def done(engine: Any, out: Any, token: int, *, damaged: bool = False) -> list[int]:
    """A step's outcome reaches the scheduler; what the request is answered by it."""
    names, plans = list(out.num_scheduled_tokens), out.kv_connector_metadata.blend_plans
    said = engine.worker.step(plans, set(out.finished_req_ids), 0)
    if damaged:
        (plan,) = plans
        said.invalid_block_ids = set(plan.block_ids[plan.local // kit.BLOCK : -(-plan.end // kit.BLOCK)])
    result = engine.scheduler.update_from_output(
        out,
        kit.ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[token] for _ in names],
            kv_connector_output=said,
        ),
    )
    return [token for outputs in result.values() for one in outputs.outputs for token in one.new_token_ids]


def test_a_blends_step_loads_before_its_forward_pass(make: Any) -> None:
    """There, behind vLLM's preparation, the worker side waits for the blend and repairs what is damaged."""
    engine = make()
    engine.add("a", 400, 4)
    out = engine.scheduler.schedule()
    assert [plan.background for plan in out.kv_connector_metadata.blend_plans] == [False]
    assert getattr(out, "has_sync_kv_loads", True)  # older ones always do
    done(engine, out, GOOD)
    engine.to_the_end()


def test_vllm_takes_back_reported_blocks_step_by_step(make: Any) -> None:
    engine = make()
    engine.add("a", 400, 4, outputs=2)
    assert done(engine, engine.scheduler.schedule(), BAD, damaged=True) == []
    out = engine.scheduler.schedule()
    assert out.num_scheduled_tokens == {"a": 400}, "all of it is computed"
    assert done(engine, out, GOOD) == [GOOD]
    engine.to_the_end()


def test_asynchronously_it_does_not(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why recomputes_reported_blocks is false there. The day this fails, vLLM takes back more than it did."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    real = kit.SchedulerConfig
    monkeypatch.setattr(kit, "SchedulerConfig", lambda **given: real(**(given | {"async_scheduling": True})))
    monkeypatch.setattr(kit, "Scheduler", AsyncScheduler)
    engine = make()
    engine.add("a", 400, 4, outputs=4)
    first = engine.scheduler.schedule()
    second = engine.scheduler.schedule()
    assert second.num_scheduled_tokens == {"a": 1}, "on blocks of which nobody knows yet whether they are damaged"
    assert done(engine, first, BAD, damaged=True) == []
    assert done(engine, second, BAD) == [BAD]
