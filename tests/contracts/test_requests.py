"""Whatever a request says, and whatever raises while it is looked after: vLLM's scheduler goes on, nothing leaks.

vLLM's scheduler, its block pool and the connector are real; see vllm_scheduler_kit.
"""

from __future__ import annotations

import random
import warnings
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from contract_kit import CHUNK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request
    from vllm_scheduler_kit import Engine, without_server

    from lmcache_rag import protocol
    from lmcache_rag.connector.lmcache_client import BlendLookup, mark_unhealthy
    from lmcache_rag.connector.metadata import Match

    OFF = protocol.Unsupported(protocol.CannotBlend.ERROR, "a test")

pytestmark = [pytest.mark.filterwarnings("ignore")]
MANY = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
KEYS = (
    *protocol.REQUEST_KEYS,
    protocol.MAX_OFFLOAD_TOKENS,
    "lmcache.anything",
    "lmcache_rag.unknown",
    "do_remote_prefill",
    "do_remote_decode",
    "cached_token_stats",
    "remote_block_ids",
    "gateway.trace",
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
SPANS = st.lists(st.lists(st.integers(-3, 400), min_size=2, max_size=2), max_size=6)
PARAMS = JSON | st.dictionaries(st.sampled_from(KEYS), JSON | SPANS | st.just(True) | st.integers(0, 300), max_size=6)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Makes schedulers."""
    made: list[Engine] = []

    def make(**options: Any) -> Engine:
        with without_server() as port:
            engine = Engine(port, tmp_path_factory.mktemp("model"), **options)
        mark_unhealthy(engine.connector.scheduler_adapter)
        finish = engine.connector.request_finished

        def finished(request: Any, blocks: Any) -> Any:
            answer = finish(request, blocks)
            engine.told[request.request_id] = (answer[1] or {}).get(protocol.ANSWER)
            return answer

        engine.connector.request_finished = finished
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.scheduler.shutdown()


@pytest.fixture
def engine(engines: Any) -> Engine:
    made: Engine = engines()
    return made


def drawn(name: str, count: int) -> list[int]:
    rng = random.Random(name)
    return [rng.randrange(5, 40000) for _ in range(count)]


def stores(out: Any) -> list[Any]:
    """What is stored in a step, of which requests."""
    return [meta for meta in out.kv_connector_metadata.requests if meta.direction == "STORE"]


def run(engine: Engine) -> list[Any]:
    """Step to the end; returns what was stored."""
    found: list[Any] = []
    for _ in range(1000):
        if engine.scheduler.has_requests():
            found += stores(engine.step())
    engine.to_the_end()
    return found


# -- what a request says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blends", [True, False])
def test_no_parameters_end_the_scheduler(engines: Any, blends: bool) -> None:
    engine = engines()
    engine.connector._scheduler.unsupported = None if blends else OFF
    count = 0

    @MANY
    @given(
        params=PARAMS,
        length=st.sampled_from([1, 40, 200, 700]),
        leaves=st.sampled_from(["at once", "after a step", "never", "never"]),
        children=st.integers(1, 3),
        salt=st.none() | st.text(max_size=200),
    )
    def check(params: Any, length: int, leaves: str, children: int, salt: str | None) -> None:
        nonlocal count
        count += 1
        names = [f"{count}-{child}" for child in range(children)]
        for name in names:
            engine.add_tokens(name, drawn(str(count), length), params, cache_salt=salt)
        if leaves == "after a step":
            engine.step(slow=2)
        for name in names if leaves != "never" else ():
            engine.abort(name)
        engine.add_tokens(f"{count} ordinary", drawn("ordinary", 200))
        run(engine)
        assert f"{count} ordinary" in engine.told

    check()


@pytest.mark.parametrize("limit", ["x", [], 100.5, {}, True, -1, None])
def test_a_limit_that_is_none_stores_nothing(engine: Engine, limit: Any) -> None:
    engine.add_tokens("limited", drawn("limited", 300), {protocol.MAX_OFFLOAD_TOKENS: limit})
    assert run(engine) == []


def test_a_limit_is_kept_to(engine: Engine) -> None:
    engine.add_tokens("limited", drawn("limited", 300), {protocol.MAX_OFFLOAD_TOKENS: 130})
    assert [(meta.op.start, meta.op.end) for meta in run(engine)] == [(0, 128)]


@pytest.mark.parametrize(
    "params",
    [
        {"lmcache.max_offload_tokens": "x"},
        {"lmcache_rag.ratio": []},
        {"stream": True, "do_remote_prefill": True, "cached_token_stats": 1},
    ],
    ids=["a limit of another type", "a ratio of another type", "keys of another role"],
)
def test_wrong_parameters_reach_no_lmcache_and_no_vllm(engine: Engine, params: dict[str, Any]) -> None:
    request = engine.add_tokens("wrong", drawn("wrong", 300), params)
    assert request.kv_transfer_params == {protocol.MAX_OFFLOAD_TOKENS: 0}
    run(engine)


def test_a_request_that_never_ran_may_ask_for_stats(engine: Engine) -> None:
    """As vLLM submits it where a prompt is refused: it is ended before anything asks for it."""
    params = {"do_remote_prefill": True, "cached_token_stats": 1}
    engine.add_tokens("refused", [1], params)
    engine.abort("refused")
    run(engine)
    assert engine.connector._scheduler._states == {}


def test_wrong_parameters_are_logged_once_and_cut(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine.add_tokens("a" * 9000, drawn("wrong", 300), {protocol.POLICY: "x" * 9000, protocol.MAX_OFFLOAD_TOKENS: []})
    engine.step()
    run(engine)
    lines = [record.getMessage() for record in caplog.records if record.name == "lmcache_rag"]
    assert sum(protocol.POLICY in line for line in lines) == 1
    assert sum(protocol.MAX_OFFLOAD_TOKENS in line for line in lines) == 1
    assert max(map(len, lines)) < 600


# -- what raises ------------------------------------------------------------------------------------------------------

FAULTS = (
    "look_up",
    "hide",
    "poll",
    "release_prefix",
    "namespace",
    "hot begin",
    "hot find",
    "hot claim",
    "hot keep",
    "hot ingested",
    "filed",
    "way",
    "claim",
    "allocated",
    "tracker",
    "LMCache allocated",
    "LMCache finished",
)


class FaultError(Exception):
    """Nothing that is handled by name."""


def targets(engine: Engine, fault: str) -> list[tuple[Any, str]]:
    """What raises."""
    side, connector = engine.connector._scheduler, engine.connector
    lookup = type(next(iter(engine.lookups.values()), None))
    return {
        "look_up": [(side.client, "look_up")],
        "hide": [(side._prefix_cache, "hide")],
        "poll": [(lookup, "poll")],
        "release_prefix": [(lookup, "release_prefix")],
        "namespace": [(connector._client._salts, "of")],
        "hot begin": [(side.gpu_chunks, "on_new_request")],
        "hot find": [(side.gpu_chunks, "find")],
        "hot claim": [(side.gpu_chunks, "claim")],
        "hot keep": [(side.gpu_chunks, "on_allocated")],
        "hot ingested": [(side.gpu_chunks, "on_ingested")],
        "filed": [(side.uncomputed, "pending")],
        "way": [(side.budget, "admit")],
        "claim": [(side.budget, "claim")],
        "allocated": [(side.budget, "on_allocated")],
        "tracker": [(LMCacheMPConnector, "_get_or_create_request_tracker")],
        "LMCache allocated": [(LMCacheMPConnector, "update_state_after_alloc")],
        "LMCache finished": [(LMCacheMPConnector, "request_finished")],
    }[fault]


@pytest.mark.parametrize("fault", FAULTS)
def test_after_an_error_others_go_on_and_nothing_leaks(
    engines: Any, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engines(least_tokens=64)
    prefix, chunk = drawn("prefix", 64), drawn("chunk", 192)
    engine.add_tokens("ingests", prefix + chunk, {protocol.INGEST: True, protocol.PREFIX: 64, protocol.BLEND: "off"})
    run(engine)
    (target, name), *_ = targets(engine, fault)
    real, count, raised = getattr(target, name), 0, []

    @settings(MANY, max_examples=25)
    @given(
        calls=st.integers(1, 6),
        polls=st.integers(0, 2),
        slow=st.integers(0, 3),
        leaves=st.sampled_from([None, None, "asks", "finds"]),
        exact=st.sampled_from([0, 128]),
    )
    def check(calls: int, polls: int, slow: int, leaves: str | None, exact: int) -> None:
        nonlocal count
        count += 1
        left = 1 if fault == "release_prefix" else calls

        def faulty(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raised.append(count)
                raise FaultError
            return real(*args, **kwargs)

        monkeypatch.setattr(target, name, faulty)
        if count % 2:  # some at an idle engine
            engine.add(f"{count} runs", 100, 0, outputs=12)
            engine.step()
        asked = {protocol.CHUNKS: [[64, 80], [80, 272]], protocol.PREFIX: 64}
        engine.found[f"{count} asks"] = polls, (CHUNK, ())  # which vLLM holds itself: its locks are given back
        engine.add_tokens(f"{count} asks", prefix + drawn(str(count), 16) + chunk + drawn(str(count), 40), asked)
        engine.add(f"{count} finds", 600, 4, polls=polls, exact=exact)
        once_more = {protocol.INGEST: True, protocol.PREFIX: 64, protocol.BLEND: "off"}
        engine.add_tokens(f"{count} ingests", prefix + drawn(f"other {count}", 130), once_more)
        engine.step(slow=slow)
        engine.step(slow=slow)
        if leaves:
            engine.abort(f"{count} {leaves}")
        run(engine)
        monkeypatch.setattr(target, name, real)

    check()
    assert raised, "nothing was tested"
    assert caplog.text.count("is computed in full, and its KV is not stored") <= len(raised)
    failures = {told[protocol.FAILURE] for told in engine.told.values() if told}
    assert failures <= {"", protocol.Fallback.REQUEST_ERROR}
    # What raised where nothing was claimed any more need not make a request fail.
    assert (protocol.Fallback.REQUEST_ERROR in failures) or fault in (
        "release_prefix", "hot ingested", "LMCache finished", "poll"
    )  # fmt: skip


def test_an_unplanned_claim_is_computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM counts it as computed: without a plan its KV would be whatever was in the blocks."""

    def raises(*args: Any, **kwargs: Any) -> None:
        raise FaultError

    engine.add("finds", 600, 4, exact=128)
    monkeypatch.setattr(LMCacheMPConnector, "update_state_after_alloc", raises)
    out = engine.step()
    monkeypatch.undo()
    (plan,) = out.kv_connector_metadata.blend_plans
    assert (plan.failure, plan.local, plan.exact, plan.matches) == (protocol.Fallback.REQUEST_ERROR, 0, 0, ())
    assert plan.end >= 128 + 4 * CHUNK
    assert run(engine) == []
    told = engine.told["finds"]
    assert (told["failure"], told["reused_tokens"], told["computed_tokens"]) == ("request error", 0, 600)


def test_a_step_with_failed_metadata_stores_no_more(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*args: Any, **kwargs: Any) -> None:
        raise FaultError

    engine.add_tokens("first", drawn("first", 700))
    monkeypatch.setattr(LMCacheMPConnector, "build_connector_meta", raises)
    out = engine.step()
    assert out.kv_connector_metadata.need_flush_before_forward
    monkeypatch.undo()
    engine.add_tokens("second", drawn("second", 300))
    assert {meta.request_id for meta in run(engine)} == {"second"}, "which blocks the first has is not known"


# -- results under another connector ----------------------------------------------------------------------------------


def test_blends_end_when_only_vllms_output_has_results(engine: Engine) -> None:
    """As inside MultiConnector, whose metadata is not ours when the scheduler hands it over first."""

    class Wrapped:
        def __init__(self, own: Any) -> None:
            self.own = own

    run_worker, update = engine.worker.step, engine.connector.update_connector_output

    def stepping(*args: Any) -> Any:
        output = run_worker(*args)
        if output.kv_connector_worker_meta is not None:
            output.kv_connector_worker_meta = Wrapped(output.kv_connector_worker_meta)
        return output

    def unwrapping(output: Any) -> None:
        if isinstance(output.kv_connector_worker_meta, Wrapped):
            output.kv_connector_worker_meta = output.kv_connector_worker_meta.own
        update(output)

    engine.worker.step = stepping  # type: ignore[method-assign]
    engine.connector.update_connector_output = unwrapping
    engine.add("runs", 50, 0, outputs=200)
    engine.step()
    for number in range(12):
        engine.add(f"finds {number}", 400, 4)
        for _ in range(3):
            engine.step()
    engine.to_the_end()
    assert sum(engine.beside.values()) == 12


# -- what is stored and forgotten -------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["ingest", "all"])
@pytest.mark.parametrize("blends", [True, False])
def test_what_is_stored_and_what_lmcache_is_told_of_it(engines: Any, store: str, blends: bool) -> None:
    engine = engines(store=store)
    engine.connector._scheduler.unsupported = None if blends else OFF
    ingest = {protocol.INGEST: True, protocol.PREFIX: 64, protocol.BLEND: "off"}
    engine.add_tokens("ingests", drawn("ingests", 200), ingest)
    engine.add_tokens("asks", drawn("asks", 200), {protocol.PREFIX: 64, "gateway.trace": [1]})
    kept = {meta.request_id: meta.request_configs for meta in run(engine)}
    assert kept.pop("ingests") == {protocol.INGEST: True}
    assert kept == ({"asks": None} if store == "all" else {})


@pytest.mark.parametrize("blends", [True, False])
def test_embedded_prompts_are_not_looked_up_or_stored(engines: Any, blends: bool) -> None:
    engine = engines()
    engine.connector._scheduler.unsupported = None if blends else OFF
    adapter = engine.connector.scheduler_adapter
    asked: list[Any] = []
    adapter.maybe_submit_lookup_request = lambda *args, **kwargs: asked.append(args)
    sampling = SamplingParams(max_tokens=3, ignore_eos=True)
    whole = Request("whole", None, sampling, None, prompt_embeds=torch.zeros(300, 8), block_hasher=engine._hasher)
    mask = [at % 3 > 0 for at in range(300)]
    mixed = Request(
        "mixed", drawn("mixed", 300), sampling, None,
        prompt_embeds=torch.zeros(300, 8), prompt_is_token_ids=mask, block_hasher=engine._hasher,
    )  # fmt: skip
    for request in (whole, mixed):
        engine.scheduler.add_request(request)
    assert run(engine) == []
    assert asked == []
    assert engine.lookups == {}


@pytest.mark.parametrize("blends", [True, False])
def test_a_forgotten_chunk_is_not_found(engines: Any, blends: bool) -> None:
    engine = engines()
    side, pool = engine.connector._scheduler, engine.scheduler.kv_cache_manager.block_pool
    prefix, chunk = drawn("the prefix", 64), drawn("the chunk", 192)
    ingest = {protocol.INGEST: True, protocol.PREFIX: 64, protocol.BLEND: "off"}
    engine.add_tokens("ingests", prefix + chunk, ingest)
    run(engine)
    asks = {protocol.CHUNKS: [[64, 104], [104, 104 + 192]]}
    engine.add_tokens("asks", prefix + drawn("words", 40) + chunk + [1, 2, 3], asks)
    run(engine)
    assert engine.told["asks"]["hot_tokens"] == 192

    engine.connector._scheduler.unsupported = None if blends else OFF
    lookups: list[Any] = []

    def look_up(request: Any) -> Any:
        tracker = engine.connector._get_or_create_request_tracker(request)
        lookups.append((tracker.request_configs, tracker.cache_salt))
        return engine.look_up(request)

    engine.use(look_up)
    engine.found["forgets"] = 3, (0, ())
    forgets = engine.add_tokens("forgets", prefix + chunk, {protocol.FORGET: True, protocol.PREFIX: 64})
    assert run(engine) == [], "what it computes is not stored"
    assert [configs for configs, _ in lookups] == [{protocol.FORGET: True, protocol.PREFIX: 64}]
    assert engine.told["forgets"][protocol.FORGOTTEN] is True
    assert engine.told["forgets"]["reused_tokens"] == 0
    assert engine.lookups["forgets"].ended

    engine.connector._scheduler.unsupported = None
    again = Request(
        "exact", prefix + chunk, SamplingParams(max_tokens=1, ignore_eos=True), None, block_hasher=engine._hasher
    )
    assert engine.scheduler.kv_cache_manager.get_computed_blocks(again)[1] == 64, "only the prefix, which others share"
    assert not any(pool.get_cached_block(own, [0]) for own in again.block_hashes[4:])
    assert len(forgets.block_hashes) >= 16
    assert side.gpu_chunks.resident.locate(array("q", prefix + chunk), again.block_hashes, [(64, 256)]) == []
    engine.add_tokens("asks again", prefix + drawn("more words", 40) + chunk + [1, 2, 3], asks)
    run(engine)
    assert engine.told["asks again"]["reused_tokens"] == 0


def test_prompts_are_stored_on_their_second_use(engines: Any) -> None:
    """With `store = "second"`; ingested chunks at once."""
    engine = engines(store="second")
    prompt, other = drawn("prompt", 256), drawn("other", 128)

    def stored(name: str, tokens: list[int], params: Any = None) -> int:
        engine.add_tokens(name, tokens, params)
        return max((meta.op.end for meta in run(engine)), default=0)

    assert stored("first", prompt + other) == 0
    assert stored("second", prompt + drawn("another", 128)) == 256, "what it has in common with the first"
    assert stored("other tenant's", other + prompt) == 0
    ingest = {protocol.INGEST: True, protocol.PREFIX: 64, protocol.BLEND: "off"}
    assert stored("ingests", drawn("new", 256), ingest) >= 256


def test_a_removal_spares_first_tokens_and_counts(engines: Any) -> None:
    """The chunk's first 64 tokens are those of another chunk, too: they stay."""
    engine = engines()
    prefix, chunk = drawn("the prefix", 64), drawn("the chunk", 192)
    engine.add_tokens("ingests", prefix + chunk, {protocol.INGEST: True, protocol.PREFIX: 64, protocol.BLEND: "off"})
    run(engine)
    configs: list[Any] = []

    def look_up(request: Any) -> Any:
        configs.append(engine.connector._get_or_create_request_tracker(request).request_configs)
        return engine.look_up(request)

    engine.use(look_up)
    for name in ("first", "second"):
        engine.found[name] = 1, (0, (Match(0, 0, 0, 0, SimpleNamespace(hash=b'{"memory": 2, "tier 2": 1}')),))
        params = {protocol.FORGET: True, protocol.PREFIX: 64, protocol.KEEP: 64, protocol.HELD: True}
        engine.add_tokens(name, prefix + chunk, params)
        run(engine)
    assert configs == [{protocol.FORGET: True, protocol.PREFIX: 128, protocol.HELD: True}] * 2
    block = engine.connector._scheduler._prefix_cache.block_size
    assert engine.told["first"][protocol.KV_HELD] == {"vLLM": 128 // block, "memory": 2, "tier 2": 1}
    assert engine.told["second"][protocol.KV_HELD]["vLLM"] == 0
    again = Request(
        "exact", prefix + chunk, SamplingParams(max_tokens=1, ignore_eos=True), None, block_hasher=engine._hasher
    )
    assert engine.scheduler.kv_cache_manager.get_computed_blocks(again)[1] == 128


@pytest.mark.parametrize("trouble", ["no server", "no answer", "no prefix"])
def test_what_could_not_be_forgotten_is_not_called_so(engines: Any, trouble: str) -> None:
    engine = engines(lookup_deadline=0.05)
    params = {protocol.FORGET: True} | ({} if trouble == "no prefix" else {protocol.PREFIX: 64})
    engine.use((lambda request: None) if trouble == "no server" else engine.look_up)
    engine.found["forgets"] = 1 << 30, (0, ())
    engine.add_tokens("forgets", drawn("forgets", 200), params)
    for _ in range(2000):
        if "forgets" in engine.told:
            break
        assert stores(engine.step()) == []
    assert engine.told["forgets"][protocol.FORGOTTEN] is False
    if trouble == "no answer":
        engine.lookups["forgets"]._left = 0
    run(engine)


def test_a_request_to_forget_may_leave_at_any_time(engine: Engine) -> None:
    for steps in (0, 1, 3):
        name = f"leaves after {steps}"
        engine.found[name] = 2, (128, ())
        engine.add_tokens(name, drawn(name, 200), {protocol.FORGET: True, protocol.PREFIX: 64})
        for _ in range(steps):
            engine.step()
        engine.abort(name)
        run(engine)
        assert engine.connector._scheduler._states == {}


# -- what is kept of a request ----------------------------------------------------------------------------------------


def test_a_planned_prompt_leaves_nothing_behind(engine: Engine) -> None:
    engine.add("finds", 600, 4, exact=128, outputs=8)
    engine.step()
    state = engine.connector._scheduler._states["finds"]
    assert state.planned
    assert (len(state.tokens), state.lookup, state.claim, state.blocks_hit) == (0, None, None, 4)
    engine.to_the_end()
    assert engine.told["finds"]["blocks_hit"] == 4


def test_a_look_up_keeps_no_key_of_the_prompt(engine: Engine) -> None:
    adapter = engine.connector.scheduler_adapter
    lookup = BlendLookup(adapter, "one", drawn("one", 300), "", None)
    assert not any(len(getattr(value, "token_ids", ())) for value in vars(lookup).values())


def test_spans_are_answered_where_requested(engine: Engine) -> None:
    for name, params in (("quiet", None), ("asks", {protocol.SPANS: True})):
        tokens = drawn(name, 400)
        engine.found[name] = 0, (0, (Match(8, 72, 64, 128), Match(72, 136, 128, 192)))
        engine.add_tokens(name, tokens, params)
        run(engine)
    assert "spans" not in engine.told["quiet"]
    assert engine.told["asks"]["spans"] == [[8, 136]]
    assert set(engine.told["asks"]) - set(engine.told["quiet"]) == {"spans"}
