"""The scheduler of vLLM with the scheduler side of our connector, through blends beside others, aborts and preemption.

See vllm_scheduler_kit for what is real, and test_internals.py.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import warnings
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from contract_kit import BLOCK, CHUNK

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from vllm.sampling_params import SamplingParams
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request
    from vllm_scheduler_kit import BLOCKS

    from lmcache_rag.connector.lmcache_client import from_lmcache, to_lmcache
    from lmcache_rag.connector.metadata import BlendPlan, BlendWorkerMetadata, Match
    from lmcache_rag.protocol import CannotBlend, Unsupported

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("told", [CHUNK, 2 * CHUNK])
def test_a_chunk_size_unlike_lmcaches_is_warned_of(make: Any, caplog: pytest.LogCaptureFixture, told: int) -> None:
    make(chunk_size=told)
    assert ("set lmcache_rag.chunk_size to LMCache's" in caplog.text) == (told != CHUNK)


def test_alone_a_request_is_blended_within_its_step(make: Any) -> None:
    engine = make()
    engine.add("a", 400, 4)
    out = engine.step()
    assert out.num_scheduled_tokens == {"a": 1}
    assert engine.beside["a"] == 0
    engine.to_the_end()
    told = engine.told["a"]
    assert (told["reused_tokens"], told["recomputed_tokens"]) == (224, 32)
    assert told["self_check"] == "passed"
    counts = [told[f"{kind}_tokens"] for kind in ("prefix", "reused", "recomputed", "computed")]
    assert sum(counts) == told["prompt_tokens"] == 400


@pytest.mark.parametrize(("tail", "alone"), [(64, True), (0, False)])
def test_a_plan_knows_whether_vllm_computes_one_token(make: Any, tail: int, alone: bool) -> None:
    engine = make(tail_tokens=tail)
    engine.add("a", 64 + 8 + 4 * (CHUNK + 8), 4, exact=64)
    out = engine.step()
    (plan,) = out.kv_connector_metadata.blend_plans
    assert plan.alone == alone == (out.num_scheduled_tokens == {"a": 1})
    engine.to_the_end()


def test_a_background_blend_lets_others_go_on(make: Any) -> None:
    engine = make()
    engine.add("runs", 100, 0, outputs=12)
    engine.step()
    engine.add("a", 400, 4)
    for _ in range(4):
        assert list(engine.step(slow=5).num_scheduled_tokens) == ["runs"]
    while "a" not in (out := engine.step().num_scheduled_tokens):
        assert list(out) == ["runs"]
    assert out["a"] == 1, "all but the last token were claimed"
    assert engine.beside["a"] == 1
    engine.to_the_end()
    assert engine.told["a"]["reused_tokens"] == 224


@pytest.mark.parametrize("when", ["looked up", "loaded", "received"])
def test_a_request_may_be_aborted_at_any_time(make: Any, when: str) -> None:
    engine = make()
    engine.add("runs", 100, 0, outputs=20)
    engine.step()
    engine.add("a", 400, 4, polls=100 if when == "looked up" else 0)
    engine.step(slow=3)
    free = engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks
    if when == "received":
        while engine.worker.background:
            engine.step()
    before = free()
    engine.abort("a")
    if when == "loaded":
        assert free() == before, "the worker is still writing to its blocks"
        while engine.worker.background:
            engine.step()
        engine.step()
    else:
        engine.step()
    if when == "looked up":
        engine.lookups["a"]._left = 0
    engine.to_the_end()
    if when != "looked up":
        assert engine.worker.done["a"] == 1


def test_an_abort_with_nobody_else_there_is_worked_off(make: Any) -> None:
    engine = make(idle_tokens=0)
    engine.add("a", 400, 4)
    engine.step(slow=4)
    assert engine.beside["a"] == 1
    engine.abort("a")
    assert engine.scheduler.has_requests(), "an engine that stopped here would keep its blocks for ever"
    engine.to_the_end()


def test_approximate_blocks_are_nobody_elses_prefix(make: Any) -> None:
    engine = make()
    engine.add("runs", 100, 0, outputs=30)
    engine.step()
    engine.add("a", 400, 4)
    for _ in range(6):
        engine.step()
    assert engine.beside["a"] == 1
    same = [random.Random("a").randrange(5, 40000) for _ in range(400)]
    engine.found["b"] = 0, (0, ())
    engine.scheduler.add_request(
        Request("b", same, SamplingParams(max_tokens=2, ignore_eos=True), None, block_hasher=engine._hasher)
    )
    engine.step()
    assert engine.connector._scheduler._states["b"].local < 8 + CHUNK
    engine.to_the_end()
    assert engine.told["b"]["reused_tokens"] == 0


@pytest.mark.parametrize("matches", [0, 5])
def test_exact_kv_is_stored_and_approximate_kv_is_not(make: Any, matches: int) -> None:
    engine = make()
    engine.add("one", 1290, matches, exact=4 * CHUNK)
    stored: list[tuple[int, int]] = []
    while engine.scheduler.has_requests():
        meta = engine.step().kv_connector_metadata
        stored += [(r.op.start, r.op.end) for r in meta.requests if r.direction == "STORE"]
    assert [start for start, _ in stored[1:]] == [end for _, end in stored[:-1]]
    if matches:  # behind 8 tokens of a gap, which fill no chunk
        assert stored == []
    else:
        assert (stored[0][0], stored[-1][1]) == (4 * CHUNK, 1280)


def test_blocks_that_may_be_written_to_are_not_reused(make: Any) -> None:
    engine = make()
    engine.add("late", 700, 4)
    run, late, over = engine.worker.step, [], []

    def stepping(new: list[BlendPlan], finished: set[str], slow: int) -> KVConnectorOutput:
        output = run(new, finished, slow)
        late.extend((plan.request_id, plan.block_ids[plan.local // BLOCK :]) for plan in new)
        meta = BlendWorkerMetadata(output.kv_connector_worker_meta.results if output.kv_connector_worker_meta else [])
        meta.timed_out, meta.ended = list(late), list(over)
        output.kv_connector_worker_meta = meta
        late.clear()
        return output

    engine.worker.step = stepping
    while engine.scheduler.has_requests():
        engine.step()
    pool = engine.scheduler.kv_cache_manager.block_pool
    (held,) = engine.connector._scheduler.fenced._fenced.values()
    assert len(held) == -(-700 // BLOCK)
    assert pool.get_num_free_blocks() == BLOCKS - 1 - len(held)
    taken = pool.get_new_blocks(pool.get_num_free_blocks())
    assert not {block.block_id for block in taken} & {block.block_id for block in held}
    pool.free_blocks(taken)
    over.append("late")
    engine.add("next", 100, 0)
    engine.to_the_end()


def test_what_ranks_say_of_late_loads_is_added_up() -> None:
    one = BlendWorkerMetadata([], [("a", (1, 2))], [])
    other = BlendWorkerMetadata([], [("a", (1, 2)), ("b", (3,))], ["c"])
    told = one.aggregate(other)
    assert isinstance(told, BlendWorkerMetadata)
    assert (told.timed_out, told.ended) == ([("a", (1, 2)), ("a", (1, 2)), ("b", (3,))], ["c"])


def test_a_lookups_namespace_has_prefix_and_tenant(make: Any) -> None:
    engine = make()
    rng = random.Random(3)
    prefix, other, chunk = ([rng.randrange(5, 40000) for _ in range(size)] for size in (100, 100, 300))
    spaces = []
    for name, tokens, salt in (
        ("a", [*prefix, *chunk], None),
        ("b", [*prefix, *chunk[::-1]], None),
        ("c", [*prefix[:-1], *other[-1:], *chunk], None),
        ("d", [*prefix, *chunk], "a/tenant@" * 50),
    ):
        engine.found[name] = 0, (0, ())
        params = {"kv_transfer_params": {"lmcache_rag.prefix": 100}}
        sampling = SamplingParams(max_tokens=1, ignore_eos=True, extra_args=params)
        request = Request(name, tokens, sampling, None, block_hasher=engine._hasher, cache_salt=salt)
        engine.scheduler.add_request(request)
        tracker = engine.connector._get_or_create_request_tracker(request)
        spaces.append(tracker.cache_salt)
        key = engine.connector.scheduler_adapter._create_key(tokens, 0, 100, name, tracker.cache_salt)
        assert key.cache_salt == tracker.cache_salt
        assert list(from_lmcache(getattr(key, "token_bytes", None) or key.token_ids)) != tokens
    assert spaces[0] == spaces[1]
    assert len(set(spaces)) == 3
    engine.to_the_end()


def test_a_chunk_computed_in_this_step_is_not_copied(make: Any) -> None:
    engine = make()
    rng = random.Random(1)
    prefix, chunk, question = ([rng.randrange(5, 40000) for _ in range(size)] for size in (64, 192, 40))

    def add(name: str, tokens: list[int], params: dict[str, Any]) -> None:
        engine.found[name] = 0, (0, ())
        sampling = SamplingParams(max_tokens=3, ignore_eos=True, extra_args={"kv_transfer_params": params})
        engine.scheduler.add_request(Request(name, tokens, sampling, None, block_hasher=engine._hasher))

    query, other = ([*prefix, *words, *chunk, *words] for words in (question, question[::-1]))
    named = {"lmcache_rag.chunks": [[64, 64 + 40], [104, 104 + 192]]}
    add(
        "ingests", [*prefix, *chunk], {"lmcache_rag.blend": "off", "lmcache_rag.ingest": True, "lmcache_rag.prefix": 64}
    )
    engine.connector._scheduler.gpu_chunks.resident.remember(
        array("q", [*prefix, *chunk]), engine.scheduler.requests["ingests"].block_hashes, 64
    )
    add("asks", query, named)
    plans: dict[str, BlendPlan] = {}
    run = engine.worker.step

    def stepping(new: list[BlendPlan], finished: set[str], slow: int) -> KVConnectorOutput:
        plans.update((plan.request_id, plan) for plan in new)
        return run(new, finished, slow)

    engine.worker.step = stepping
    assert set(engine.step().num_scheduled_tokens) == {"ingests", "asks"}
    assert "asks" not in plans, "its blocks were filed, and hold nothing yet"
    add("asks later", other, named)
    engine.step()
    assert [m.old_start for m in plans["asks later"].matches] == list(range(64, 64 + 192, BLOCK))
    engine.to_the_end()
    assert engine.told["asks later"]["hot_tokens"] == 192
    assert engine.told["asks"]["hot_tokens"] == 0


@pytest.mark.parametrize("hot", [True, False])
def test_a_blend_waits_for_its_prefix(make: Any, hot: bool) -> None:
    """Two requests of one prefix in one step: vLLM lets the second share the blocks that the first is to compute."""
    engine = make(hot=hot)
    rng = random.Random(2)
    prefix, one, two = ([rng.randrange(5, 40000) for _ in range(size)] for size in (64, 100, 400))
    sampling = SamplingParams(max_tokens=3, ignore_eos=True)
    found = tuple(Match(72 + i * CHUNK, 72 + (i + 1) * CHUNK, 64 + i * CHUNK, 128 + i * CHUNK) for i in range(4))
    for name, tokens, cached in (("first", [*prefix, *one], ()), ("second", [*prefix, *two], found)):
        engine.found[name] = 0, (0, cached)
        engine.scheduler.add_request(Request(name, tokens, sampling, None, block_hasher=engine._hasher))
    assert set(engine.step().num_scheduled_tokens) == {"first"}
    engine.step()
    assert engine.beside["second"] == 1
    engine.to_the_end()
    assert (engine.told["second"]["prefix_tokens"], engine.told["second"]["reused_tokens"]) == (64, 224)


@pytest.mark.parametrize("seed", range(6))
def test_any_schedule_ends_with_every_block_free(make: Any, seed: int) -> None:
    """Small pool: requests are preempted and wait for blocks."""
    rng = random.Random(seed)
    engine = make(step_tokens=64, idle_tokens=rng.choice([0, 100, 8192]), least_tokens=64)
    alive: list[str] = []
    for number in range(60):
        if rng.random() < 0.9:
            name = f"{seed}-{number}"
            exact = rng.choice([0, 0, CHUNK, 2 * CHUNK])
            engine.add(
                name,
                rng.randrange(80, 700),
                rng.randrange(0, 9),
                polls=rng.randrange(3),
                outputs=rng.randrange(10, 60),
                exact=exact,
            )
            alive.append(name)
        if alive and rng.random() < 0.25:
            engine.abort(alive.pop(rng.randrange(len(alive))))
        engine.step(slow=rng.choice([0, 0, 1, 4]))
    engine.to_the_end(2000)
    assert sum(engine.beside.values()) > 3
    assert engine.preempted, "the pool was to be small"
    for told in engine.told.values():
        if told:
            counts = [told[f"{kind}_tokens"] for kind in ("prefix", "reused", "recomputed", "computed")]
            assert min(counts) >= 0
            assert sum(counts) == told["prompt_tokens"]


def test_lora_adapters_have_namespaces_of_their_own(make: Any, tmp_path: Path) -> None:
    """Fault B1: LMCache's key holds no adapter, so A's KV answered B's prompt."""
    from vllm.lora.request import LoRARequest

    engine, tokens = make(), list(range(300))
    spaces = []
    for name, number in (("base", 0), ("a", 1), ("b", 2), ("a again", 1)):
        adapter = LoRARequest(f"adapter-{number}", number, str(tmp_path)) if number else None
        sampling = SamplingParams(max_tokens=1)
        request = Request(name, tokens, sampling, None, block_hasher=engine._hasher, lora_request=adapter)
        spaces.append(engine.connector._get_or_create_request_tracker(request).cache_salt)
    assert len(set(spaces)) == 3
    assert spaces[1] == spaces[3]


@pytest.mark.parametrize("blends", [True, False], ids=["blends", "fallback"])
def test_embedded_prompts_are_not_looked_up_or_stored(make: Any, blends: bool) -> None:
    """Their token ids are zeros: prompts of one length would share KV."""
    engine = make()
    connector = engine.connector
    if not blends:
        connector._scheduler.unsupported = Unsupported(CannotBlend.ERROR, "a test")
    asked: list[str] = []
    connector.scheduler_adapter.maybe_submit_lookup_request = lambda name, **_: asked.append(name)
    trackers = []
    for name in ("a", "b"):
        engine.found[name] = 0, (0, ())
        sampling, embedded = SamplingParams(max_tokens=4, ignore_eos=True), torch.rand(300, 8)
        request = Request(name, None, sampling, None, block_hasher=engine._hasher, prompt_embeds=embedded)
        engine.scheduler.add_request(request)
        trackers.append(connector._get_or_create_request_tracker(request))
    for _ in range(8):
        out = engine.step()
        meta = out.kv_connector_metadata
        assert [one for one in meta.requests if one.direction == "STORE"] == []
    assert asked == []
    assert trackers[0].cache_salt != trackers[1].cache_salt
    assert [tracker.num_scheduled_tokens for tracker in trackers] == [303, 303], "they ran"
    engine.to_the_end()


@pytest.mark.parametrize("healthy", [True, False])
def test_lmcaches_connector_returns_locks_by_name(make: Any, healthy: bool) -> None:
    """Its calls name their arguments."""
    adapter = make().connector.scheduler_adapter
    client, sent = next(iter(adapter.req_clients.values())), []
    client.free_lookup_locks = lambda key, *more: sent.append((key.request_id, key.start, key.end))
    client.end_session = lambda request_id: None
    (event,) = adapter._health_events.values()
    if not healthy:
        event.clear()
    tokens = list(inspect.signature(type(adapter).free_lookup_locks).parameters)[1]  # 0.5.7 has another name for them
    named = {tokens: to_lmcache(range(CHUNK)), "start": 0, "end": CHUNK, "request_id": "r", "cache_salt": ""}
    adapter.free_lookup_locks(**named, request_configs=None)
    event.set()
    adapter.end_session("another")
    assert sent == [("r", 0, CHUNK)]


def test_locks_are_returned_once_lmcache_is_healthy(make: Any) -> None:
    """A paused server goes on with the look-ups that nobody waits for any more; LMCache's adapter may not know yet."""
    engine = make(lookup_deadline=0.2)
    del engine.connector._client.look_up  # LMCache is asked
    adapter = engine.connector.scheduler_adapter
    client = next(iter(adapter.req_clients.values()))
    answer, sent = SimpleNamespace(there=False), []
    found = SimpleNamespace(prefix_coverage_tokens=CHUNK, non_prefix_segments=())
    client.cb_unified_lookup = lambda key, ranks: SimpleNamespace(
        wait=lambda seconds: answer.there, result=lambda seconds: found
    )
    client.free_lookup_locks = lambda key, *more: sent.append((key.request_id, key.start, key.end))
    client.end_session = sent.append
    engine.add_tokens("paused", list(range(100, 400)), outputs=60)
    while engine.connector._scheduler.aborted_lookups == 0:
        engine.step()
    for event in adapter._health_events.values():
        event.clear()
    answer.there = True
    engine.step()
    assert (engine.connector._scheduler.aborted_lookups, sent) == (0, [])
    for event in adapter._health_events.values():
        event.set()
    engine.step()
    assert sent == [("paused", 0, CHUNK), "paused"]
    engine.to_the_end()


@pytest.mark.parametrize("case", ["aborted", "unhealthy", "answered"])
def test_locks_lmcache_never_requested_are_returned(make: Any, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Where we do not blend. LMCache would keep the look-up's job for ever, and its locks for five minutes."""
    from lmcache.v1.multiprocess.futures import MessagingFuture

    from lmcache_rag.connector import lmcache_client

    monkeypatch.setattr(lmcache_client.DeferredReleases, "REPEAT_S", 0.5)
    engine = make()
    engine.connector._scheduler.unsupported = Unsupported(CannotBlend.ERROR, "a test")
    adapter = engine.connector.scheduler_adapter
    client, sent = next(iter(adapter.req_clients.values())), []
    if case != "answered":
        client.lookup = lambda *_: MessagingFuture()
    client.free_lookup_locks = lambda key, *_: sent.append((key.request_id, key.start, key.end))
    client.end_session = sent.append
    tokens = list(range(100, 430))
    engine.add_tokens("r", tokens)
    engine.step()
    if case == "aborted":
        engine.abort("r")
    elif case == "unhealthy":
        for event in adapter._health_events.values():
            event.clear()
        engine.step()
        assert engine.scheduler.requests["r"].num_computed_tokens > 0, "it did not wait"
        for event in adapter._health_events.values():
            event.set()
    while engine.scheduler.has_requests():
        engine.step()
    engine.to_the_end()
    told = [("r", 0, len(tokens) // CHUNK * CHUNK), "r"]
    assert sent == (["r"] if case == "answered" else told + told)
    assert not engine.connector._client.has_releases
    assert not engine.connector._client._unused


def test_a_failure_while_releasing_locks_ends_nothing(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache_rag.connector import lmcache_client

    monkeypatch.setattr(lmcache_client.DeferredReleases, "REPEAT_S", 0.0)
    engine = make()
    releases, adapter = engine.connector._client._releases, engine.connector.scheduler_adapter
    tried: list[Any] = []

    def fails(*given: Any) -> None:
        tried.append(given)
        raise ConnectionError("gone")

    client = next(iter(adapter.req_clients.values()))
    client.free_lookup_locks = client.end_session = fails
    tracker = SimpleNamespace(get_token_ids=lambda: list(range(CHUNK)), cache_salt="s", request_configs=None)
    with contextlib.suppress(ConnectionError):
        releases.release_unused("r", tracker)
    releases._repeated.append((0.0, "r", fails))
    releases.send()
    assert len(tried) >= 2
    assert not releases.pending
