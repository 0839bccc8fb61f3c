"""No block is given to another request while LMCache may still store from it; with LMCache's own worker adapter.

See test_internals.py.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from contract_kit import CHUNK

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import zmq
    from lmcache.integration.vllm import lmcache_mp_connector, lmcache_mp_metadata
    from lmcache.integration.vllm import vllm_multi_process_adapter as adapters
    from lmcache.v1.multiprocess import custom_types, futures
    from lmcache.v1.multiprocess.transfer_context import worker_transfer
    from vllm.v1.outputs import KVConnectorOutput
    from vllm_cpu_kit import free_port

    from lmcache_rag.connector import connector, lmcache_client, lmcache_transfers
    from lmcache_rag.connector.config import ConnectorOptions
    from lmcache_rag.connector.gpu_chunks import PrefixCache
    from lmcache_rag.connector.lmcache_client import from_lmcache, to_lmcache
    from lmcache_rag.connector.metadata import BlendResult, BlendWorkerMetadata
    from lmcache_rag.connector.scheduler import BlendScheduler
    from lmcache_rag.connector.transfers import FinishedGate
    from lmcache_rag.protocol import UNTIL

pytestmark = [pytest.mark.filterwarnings("ignore")]

LONG = 3600.0


class Events:
    """Events of a device on which every copy is done at once."""

    def create_event(self, device: Any) -> str:
        return "event"

    def record_event(self, event: str, stream: Any) -> None:
        """It has happened."""

    def export_event(self, event: str, device: Any) -> bytes:
        return b"handle"

    def import_event(self, handle: bytes, device: Any) -> str:
        return "event"

    def query_event(self, event: str) -> bool:
        return True

    def synchronize_event(self, event: str, device: Any) -> None:
        """It has happened."""


class Worker:
    """LMCache's worker adapter and transfer context, of a server that answers when the test says so."""

    def __init__(self) -> None:
        strategy = adapters.ParallelStrategy(**{field.name: 1 for field in fields(adapters.ParallelStrategy)})
        url = f"tcp://localhost:{free_port()}"
        with lmcache_client.allow_missing_server(CHUNK):
            self.adapter = adapters.LMCacheMPWorkerAdapter(
                url, zmq.Context.instance(), "m", 16, strategy, mq_timeout=LONG
            )
        self.adapter._ensure_heartbeat_started = lambda: None
        self.answers: list[Any] = []
        self.keys: list[Any] = []
        self.ended, self.unknown = False, 0
        client = SimpleNamespace(store=self._store, retrieve=self._store)
        self.adapter.transfer_ctx = worker_transfer.LMCacheDrivenTransferContext(1, client)
        self.adapter.transfer_ctx._device, self.adapter.transfer_ctx._event_backend = "cpu", Events()
        self.adapter.transfer_ctx._mq_timeout = LONG
        self.connector: Any = object.__new__(connector.CacheBlendConnector)
        self.connector.worker_adapter, self.connector._worker = self.adapter, None
        self.connector._stores, self.connector._can_store = FinishedGate(), True
        self.connector.lazy_offload = self.connector._enable_kv_events = False
        self.connector._report_request_errors = False
        self.connector._kv_events_hook_called = True
        self.connector._in_flight = lmcache_transfers.InFlightTransfers(
            self.adapter, lambda: self.ended, self._is_unknown
        )

    def _is_unknown(self) -> None:
        self.unknown += 1

    def _store(self, key: Any, *more: Any) -> Any:
        answer: Any = futures.MessagingFuture()
        self.keys.append(key)
        self.answers.append(answer)
        return answer

    def store(self, request_id: str, start: int = 0) -> Any:
        """Send a store of one chunk, as LMCache's connector does."""
        tokens = to_lmcache(range(start + CHUNK))
        op = adapters.LoadStoreOp(tokens, [[1, 2, 3, 4]], start, start + CHUNK)
        self.adapter.batched_submit_store_requests([request_id], [op], "event", ["salt"], [{"lmcache.x": 1}])
        return self.answers[-1]

    def load(self, request_id: str) -> Any:
        """Ask for a chunk of an exact prefix, as LMCache's connector does."""
        op = adapters.LoadStoreOp(to_lmcache(range(CHUNK)), [[1, 2, 3, 4]], 0, CHUNK)
        self.adapter.batched_submit_retrieve_requests([request_id], [op], "event", ["salt"], [None])
        return self.answers[-1] if self.answers else None

    def loaded(self) -> tuple[set[str], set[int]]:
        """What a step reports as loaded, and the blocks that are to be computed."""
        return set(self.connector.get_finished(set())[1]), self.connector.get_block_ids_with_load_errors()

    def stored(self, *ended: str) -> set[str]:
        """What a step reports as stored, when these requests have ended."""
        return set(self.connector.get_finished(set(ended))[0])


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setattr(lmcache_client, "FIRST_WAIT_S", 0.01)
    made = Worker()
    yield made
    made.adapter.req_client.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmcache_transfers, "STORE_S", 0.2)
    monkeypatch.setattr(lmcache_transfers, "GRACE_S", 0.1)


def settle() -> None:
    time.sleep(0.35)


def test_a_request_is_freed_after_its_last_store(worker: Worker) -> None:
    first, second = worker.store("r"), worker.store("r", CHUNK)
    assert worker.adapter.store_futures.keys() == {"r"}, "LMCache knows the last one only"
    first.set_result((b"handle", True))
    assert worker.stored("r") == set()
    second.set_result((b"handle", True))
    assert worker.stored() == {"r"}
    assert worker.stored() == set()


def test_a_first_store_that_is_done_frees_nothing(worker: Worker) -> None:
    worker.store("r").set_result((b"handle", True))
    assert worker.stored() == set()
    second = worker.store("r", CHUNK)
    assert worker.stored("r") == set()
    assert "r" in worker.adapter._returned_finished, "LMCache reports it; where it does not, it has mended that"
    second.set_result((b"handle", True))
    assert worker.stored() == {"r"}


def test_a_store_has_a_deadline(worker: Worker) -> None:
    before = time.time()
    worker.store("r")
    (key,) = worker.keys
    assert before + lmcache_transfers.STORE_S <= key.request_configs[UNTIL] <= time.time() + lmcache_transfers.STORE_S
    assert key.request_configs["lmcache.x"] == 1
    assert (key.start, key.end, key.cache_salt) == (0, CHUNK, "salt")


@pytest.mark.parametrize("healthy", [True, False])
def test_blocks_are_kept_until_the_fence(worker: Worker, quick: None, healthy: bool) -> None:
    """Whether a heartbeat has failed or not; LMCache stands still, or never answers since the call failed in it."""
    worker.store("r")
    if not healthy:
        worker.adapter._health_event.clear()
    assert worker.stored("r") == set()
    assert worker.stored() == set()
    settle()
    assert worker.stored() == {"r"}
    assert not worker.adapter.store_futures


def test_a_server_that_ended_reads_nothing(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmcache_transfers, "STORE_S", LONG)
    monkeypatch.setattr(lmcache_transfers, "_ENDED_POLL_S", 0.0)
    worker.store("r")
    worker.adapter._health_event.clear()
    assert worker.stored("r") == set()
    worker.ended = True
    assert worker.stored() == {"r"}


def test_an_answer_with_an_error_waits_for_the_fence(worker: Worker, quick: None) -> None:
    worker.store("r").set_exception(ConnectionError("lost"))
    assert worker.stored("r") == set(), "and does not end the worker"
    settle()
    assert worker.stored() == {"r"}


@pytest.mark.parametrize("healthy", [True, False])
def test_a_preemption_waits_once_for_all_stores(
    worker: Worker, quick: None, healthy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, long = futures.DeviceMessagingFuture.wait, list[float]()

    def wait(self: Any, timeout: float) -> bool:
        if timeout == LONG:
            long.append(timeout)
        return timeout != LONG and stock(self, timeout)

    monkeypatch.setattr(futures.DeviceMessagingFuture, "wait", wait)
    for number in range(5):
        worker.store(f"r{number}")
    if not healthy:
        worker.adapter._health_event.clear()
    worker.adapter.handle_preemptions(False)
    assert time.time() < worker.keys[-1].request_configs[UNTIL], "without a preemption it does not wait"
    worker.adapter.handle_preemptions(True)
    assert time.time() > max(key.request_configs[UNTIL] for key in worker.keys), "the fence is passed"
    assert long == [], "LMCache waits for each store, as long as its own timeout"


def test_a_preemption_does_not_wait_for_a_dead_server(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmcache_transfers, "STORE_S", LONG)
    worker.ended = True
    worker.store("r")
    begin = time.monotonic()
    worker.adapter.handle_preemptions(True)
    assert time.monotonic() - begin < LONG / 100


def test_a_preemption_does_not_wait_for_a_broken_copy(
    worker: Worker, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LMCache was killed after its answer: its event is never signalled."""

    def hangs(*_: Any) -> None:
        pytest.fail("the host would wait for the event for ever")

    events = worker.adapter.transfer_ctx._event_backend
    monkeypatch.setattr(events, "query_event", lambda event: False, raising=False)
    monkeypatch.setattr(events, "synchronize_event", hangs, raising=False)
    worker.store("r").set_result((b"handle", True))
    worker.adapter.handle_preemptions(True)
    assert time.time() > worker.keys[-1].request_configs[UNTIL], "the fence is passed"


def test_a_preemption_waits_for_an_answer(worker: Worker) -> None:
    worker.store("r").set_result((b"handle", True))
    worker.adapter.handle_preemptions(True)
    assert worker.unknown == 0


def test_a_refusal_in_time_means_an_unknown_worker(worker: Worker, quick: None) -> None:
    worker.store("fenced")
    settle()
    worker.answers[-1].set_result((b"", False))
    assert worker.stored("fenced") == {"fenced"}
    assert worker.unknown == 0, "refused after its deadline"
    worker.store("r").set_result((b"", False))
    assert worker.stored("r") == {"r"}
    assert worker.unknown == 1


def heartbeat(worker: Worker) -> tuple[Any, list[str]]:
    """LMCache's heartbeat of a server that answers every ping, and what was registered by it."""

    def answer(instance_id: int | None) -> Any:
        future: Any = futures.MessagingFuture()
        future.set_result(True)
        return future

    registered: list[str] = []
    worker.adapter.req_client.ping = answer
    registration = lmcache_client.Registration(worker.adapter)
    beat = adapters.HeartbeatThread(worker.adapter.req_client, worker.adapter._health_event, 1.0, 7)
    beat.register_recover_callback(lambda: not registered.append("again"))  # type: ignore[func-returns-value]
    return (beat, registration), registered


def test_an_unknown_worker_registers_again(worker: Worker) -> None:
    (beat, registration), registered = heartbeat(worker)
    for _ in range(3):
        beat._execute()
    assert registered == []
    registration.renew()
    beat._execute()
    assert not worker.adapter.is_healthy
    for _ in range(2):
        beat._execute()
    assert (worker.adapter.is_healthy, registered) == (True, ["again"])


def test_a_worker_that_was_paused_registers_again(worker: Worker) -> None:
    (beat, registration), registered = heartbeat(worker)
    beat._execute()
    registration._last -= 2 * registration._silent
    beat._execute()
    assert not worker.adapter.is_healthy
    for _ in range(2):
        beat._execute()
    assert (worker.adapter.is_healthy, registered) == (True, ["again"])


def test_a_load_has_a_deadline_and_is_answered(worker: Worker) -> None:
    before = time.time()
    answer = worker.load("r")
    (key,) = worker.keys
    assert before + lmcache_transfers.STORE_S <= key.request_configs[UNTIL] <= time.time() + lmcache_transfers.STORE_S
    assert worker.loaded() == (set(), set())
    answer.set_result((b"handle", True))
    assert worker.loaded() == ({"r"}, set())
    assert worker.stored("r") == {"r"}


def test_a_late_loads_blocks_are_kept_until_the_fence(worker: Worker, quick: None) -> None:
    worker.load("r")
    worker.adapter._health_event.clear()
    assert worker.loaded() == ({"r"}, {1, 2, 3, 4}), "it is computed"
    assert worker.stored("r") == set(), "LMCache may still write to its blocks"
    settle()
    assert worker.stored() == {"r"}


def test_a_load_that_is_not_answered_is_computed(worker: Worker, quick: None) -> None:
    worker.load("r")
    assert worker.loaded() == (set(), set())
    settle()
    assert worker.loaded() == ({"r"}, {1, 2, 3, 4})
    assert worker.unknown == 0


def test_a_preemption_waits_for_late_loads_only(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.load("waits")
    worker.adapter.handle_preemptions(True)
    assert time.time() < worker.keys[-1].request_configs[UNTIL], "it keeps its blocks"
    assert worker.loaded() == (set(), set())
    monkeypatch.setattr(lmcache_transfers, "STORE_S", 0.2)
    monkeypatch.setattr(lmcache_transfers, "GRACE_S", 0.1)
    worker.answers[-1].set_result((b"handle", True))
    worker.load("late")
    worker.adapter._health_event.clear()
    assert worker.loaded()[0] == {"waits", "late"}
    worker.adapter.handle_preemptions(True)
    assert time.time() > worker.keys[-1].request_configs[UNTIL]


@pytest.mark.parametrize("lazy", [False, True])
def test_a_transfer_that_raises_keeps_the_worker_alive(worker: Worker, quick: None, lazy: bool) -> None:
    """Through shared memory LMCache's timeout is an error. It may have been sent, and blocks are kept for that long."""

    def fails(*_: Any) -> None:
        raise TimeoutError("PREPARE_STORE timed out")

    worker.adapter.lazy_offload = lazy
    worker.adapter.transfer_ctx._req_client = SimpleNamespace(store=fails, retrieve=fails)
    op = adapters.LoadStoreOp(to_lmcache(range(CHUNK)), [[1, 2, 3, 4]], 0, CHUNK)
    worker.adapter.batched_submit_store_requests(["r"], [op], "event")
    assert worker.connector._in_flight.requests_in_use() == {"r"}
    assert worker.adapter._completed_store_requests == ({"r": 1} if lazy else {})
    worker.load("loads")
    settle()
    assert worker.connector._in_flight.requests_in_use() == set()
    worker.adapter.lazy_offload = False
    assert worker.loaded() == ({"loads"}, {1, 2, 3, 4})
    assert worker.stored("r") == {"r"}


def test_an_engine_driven_worker_waits_no_longer(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks LMCache in a step of vLLM, which stands still meanwhile; also after it was registered again."""
    for _ in range(2):
        context = worker_transfer.EngineDrivenTransferContext(1, worker.adapter.req_client)
        context._engine_driven_context = SimpleNamespace(mq_timeout=LONG)
        monkeypatch.setattr(context, "register", lambda *_, **more: None)
        monkeypatch.setattr(adapters, "create_transfer_context", lambda *_, made=context, **more: made)
        worker.adapter._layout_hints, worker.adapter.engine_group_infos = None, []
        worker.adapter._send_register_kv_caches_request({})
        assert context.engine_driven_context.mq_timeout == lmcache_transfers.STORE_S


def test_what_the_adapter_remembers_is_bounded(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_rag.connector.lmcache_client.REMEMBERED", 50)
    lmcache_client.bound_memory(worker.adapter)
    for number in range(100):
        assert worker.stored(f"r{number}") == {f"r{number}"}
    assert len(worker.adapter._returned_finished) == 50
    assert worker.stored("r99") == set(), "vLLM repeats what was reported"
    pending = worker.adapter.req_client._message_queue_client.pending_futures
    for number in range(1000, 1100):
        pending[number] = "call"
    assert len(pending) == 50
    assert pending.pop(1099, None) == "call"


def test_a_worker_uses_the_server_that_we_look_at() -> None:
    text = inspect.getsource(lmcache_mp_connector.LMCacheMPConnector.__init__)
    assert "ranks_per_node = parallel_strategy.vllm_world_size // n_servers" in text
    assert "parallel_strategy.vllm_worker_id // ranks_per_node" in text


def test_lmcaches_receipts_of_every_rank_arrive() -> None:
    def receipt(name: str) -> Any:
        return lmcache_mp_metadata.LMCacheMPWorkerMetadata({name: 1}, set())

    result = BlendResult("r", 0, 0, 0, 0, 0.0, 0.0)
    ranks = [
        BlendWorkerMetadata([result], lmcache=receipt("a")),
        BlendWorkerMetadata([result]),
        BlendWorkerMetadata(lmcache=receipt("a")),
    ]
    whole: Any = ranks[0]
    for rank in ranks[1:]:
        whole = whole.aggregate(rank)
    assert whole.results == [result]
    assert whole.lmcache.completed_store_requests == {"a": 2}

    heard: list[Any] = []
    one: Any = object.__new__(connector.CacheBlendConnector)
    one._enable_kv_events, one.lazy_offload = False, True
    one._scheduler = BlendScheduler(ConnectorOptions(), CHUNK, SimpleNamespace(), PrefixCache(16))
    one._lazy_offload_manager = SimpleNamespace(
        on_store_results=lambda failed, done: heard.append(done) or SimpleNamespace(sessions_to_end=())
    )
    one.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=whole))
    assert heard == [{"a": 2}]


def test_lazy_offload_keeps_blocks_until_the_fence(worker: Worker, quick: None) -> None:
    worker.connector.lazy_offload = worker.adapter.lazy_offload = True
    worker.store("r")
    worker.adapter._health_event.clear()
    worker.connector.get_finished({"r"})
    assert worker.connector.build_connector_worker_meta().lmcache.completed_store_requests == {}
    settle()
    assert worker.connector.build_connector_worker_meta().lmcache.completed_store_requests == {"r": 1}


@pytest.mark.parametrize("fails", ["when it is sent", "when it is answered"])
def test_an_error_of_a_lookup_is_a_miss(fails: str, caplog: pytest.LogCaptureFixture) -> None:
    """Over gRPC that is how a server that has ended answers."""

    def ask(key: Any, ranks: int) -> Any:
        if fails == "when it is sent":
            raise ConnectionError("gone")
        future: Any = futures.MessagingFuture()
        future.set_exception(ConnectionError("gone"))
        return future

    def create(tokens: Any, start: int, end: int, name: str, salt: str, configs: Any) -> Any:
        return custom_types.IPCCacheServerKey("m", 1, None, to_lmcache(from_lmcache(tokens)), start, end, name, salt)

    adapter = SimpleNamespace(
        _create_key=create, req_clients={"url": SimpleNamespace(cb_unified_lookup=ask)}, tp_size=1
    )
    lookup = lmcache_client.BlendLookup(adapter, "r", list(range(300)), "", None)
    assert lookup.poll(1.0)
    assert lookup.result == (0, ())
    assert "gone" in caplog.text
