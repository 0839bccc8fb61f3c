"""Look-ups of a long queue: few in flight, in order, and one deadline for all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from scheduler_kit import CHUNK, Once, Request

from lmcache_rag.connector import lookup, scheduler
from lmcache_rag.connector.lookup import IN_FLIGHT


def long_queue(once: Once, count: int, **more: Any) -> list[Request]:
    return [once.request(str(number), **more) for number in range(count)]


def asked_for(once: Once, queue: list[Request]) -> list[str]:
    """vLLM asks for every waiting request in a step: those that can run."""
    found = [request.request_id for request in queue if once.side.match(request, 0) is not None]
    once.side.build_plans({"runs": 1})
    return found


def test_a_queue_has_a_limit_of_lookups_in_flight() -> None:
    once = Once()
    once.side.build_plans({"runs": 1})
    queue = long_queue(once, 100, polls=1 << 30)
    for request in queue[:50]:
        once.side.start_early(request)
    short = Request("cannot hit", list(range(CHUNK)), None, (0, ()), 0, 0, num_tokens=CHUNK)
    for _ in range(5):
        assert asked_for(once, [*queue, short]) == ["cannot hit"]
    assert len(once.lookups) == IN_FLIGHT


def test_a_step_begins_few_look_ups_of_long_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "STEP_TOKENS", 250)
    once = Once()
    queue = long_queue(once, 9, polls=1 << 30)
    for request in queue:
        once.side.start_early(request)
    assert len(once.lookups) == 2
    for count in (2, 4, 6):
        asked_for(once, queue)
        assert len(once.lookups) == count
    huge = Request("huge", list(range(900)), None, (0, ()), 9, 0, num_tokens=900)
    asked_for(once, queue)
    asked_for(once, queue)
    asked_for(once, [huge])
    assert once.lookups[-1].request is huge, "whatever a step may begin, it begins one"


def test_a_queues_requests_are_looked_up_in_order() -> None:
    once = Once(overlap=False, step_tokens=1 << 20)
    once.side.build_plans({"runs": 1})
    queue = long_queue(once, 100, polls=2, cached=(0, ()))
    waiting, done = list(queue), []
    for number in range(60):
        for name in asked_for(once, waiting)[:8]:  # as many as there is room for
            request = next(one for one in waiting if one.request_id == name)
            once.side.on_allocated(request, list(range(13)), 0, None)
            waiting.remove(request)
            done.append(name)
        late = once.request(f"late {number}", polls=2)
        once.side.start_early(late)
        waiting.append(late)
    assert done[:100] == [request.request_id for request in queue]


def test_blocked_requests_do_not_block_other_lookups() -> None:
    once = Once()
    once.side.build_plans({"runs": 1})
    blocked = long_queue(once, IN_FLIGHT, polls=2)
    for request in blocked:
        once.side.start_early(request)  # and is not asked for: its grammar is being compiled
    other = once.request("other")
    for _ in range(6):
        if asked_for(once, [other]):
            break
    assert once.lookups[-1].request is other
    for request in blocked:
        assert once.side.match(request, 0) in (None, 99, 76)
    for _ in range(9):
        asked_for(once, blocked)
    for request in [other, *blocked]:
        once.finish(request)
    for _ in range(9):
        once.side.build_plans()
    assert not any(once.server.held.values())
    assert once.side.aborted_lookups == once.side.requests == 0


def test_a_queue_waits_one_deadline_for_silent_servers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    once, now = Once(), [1000.0]
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    once.side.build_plans({"runs": 1})
    queue = long_queue(once, 100, polls=1 << 30)
    assert asked_for(once, queue) == []
    now[0] += once.side.options.lookup_deadline + 0.1
    assert asked_for(once, queue) == [request.request_id for request in queue]
    for request in queue:
        stats = once.finish(request)
        assert stats is not None
        assert stats["failure"] == "look-up deadline"


def test_an_idle_step_waits_once_for_all_look_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    once, now, waits = Once(), [1000.0], []
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def poll(self: Any, seconds: float) -> bool:
        waits.append(seconds)
        now[0] += seconds
        return False

    queue = long_queue(once, 20)
    monkeypatch.setattr(type(once.look_up(queue[0])), "poll", poll)
    for _ in range(3):
        for request in queue:
            assert once.side.match(request, 0) is None
        assert sum(waits) <= once.side.options.poll + 1e-9
        waits.clear()
        once.side.build_plans()
