"""A real LMCache server with our guard in it, and one that is not there or comes back as another.

See test_internals.py.
"""

from __future__ import annotations

import inspect
import json
import pickle
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from contract_kit import CHUNK

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import httpx
    import torch
    import zmq
    from lmcache.integration.vllm import vllm_multi_process_adapter as adapters
    from lmcache.integration.vllm.vllm_multi_process_adapter import ParallelStrategy
    from lmcache.v1.multiprocess.custom_types import (
        CBMatchResult,
        IPCCacheServerKey,
        RegisterEngineDrivenContextPayload,
    )
    from lmcache.v1.multiprocess.modules.blend import BlendModule
    from lmcache.v1.multiprocess.modules.lmcache_driven_transfer import LMCacheDrivenTransferModule
    from lmcache.v1.multiprocess.request_handler import iter_request_handlers
    from lmcache.v1.multiprocess.transport.factory import RequestClientFactory
    from vllm_cpu_kit import Process, answers, free_port, until

    from lmcache_rag import protocol
    from lmcache_rag.connector import lmcache_client
    from lmcache_rag.connector.lmcache_server.modules import Guard
    from lmcache_rag.connector.lmcache_server.settings import INDEX_SIZE, ServerSettings
    from lmcache_rag.connector.server_guard import MODULE
    from lmcache_rag.protocol import FORGET, INGEST, PREFIX, UNTIL

pytestmark = [pytest.mark.filterwarnings("ignore")]


@dataclass(frozen=True)
class Served:
    """LMCache's server."""

    port: int
    url: str
    tier: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, port, http = tmp_path_factory.mktemp("guarded"), free_port(), free_port()
    tier = f"{folder}/redis://user:s3cret@tier"  # a folder whose name looks like an address with a password
    options = f"--engine-type blend --supported-transfer-mode auto --chunk-size {CHUNK} --l1-size-gb 1 --host localhost"
    more = f"--eviction-policy LRU --port {port} --http-host 127.0.0.1 --http-port {http} --server-module"
    command = ["lmcache", "server", *options.split(), *more.split(), json.dumps({"module_path": MODULE})]
    command += ["--l2-adapter", json.dumps({"type": "fs", "base_path": tier})]
    process = Process(command, folder / "lmcache.log")
    try:
        process.wait_for(lambda: answers(f"http://127.0.0.1:{http}/healthcheck"), 120)
        yield Served(port, f"http://127.0.0.1:{http}", Path(tier))
    finally:
        process.kill()


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    client = RequestClientFactory.create(f"tcp://localhost:{served.port}", context=zmq.Context.instance())
    assert client.get_chunk_size().result(timeout=10) == CHUNK
    yield client
    client.close()


def key(until: float | None) -> Any:
    configs = None if until is None else {UNTIL: until}
    return IPCCacheServerKey.from_token_ids("m", 1, 0, list(range(CHUNK)), 0, CHUNK, "r", "", 1, configs)


def test_a_load_that_nobody_waits_for_is_refused(client: Any) -> None:
    match = [CBMatchResult(64, 64 + CHUNK, 128, 128 + CHUNK, b"h" * 32)]
    late = client.cb_retrieve_pre_computed(key(time.time() - 1), match, [[1, 2, 3]], 7, b"")
    assert late.result(timeout=10) == (b"", False)
    # In time it goes on to LMCache, which knows no worker 7 and then gives no answer.
    for until in (time.time() + 60, None):
        with pytest.raises(TimeoutError):
            client.cb_retrieve_pre_computed(key(until), match, [[1, 2, 3]], 7, b"").result(timeout=1)


def test_a_store_after_its_deadline_is_refused(client: Any) -> None:
    assert client.store(key(time.time() - 1), 7, [[1, 2]], b"").result(timeout=10) == (b"", False)
    assert client.commit_store(key(time.time() - 1), 7, b"").result(timeout=10) is False


def test_lmcache_learns_an_unknown_worker_by_a_store(client: Any) -> None:
    """Its heartbeats are answered all the same; see lmcache_client.Registration."""
    assert client.ping(7).result(timeout=10) is True
    assert client.store(key(time.time() + 60), 7, [[1, 2, 3, 4]], b"").result(timeout=10) == (b"", False)


def test_handlers_keep_lmcaches_signatures() -> None:
    """What LMCache's server reads of them when it starts."""
    guard = Guard(FakeContext(), ServerSettings())
    blend, transfer = object.__new__(BlendModule), object.__new__(LMCacheDrivenTransferModule)
    blend._transfer_module = SimpleNamespace(register_host_func=lambda *_: None)
    for module, names in (
        (blend, ("store", "cb_retrieve_pre_computed", "cb_unified_lookup")),
        (transfer, ("store", "retrieve")),
    ):
        stock = type(module)
        guard.patch(module)
        assert type(module) is not stock
        assert {each.operation for each in iter_request_handlers(module)} == {
            each.operation for each in iter_request_handlers(stock)
        }
        for name in names:
            assert inspect.signature(getattr(type(module), name)) == inspect.signature(getattr(stock, name))
            assert getattr(type(module), name) is not getattr(stock, name)


class FakeContext:
    """A server's context, as far as patching needs it."""

    storage_manager = SimpleNamespace()
    chunk_size = CHUNK


def test_the_http_api_gives_nothing_away(served: Served) -> None:
    gone = ("/env", "/threads", "/periodic-threads", "/loglevel", "/docs", "/openapi.json", "/reconfigure/x/l2/status")
    for path in gone:
        assert httpx.get(served.url + path).status_code == 404, path
    for path in ("/run_script", "/metrics/reset", "/reconfigure/dax/l1/add", "/cache/checksums"):
        assert httpx.post(served.url + path).status_code in (404, 405), path
    for path in ("/healthcheck", "/status", "/config", "/metrics", "/quota"):
        assert httpx.get(served.url + path).status_code == 200, path
    settings = httpx.get(served.url + "/config").json()
    assert settings["mp"]["chunk_size"] == CHUNK
    (tier,) = settings["storage_manager"]["l2_adapter_config"]["adapters"]
    if isinstance(tier, dict):  # 0.5.7 shows no settings of second tiers
        assert tier["base_path"].endswith("redis://***@tier")
    assert "s3cret" not in httpx.get(served.url + "/config").text
    assert httpx.post(served.url + "/cache/clear").status_code == 200


def test_the_server_counts_what_its_index_finds(client: Any, served: Served) -> None:
    before = counted(served, "chunks_asked_total")
    client.cb_unified_lookup(lookup(list(range(3 * CHUNK + 1)), "counts"), 1).result(timeout=10)
    assert counted(served, "chunks_asked_total") == before + 3
    assert counted(served, "chunks_found_total") == 0
    assert counted(served, "index_entries") == 0
    read = [protocol.lmcache_number(httpx.get(served.url + "/metrics").text, name) for name in NUMBERS]
    assert read == [0, before + 3, 0, INDEX_SIZE], "as doctor reads them"
    found = protocol.lmcache_facts(httpx.get(served.url + "/metrics").text)
    assert set(found) == {*protocol.LMCACHE_FACTS}
    assert (found["chunk"], len(found["hash"])) == (str(CHUNK), 16)


NUMBERS = (protocol.INDEX_ENTRIES, protocol.INDEX_ASKED, protocol.INDEX_FOUND, protocol.INDEX_SIZE)


def counted(served: Served, name: str) -> float:
    lines = [line for line in httpx.get(served.url + "/metrics").text.splitlines() if f"lmcache_rag_{name}" in line]
    return float(next(line for line in lines if not line.startswith("#")).split()[-1])


def test_a_look_up_can_forget(client: Any, served: Served) -> None:
    """The first chunk is the prefix; memory and the second tier lose the others."""
    shape = (2, 1, CHUNK, 8)
    payload = RegisterEngineDrivenContextPayload(7, "m", 1, 16, 1, 8, "float32", False, CHUNK)
    client.register_kv_cache_engine_driven_context(payload).result(timeout=10)
    tokens = list(range(100, 100 + 3 * CHUNK))
    stored = stored_key(tokens, "stores", {INGEST: True})
    client.prepare_store(stored, 7).result(timeout=10)
    assert client.commit_store(stored, 7, inline([torch.ones(shape) for _ in range(3)])).result(timeout=10)
    held = lambda: len([each for each in served.tier.rglob("*") if each.is_file()])  # noqa: E731
    assert until(lambda: held() == 3)

    assert answer(client, lookup(tokens, "reads")).prefix_coverage_tokens == 3 * CHUNK
    client.end_session("reads")
    asked = lookup(tokens, "forgets", {FORGET: True, PREFIX: CHUNK})
    assert answer(client, asked).prefix_coverage_tokens == 0
    client.end_session("forgets")
    assert until(lambda: held() == 1)
    assert until(lambda: answer(client, lookup(tokens, "reads again")).prefix_coverage_tokens == CHUNK)


def answer(client: Any, asked: Any) -> Any:
    end = time.monotonic() + 60
    while (found := client.cb_unified_lookup(asked, 1).result(timeout=10)) is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def lookup(tokens: list[int], request: str, configs: dict[str, Any] | None = None) -> Any:
    return IPCCacheServerKey.from_token_ids("m", 1, None, tokens, 0, len(tokens), request, "", 1, configs)


def stored_key(tokens: list[int], request: str, configs: dict[str, Any]) -> Any:
    return IPCCacheServerKey.from_token_ids("m", 1, 0, tokens, 0, len(tokens), request, "", 1, configs)


def inline(chunks: list[Any]) -> bytes:
    """Tensors as LMCache's client sends them."""
    try:
        from lmcache.v1.multiprocess.transfer_context.tensor_wire import encode_tensors
    except ImportError:  # 0.5.6
        return pickle.dumps(chunks)
    return bytes(encode_tensors(chunks))


def test_an_adapter_without_server_keeps_its_chunk(
    client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lmcache_client, "FIRST_WAIT_S", 0.5)
    strategy = ParallelStrategy(**{field.name: 1 for field in fields(ParallelStrategy)})
    url = f"tcp://localhost:{free_port()}"
    stock = adapters.get_lmcache_chunk_size

    def make(chunk: int) -> Any:
        with lmcache_client.allow_missing_server(chunk) as absent:
            made = adapters.LMCacheMPSchedulerAdapter([url], zmq.Context.instance(), "m", 16, strategy, mq_timeout=1.0)
        assert absent
        return made

    adapter = make(2 * CHUNK)
    assert adapters.get_lmcache_chunk_size is stock
    assert adapter.lmcache_tokens_per_chunk == 2 * CHUNK
    lmcache_client.mark_unhealthy(adapter)
    assert not adapter.is_healthy
    assert not lmcache_client.has_same_chunk_size(adapter, client), f"it has {CHUNK}"
    assert f"chunk size {CHUNK}, expected {2 * CHUNK}" in caplog.text
    assert lmcache_client.has_same_chunk_size(make(CHUNK), client)
    assert lmcache_client.handshake(client, 10.0) == ""
    with pytest.raises(ConnectionError):
        make(0)
    # The heartbeat asks us before it takes a server that is back for healthy.
    lmcache_client.watch_server(adapter, lambda: True)
    for heartbeat in adapter._heartbeats.values():
        assert not heartbeat._recover_callback()
        heartbeat.stop()


def test_a_worker_whose_caches_nobody_took_goes_on() -> None:
    adapter = SimpleNamespace(_mq_timeout=60.0, is_healthy=False, _health_event=threading.Event())
    adapter._health_event.set()
    with lmcache_client.allow_failed_registration(adapter, may_fail=True) as failed:
        assert adapter._mq_timeout == lmcache_client.FIRST_WAIT_S
        raise ConnectionError("no answer")
    assert len(failed) == 1
    assert (adapter._mq_timeout, adapter._health_event.is_set()) == (60.0, False)
    with pytest.raises(ConnectionError), lmcache_client.allow_failed_registration(adapter, may_fail=False):
        raise ConnectionError
