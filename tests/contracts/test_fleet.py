"""LMCache servers with our module, and LMCache's coordinator: its real application, in this process.

With processes of their own: tests/servers/test_fleet.py.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from contract_kit import CHUNK
from lmcache_server_kit import LMCacheServer, made_servers, text
from vllm_cpu_kit import free_port, until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import httpx
    import uvicorn
    from lmcache.v1.mp_coordinator import cache_events
    from lmcache.v1.mp_coordinator.app import create_app
    from lmcache.v1.mp_coordinator.config import MPCoordinatorConfig
    from lmcache.v1.mp_observability import event_bus

    from lmcache_rag.connector.lmcache_server import fleet, reports

pytestmark = [pytest.mark.filterwarnings("ignore")]

Make = Callable[..., LMCacheServer]
AWAY, BACK, WRONG = "does not answer", "answers again", "does not find a chunk"


class Coordinator:
    """LMCache's coordinator in a thread. Its state is lost when it is stopped, as without a checkpoint."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.delay = 0.0
        self._server: Any = None

    def start(self, **settings: Any) -> Coordinator:
        settings = {"enable_blend_lookup": True, "chunk_size": CHUNK, "metrics_enabled": False} | settings
        app = create_app(MPCoordinatorConfig(**settings))

        @app.middleware("http")
        async def late(request: Any, call: Any) -> Any:
            import asyncio

            await asyncio.sleep(self.delay)
            return await call(request)

        config = uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        assert until(lambda: self._server.started, 20)
        return self

    def stop(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
            self._thread.join(20)
            self._server = None

    def stats(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/directory/stats", timeout=5).json())

    @property
    def chunks(self) -> int:
        return int(self.stats()["blend"]["num_chunks"])


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    made = Coordinator()
    yield made
    made.stop()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr(fleet, "PROBE_S", 0.2)
    monkeypatch.setattr(cache_events, "create_cache_event_sink", cache_events.create_cache_event_sink)
    monkeypatch.setattr(event_bus, "_global_bus", event_bus._global_bus)
    monkeypatch.setattr(event_bus, "_observability_enabled", event_bus._observability_enabled)
    with made_servers() as made:
        yield made


def told(caplog: pytest.LogCaptureFixture, words: str) -> int:
    return sum(words in record.getMessage() for record in caplog.records if record.levelno >= logging.INFO)


def test_the_coordinator_knows_only_ingested_chunks(make: Make, draw: random.Random, coordinator: Coordinator) -> None:
    """LMCache itself reports the tokens of every prompt."""
    server = make(coordinator=coordinator.start().url)
    prefix, chunk, question = text(draw, 1), text(draw, 2), text(draw, 2)
    server.store(prefix + question)
    server.store(prefix + chunk, ingest=True)
    assert until(lambda: coordinator.chunks == 2)
    assert until(lambda: coordinator.stats()["num_keys"] == 5), "what is stored is reported, without its tokens"
    tokens = [
        httpx.get(f"{coordinator.url}/directory/keys", timeout=5).json()["keys"][n]["num_tokens"] for n in range(5)
    ]
    assert sorted(tokens) == [0, 0, 0, CHUNK, CHUNK], "neither a question nor the prefix"
    server.store(prefix + question, ingest=True)
    assert until(lambda: coordinator.chunks == 4), "stored by a question, and ingested later"


def test_tokens_of_a_question_are_not_delivered(make: Make, draw: random.Random) -> None:
    """Whatever LMCache gives us with an object."""
    from lmcache.v1.mp_coordinator.api import CacheEventEntry

    server = make()
    prompt = text(draw, 3)
    server.store(prompt)
    made: Any = object.__new__(reports.Reports)
    made._index = server.guard.index
    key = server.keys(prompt)[1].to_encoded_object_key()
    entry = CacheEventEntry(key=key, size_bytes=1, token_ids=[1, 2], token_offset=0)
    assert made._with_tokens(entry).token_ids == []


def test_a_server_finds_what_another_one_stored(
    make: Make, draw: random.Random, coordinator: Coordinator, tmp_path: Any
) -> None:
    """Its own memory and index are empty: as another machine's, or its own after a restart."""
    first = make(coordinator=coordinator.start().url, l2=tmp_path)
    prefix, chunk = text(draw, 1), text(draw, 2)
    first.store(prefix + chunk, ingest=True)
    assert until(lambda: coordinator.chunks == 2)
    assert until(lambda: coordinator.stats()["l2_count"] == 3)
    other = make(coordinator=coordinator.url, l2=tmp_path, name="other")
    assert [each.cur_st for each in other.look_up([5] * 7 + chunk).non_prefix_segments] == [7, 7 + CHUNK]
    assert other.guard.fleet is not None
    assert (other.guard.fleet.found, len(other.guard.index)) == (2, 2), "from now on it knows them itself"
    assert other.chunks([5] * 7 + chunk, "another namespace") == 0
    coordinator.stop()
    assert other.chunks([5] * 7 + chunk) == 2


def test_one_warning_while_the_coordinator_is_away(
    make: Make, draw: random.Random, coordinator: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lmcache_rag")
    server = make(coordinator=coordinator.url)
    prefix, chunk = text(draw, 1), text(draw, 2)
    server.store(prefix + chunk, ingest=True)
    for _ in range(20):
        assert server.chunks([5] * 7 + chunk) == 2, "this server knows them"
    assert until(lambda: told(caplog, AWAY) == 1)
    assert not [record for record in caplog.records if "Blend coordinator match failed" in record.getMessage()]
    coordinator.start()
    assert until(lambda: coordinator.chunks == 2), "what it missed is reported"
    assert (told(caplog, AWAY), told(caplog, BACK), told(caplog, WRONG)) == (1, 1, 0)


def test_a_slow_coordinator_delays_one_look_up(
    make: Make, draw: random.Random, coordinator: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    server = make(coordinator=coordinator.start().url)
    prefix, chunk = text(draw, 1), text(draw, 2)
    server.store(prefix + chunk, ingest=True)
    assert until(lambda: coordinator.chunks == 2)
    coordinator.delay = 30.0
    begin = time.monotonic()
    for _ in range(20):
        assert server.chunks([5] * 7 + chunk) == 2
    assert time.monotonic() - begin < 8, "20 look-ups, each half a second, would take 10 s"
    assert told(caplog, AWAY) == 1
    assert told(caplog, "deadline exceeded") == 0


def test_a_coordinator_without_its_index_gets_it_again(
    make: Make, draw: random.Random, coordinator: Coordinator
) -> None:
    server = make(coordinator=coordinator.start().url)
    prefix, chunk, gone = text(draw, 1), text(draw, 2), text(draw, 2)
    server.store(prefix + chunk, ingest=True)
    server.store(prefix + gone, ingest=True)
    assert until(lambda: coordinator.chunks == 4)
    coordinator.stop()
    server.storage.delete_l1_keys(server.keys(prefix + gone)[1:])
    coordinator.start()
    server.storage.publish_capacity()  # as LMCache does when it registers again
    assert until(lambda: coordinator.chunks == 2)
    server.store(prefix + gone, ingest=True)
    assert until(lambda: coordinator.chunks == 4)
    server.evict()
    assert until(lambda: coordinator.chunks == 0)


@pytest.mark.parametrize("settings", [{"chunk_size": 4 * CHUNK}, {"enable_blend_lookup": False}])
def test_a_coordinator_with_wrong_options_is_named(
    make: Make,
    draw: random.Random,
    coordinator: Coordinator,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
) -> None:
    server = make(coordinator=coordinator.start(**settings).url)
    prefix, chunk = text(draw, 1), text(draw, 2)
    server.store(prefix + chunk, ingest=True)
    assert until(lambda: told(caplog, f"--enable-blend-lookup --chunk-size {CHUNK}") == 1)
    assert server.chunks([5] * 7 + chunk) == 2


def test_matches_that_do_not_fit_are_not_used(make: Make, draw: random.Random, coordinator: Coordinator) -> None:
    server = make(coordinator=coordinator.url)
    found = server.guard.fleet
    assert found is not None
    good = {"old_st": CHUNK, "old_ed": 2 * CHUNK, "cur_st": 7, "cur_ed": 7 + CHUNK, "hash": b"h"}
    wrong = [
        {"cur_ed": 7 + 4 * CHUNK, "old_ed": 5 * CHUNK},  # a coordinator whose chunks are longer
        {"cur_ed": 7 + CHUNK - 1},
        {"old_st": -1, "old_ed": CHUNK - 1},
        {"cur_st": 300 - CHUNK + 1, "cur_ed": 301},
        {"old_st": "0"},
        {"hash": "68"},
    ]
    matches = [SimpleNamespace(**(good | each)) for each in ({}, *wrong)]
    assert found.merged("unknown", matches, 300) == matches[:1]


def test_a_forgotten_chunk_is_found_nowhere(make: Make, draw: random.Random, coordinator: Coordinator) -> None:
    server = make(coordinator=coordinator.start().url)
    prefix, chunk = text(draw, 1), text(draw, 2)
    server.store(prefix + chunk, ingest=True)
    assert until(lambda: coordinator.chunks == 2)
    server.look_up(prefix + chunk, forget=True, prefix=CHUNK)
    assert server.chunks([5] * 7 + chunk) == 0, "though the coordinator may not know it yet"
    assert until(lambda: coordinator.chunks == 0)


@pytest.mark.full
def test_reports_that_are_refused_are_warned_of_once(
    make: Make, draw: random.Random, coordinator: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    """Its health is asked for with success each time."""
    server = make(coordinator=coordinator.start().url)
    sink = next(each for each in server.bus._registered_subscribers if hasattr(each, "_sink"))._sink
    assert isinstance(sink, reports.Reports)
    calls: list[int] = []

    def refuse(_: Any) -> None:
        calls.append(1)
        raise OSError("404")

    sink._sink.publish = refuse
    server.store(text(draw, 2), ingest=True)
    assert until(lambda: len(calls) >= 3)
    assert told(caplog, AWAY) == 1
    assert dataclasses.is_dataclass(sink._last)
