"""A look-up is sent before vLLM hashes the prompt: vLLM's own preprocessing and scheduler, LMCache's own client."""

from __future__ import annotations

import time
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from contract_kit import CHUNK

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core import EngineCore
    from vllm_scheduler_kit import Engine

    from lmcache_rag.connector.lookup import SchedulerClient
    from lmcache_rag.protocol import INGEST_PRIORITY

pytestmark = [pytest.mark.filterwarnings("ignore")]


class Core:
    """What vLLM's EngineCore does with a request that it has received."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.events = engine, []  # type: ignore[var-annotated]
        self._core = SimpleNamespace(
            mm_receiver_cache=None,
            request_block_hasher=self._hash,
            scheduler=engine.scheduler,
            structured_output_manager=None,
        )
        client: Any = engine.connector._client
        engine.use(lambda request: SchedulerClient.look_up(client, request))  # the real one
        self._transport = next(iter(engine.connector.scheduler_adapter.req_clients.values()))
        self._send = self._transport.cb_unified_lookup
        self._transport.cb_unified_lookup = self._lookup

    def _hash(self, request: Any) -> Any:
        if not request.block_hashes:
            self.events.append(f"hash {request.request_id}")
        return self.engine._hasher(request)

    def _lookup(self, key: Any, *args: Any) -> Any:
        self.events.append(f"look-up {key.request_id}")
        return self._send(key, *args)

    def receive(self, name: str, params: Any = None, prompt: int = 400, **more: Any) -> Any:
        extra = None if params is None else {"kv_transfer_params": params}
        values = {
            "request_id": name,
            "prompt_token_ids": list(range(1000, 1000 + prompt)),
            "mm_features": None,
            "sampling_params": SamplingParams(max_tokens=2, ignore_eos=True, extra_args=extra),
            "pooling_params": None,
            "arrival_time": 0.0,
            "lora_request": None,
            "cache_salt": None,
            "data_parallel_rank": None,
        }
        request, _ = EngineCore.preprocess_add_request(self._core, EngineCoreRequest(**values | more))
        return request

    def events_of(self, name: str) -> list[str]:
        return [event.removesuffix(f" {name}") for event in self.events if event.endswith(f" {name}")]


@pytest.fixture
def core(make: Any) -> Core:
    return Core(make(min_gain="off"))


def test_the_lookup_is_sent_before_vllm_hashes(core: Core) -> None:
    request = core.receive("a", {"lmcache_rag.prefix": 64})
    assert core.events_of("a")[:2] == ["look-up", "hash"]
    core.engine.scheduler.add_request(request)
    assert core.events_of("a").count("look-up") == 1
    state = core.engine.connector._scheduler._states["a"]
    tracker = core.engine.connector.request_trackers["a"]
    assert (state.lookup.salt, state.lookup.configs) == (tracker.cache_salt, tracker.request_configs)
    core.engine.to_the_end()
    assert core.engine.told["a"]["prompt_tokens"] == 400


@pytest.mark.parametrize(
    "params", [{"lmcache_rag.blend": "off"}, {"lmcache_rag.ratio": 7}, {"lmcache_rag.ingest": True}]
)
def test_other_requests_are_left_to_the_scheduler(core: Core, params: Any) -> None:
    request = core.receive("a", params)
    assert core.events_of("a")[0] == "hash"
    core.engine.scheduler.add_request(request)
    core.engine.to_the_end()


def test_a_request_that_cannot_be_made_is_cancelled(core: Core) -> None:
    def fail(request: Any) -> Any:
        raise RuntimeError("no hash")

    core._core.request_block_hasher = fail
    with pytest.raises(RuntimeError, match="no hash"):
        core.receive("a")
    early = core.engine.connector.early_lookups
    assert (core.events_of("a"), len(early), len(early._sent)) == (["look-up"], 1, 0)
    core.engine.add_tokens("other", list(range(20)), outputs=40)
    end = time.monotonic() + 20
    core.engine.step()
    while core.engine.connector._scheduler.aborted_lookups and time.monotonic() < end:
        time.sleep(0.01)  # LMCache's answer is on its way
        core.engine.step()
    assert len(early) == core.engine.connector._scheduler.aborted_lookups == 0
    core.engine.to_the_end()


def test_a_known_request_is_not_looked_up_again(core: Core) -> None:
    core.engine.scheduler.add_request(core.receive("a"))
    before = list(core.events)
    core.receive("a")
    assert core.events == [*before, "hash a"]
    core.engine.to_the_end()


def test_the_scheduler_finds_the_namespace(core: Core) -> None:
    """Another request may name the prefix while this one is hashed: then it is looked up again, in that namespace."""
    prefix = {"lmcache_rag.prefix": CHUNK * 2, "lmcache_rag.ingest": True}
    first, second = core.receive("first", prefix), core.receive("second", prompt=500)
    assert core.events_of("second")[0] == "look-up"
    lookup = core.engine.connector.early_lookups._sent["second"].lookup
    poll, lookup.poll = lookup.poll, lambda seconds: False
    core.engine.scheduler.add_request(first)
    core.engine.scheduler.add_request(second)
    core.engine.step()
    assert core.events_of("second").count("look-up") == 1, "LMCache would answer the second one with the first one's KV"
    lookup.poll = poll
    end = time.monotonic() + 20
    while core.events_of("second").count("look-up") < 2 and time.monotonic() < end:
        time.sleep(0.01)
        core.engine.step()
    trackers = core.engine.connector.request_trackers
    if "second" in trackers:
        assert trackers["second"].cache_salt == trackers.get("first", trackers["second"]).cache_salt
    core.engine.to_the_end()
    assert core.events_of("second").count("look-up") == 2


def test_the_parts_of_vllm_that_are_used() -> None:
    fields = EngineCoreRequest.__struct_fields__
    assert {"prompt_token_ids", "prompt_embeds", "mm_features", "lora_request", "cache_salt", "resumable"} <= set(
        fields
    )
    assert hasattr(SamplingParams(), "skip_reading_prefix_cache")


INGESTION = {"lmcache_rag.ingest": True, "lmcache_rag.prefix": 64, "lmcache_rag.blend": "off"}


@pytest.mark.parametrize(("policy", "order"), [("priority", ["q", "a", "b", "c"]), ("fcfs", ["a", "b", "c", "q"])])
def test_a_question_overtakes_queued_ingestion(make: Any, policy: str, order: list[str]) -> None:
    """On vLLM's own queue, where `serve` sets the policy; a server without it goes on as before."""
    core = Core(make(policy=policy, seqs=1, min_gain="off"))
    engine = core.engine
    engine.use(engine.look_up)  # answered at once
    for name, params in (("a", INGESTION), ("b", INGESTION), ("c", INGESTION), ("q", {"lmcache_rag.blend": "off"})):
        engine.found[name] = 0, (0, ())
        prompt = list(range(ord(name) * 1000, ord(name) * 1000 + 400))
        engine.scheduler.add_request(core.receive(name, params, prompt_token_ids=prompt, arrival_time=ord(name)))
    started: list[str] = []
    for _ in range(200):
        started += [name for name in engine.step().num_scheduled_tokens if name not in started]
    assert started == order
    engine.to_the_end()


@pytest.mark.parametrize(
    ("params", "given", "priority"),
    [
        (INGESTION, 0, INGEST_PRIORITY),
        ({"lmcache_rag.forget": True}, 0, INGEST_PRIORITY),
        (INGESTION, 500, 500),
        ({"lmcache_rag.blend": "off"}, 0, 0),
        (None, -3, -3),
        ([1], 0, 0),
    ],
)
def test_ingestion_has_a_low_priority(core: Core, params: Any, given: int, priority: int) -> None:
    assert core.receive("a", params, priority=given).priority == priority
