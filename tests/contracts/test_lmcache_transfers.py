"""Transfers between LMCache's server and vLLM's blocks: answers, errors, and a server that is away at the start."""

from __future__ import annotations

import threading
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from contract_kit import CHUNK

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from lmcache.v1.multiprocess import futures

    from lmcache_rag.budget import Budget
    from lmcache_rag.connector import lmcache_transfers
    from lmcache_rag.connector.metadata import BlendPlan


pytestmark = [pytest.mark.filterwarnings("ignore")]


class Backend:
    """Events of a device; `fails` is what importing one comes to, `copied` whether the copy before one is done."""

    def __init__(self) -> None:
        self.fails: Exception | None = None
        self.copied, self.waits = True, list[str]()

    def import_event(self, handle: bytes, device: Any) -> str:
        if self.fails:
            raise self.fails
        return "event"

    def wait_event(self, event: str, stream: Any) -> None:
        self.waits.append(event)

    def query_event(self, event: str) -> bool:
        return self.copied

    def synchronize_event(self, event: str, device: Any) -> None:
        assert self.copied, "the host would wait for ever for a copy that was cut off"


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("torch.cuda.current_stream", lambda: "stream")
    return lmcache_transfers.LMCacheLoader(SimpleNamespace(), 0.05)


def asked(backend: Backend) -> tuple[Any, Any]:
    """A question to the server as LMCache's client has it: the answer to come, and what waits for its copy."""
    raw: Any = futures.MessagingFuture()
    return raw, futures.DeviceMessagingFuture(raw, device="cpu", event_backend=backend)  # type: ignore[arg-type]


def test_kv_comes_or_not(link: Any) -> None:
    for came in (True, False):
        raw, future = asked(Backend())
        assert (link.answered(future, 0.01), link.there(future), link.arrived(future, 0.01)) == (False, False, False)
        raw.set_result((b"handle", came))
        assert (link.answered(future, 0.01), link.there(future), link.arrived(future, 0.01)) == (True, True, came)


def test_a_broken_copy_is_awaited_until_its_deadline(link: Any) -> None:
    """LMCache was killed after its answer: its event is never signalled, and neither host nor stream waits for it."""
    backend = Backend()
    backend.copied = False
    raw, future = asked(backend)
    raw.set_result((b"handle", True))
    assert (link.answered(future, 0.01), link.there(future), link.arrived(future, 0.01)) == (True, False, False)
    assert not backend.waits, "no work of vLLM's stream is queued after the copy"
    backend.copied = True
    assert (link.there(future), link.arrived(future, 0.01)) == (True, True)


@pytest.mark.parametrize("where", ["request", "event"])
def test_an_error_of_lmcaches_client_is_missing_kv(link: Any, caplog: pytest.LogCaptureFixture, where: str) -> None:
    def fails() -> Any:
        backend = Backend()
        raw, future = asked(backend)
        if where == "request":
            raw.set_exception(ConnectionError("lost"))
        else:
            backend.fails = ConnectionError("lost")
            raw.set_result((b"handle", True))
        return future

    for _ in range(2):
        future = fails()
        assert (link.answered(future, 0.01), link.there(future), link.arrived(future, 0.01)) == (True, True, False)
    assert [record.getMessage() for record in caplog.records] == [
        "KV could not be loaded from LMCache: ConnectionError: lost"
    ]
    raw, future = asked(Backend())
    raw.set_result((b"handle", True))
    assert link.arrived(future, 0.01)
    link.arrived(fails(), 0.01)
    assert len(caplog.records) == 2, "it is another outage"


def test_what_cannot_be_sent_is_kv_that_does_not_come(link: Any, caplog: pytest.LogCaptureFixture) -> None:
    plan = BlendPlan("r", (1,) * 200, 0, 64, (), 128, tuple(range(20)), "query", Budget())
    for ask in (lambda: link.submit_exact(plan), lambda: link.submit_matches(plan, [])):
        future = ask()  # the adapter is empty: whatever is asked of it fails
        assert (link.answered(future, 0.01), link.there(future), link.arrived(future, 0.01)) == (True, True, False)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("problem", "handshake"),
    [(ConnectionError("lost"), "ConnectionError: lost"), (None, "start it with --engine-type")],
)
def test_an_error_at_start_is_a_reason(monkeypatch: pytest.MonkeyPatch, problem: Any, handshake: str) -> None:
    def answer(*given: Any) -> Any:
        future: Any = futures.MessagingFuture()
        if problem:
            future.set_exception(problem)
        return future

    adapter = SimpleNamespace(
        transfer_ctx=SimpleNamespace(_event_backend=Backend()),
        req_client=SimpleNamespace(cb_protocol_handshake=answer, cb_register_rope=answer, get_chunk_size=chunk_size),
        lmcache_tokens_per_chunk=CHUNK,
        kv_caches={},
        instance_id=1,
        _reregister_kv_caches_callback=lambda: True,
    )
    again = adapter._reregister_kv_caches_callback
    monkeypatch.setattr("lmcache.v1.platform.kv_wrap.wrap_one_kv_cache", lambda tensor: tensor)
    link = lmcache_transfers.LMCacheLoader(adapter, 0.01)
    assert handshake in link.unsupported_reason().detail
    assert "did not take the rotary table" in link.register_rope(torch.zeros(2, 2), 2, True)
    assert adapter._reregister_kv_caches_callback is again


def test_a_server_that_hangs_at_start_is_used_later(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[str] = []

    def asked(what: str, said: Any) -> Any:
        def ask(*given: Any) -> Any:
            future: Any = futures.MessagingFuture()
            if what in answers:
                future.set_result(said)
            return future

        return ask

    monkeypatch.setattr("lmcache_rag.connector.lmcache_client._CALL_S", 0.01)
    monkeypatch.setattr("lmcache.v1.platform.kv_wrap.wrap_one_kv_cache", lambda tensor: tensor)
    client = SimpleNamespace(
        cb_protocol_handshake=asked("handshake", (1, True)),
        cb_register_rope=asked("table", True),
        get_chunk_size=asked("size", CHUNK),
    )
    healthy = threading.Event()
    healthy.set()
    adapter = SimpleNamespace(
        transfer_ctx=SimpleNamespace(_event_backend=Backend()),
        req_client=client,
        lmcache_tokens_per_chunk=CHUNK,
        kv_caches={},
        instance_id=1,
        _health_event=healthy,
        is_healthy=True,
        _reregister_kv_caches_callback=lambda: True,
    )
    link = lmcache_transfers.LMCacheLoader(adapter, 0.01)
    assert link.unsupported_reason() is None
    assert not healthy.is_set()
    assert link.register_rope(torch.zeros(2, 2), 2, True) == ""
    back = adapter._reregister_kv_caches_callback
    for more, healed in (("size", True), ("handshake", False), ("table", True)):
        answers.append(more)
        if more == "size":  # it answers, and not the handshake: no blend server, but one for exact prefixes
            other = lmcache_transfers.LMCacheLoader(adapter, 0.01, absent=True)
            adapter._reregister_kv_caches_callback = lambda: True
            assert other.register_rope(torch.zeros(2, 2), 2, True) == ""
            assert adapter._reregister_kv_caches_callback() is healed
            assert not other.is_healthy
            continue
        assert back() is healed
    assert link.is_healthy


def chunk_size(*given: Any) -> Any:
    future: Any = futures.MessagingFuture()
    future.set_result(CHUNK)
    return future


def test_a_server_that_comes_back_gets_the_table_again(monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[Any] = [None, ConnectionError("lost"), None]
    sent: list[Any] = []

    def register(*given: Any) -> Any:
        future: Any = futures.MessagingFuture()
        problem = problems.pop(0)
        sent.append(problem)
        future.set_exception(problem) if problem else future.set_result(True)
        return future

    adapter = SimpleNamespace(
        req_client=SimpleNamespace(cb_register_rope=register, get_chunk_size=chunk_size),
        lmcache_tokens_per_chunk=CHUNK,
        instance_id=1,
        _reregister_kv_caches_callback=lambda: True,
    )
    monkeypatch.setattr("lmcache.v1.platform.kv_wrap.wrap_one_kv_cache", lambda tensor: tensor)
    link = lmcache_transfers.LMCacheLoader(adapter, 0.01)
    assert link.register_rope(torch.zeros(2, 2), 2, True) == ""
    back = adapter._reregister_kv_caches_callback
    assert [back(), back()] == [False, True]
    assert len(sent) == 3
