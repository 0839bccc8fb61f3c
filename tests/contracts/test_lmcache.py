"""The private parts of LMCache that the connector touches.

See test_internals.py.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from contract_kit import BLOCK, CHUNK, request, sets, takes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lmcache.integration.vllm import lmcache_mp_connector, lmcache_mp_metadata
    from lmcache.integration.vllm import vllm_multi_process_adapter as adapters
    from lmcache.v1.distributed import api
    from lmcache.v1.multiprocess import custom_types, futures
    from lmcache.v1.multiprocess.engine_context import MPCacheServerContext
    from lmcache.v1.multiprocess.modules.blend import lookup
    from lmcache.v1.multiprocess.modules.blend.matcher import BlendTokenRangeMatcher
    from lmcache.v1.multiprocess.modules.lookup import resolve_prefetched_obj_keys
    from lmcache.v1.multiprocess.session import Session
    from lmcache.v1.multiprocess.token_hasher import TokenHasher
    from lmcache.v1.multiprocess.transfer_context import worker_transfer
    from lmcache.v1.multiprocess.transport.base import RequestClient
    from lmcache.v1.platform.kv_wrap import wrap_one_kv_cache
    from vllm.distributed.kv_transfer.kv_connector.v1 import base
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import KVConnectorOutput

    from lmcache_rag.budget import Budget
    from lmcache_rag.connector import connector, lmcache_client, lmcache_transfers
    from lmcache_rag.connector.cache_salt import CacheSalts, renumbered
    from lmcache_rag.connector.config import ConnectorOptions
    from lmcache_rag.connector.gpu_chunks import PrefixCache
    from lmcache_rag.connector.lmcache_client import from_lmcache, to_lmcache
    from lmcache_rag.connector.lookup import SchedulerClient
    from lmcache_rag.connector.metadata import BlendPlan
    from lmcache_rag.connector.scheduler import BlendScheduler
    from lmcache_rag.connector.transfers import FinishedGate


pytestmark = [pytest.mark.filterwarnings("ignore")]
KEY = custom_types.IPCCacheServerKey
TOKENS = next(name for name in ("token_bytes", "token_ids") if name in KEY.__dataclass_fields__)  # 0.5.7's, 0.5.6's


def ids(key: Any) -> list[int]:
    """The tokens of a key."""
    return list(from_lmcache(getattr(key, TOKENS)))


def bare() -> Any:
    """Our connector without LMCache's and vLLM's parts, which each test puts in as far as it needs them."""
    one: Any = object.__new__(connector.CacheBlendConnector)
    one._scheduler = BlendScheduler(ConnectorOptions(), CHUNK, SimpleNamespace(), PrefixCache(BLOCK))
    one._scheduler.unsupported = None
    return one


def client(adapter: Any, trackers: dict[str, Any]) -> SchedulerClient:
    return SchedulerClient(adapter, trackers, CacheSalts("model", CHUNK), ConnectorOptions())


def test_lmcaches_connector_has_what_we_read() -> None:
    stock = lmcache_mp_connector.LMCacheMPConnector
    sets(stock, "scheduler_adapter", "worker_adapter", "_hit_alignment_tokens", "_gpu_block_pool", "request_trackers")
    assert "self._vllm_config =" in inspect.getsource(base.KVConnectorBase_V1)
    takes(stock._get_or_create_request_tracker, "request")
    takes(stock._get_request_tracker, "request_id")
    takes(stock._get_connector_metadata)


def test_lmcache_stores_up_to_our_limit_only() -> None:
    one = request("one", list(range(300)), None, {"lmcache.x": 1, "other": 2})
    one.cache_salt = "tenant"
    tracker = lmcache_mp_metadata.LMCacheMPRequestTracker(one)
    assert (tracker.cache_salt, tracker.request_configs) == ("tenant", {"lmcache.x": 1})
    assert one.kv_transfer_params == {"lmcache.x": 1, "other": 2}
    tracker.allocated_block_ids = {0: list(range(20))}
    tracker.num_scheduled_tokens = 300
    tracker.num_vllm_hit_tokens = 0
    tracker.num_stored_tokens = 64
    tracker.max_offload_tokens = 200
    store = lmcache_mp_metadata.LMCacheMPRequestMetadata.GetStoreMetadata(tracker, CHUNK, [BLOCK])
    assert store is not None
    assert (store.op.start, store.op.end) == (64, 192)
    assert lmcache_mp_metadata.LMCacheMPRequestMetadata.GetStoreMetadata(tracker, CHUNK, [BLOCK]) is None


def test_the_calls_of_a_blend_server() -> None:
    takes(RequestClient.cb_protocol_handshake, "client_version")
    takes(RequestClient.cb_unified_lookup, "key", "tp_size")
    rope = ["instance_id", "cos_sin_caches_ipc", "head_size", "is_neox_style"]
    rope += ["group_to_cache", "group_rot", "group_head_size", "kv_quant"]
    assert list(inspect.signature(RequestClient.cb_register_rope).parameters)[1:] == rope
    retrieve = ["key", "match_results", "block_ids", "instance_id", "event_ipc_handle"]
    assert list(inspect.signature(RequestClient.cb_retrieve_pre_computed).parameters)[1:] == retrieve
    assert [*custom_types.CBMatchResult.__dataclass_fields__] == ["old_st", "old_ed", "cur_st", "cur_ed", "hash"]
    found = custom_types.CBUnifiedLookupResult.__dataclass_fields__
    assert {"prefix_coverage_tokens", "non_prefix_segments"} <= set(found)
    takes(wrap_one_kv_cache, "tensor")


def test_the_adapters_have_what_we_use() -> None:
    scheduler, worker = adapters.LMCacheMPSchedulerAdapter, adapters.LMCacheMPWorkerAdapter
    key = [TOKENS, "start", "end", "request_id", "cache_salt", "request_configs"]
    for adapter in (scheduler, worker):
        assert list(inspect.signature(adapter._create_key).parameters)[1:] == key
        takes(adapter._ensure_heartbeat_started)
        sets(adapter, "lmcache_tokens_per_chunk", "is_healthy", "blocks_in_chunk")
    locks = list(inspect.signature(scheduler.free_lookup_locks).parameters)[1:]
    assert [name.removeprefix("packed_") for name in locks[:6]] == ["token_ids", *key[1:]]
    takes(scheduler.end_session, "request_id")
    sets(scheduler, "req_clients", "tp_size")
    sets(worker, "req_client", "transfer_ctx", "instance_id", "kv_caches", "retrieve_futures")
    takes(worker._reregister_kv_caches_callback)
    # Looked up when the heartbeat starts, so an attribute of the object takes its place.
    assert "register_recover_callback(self._reregister_kv_caches_callback)" in inspect.getsource(
        worker._ensure_heartbeat_started
    )


def test_transfers_and_answers() -> None:
    driven = worker_transfer.LMCacheDrivenTransferContext
    sets(driven, "_device", "_event_backend")
    takes(driven.create_recorded_event)
    retrieve = list(inspect.signature(driven.submit_retrieve).parameters)[1:]
    assert [name.lstrip("_") for name in retrieve] == [
        "request_id",
        "key",
        "kv_caches",
        "block_ids",
        "event",
        "blocks_in_chunk",
        "skip_first_n_tokens",
    ]
    takes(futures.MessagingFuture.to_device_future, "device", "event_backend")
    takes(futures.DeviceMessagingFuture.query)
    raw: Any = futures.MessagingFuture()
    assert futures.DeviceMessagingFuture(raw, device="cpu", event_backend=object()).raw_future_ is raw
    raw.set_result((b"", True))
    assert futures.DeviceMessagingFuture(raw, device="cpu", event_backend=object()).query()
    never: Any = futures.MessagingFuture()
    assert not never.wait(0.01)
    with pytest.raises(TimeoutError):
        never.result(0.01)


def test_a_pending_lookups_session_outlives_requests() -> None:
    """LMCache's connector ends it by the adapter's method, which it looks up when the request ends."""
    ended: list[str] = []
    stock = lmcache_mp_connector.LMCacheMPConnector
    one: Any = bare()
    one.request_trackers, one.lazy_offload, one._can_store = {}, False, True

    class Adapter(adapters.LMCacheMPSchedulerAdapter):
        is_healthy = True

        def __init__(self) -> None:
            """No server."""

        def cleanup_lookup_result(self, request_id: str) -> None:
            """Nothing."""

        def end_session(self, request_id: str) -> None:
            ended.append(request_id)

    one.scheduler_adapter = Adapter()
    one._client = client(one.scheduler_adapter, one.request_trackers)
    side = one._scheduler
    side.finish = lambda request: {}
    waits = SimpleNamespace(request_id="waits", poll=lambda seconds: False)
    side._aborted.add(waits, time.perf_counter(), 0.0)
    one._role = base.KVConnectorRole.SCHEDULER
    for name in ("waits", "other"):
        later, params = one.request_finished(request(name, [1], None), [])
        assert (later, params) == (True, {"lmcache_rag": {}})
    assert ended == ["other"]
    one.scheduler_adapter.end_session("waits")
    assert ended == ["other", "waits"], "what holds the look-up can end it"
    assert one.has_pending_push_work(), "an engine without requests goes on for it"
    side._aborted._lookups.clear()
    assert not one.has_pending_push_work()
    assert "self.scheduler_adapter.end_session(" in inspect.getsource(stock.request_finished)
    assert "self.connector.has_pending_push_work()" in inspect.getsource(Scheduler.has_requests)


def test_lmcache_gets_block_reports_after_a_token() -> None:
    stock = lmcache_mp_connector.LMCacheMPConnector
    takes(adapters.LMCacheMPSchedulerAdapter.report_block_allocations, "records")
    assert "self.scheduler_adapter.report_block_allocations(" in inspect.getsource(stock)

    told: list[Any] = []

    class Adapter:
        is_healthy, free_lookup_locks = True, None

        def report_block_allocations(self, records: list[Any]) -> None:
            told.append(records)

        def cleanup_lookup_result(self, request_id: str) -> None:
            """Nothing is left over."""

        def end_session(self, request_id: str) -> None:
            told.append(request_id)

    one: Any = bare()
    one.request_trackers, one.lazy_offload, one.scheduler_adapter = {}, False, Adapter()
    one._can_store = True
    one._role = base.KVConnectorRole.SCHEDULER
    one._client = client(one.scheduler_adapter, one.request_trackers)
    one._client._releases.send = list
    for step in range(1, 4):
        one.scheduler_adapter.report_block_allocations([f"step {step}"])
        one._client.on_step()
    assert told == [], "vLLM schedules a second step before it has delivered the token of the first"
    one._client.on_step()
    one._client.on_step()
    assert told == [["step 1"]]
    one.request_finished(request("r", [1], None), [])
    assert told == [["step 1"], ["step 2", "step 3"], "r"]
    one._client.on_step()
    one._client._reports.send()
    assert len(told) == 3


def test_a_request_is_freed_once_whatever_lmcache_says() -> None:
    """The connector is asked before vLLM hears; vLLM hears of loads first."""
    text = inspect.getsource(Scheduler._update_from_kv_xfer_finished)
    order = [text.index(f"self.connector.{word}" if "(" in word else f"in kv_connector_output.{word}") for word in (
        "update_connector_output(", "finished_recving", "finished_sending",
    )]  # fmt: skip
    assert order == sorted(order)
    stock = lmcache_mp_connector.LMCacheMPConnector
    assert "self.get_finished(" in inspect.getsource(stock.get_transfer_results)

    one: Any = bare()
    one._stores = FinishedGate()
    one._enable_kv_events = one.lazy_offload = False
    one._scheduler.remove("a", delayed=True)
    output = KVConnectorOutput(finished_recving={"a"}, finished_sending={"a", "b"})
    one.update_connector_output(output)
    assert (output.finished_recving, output.finished_sending) == ({"a"}, {"b"})
    one._can_store, one._worker, one._in_flight = True, None, SimpleNamespace(requests_in_use=lambda: {"s"})
    one.worker_adapter = SimpleNamespace(get_finished=lambda ids: (ids, None), retrieve_futures={"c": None})
    assert one.get_finished({"c", "d"}) == ({"d"}, None)
    one.worker_adapter.retrieve_futures.clear()
    assert one.get_finished({"s"}) == ({"c"}, None), "s is still being stored"
    one._in_flight = SimpleNamespace(requests_in_use=set)
    assert one.get_finished(set()) == ({"s"}, None)

    ended: set[str] = set()
    one._worker = SimpleNamespace(
        cancel=ended.update, finish=lambda: None, take_received=lambda: {"e"}, receiving={"f", "g"}
    )
    assert one.get_finished({"f", "h"}) == ({"h"}, {"e"}), "f is still being written to"
    assert ended == {"f", "h"}


def test_vllm_waits_for_a_background_blend() -> None:
    """A claim that is asynchronous: blocks for it and no more, and the request goes on when a worker says so."""
    assert "self.connector.on_new_request(request)" in inspect.getsource(Scheduler.add_request)
    schedule = inspect.getsource(Scheduler.schedule)
    assert "delay_cache_blocks=load_kv_async" in schedule
    assert "request.status = RequestStatus.WAITING_FOR_REMOTE_KVS" in schedule
    done = inspect.getsource(Scheduler._update_from_kv_xfer_finished)
    assert "self.finished_recving_kv_req_ids.add(req_id)" in done
    assert "cache_blocks(request, request.num_computed_tokens)" in inspect.getsource(
        Scheduler._update_waiting_for_remote_kv
    )
    abort = inspect.getsource(Scheduler.finish_requests)
    assert "delay_free_blocks" in abort, "blocks that are still being written to are kept"


def test_the_null_block_is_nobodys() -> None:
    from vllm.v1.core.block_pool import BlockPool

    from lmcache_rag.connector.job import NULL_BLOCK

    pool = BlockPool(4, False, 16)
    assert (pool.null_block.block_id, pool.null_block.is_null) == (NULL_BLOCK, True)
    assert NULL_BLOCK not in {block.block_id for block in pool.get_new_blocks(3)}


def test_exact_prefixes_are_asked_for_in_whole_chunks() -> None:
    session = Session("s", TokenHasher(chunk_size=CHUNK, hash_algorithm="blake3"))
    session.set_tokens(to_lmcache(range(200)))
    assert len(session.get_hashes(64, 192)) == 2
    with pytest.raises(AssertionError):
        session.get_hashes(64, 191)
    # No tokens behind the end are needed.
    short = Session("s", TokenHasher(chunk_size=CHUNK, hash_algorithm="blake3"))
    short.set_tokens(to_lmcache(range(192)))
    assert short.get_hashes(64, 192) == session.get_hashes(64, 192)
    for function in (MPCacheServerContext.resolve_obj_keys, resolve_prefetched_obj_keys):
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        reads = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Call) and TOKENS in ast.unparse(n)]
        assert set(reads) <= {
            "session.set_tokens(list(key.token_ids))",
            "session.set_tokens(key.token_bytes)",
            "ctx.token_hasher.compute_chunk_hashes(list(key.token_ids), start=key.start, end=key.end)",
            "ctx.token_hasher.compute_packed_chunk_hashes(key.token_bytes, start=key.start, end=key.end)",
            "list(key.token_ids)",
        }


def test_a_prefix_is_named_by_the_tokens_up_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is loaded, and when it is not. Whoever asks for a load then lets LMCache's thread send it."""
    sent: list[Any] = []
    monkeypatch.setattr(lmcache_transfers.time, "sleep", lambda seconds: sent.append("GIL"))

    def create(tokens: Any, start: int, end: int, *more: Any) -> Any:
        return list(from_lmcache(tokens)), start, end

    transfer = SimpleNamespace(
        create_recorded_event=lambda: "event",
        submit_retrieve=lambda name, key, *more, skip_first_n_tokens: sent.append((*key, skip_first_n_tokens)),
    )
    worker = SimpleNamespace(
        _create_key=create, transfer_ctx=transfer, kv_caches={}, lmcache_tokens_per_chunk=64, blocks_in_chunk=4
    )
    plan = BlendPlan("r", tuple(range(500)), 80, 191, (), 400, tuple(range(25)), "query", Budget())
    lmcache_transfers.LMCacheLoader(worker, 1.0).submit_exact(plan)
    assert sent == [(list(range(192)), 64, 192, 16), "GIL"]
    lmcache_transfers.LMCacheLoader(worker, 1.0).give_back(plan)
    assert sent[2:] == sent[:2]
    del sent[2:]

    client = SimpleNamespace(cb_unified_lookup=lambda key, ranks: None)
    keyed = SimpleNamespace(no_worker_id_version=lambda: KEY("m", 1, None, to_lmcache(()), 0, 0, "r"))
    scheduler = SimpleNamespace(
        _create_key=lambda *given: keyed,
        req_clients={"url": client},
        tp_size=1,
        free_lookup_locks=lambda *given: sent.append(given),
    )
    look_up = lmcache_client.BlendLookup(scheduler, "r", list(range(500)), "salt", None)
    look_up.release_prefix(0, 128)
    assert sent[2:] == [(to_lmcache(range(128)), 0, 128, "r", "salt", None)]


def test_the_chunk_index_ignores_prefix_and_tenant() -> None:
    """So the same chunk needs other numbers in each namespace."""
    prefix, other, chunk = list(range(CHUNK)), list(range(900, 900 + CHUNK)), list(range(100, 100 + 2 * CHUNK))
    hasher = TokenHasher(chunk_size=CHUNK, hash_algorithm="blake3")

    def index(renumber: Any) -> tuple[BlendTokenRangeMatcher, list[int]]:
        matcher = BlendTokenRangeMatcher(CHUNK)
        for name, before in (("a", prefix), ("b", other)):
            tokens = renumber([*before, *chunk], name)
            hashes = [hasher.hash_to_bytes(one) for one in hasher.compute_chunk_hashes(tokens)]
            matcher.on_new_token_hashes(tokens, hashes, start_chunk_idx=1)
        found = [matcher.match_sub_sequence(renumber([*before, 5, *chunk], name)) for name, before in places]
        hits = {match.hash for matches in found for match in matches}
        return matcher, [len(hits), *map(len, found)]

    places = (("a", prefix), ("b", other), ("c", prefix))
    assert index(lambda tokens, name: tokens)[1] == [2, 2, 2, 2], "whoever came last serves everybody"
    assert index(renumbered)[1] == [4, 2, 2, 0]


@pytest.mark.parametrize("adapter", [adapters.LMCacheMPSchedulerAdapter, adapters.LMCacheMPWorkerAdapter])
def test_every_key_uses_its_namespaces_token_numbers(adapter: Any) -> None:
    one = object.__new__(adapter)
    one.parallel_strategy = SimpleNamespace(num_kv_readers=1, kv_world_size=1, kv_worker_id=0)
    one.model_name = "m"
    lmcache_client.renumber_tokens(one)
    keys = [
        one._create_key(to_lmcache([1, 2, 3]), 0, 3, "r", "a"),
        one._create_key(
            to_lmcache([1, 2, 3]), start=0, end=3, request_id="r", cache_salt="a", request_configs={"x": 1}
        ),
    ]
    assert [ids(key) for key in keys] == [renumbered([1, 2, 3], "a")] * 2
    assert [(key.start, key.end, key.cache_salt, key.request_configs) for key in keys] == [
        (0, 3, "a", None),
        (0, 3, "a", {"x": 1}),
    ]
    made = ast.walk(ast.parse(inspect.getsource(adapters)))
    calls = [n for n in made if isinstance(n, ast.Call) and ast.unparse(n.func) == "IPCCacheServerKey"]
    assert len(calls) == 2, "one in each adapter's _create_key"


def test_a_salt_that_lmcache_does_not_take_is_an_error() -> None:
    for bad in ("a/b", "a@b", "x" * 129):
        with pytest.raises(ValueError, match="cache_salt"):
            KEY("m", 1, None, to_lmcache((1,)), 0, 1, "r", bad)


def test_the_server_reads_a_prompt_once() -> None:
    """Later questions and the retrieve come without token ids; the server must not look at them there."""
    folder = Path(lookup.__file__).parent
    tree = ast.parse((folder / "lookup.py").read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    asked = functions["cb_unified_lookup"]
    first = next(n for n in asked.body if isinstance(n, ast.If) and ast.unparse(n.test) == "job is None")
    # Segmented prefixes are an option of the server that `serve` leaves off.
    segmented = [
        n for n in ast.walk(asked) if isinstance(n, ast.If) and ast.unparse(n.test).startswith("segmented and")
    ]
    allowed = {id(n) for branch in (first, *segmented) for n in ast.walk(branch)}
    for name in ("cb_unified_lookup", "_poll_prefix_leg", "_sparse_prefetch_submit", "_sparse_classify"):
        for node in ast.walk(functions[name]):
            reads = isinstance(node, ast.Attribute) and (
                node.attr in (TOKENS, "start", "end") or ast.unparse(node) == "key.num_tokens"
            )
            assert not reads or id(node) in allowed, f"{name} reads {ast.unparse(node)}"
    assert "job = self._cb_jobs.get(rid)" in ast.unparse(asked), "how it knows the prompt again"
    for source in ((folder / "retrieve.py").read_text(), inspect.getsource(api.ipc_key_to_grouped_object_keys)):
        assert TOKENS not in source
        assert "key.start" not in source
        assert "key.end" not in source


def test_a_lookup_sends_the_prompt_once() -> None:
    class Future:
        def __init__(self, found: Any) -> None:
            self.result = lambda seconds: found
            self.wait = lambda seconds: True

    class Client:
        def __init__(self) -> None:
            self.keys: list[Any] = []

        def cb_unified_lookup(self, key: Any, ranks: int) -> Future:
            self.keys.append(key)
            segments = [custom_types.CBMatchResult(64, 128, 200, 264, b"h")]
            return Future(custom_types.CBUnifiedLookupResult(64, segments) if len(self.keys) == 3 else None)

    def create(tokens: list[int], start: int, end: int, name: str, salt: str, configs: Any) -> Any:
        return KEY("m", 1, None, tokens, start, end, name, salt, configs, 1)

    client = Client()
    adapter = SimpleNamespace(_create_key=create, req_clients={"url": client}, tp_size=1)
    asked = lmcache_client.BlendLookup(adapter, "r", list(range(300)), "tenant", None)
    assert asked.poll(1.0)
    assert asked.result is not None
    assert asked.result[0] == 64
    assert asked._prefix == list(range(64)), "the rest of the prompt is let go of"
    assert [(m.start, m.end, m.old_start) for m in asked.result[1]] == [(200, 264, 64)]
    assert [len(ids(key)) for key in client.keys] == [300, 0, 0]
    assert {(key.request_id, key.cache_salt, key.model_name, key.num_kv_readers) for key in client.keys} == {
        ("r", "tenant", "m", 1)
    }
