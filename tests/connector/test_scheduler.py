"""The scheduler side, one thing at a time. tests/invariants/test_schedules.py has everything at once."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
from scheduler_kit import CHUNK, Once, Pool, Request, chunk_hashes

from lmcache_rag.connector import scheduler
from lmcache_rag.connector.gpu_chunks import GpuChunks, ResidentChunks
from lmcache_rag.connector.lookup import LOCK_SECONDS
from lmcache_rag.connector.metadata import BlendResult
from lmcache_rag.protocol import MAX_OFFLOAD_TOKENS


def known(once: Once, tokens: list[int], hashes: list[str], prefix: int) -> None:
    """prefix + chunk was ingested."""
    assert once.side.gpu_chunks is not None
    own = chunk_hashes(hashes[-1], tokens[prefix:], 8)
    once.side.gpu_chunks.resident.remember(array("q", tokens), [*hashes, *own], prefix)


def test_a_claim_ends_with_the_last_match() -> None:
    once = Once()
    request = once.request()
    assert once.side.match(request, 8) == 76 - 8
    assert request.hidden == [40]
    assert once.side.store_limit("a") == 40
    assert once.side.stored(request) == 32
    request.kv_transfer_params = {"lmcache_rag.ingest": True}
    assert once.side.stored(request) == 0, "LMCache's index may not have it"
    request.kv_transfer_params = None
    once.side.on_allocated(request, list(range(13)), 68, {"lmcache.x": 1})
    ((plan,), _) = once.side.build_plans()
    assert (plan.local, plan.exact, plan.matches, plan.end) == (8, 32, Once.MATCHES, 76)
    assert (plan.block_ids, plan.policy, plan.configs) == (tuple(range(13)), "query", {"lmcache.x": 1})
    assert once.server.held["a"] == {0, 1}, "the worker loads both chunks, since vLLM holds half of the first one only"
    once.server.give_back("a", 0, 32)
    once.side.on_results([BlendResult("a", 32, 24, 8, 12, 1.5, 2.5)])
    stats = once.finish(request)
    assert stats is not None
    assert [stats[f"{n}_tokens"] for n in ("prefix", "reused", "recomputed", "computed")] == [32, 24, 8, 36]
    assert (stats["blended"], stats["blocks_hit"], stats["load_ms"], stats["blend_ms"]) == (True, 2, 1.5, 2.5)


@pytest.mark.parametrize("when", ["look-up under way", "claimed", "planned", "over"])
def test_a_request_may_go_away_at_any_time(when: str) -> None:
    once = Once()
    request = once.request(polls=5 if when == "look-up under way" else 0)
    more = once.side.match(request, 0)
    if when == "planned":
        once.side.on_allocated(request, list(range(13)), more or 0, None)
    elif when == "over":
        once.side.on_allocated(request, list(range(13)), 0, None)
    stats = once.finish(request)
    assert stats is not None
    assert not stats["blended"]
    steps = 0
    while once.side.aborted_lookups:
        assert once.side.build_plans()[0] == []
        steps += 1
    assert steps == (4 if when == "look-up under way" else 0)
    assert not once.server.held["a"]
    assert once.side.requests == 0
    assert once.side.build_plans()[0] == [], "a plan of a request that is gone"


@pytest.mark.parametrize("polls", [2, 3])
def test_a_late_answer_of_an_aborted_lookup_unlocks(polls: int) -> None:
    once = Once()
    request = once.request(polls=polls)
    assert once.side.match(request, 0) is None
    assert once.finish(request) is not None
    assert once.server.held["a"] == ({0, 1} if polls == 2 else set()), "taken, and the scheduler does not know yet"
    assert "a" not in once.server.ended, "with its session the server would forget what it has locked"
    assert once.side.keeps_session("a")
    assert once.side.has_recent_aborts, "an engine without requests would never hear it"
    for _ in range(polls - 1):
        once.side.build_plans()
    assert not once.server.held["a"]
    assert "a" in once.server.ended
    assert not once.side.keeps_session("a")
    assert not once.side.has_recent_aborts


def test_an_engine_does_not_wait_forever_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    once = Once()
    now = [1000.0]
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    once.server.answers = False
    request = once.request()
    assert once.side.match(request, 0) is None
    once.finish(request)
    assert once.side.has_recent_aborts
    now[0] += once.side.options.lookup_deadline + 0.1
    once.side.build_plans()
    assert not once.side.has_recent_aborts
    assert once.side.aborted_lookups == 1, "it is heard when there is a step anyway"
    now[0] += LOCK_SECONDS
    once.side.build_plans()
    assert once.side.aborted_lookups == 0
    assert once.lookups[0].closed, "its session is ended all the same"


def test_a_preempted_request_is_not_blended_again() -> None:
    once = Once()
    request = once.request()
    once.side.on_allocated(request, list(range(13)), once.side.match(request, 0) or 0, None)
    once.server.give_back("a", 0, 32)
    assert len(once.side.build_plans()[0]) == 1
    once.side.on_results([BlendResult("a", 32, 24, 8, 12, 1.0, 1.0)])
    request.num_tokens = 103
    assert once.side.match(request, 96) == 0, "it goes on from its own blocks"
    once.side.on_allocated(request, list(range(13)), 0, None)
    assert once.side.build_plans()[0] == []
    assert once.side.store_limit("a") == 40, "its KV is as approximate as before"
    stats = once.finish(request)
    assert stats is not None
    assert (stats["prefix_tokens"], stats["reused_tokens"], stats["blocks_hit"]) == (32, 24, 2)


@pytest.mark.parametrize(
    ("scheduled", "tail", "alone"),
    [
        ({"a": 1}, 100, True),
        ({"a": 24}, 0, False),  # the rest of the prompt is vLLM's
        ({"a": 1}, 0, False),  # a piece of a rest that does not fit the step
        ({"a": 1, "b": 1}, 100, False),
        ({}, 100, False),
    ],
    ids=str,
)
def test_a_plan_says_whether_vllm_computes_one_token(scheduled: dict[str, int], tail: int, alone: bool) -> None:
    once = Once(tail_tokens=tail)
    request = once.request("a")
    more = once.side.match(request, 0)
    assert more == (99 if tail else 76)
    once.side.on_allocated(request, list(range(13)), more, None)
    ((plan,), _) = once.side.build_plans(scheduled)
    assert plan.alone == alone


def test_on_a_busy_engine_a_request_is_blended_async() -> None:
    once = Once()
    first, second = once.request("a"), once.request("b")
    exact, nothing = once.request("c", cached=(32, ())), once.request("d", cached=(0, ()))
    assert once.side.match(first, 0) == 76
    assert not once.side.in_background("a")
    assert once.side.match(second, 0) == 99, "it waits without blocks for the rest, so all of it is claimed"
    assert once.side.in_background("b")
    assert once.side.match(exact, 0) == 32
    assert once.side.in_background("c")
    assert once.side.match(nothing, 0) == 0
    once.side.on_allocated(first, list(range(13)), 76, None)
    once.side.on_allocated(second, list(range(13)), 99, None)
    plans, _ = once.side.build_plans({"a": 24})
    assert [(plan.request_id, plan.background, plan.end) for plan in plans] == [("a", False, 76), ("b", True, 99)]
    once.side.finish(second)
    assert once.side.budget.background, "the worker is still at it, and vLLM waits for its word"
    once.side.on_results([BlendResult("b", 32, 24, 8, 12, 1.0, 1.0)])
    assert not once.side.budget.background


def test_a_background_plan_outlives_its_request() -> None:
    """vLLM frees the blocks of an asynchronous load only when a worker reports that it is done."""
    once = Once()
    once.side.build_plans({"runs": 1})
    request = once.request()
    once.side.on_allocated(request, list(range(13)), once.side.match(request, 32) or 0, None)
    assert once.side.in_background("a")
    once.finish(request)  # before the plan was sent: what makes a step's metadata may have raised
    ((plan,), _) = once.side.build_plans({"runs": 1})
    assert (plan.request_id, plan.background) == ("a", True)
    once.side.on_results([BlendResult("a", 32, 24, 8, 12, 1.0, 1.0)])
    assert not once.side.budget.background


def test_a_request_that_is_not_blended_does_not_wait() -> None:
    once = Once()
    once.side.build_plans({"runs": 1})
    for number in range(once.side.budget.max_background):
        request = once.request(str(number))
        once.side.on_allocated(request, list(range(13)), once.side.match(request, 0) or 0, None)
    assert once.side.budget.full
    blends, plain = once.request("blends"), once.request("plain")
    plain.kv_transfer_params = {"lmcache_rag.blend": False}
    assert once.side.match(blends, 32) is None
    assert once.side.match(plain, 32) == 0, "vLLM holds its exact prefix: there is nothing to load"


def test_without_overlap_full_steps_defer_only_blends() -> None:
    once = Once(overlap=False, step_tokens=50)
    blends, waits = once.request("a"), once.request("b")
    exact, nothing = once.request("c", cached=(32, ())), once.request("d", cached=(0, ()))
    for request in (blends, waits):
        request.kv_transfer_params = {"lmcache_rag.ratio": 1.0}
    assert once.side.match(blends, 0) == 76
    assert once.side.match(waits, 0) is None, "44 tokens behind the prefix, and as many of it"
    assert once.side.match(exact, 0) == 32
    assert once.side.match(nothing, 0) == 0
    assert not any(once.side.in_background(name) for name in "abcd")
    once.side.build_plans()
    assert once.side.match(waits, 0) == 76


def test_a_short_exact_prefix_is_computed_not_loaded() -> None:
    once = Once(least_tokens=33)
    request = once.request(cached=(32, ()))
    assert once.side.match(request, 0) == 0
    once.side.on_allocated(request, list(range(13)), 0, None)
    assert not once.server.held["a"], "its locks are given back"
    assert once.side.build_plans()[0] == []
    stats = once.finish(request)
    assert stats is not None
    assert (stats["prefix_tokens"], stats["computed_tokens"]) == (0, 100)


def test_a_new_request_is_looked_up_before_scheduling() -> None:
    once = Once()
    request = once.request(polls=1)
    once.side.start_early(request)
    assert len(once.lookups) == 1
    assert once.side.match(request, 0) is None
    assert once.side.match(request, 0) == 76
    assert len(once.lookups) == 1
    many = [once.request(str(number)) for number in range(40)]
    for one in many:
        once.side.start_early(one)
    assert len(once.lookups) == 32, "locks of a long queue would end by themselves"
    for one in [request, *many]:
        once.finish(one)
    assert once.side.requests == 0
    assert not any(once.server.held.values())


@pytest.mark.parametrize("failure", ["load failed", "load failed on another rank", "out of memory", ""])
def test_waiting_in_a_failed_load_costs_one_deadline(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    once = Once()
    now = [1000.0]
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    first, second = once.request("a"), once.request("b")
    more = once.side.match(first, 0)
    assert more
    once.side.on_allocated(first, list(range(13)), more, None)
    once.side.build_plans({"a": 24})
    once.server.answers = False
    once.side.start_early(second)
    now[0] += once.side.options.lookup_deadline + 0.1  # the step of the first waits for its load, and vLLM with it
    once.side.on_results([BlendResult("a", 0, 0, 0, 76, 5000.0, 1.0, failure)])
    assert once.side.match(second, 0) == (0 if failure.startswith("load") else None)
    stats = once.finish(second)
    assert stats is not None
    assert stats["failure"] == ("look-up deadline" if failure.startswith("load") else "")


def test_a_lookup_is_waited_for_until_its_deadline(caplog: pytest.LogCaptureFixture) -> None:
    once = Once(lookup_deadline=0.0)
    request = once.request(polls=3)
    assert once.side.match(request, 0) == 0
    assert "did not answer for" in caplog.text
    stats = once.finish(request)
    assert stats is not None
    assert stats["failure"] == "look-up deadline"
    while once.side.aborted_lookups:
        once.side.build_plans()
    assert once.lookups[0].closed
    assert not once.server.held["a"]


def test_without_a_server_everything_is_computed() -> None:
    once = Once()
    once.side.client = SimpleNamespace(look_up=lambda request: None)
    request = once.request()
    assert once.side.match(request, 16) == 0
    once.side.on_allocated(request, list(range(13)), 0, None)
    stats = once.finish(request)
    assert stats is not None
    assert (stats["failure"], stats["prefix_tokens"], stats["computed_tokens"]) == ("no server", 16, 84)


def test_what_is_short_or_not_text_is_not_looked_up() -> None:
    once = Once()
    short = Request("s", list(range(CHUNK)), None, (0, ()), 0, 0, num_tokens=CHUNK)
    picture = once.request("p")
    picture.mm_features = ["a picture"]  # type: ignore[attr-defined]
    embedded = once.request("e")
    embedded.prompt_embeds = "numbers"  # type: ignore[attr-defined]
    once.side.unsupported = None
    for request, failure in ((short, ""), (picture, "not text"), (embedded, "not text")):
        request.kv_transfer_params = None
        once.side.on_new_request(request)
        assert once.side.match(request, 0) == 0
        stats = once.finish(request)
        assert stats is not None
        assert stats["failure"] == failure
        assert (request.kv_transfer_params == {MAX_OFFLOAD_TOKENS: 0}) == bool(failure)
    assert once.lookups == []


def test_each_outage_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    once, there = Once(), [False, False, True, False]
    once.side.client = SimpleNamespace(look_up=lambda request: once.look_up(request) if there.pop(0) else None)
    for name in "abcd":
        request = once.request(name)
        assert (once.side.match(request, 0) > 0) == (name == "c")
        once.finish(request)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert caplog.text.count("LMCache does not answer") == 2


def test_an_answer_to_an_earlier_lookup_ends_no_outage(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    once, now = Once(), [1000.0]
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def not_answered(name: str) -> None:
        request = once.request(name, polls=1 << 30)
        assert once.side.match(request, 0) is None
        now[0] += once.side.options.lookup_deadline + 0.1
        assert once.side.match(request, 0) == 0
        once.finish(request)

    early = once.request("early", polls=1)
    once.side.start_early(early)  # before the server stopped
    now[0] += 1.0
    not_answered("first")
    assert once.side.match(early, 0) is None
    assert once.side.match(early, 0) == 76
    not_answered("second")
    assert caplog.text.count("did not answer for") == 1, "the outage had not ended"
    now[0] += 1.0
    assert once.side.match(once.request("new"), 0)
    not_answered("third")
    assert caplog.text.count("did not answer for") == 2


def test_wrong_wishes_are_warned_of_and_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    once = Once()
    request = once.request()
    request.kv_transfer_params = {"lmcache_rag.ratio": 7, "lmcache_rag.policy": "head"}
    assert once.side.match(request, 0) == 76
    assert "lmcache_rag.ratio 7" in caplog.text
    once.side.on_allocated(request, list(range(13)), 76, None)
    ((plan,), _) = once.side.build_plans()
    assert (plan.policy, str(plan.budget)) == ("head", "auto")


def test_an_invalid_parameter_keeps_the_servers_choice() -> None:
    for blend in (True, False):
        once = Once(blend=blend)
        request = once.request()
        request.kv_transfer_params = {"lmcache_rag.blend": "perhaps"}
        assert once.side.match(request, 0) == (76 if blend else 32)


def test_blending_off_by_default_still_allows_requests() -> None:
    once = Once(blend=False)
    plain, asks = once.request("a"), once.request("b")
    asks.kv_transfer_params = {"lmcache_rag.blend": "on"}
    assert once.side.match(plain, 0) == 32
    assert plain.hidden == []
    assert once.side.store_limit("a") is None
    once.side.build_plans()
    assert once.side.match(asks, 0) == 76


def test_a_blend_claims_a_short_rest_of_the_prompt() -> None:
    once = Once(tail_tokens=23)
    request = once.request()
    assert once.side.match(request, 0) == 99, "all but the last token"
    once.side.on_allocated(request, list(range(13)), 99, None)
    ((plan,), _) = once.side.build_plans()
    assert (plan.matches, plan.end) == (Once.MATCHES, 99)
    assert Once(tail_tokens=22).side.match(once.request("b"), 0) == 76


def test_chunks_evicted_while_waiting_are_looked_up() -> None:
    once, pool = Once(), Pool()
    once.side.gpu_chunks = GpuChunks(ResidentChunks(pool, 8))
    request = once.request(polls=2)
    request.kv_transfer_params = {"lmcache_rag.chunks": [[32, 56]]}
    request.block_hashes = ["a", "b", "c", "d"]
    pool.file("d", request.prompt_token_ids[32:56], 8)
    known(once, request.prompt_token_ids[:56], ["a", "b", "c", "d"], 32)
    assert once.side.match(request, 32) == 24
    assert once.lookups == [], "all of it is there"
    assert [block.users for block in pool.filed.values()] == [1, 1, 1]
    assert once.side.build_plans()[0] == []  # no blocks were free
    pool.evict()
    assert pool.filed == {}, "what is not allocated is not kept"
    assert once.side.match(request, 32) is None, "LMCache is asked and waited for"
    assert once.side.match(request, 32) is None
    assert once.side.match(request, 32) == 76 - 32
    assert once.finish(request) is not None
    assert not once.server.held["a"]


def test_resident_chunks_are_kept_until_copied() -> None:
    once, pool = Once(), Pool()
    once.side.gpu_chunks = GpuChunks(ResidentChunks(pool, 8))
    request = once.request()
    request.kv_transfer_params = {"lmcache_rag.chunks": [[32, 56]]}
    request.block_hashes = ["a", "b", "c", "d"]
    pool.file("d", request.prompt_token_ids[32:56], 8)
    known(once, request.prompt_token_ids[:56], ["a", "b", "c", "d"], 32)
    once.side.on_allocated(request, list(range(13)), once.side.match(request, 32) or 0, None)
    ((plan,), _) = once.side.build_plans()
    assert [match.block for match in plan.matches] == [block.block_id for block in pool.filed.values()]
    assert [block.users for block in pool.filed.values()] == [1, 1, 1]
    once.side.on_results([BlendResult("a", 32, 24, 0, 0, 1.0, 1.0)])
    assert [block.users for block in pool.filed.values()] == [0, 0, 0]


def test_a_second_claim_that_begins_earlier_hides_more() -> None:
    once = Once()
    request = once.request()
    for local, hidden in ((48, [60]), (0, [60, 40]), (48, [60, 40])):
        assert once.side.match(request, local) == 76 - local
        assert request.hidden == hidden
        assert once.side.store_limit("a") == min(hidden)
        once.side.build_plans()
