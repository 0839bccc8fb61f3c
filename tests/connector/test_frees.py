"""Requests cancelled while LMCache loads for them: vLLM frees each once, and never while it is written to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmcache_rag.connector.transfers import FinishedGate, FinishedOnce


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
        self.told = {"loaded": set[int](), "stored": set[int]()}

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
                self.told["loaded"].add(rank)
            if stored:
                self.told["stored"].add(rank)
        self.pending = words

    def hear(self, before: dict[str, bool]) -> None:
        everyone = len(self.workers)
        loaded = {"a"} if not before["loaded"] and len(self.told["loaded"]) == everyone else set()
        stored = {"a"} if not before["stored"] and len(self.told["stored"]) == everyone else set()
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
    told = False  # the workers know that it ended
    for number, arrives in enumerate([*arrivals, (True, True), (False, False), (False, False)]):
        if number == abort_at and not late:
            vllm.abort()
        before = {name: len(ranks_told) == ranks for name, ranks_told in vllm.told.items()}
        ends = not told and (vllm.requests.get("a") == "ended" or number == 7)
        vllm.step(ends, list(arrives))
        told = told or ends
        if number == abort_at and late:
            vllm.abort()  # while the step's output is on its way
        vllm.hear(before)
    assert vllm.requests == {}
    assert len(vllm.side) == 0
