"""Look-ups that are sent before the scheduler has the request: of which requests, and who releases what they hold."""

from __future__ import annotations

import time
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from scheduler_kit import CHUNK, Lookup, Once, Pool, Request, chunk_hashes

from lmcache_rag.connector import early_lookup
from lmcache_rag.connector.admission import BlendGate
from lmcache_rag.connector.authorization import IngestKey
from lmcache_rag.connector.cache_salt import CacheSalts
from lmcache_rag.connector.early_lookup import EarlyLookups
from lmcache_rag.connector.gpu_chunks import GpuChunks, ResidentChunks
from lmcache_rag.connector.lookup import IN_FLIGHT, STEP_TOKENS, SentLookup
from lmcache_rag.costs import KEEP, CostModel
from lmcache_rag.protocol import CannotBlend, Unsupported


class World(Once):
    """One scheduler, the thread that receives requests, and a client that sends look-ups."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.side.unsupported = None
        self.offered: SentLookup | None = None
        self.same = True
        self.early = EarlyLookups(self.side, self, CHUNK, self.side._prefix_cache)  # type: ignore[arg-type]

    def look_up_early(self, request: Any, params: Any) -> SentLookup:
        self.lookups.append(Lookup(self.server, request.like))
        return SentLookup(self.lookups[-1], time.perf_counter())  # type: ignore[arg-type]

    def look_up(self, request: Request) -> Lookup:
        sent = self.offered
        if sent is not None and sent.lookup.request_id == request.request_id and not sent.used:
            sent.used = True
            return sent.lookup  # type: ignore[return-value]
        return super().look_up(request)

    def received(self, like: Request, **more: Any) -> Any:
        """A request as the thread receives it."""
        sampling = SimpleNamespace(skip_reading_prefix_cache=None, extra_args=None)
        if like.kv_transfer_params is not None:
            sampling.extra_args = {"kv_transfer_params": like.kv_transfer_params}
        values = {
            "request_id": like.request_id,
            "prompt_token_ids": like.prompt_token_ids,
            "sampling_params": sampling,
            "mm_features": None,
            "prompt_embeds": None,
            "lora_request": None,
            "cache_salt": None,
            "resumable": False,
            "abort_immediately": False,
            "like": like,
        }
        return SimpleNamespace(**values | more)

    def send(self, like: Request, **more: Any) -> None:
        self.early.send(self.received(like, **more))

    def arrive(self, request: Request) -> None:
        """As CacheBlendConnector.on_new_request."""
        with self.early.taken(request.request_id) as sent:
            if self.side.on_new_request(request):
                self.offered = sent if self.same else None
                if self.offered is None:
                    self.early.abort(sent)
                self.side.start_early(request, sent=self.offered is not None)

    def end(self, request: Request) -> None:
        self.finish(request)
        self.steps()

    def steps(self) -> None:
        for _ in range(5):
            self.early.abort_lost()
            self.side.build_plans()
        assert len(self.early) == self.side.aborted_lookups == 0
        assert not any(self.server.held.values()), "locks leak"


def costs(prefill: float, lookup: float) -> CostModel:
    """Milliseconds for each token; a blend's passes and its load take nothing."""
    made = CostModel()
    for size in (20, 100, 400):
        for _ in range(KEEP):
            made.prefill.observe((size, 0, 1), size * prefill)
            made.prefill.observe((size, 0, 0), size * prefill)
            made.lookup.observe((size,), size * lookup)
            made.load.observe((0, size, 0), 0.0)
            made.observe_passes("query", size, 100, 0.0)
    return made


@pytest.mark.parametrize("polls", [0, 3])
def test_the_scheduler_takes_a_lookup_that_was_sent(polls: int) -> None:
    world = World()
    request = world.request(polls=polls)
    world.send(request)
    (sent,) = world.lookups
    world.arrive(request)
    assert world.side._states["a"].lookup is sent
    while (more := world.side.match(request, 0)) is None:
        world.side.build_plans()
    assert more > 32
    assert len(world.lookups) == 1, "it is not sent twice"
    world.end(request)


NOT_SENT: dict[str, dict[str, Any]] = {
    "embeddings": {"prompt_embeds": object()},
    "no tokens": {"prompt_token_ids": None},
    "a short prompt": {"prompt_token_ids": list(range(CHUNK))},
    "images": {"mm_features": [object()]},
    "an adapter": {"lora_request": object()},
    "a pooling request": {"sampling_params": None},
    "a session": {"resumable": True},
    "a rejected request": {"abort_immediately": True},
    "no prefix caching": {"sampling_params": SimpleNamespace(skip_reading_prefix_cache=True, extra_args=None)},
    "a malformed request": {"sampling_params": SimpleNamespace(skip_reading_prefix_cache=False, extra_args=5)},
}


@pytest.mark.parametrize("what", NOT_SENT)
def test_requests_that_cannot_hit_are_not_sent(what: str) -> None:
    world = World()
    world.send(world.request(), **NOT_SENT[what])
    assert world.lookups == []


@pytest.mark.parametrize(
    "params",
    [
        {"lmcache_rag.blend": "off"},
        {"lmcache_rag.ingest": True, "lmcache_rag.prefix": 16},
        {"lmcache_rag.forget": True, "lmcache_rag.prefix": 16},
        {"lmcache_rag.ratio": 7},
        {"lmcache_rag.chunks": "x"},
        {"do_remote_prefill": True},
        "x",
    ],
    ids=str,
)
def test_invalid_and_special_parameters_are_not_sent(params: Any) -> None:
    world = World()
    request = world.request()
    request.kv_transfer_params = params
    world.send(request)
    assert world.lookups == []


def test_a_request_without_the_ingest_key_is_ordinary() -> None:
    world = World()
    world.early._ingest_key = IngestKey("secret")
    request = world.request()
    request.kv_transfer_params = {"lmcache_rag.ingest": True, "lmcache_rag.prefix": 16}
    world.send(request)
    assert len(world.lookups) == 1
    world.early.cancel("a")
    world.steps()


def test_workers_that_cannot_blend_look_nothing_up() -> None:
    world = World()
    world.side.unsupported = Unsupported(CannotBlend.MODEL, "")
    world.send(world.request())
    assert world.lookups == []


def test_a_request_that_cannot_gain_is_not_sent() -> None:
    world = World()
    world.side.gate.costs = costs(prefill=0.01, lookup=1.0)
    for number in range(40):
        world.send(world.request(str(number)))
    assert world.lookups == []
    assert world.side.gate._exploration._debts == {}, "the scheduler counts, when it decides"
    request = world.request()
    request.kv_transfer_params = {"lmcache_rag.blend": "always"}
    world.send(request)
    assert len(world.lookups) == 1
    world.early.cancel("a")
    world.steps()


def test_nothing_waits_for_a_gate_that_is_in_use() -> None:
    world = World()
    with world.side.gate.lock:
        world.send(world.request())
    assert world.lookups == []


def test_the_scheduler_holds_the_gate_in_every_call() -> None:
    """The costs are not changed while another thread reads them."""
    calls = {name: call for name, call in vars(BlendGate).items() if callable(call) and not name.startswith("_")}
    assert {name for name, call in calls.items() if not hasattr(call, "__wrapped__")} == {"may_gain"}


def test_few_are_in_flight() -> None:
    world = World()
    requests = [world.request(str(number)) for number in range(2 * early_lookup.MOST)]
    for request in requests:
        world.send(request)
    assert len(world.lookups) == early_lookup.MOST
    for request in requests:
        world.arrive(request)
    assert len(world.lookups) == len(requests)
    for request in requests:
        world.finish(request)
    world.steps()


def test_a_full_window_and_a_queue_are_respected() -> None:
    world = World()
    waiting = [world.request(str(number), polls=99) for number in range(IN_FLIGHT)]
    for request in waiting:
        world.arrive(request)
    world.send(world.request("late"))
    assert len(world.lookups) == IN_FLIGHT
    for request in waiting:
        request.polls = 0
        world.lookups[waiting.index(request)].left = 0
        world.finish(request)
    world.steps()
    queue = World()
    queue.side.window._queued = True
    queue.send(queue.request())
    assert queue.lookups == [], "it would overtake those that wait"
    assert not queue.side.window.has_place(0, 0.0)
    queue.side.window._queued = False
    queue.side.window._step_tokens = STEP_TOKENS
    assert not queue.side.window.has_place(1, 0.0)


def test_a_resident_prompt_is_not_sent() -> None:
    world = World()
    asked: list[Any] = []

    class Chunks:
        def may_be_enough(self, params: Any, prompt: Any) -> bool:
            asked.append((params, len(prompt)))
            return True

    world.side.gpu_chunks = Chunks()  # type: ignore[assignment]
    world.send(world.request())
    assert (world.lookups, asked) == ([], [(None, 100)])


@pytest.mark.parametrize("polls", [0, 2])
@pytest.mark.parametrize("why", ["another namespace", "no blending any more", "invalid by now"])
def test_a_lookup_that_is_not_taken_is_aborted(why: str, polls: int) -> None:
    world = World()
    request = world.request(polls=polls)
    world.send(request)
    world.same = why != "another namespace"
    if why == "no blending any more":
        world.side.unsupported = Unsupported(CannotBlend.MODEL, "")
    if why == "invalid by now":
        request.kv_transfer_params = {"lmcache_rag.ratio": 7}
    world.arrive(request)
    assert world.side.aborted_lookups == (1 if polls else 0)
    if why == "another namespace":
        state = world.side._states["a"]
        if polls:
            assert state.lookup is None, "LMCache would take it for the first one, of the same request"
        while world.side.match(request, 0) is None:
            world.side.build_plans()
        assert state.lookup is world.lookups[1]
    world.end(request)


def test_a_request_aborted_at_once_holds_nothing() -> None:
    world = World()
    request = world.request(polls=2)
    world.send(request)
    world.arrive(request)
    world.end(request)
    assert len(world.early) == 0
    assert not world.side._states


def test_a_request_that_never_comes_holds_nothing() -> None:
    world = World(lookup_deadline=0.05)
    world.send(world.request("not made", polls=1))
    world.early.cancel("not made")
    world.early.cancel("unknown")
    world.send(world.request("late", polls=1))
    world.early.abort_lost()
    assert (world.side.aborted_lookups, len(world.early)) == (1, 1)
    time.sleep(0.1)
    world.early.abort_lost()
    assert (world.side.aborted_lookups, len(world.early)) == (2, 0)
    late = world.request("late")
    world.arrive(late)
    world.end(late)


def test_an_error_ends_no_request() -> None:
    world = World()
    world.side.gate.costs = None  # type: ignore[assignment]
    world.send(world.request())
    assert world.lookups == []
    assert not world.side.gate.lock.locked()


# -- what the thread reads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [0, 16, 24, 32])
@pytest.mark.parametrize("known", [(), (16,), (32, 16)])
def test_peeking_at_a_namespace_remembers_nothing(known: tuple[int, ...], named: int) -> None:
    salts = CacheSalts("model", 16)
    prompt, other = list(range(100)), list(range(50, 150))
    for length in known:
        salts.of(prompt, "tenant", {"lmcache_rag.ingest": True, "lmcache_rag.prefix": length})
        salts.of(other, "tenant", {"lmcache_rag.ingest": True, "lmcache_rag.prefix": length})
    params = {"lmcache_rag.prefix": named} if named else {}
    before = {tenant: list(own) for tenant, own in salts._named.items()}
    found = salts.peek(prompt, "tenant", params)
    assert {tenant: list(own) for tenant, own in salts._named.items()} == before
    assert found == salts.of(prompt, "tenant", params)
    assert found != salts.peek(prompt, "another", params)


def test_an_ingested_chunk_may_be_resident() -> None:
    pool, block = Pool(), 8
    resident = ResidentChunks(pool, block)
    chunks, prefix, chunk = GpuChunks(resident), list(range(8)), list(range(100, 124))
    prompt, params = [*prefix, *chunk, 1, 2], {"lmcache_rag.chunks": [[8, 32]]}
    assert not chunks.may_be_enough(params, prompt)
    for start in (0, 1):
        own = [*range(start, start + 8)]
        resident.remember(array("q", own + chunk), chunk_hashes(None, own + chunk, block), 8)
    assert chunks.may_be_enough(params, prompt)
    assert not chunks.may_be_enough(None, prompt)
    assert not chunks.may_be_enough({"lmcache_rag.chunks": [[8, 32], [32, 80]]}, [*prompt, *range(200, 400)])
    for start in (0, 1):
        assert chunks.may_be_enough(params, prompt)
        own = [*range(start, start + 8)]
        resident.forget(array("q", own + chunk), chunk_hashes(None, own + chunk, block), 8)
    assert not chunks.may_be_enough(params, prompt)
    assert not resident._digests, "it would grow without end"
