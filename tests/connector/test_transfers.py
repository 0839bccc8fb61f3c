"""Loads that timed out keep their blocks until nothing writes to them; vLLM frees each request once."""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_kit import Block

from lmcache_rag.connector import lmcache_client, lmcache_transfers
from lmcache_rag.connector.transfers import FencedBlocks, FinishedGate, FinishedOnce, TimedOutLoad, TimedOutLoads


class Link:
    """A server that may answer, or end."""

    def __init__(self) -> None:
        self.answers: set[str] = set()
        self.ended = False
        self.looks = 0

    def answered(self, future: str, seconds: float) -> bool:
        return future in self.answers

    def there(self, future: str) -> bool:
        return f"copied {future}" in self.answers

    def lost(self, since: float) -> bool:
        self.looks += 1
        return self.ended and since < 100


def loads(link: Any, **options: Any) -> TimedOutLoads:
    late = TimedOutLoads(link, **options)
    late.add(TimedOutLoad("a", (1, 2), ("x", "y"), 50.0))
    late.add(TimedOutLoad("b", (3,), ("z",), 500.0))
    return late


def test_a_load_ends_with_its_last_answer_and_copy() -> None:
    link = Link()
    late = loads(link)
    assert late.request_ids == {"a", "b"}
    assert late.take() == ({"a": (1, 2), "b": (3,)}, [])
    for said, over in (("x", []), ("copied x", []), ("y", []), ("copied y", ["a"])):
        link.answers.add(said)
        assert late.take() == ({}, over)
    assert late.request_ids == {"b"}


def test_an_ended_server_is_not_polled_in_every_step() -> None:
    link = Link()
    late = loads(link, pause=0.2)
    late.take()
    assert link.looks == 2
    link.ended = True
    assert late.take() == ({}, [])
    assert link.looks == 2
    time.sleep(0.25)
    assert late.take() == ({}, ["a"])
    assert late.request_ids == {"b"}, "asked of another process"


def test_blocks_are_kept_until_every_rank_is_done() -> None:
    touched: list[Block] = []

    class Pool:
        blocks = tuple(Block(number) for number in range(6))

        def touch(self, blocks: Any) -> None:
            for block in blocks:
                block.users += 1
                touched.append(block)

        def free_blocks(self, blocks: Any) -> None:
            for block in blocks:
                block.users -= 1

    pool = Pool()
    held = FencedBlocks(pool)
    held.add("a", (2, 3))
    held.add("a", (2, 3))
    held.add("b", (3,))
    assert [block.users for block in pool.blocks] == [0, 0, 1, 2, 0, 0]
    held.release("a")
    assert len(held) == 2
    held.release("a")
    held.release("nobody")
    assert [block.users for block in pool.blocks] == [0, 0, 0, 1, 0, 0]
    held.release("b")
    assert (len(held), sum(block.users for block in pool.blocks)) == (0, 0)
    FencedBlocks().add("a", (1,))


def test_whether_a_server_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = server.getsockname()
        link = lmcache_transfers.LMCacheLoader(SimpleNamespace(), 5.0, where)
        assert not link.lost(0.0), "it may be stopped only"
        assert not lmcache_transfers.LMCacheLoader(SimpleNamespace(), 5.0).lost(0.0)
    assert link.lost(0.0)
    again = lmcache_transfers.LMCacheLoader(SimpleNamespace(), 5.0, where)
    again._recovered = time.monotonic()
    assert not again.lost(0.0), "it may still have work from before"
    monkeypatch.setattr(lmcache_transfers, "_BACKLOG_S", 0.0)
    assert again.lost(0.0)


def test_where_the_server_is() -> None:
    def of(**given: Any) -> Any:
        return lmcache_client.server_address(lambda key, default: given.get(key.rpartition(".")[2], default))

    assert of(host="tcp://localhost", port=5600) == ("localhost", 5600)
    assert of() == ("localhost", 5555)
    assert of(host="grpc://localhost") == ("localhost", 5555)
    assert of(server_urls=["tcp://a:1", "b:2"]) == ("a", 1)
    assert of(host="ipc:///tmp/x", port="y") is None


@pytest.mark.parametrize("urls", [["tcp://a:1", "tcp://b:2"], "a:1, b:2"])
def test_which_of_several_servers_a_worker_uses(urls: Any) -> None:
    """As in LMCache's connector: the first half of the ranks uses the first of two."""
    found = [lmcache_client.server_address(lambda key, default: urls, rank, 4) for rank in range(4)]
    assert found == [("a", 1), ("a", 1), ("b", 2), ("b", 2)]


def test_no_stores_are_reported_during_a_load() -> None:
    worker = FinishedGate()
    assert worker.report({"a", "b"}, {"a", "c"}) == {"b"}
    assert worker.report(set(), {"a"}) == set()
    assert worker.report({"d"}, set()) == {"a", "d"}
    assert worker.report(set(), set()) == set()


def test_a_request_freed_by_its_load_is_freed_once() -> None:
    side = FinishedOnce()
    side.ends("a")
    assert side.stored({"a"}, {"b"}) == {"b"}
    assert side.stored((), {"a"}) == set()
    assert len(side) == 0


def test_a_load_done_before_the_end_frees_nothing() -> None:
    side = FinishedOnce()
    assert side.stored({"a"}, ()) == set()
    side.ends("a")
    assert side.stored((), {"a"}) == {"a"}
    assert len(side) == 0


def test_both_words_in_one_step_are_one() -> None:
    side = FinishedOnce()
    side.ends("a")
    assert side.stored({"a"}, {"a"}) == set()
    assert len(side) == 0


class VLLM:
    """What vLLM's scheduler does of it (Scheduler._update_from_kv_xfer_finished), with its assertions."""

    def __init__(self, ranks: int) -> None:
        self.requests = {"a": "loading"}
        self.side = FinishedOnce()
        self.workers = [FinishedGate() for _ in range(ranks)]
        self.loaded: dict[int, set[str]] = {rank: {"a"} for rank in range(ranks)}  # still to come
        self.reported = {"loaded": set[int](), "stored": set[int]()}

    def abort(self) -> None:
        if self.requests.get("a") in ("loading", "runs"):
            self.requests["a"] = "ended"
            self.side.ends("a")

    def step(self, ends: bool, arrives: list[bool]) -> None:
        """All ranks report; what all of them said counts."""
        words = []
        for rank, worker in enumerate(self.workers):
            done = self.loaded[rank] if arrives[rank] else set()
            self.loaded[rank] = self.loaded[rank] - done
            stored = worker.report({"a"} if ends else (), self.loaded[rank])
            assert not (stored & self.loaded[rank]), "freed while it is written to"
            words.append((done, stored))
        for rank, (done, stored) in enumerate(words):
            if done:
                self.reported["loaded"].add(rank)
            if stored:
                self.reported["stored"].add(rank)
        self.pending = words

    def hear(self, before: dict[str, bool]) -> None:
        everyone = len(self.workers)
        loaded = {"a"} if not before["loaded"] and len(self.reported["loaded"]) == everyone else set()
        stored = {"a"} if not before["stored"] and len(self.reported["stored"]) == everyone else set()
        stored = self.side.stored(loaded, stored)
        for name in loaded:
            assert name in self.requests
            if self.requests[name] == "loading":
                self.requests[name] = "runs"
            else:
                del self.requests[name]
        for name in stored:
            assert name in self.requests
            del self.requests[name]


@given(
    ranks=st.integers(1, 2),
    arrivals=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=6, max_size=6),
    abort_at=st.integers(0, 5),
    late=st.booleans(),
)
def test_in_any_order_on_any_ranks_it_is_freed_once(
    ranks: int, arrivals: list[tuple[bool, bool]], abort_at: int, late: bool
) -> None:
    vllm = VLLM(ranks)
    known = False  # the workers know that it ended
    for number, arrives in enumerate([*arrivals, (True, True), (False, False), (False, False)]):
        if number == abort_at and not late:
            vllm.abort()
        before = {name: len(ranks_reported) == ranks for name, ranks_reported in vllm.reported.items()}
        ends = not known and (vllm.requests.get("a") == "ended" or number == 7)
        vllm.step(ends, list(arrives))
        known = known or ends
        if number == abort_at and late:
            vllm.abort()  # while the step's output is on its way
        vllm.hear(before)
    assert vllm.requests == {}
    assert len(vllm.side) == 0
