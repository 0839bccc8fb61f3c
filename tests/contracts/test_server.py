"""Our module in LMCache's server: its real storage, sessions and blend module, in this process.

See test_internals.py.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from contract_kit import CHUNK
from lmcache_server_kit import TOKENS, LMCacheServer, key, made_servers, text

from lmcache_rag import protocol
from lmcache_rag.connector.lmcache_client import read_counts
from lmcache_rag.connector.lmcache_server import removal as removal_module
from lmcache_rag.connector.metadata import Match

pytestmark = [pytest.mark.filterwarnings("ignore")]

Make = Callable[..., LMCacheServer]


@pytest.fixture
def make() -> Iterator[Make]:
    with made_servers() as made:
        yield made


def until(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


# -- what is indexed --------------------------------------------------------------------------------------------------


def test_only_ingested_chunks_are_found(make: Make, draw: random.Random) -> None:
    server = make()
    prefix, chunk, other = text(draw, 1), text(draw, 2), text(draw, 2)
    assert server.store(prefix + chunk, ingest=True)
    assert server.store(prefix + other)
    found = server.look_up(text(draw, 1) + [5] * 7 + chunk + other).non_prefix_segments
    assert [(each.old_st, each.cur_st) for each in found] == [(CHUNK, CHUNK + 7), (2 * CHUNK, 2 * CHUNK + 7)]
    assert server.look_up(prefix + other).prefix_coverage_tokens == 3 * CHUNK, "exact prefixes are as ever"


def test_all_are_found_where_that_is_asked_for(make: Make, draw: random.Random) -> None:
    server = make({"index": "all"})
    prefix, other = text(draw, 1), text(draw, 2)
    server.store(prefix + other)
    assert server.chunks([5] * 7 + other) == 2


def test_a_chunk_stored_by_a_question_can_be_ingested(make: Make, draw: random.Random) -> None:
    """LMCache's own store would pass it over: it is there already."""
    server = make()
    prefix, chunk = text(draw, 1), text(draw, 2)
    server.store(prefix + chunk)
    assert server.chunks([5] * 7 + chunk) == 0
    server.store(prefix + chunk, ingest=True)
    assert server.chunks([5] * 7 + chunk) == 2


def test_another_namespace_finds_nothing(make: Make, draw: random.Random) -> None:
    server = make()
    prefix, chunk = text(draw, 1), text(draw, 2)
    server.store(prefix + chunk, "one", ingest=True)
    for _ in range(3):  # nor does its asking take anything out of the index
        assert server.chunks([5] * 7 + chunk, "other") == 0
    assert server.chunks([5] * 7 + chunk, "one") == 2


def test_chunks_leave_the_index_when_they_leave_memory(make: Make, draw: random.Random) -> None:
    server = make()
    prefix, chunk = text(draw, 1), text(draw, 2)
    index = server.guard.index
    server.store(prefix + chunk, ingest=True)
    assert len(index) == 2
    server.evict()
    assert len(index) == 0
    server.store(prefix + chunk, ingest=True)
    assert server.chunks([5] * 7 + chunk) == 2


def test_chunks_in_a_second_tier_stay_in_the_index(make: Make, draw: random.Random, tmp_path: Path) -> None:
    server = make(l2=tmp_path)
    prefix, chunk = text(draw, 1), text(draw, 2)
    server.store(prefix + chunk, ingest=True)
    assert until(lambda: len(files(tmp_path)) == 3)
    assert until(lambda: server.evict() or server.in_memory(prefix + chunk) == 0)
    assert server.chunks([5] * 7 + chunk) == 2, "loaded from there"
    assert until(lambda: server.evict() or server.in_memory(prefix + chunk) == 0)
    for _, tier in server.storage.l2_adapters():
        tier.delete(server.keys(prefix + chunk))
    assert len(server.guard.index) == 0


def test_ten_tables_of_other_traffic_hide_no_chunk(make: Make, draw: random.Random) -> None:
    """With LMCache's real blend module, which keeps 2^20 chunks; here 200, and memory for 800."""
    size = 200
    server = make({"index": "all", "index_size": size})
    prefix = text(draw, 1)
    documents = [text(draw, 3) for _ in range(20)]
    for document in documents:
        server.store(prefix + document, ingest=True)
    for _ in range(size):
        server.store(text(draw, 11))
        if server.storage.get_l1_usage()[0] > 0.8 * server.storage.get_l1_usage()[1]:
            server.make_room()
    assert len(server.guard.index) <= size
    for document in documents:
        assert server.chunks([5] * 7 + document) == 3
    server.store(prefix + (late := text(draw, 3)), ingest=True)
    assert server.chunks([5] * 7 + late) == 3


def test_what_is_indexed_is_counted(make: Make, draw: random.Random) -> None:
    server = make()
    prefix, chunk = text(draw, 1), text(draw, 2)
    server.store(prefix + chunk, ingest=True)
    server.chunks([5] * 7 + chunk)
    index = server.guard.index
    assert (len(index), index.looked_up, index.found) == (2, 2, 2)


def test_wrong_settings_end_the_start(make: Make) -> None:
    for wrong in ({"index": "some"}, {"store": "none"}, {"index_size": 0}, {"size": 1}):
        with pytest.raises(ValueError, match=r"index|store|size"):
            make(wrong)


def test_the_index_follows_the_agreed_chunk(make: Make) -> None:
    """LMCache 0.5.7 makes another matcher when the first worker names its block."""
    server = make()
    server.blend._token_range_matcher = type("Matcher", (), {"chunk_size": 2 * CHUNK})()
    assert server.guard.index.chunk == server.blend._token_range_matcher.chunk_size == 2 * CHUNK


# -- deadlines --------------------------------------------------------------------------------------------------------


def test_a_store_after_its_deadline_is_refused(make: Make, draw: random.Random) -> None:
    server = make()
    prompt = text(draw, 2)
    assert not server.store(prompt, until=time.time() - 1, ingest=True)
    assert server.in_memory(prompt) == 0
    assert server.store(prompt, until=time.time() + 60, ingest=True)
    assert server.in_memory(prompt) == 2


def test_a_refused_exact_prefix_load_leaves_no_lock(make: Make, draw: random.Random) -> None:
    """After a pause, and for a plan whose worker found the server away. Its key ends with the prefix."""
    server = make()
    prefix = text(draw, 3)
    server.store(prefix)
    load = next(module for module in server.modules if hasattr(module, "_release_failed_retrieve_locks")).retrieve
    asked, found = server.hold(prefix + text(draw, 2))
    assert found.prefix_coverage_tokens == len(prefix)
    other, _ = server.hold(prefix + text(draw, 1))
    late = {protocol.UNTIL: 0.0}
    for request in (other.request_id, asked.request_id, asked.request_id, "unknown"):
        assert load(key(prefix, request, configs=late), 7, [[]], b"", 0) == (b"", False)
        server.evict()
        assert server.in_memory(prefix) == (3 if request == other.request_id else 0)


def test_a_store_late_while_copying_commits_nothing(
    make: Make, draw: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make()
    prompt = text(draw, 2)
    monkeypatch.setattr(server, "copying", lambda: time.sleep(0.3))
    assert not server.store(prompt, until=time.time() + 0.2, ingest=True)
    assert server.in_memory(prompt) == 0
    assert len(server.guard.index) == 0
    monkeypatch.setattr(server, "copying", lambda: None)
    assert server.store(text(draw, 2)), "the next one has no deadline"


def test_only_ingested_kv_is_stored_if_so_configured(make: Make, draw: random.Random) -> None:
    server = make({"store": "ingest"})
    prompt = text(draw, 2)
    handle, stored = server.blend.store(key(prompt, "r"), 7, [[1, 2]], b"")
    assert (handle, stored) == (b"an event", False), "without an event the worker would register again"
    assert server.in_memory(prompt) == 0
    assert server.store(prompt, ingest=True)
    assert server.in_memory(prompt) == 2


# -- eviction ---------------------------------------------------------------------------------------------------------


def test_ingested_kv_is_evicted_last(make: Make, draw: random.Random) -> None:
    server = make()
    prefix, chunk = text(draw, 1), text(draw, 2)
    asked = text(draw, 2)
    server.store(asked)
    server.store(prefix + chunk, ingest=True)
    questions = [text(draw, 2) for _ in range(8)]
    for question in questions:
        server.store(question)
    server.store(asked, ingest=True)  # stored as a question before
    for _ in range(40):
        if not sum(map(server.in_memory, questions)):
            break
        assert server.in_memory(prefix + chunk) == 3
        assert server.in_memory(asked) == 2
        server.make_room()
    assert sum(map(server.in_memory, questions)) == 0
    assert server.in_memory(prefix + chunk) == 3
    for _ in range(40):
        server.make_room()
    assert server.in_memory(prefix + chunk) == server.in_memory(asked) == 0, "at last they go"


def test_a_second_tier_evicts_ingested_kv_last(make: Make, draw: random.Random) -> None:
    tier = {"type": "mock", "max_size_gb": 1, "mock_bandwidth_gb": 10, "eviction": {"eviction_policy": "LRU"}}
    server = make(l2=tier)
    prefix, chunk, question = text(draw, 1), text(draw, 1), text(draw, 3)
    server.store(prefix + chunk, ingest=True)
    server.store(question)
    ((_, adapter),) = server.storage.l2_adapters()
    assert until(lambda: adapter.get_usage().total_bytes_used == 5 * CHUNK * TOKENS)
    (state,) = server.storage._l2_eviction_controller._adapter_states
    evicted = [each for action in state.eviction_policy.get_eviction_actions(1.0) for each in action.keys]
    assert set(evicted) == set(server.keys(question))
    adapter.delete(evicted)
    left = [each for action in state.eviction_policy.get_eviction_actions(1.0) for each in action.keys]
    assert set(left) == set(server.keys(prefix + chunk))


# -- forgetting -------------------------------------------------------------------------------------------------------


def test_forgotten_chunks_go_and_the_prefix_stays(make: Make, draw: random.Random, tmp_path: Path) -> None:
    server = make(l2=tmp_path)
    prefix, chunk, other = text(draw, 1), text(draw, 2), text(draw, 2)
    server.store(prefix + chunk, ingest=True)
    server.store(prefix + other, ingest=True)
    assert until(lambda: len(files(tmp_path)) == 5)
    answer = server.look_up(prefix + chunk + [1, 2], forget=True, prefix=len(prefix))
    assert (answer.prefix_coverage_tokens, answer.non_prefix_segments) == (0, [])
    assert server.in_memory(prefix + chunk) == 1, "the prefix"
    assert len(files(tmp_path)) == 3
    assert server.look_up(prefix + chunk).prefix_coverage_tokens == CHUNK
    assert server.chunks([5] * 7 + chunk) == 0
    assert server.chunks([5] * 7 + other) == 2
    server.store(prefix + chunk, ingest=True)
    assert server.chunks([5] * 7 + chunk) == 2, "it can be ingested again"


def test_a_removal_counts_what_every_tier_held(make: Make, draw: random.Random, tmp_path: Path) -> None:
    server = make(l2=tmp_path)
    prefix, chunk = text(draw, 1), text(draw, 2)
    server.store(prefix + chunk, ingest=True)
    assert until(lambda: len(files(tmp_path)) == 3)
    counts = []
    for _ in range(2):
        answer = server.look_up(prefix + chunk, forget=True, prefix=len(prefix), held=True)
        counts.append(read_counts((0, tuple(Match(0, 0, 0, 0, each) for each in answer.non_prefix_segments))))
    assert counts == [{"memory": 2, "tier 2": 2}, {"memory": 0, "tier 2": 0}]
    assert (server.in_memory(prefix + chunk), len(files(tmp_path))) == (1, 1), "the prefix"
    assert read_counts((0, ())) == read_counts((0, (Match(0, 0, 0, 0, None),))) == {}, "without our module"


def test_kv_that_is_too_old_leaves_every_tier(
    make: Make, draw: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal_module, "PASSES_S", (0.0, 0.2))
    server = make({"kv_ttl": 3600}, l2=tmp_path)
    old, new = text(draw, 3), text(draw, 3)
    server.store(old, ingest=True)
    assert until(lambda: len(files(tmp_path)) == 3)
    begin = time.monotonic()
    server.store(new, ingest=True)
    server.store(old, ingest=True)
    assert until(lambda: len(files(tmp_path)) == 6)
    assert server.guard.expiry is not None
    server.guard.expiry.add(server.keys(old))  # as when it is loaded from a tier: it does not grow younger
    assert server.guard.expiry.step(begin) == 0
    assert server.guard.expiry.step(begin + 3600) == 3
    assert server.chunks([5] * 7 + old[CHUNK:]) == 0, "at once"
    assert until(lambda: (server.in_memory(old), len(files(tmp_path))) == (0, 3))
    assert server.chunks([5] * 7 + new[CHUNK:]) == 2
    assert make().guard.expiry is None


def test_an_evicted_object_has_no_age(make: Make, draw: random.Random) -> None:
    server = make({"kv_ttl": 3600})
    prompt = text(draw, 3)
    server.store(prompt, ingest=True)
    assert server.guard.expiry is not None
    assert len(server.guard.expiry._since) == 3
    assert until(lambda: server.evict() or server.in_memory(prompt) == 0)
    assert server.guard.expiry._since == {}


def test_without_a_prefix_nothing_is_forgotten(
    make: Make, draw: random.Random, caplog: pytest.LogCaptureFixture
) -> None:
    server = make()
    prefix, chunk = text(draw, 1), text(draw, 2)
    server.store(prefix + chunk, ingest=True)
    for wrong in ({}, {"prefix": 0}, {"prefix": "x"}, {"prefix": 10**6}):
        server.look_up(prefix + chunk, forget=True, **wrong)
    server.look_up(prefix + chunk, "other", forget=True, prefix=CHUNK)
    server.look_up(prefix + chunk, forget="yes", prefix=CHUNK)
    assert server.chunks([5] * 7 + chunk) == 2
    assert protocol.PREFIX in caplog.text


def test_a_chunk_in_use_is_forgotten_after_its_read(make: Make, draw: random.Random) -> None:
    server = make()
    prefix, chunk = text(draw, 1), text(draw, 2)
    server.store(prefix + chunk, ingest=True)
    asked, reading = server.hold([5] * 7 + chunk)
    assert len(reading.non_prefix_segments) == 2
    server.look_up(prefix + chunk, forget=True, prefix=CHUNK)
    assert server.in_memory(prefix + chunk) == 3, "it is being read"
    assert server.look_up(prefix + chunk).prefix_coverage_tokens == CHUNK, "and by nobody else"
    assert server.chunks([5] * 7 + chunk) == 0
    server.release(asked, reading)
    assert until(lambda: server.in_memory(prefix + chunk) == 1)


def test_a_chunk_that_is_being_stored_is_forgotten(
    make: Make, draw: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal_module, "PASSES_S", (0.0, 0.5, 1.0))
    server = make()
    prefix, chunk = text(draw, 1), text(draw, 2)
    monkeypatch.setattr(server, "copying", lambda: server.look_up(prefix + chunk, forget=True, prefix=CHUNK))
    server.store(prefix + chunk, ingest=True)
    assert server.look_up(prefix + chunk).prefix_coverage_tokens == CHUNK, "the prefix"
    assert server.chunks([5] * 7 + chunk) == 0
    assert until(lambda: len(server.guard.forgetting) == 0)
    assert server.in_memory(prefix + chunk) == 1
    assert len(server.guard.index) == 0


def test_a_chunk_on_its_way_to_l2_is_forgotten(
    make: Make, draw: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal_module, "PASSES_S", (0.0, 0.2, 0.4))
    server = make(l2=tmp_path)
    for _ in range(10):
        prefix, chunk = text(draw, 1), text(draw, 4)
        server.store(prefix + chunk, ingest=True)
        server.look_up(prefix + chunk, forget=True, prefix=CHUNK)
    assert until(lambda: len(server.guard.forgetting) == 0)
    assert until(lambda: len(files(tmp_path)) == 10), "the prefixes"


def test_a_chunk_on_its_way_from_l2_is_forgotten(
    make: Make, draw: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal_module, "PASSES_S", (0.0, 1.0, 2.0, 6.0))
    server = make(l2={"type": "mock", "max_size_gb": 1, "mock_bandwidth_gb": 2e-4})  # 0.3 s for a chunk
    prefix, chunk = text(draw, 1), text(draw, 3)
    server.store(prefix + chunk, ingest=True)
    ((_, tier),) = server.storage.l2_adapters()
    assert until(lambda: tier.get_usage().total_bytes_used == 4 * CHUNK * TOKENS)
    assert until(lambda: server.evict() or server.in_memory(prefix + chunk) == 0)
    asked = key([5] * 7 + chunk, "loads", worker=None)
    assert server.blend.cb_unified_lookup(asked, 1) is None, "it is being loaded"
    server.look_up(prefix + chunk, forget=True, prefix=CHUNK)
    found = server.answer(asked)
    server.release(asked, found)
    assert until(lambda: len(server.guard.forgetting) == 0)
    assert server.in_memory(prefix + chunk) <= 1, "the prefix"
    assert tier.get_usage().total_bytes_used == CHUNK * TOKENS


# -- HTTP -------------------------------------------------------------------------------------------------------------


def test_only_routes_that_are_needed_are_left(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of LMCache's own application; see test_guard.py too."""
    from fastapi.testclient import TestClient
    from lmcache.v1.multiprocess.http_server import app

    from lmcache_rag.connector.lmcache_server import modules

    monkeypatch.setattr(app.router, "routes", list(app.router.routes))
    monkeypatch.setattr(app.state, "configs", {"tier": {"host": "h", "password": "s3cret"}}, raising=False)
    gone = {route.path for route in app.router.routes} - modules.KEPT_ROUTES
    make()
    assert {"/env", "/run_script", "/threads", "/loglevel", "/metrics/reset", "/openapi.json"} <= gone
    assert {getattr(route, "path", None) for route in app.router.routes} == modules.KEPT_ROUTES
    client = TestClient(app)
    for path in gone:
        assert client.get(path).status_code == client.post(path).status_code == 404
    assert client.get("/config").json() == {"tier": {"host": "h", "password": modules.MASK}}


def test_secrets_are_masked_in_settings() -> None:
    from lmcache_rag.connector.lmcache_server.modules import masked

    shown = masked(
        {
            "adapters": [{"type": "resp", "host": "h", "password": "p4ss", "username": "u", "port": 1, "api_key": ""}],
            "secrets": ["s1", {"x": "s2"}],
            "url": "redis://user:s3@host:1/0",
            "max_tokens": 5,
        }
    )
    assert not [secret for secret in ("p4ss", "s1", "s2", "s3", "user") if f"{secret}'" in str(shown).replace('"', "'")]
    assert shown["adapters"][0]["host"] == "h"
    assert (shown["adapters"][0]["port"], shown["max_tokens"]) == (1, 5)
    assert shown["url"].endswith("@host:1/0")
    assert "s3" not in shown["url"]


def files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size >= TOKENS * CHUNK]


def test_log_lines_name_no_tokens(make: Make, draw: random.Random, caplog: pytest.LogCaptureFixture) -> None:
    server = make()
    prompt = [123456789] * CHUNK
    with caplog.at_level(logging.DEBUG, "lmcache_rag"):
        server.store(prompt, ingest=True, until=0.0)
        server.look_up([*prompt, 1], forget=True, prefix=1)
    assert "123456789" not in caplog.text
