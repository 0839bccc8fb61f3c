"""Lazy fill: which passages are ingested in the background and when, that it costs no answer, and that it ends."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from embedded_server_kit import serving
from fake_vllm import FakeVLLM
from framework_kit import fresh, light_tokenizer, passages, tiny_llama
from lmcache_rag.integrations.blender import Blender
from lmcache_rag.integrations.kv_registry import KVRegistry, as_workspace
from openai_kit import vllm_serving

from lmcache_rag import Workspace, lazy_fill
from lmcache_rag.engines.base import BlendOptions, Completion, PrecomputeResult, Sampling, kv_key
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.errors import ConfigError, EngineUnavailableError, StoreLockedError
from lmcache_rag.lazy_fill import EXIT_S, FillCounts, LazyFill, fill_of

LONG = 60.0  # seconds that nothing here takes
KEY = "0" * 63


class Ingestion:
    """Notes what is ingested."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.threads: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.gate = threading.Event()
        self.gate.set()
        self.failures: list[Exception] = []

    def of(self, name: str) -> Callable[[threading.Event], PrecomputeResult]:
        def ingest(stop: threading.Event) -> PrecomputeResult:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            self.threads.add(threading.current_thread().name)
            while not (stop.is_set() or self.gate.wait(0.01)):
                pass
            self.at_once -= 1
            if self.failures:
                raise self.failures.pop(0)
            self.done.append(name)
            return PrecomputeResult(name, 10, 100, computed=True)

        return ingest


@pytest.fixture
def ingestion() -> Ingestion:
    return Ingestion()


@pytest.fixture
def fill() -> Iterator[LazyFill]:
    made = LazyFill(quiet=0.0, cool_down=0.0)
    yield made
    made.cancel()


def use(fill: LazyFill, ingestion: Ingestion, name: str, *, uses: int = 2, owner: object = "store") -> bool:
    return fill.offer(f"{KEY}{name}", ingestion.of(name), uses=uses, owner=owner)


# -- what is ingested, and when -------------------------------------------------------------------------------------


def test_a_passage_is_ingested_at_its_second_use(fill: LazyFill, ingestion: Ingestion) -> None:
    assert [use(fill, ingestion, "a"), use(fill, ingestion, "b"), use(fill, ingestion, "a")] == [False, False, True]
    assert fill.drain(LONG)
    assert ingestion.done == ["a"]
    assert fill.counts == FillCounts(ingested=1, tokens=10)


def test_a_missing_passage_is_ingested_less_and_less(fill: LazyFill, ingestion: Ingestion) -> None:
    queued = []
    for _ in range(14):
        queued.append(use(fill, ingestion, "a"))
        assert fill.drain(LONG)
    assert [number for number, each in enumerate(queued, start=1) if each] == [2, 6, 14]


def test_a_passage_under_way_is_not_queued_again(fill: LazyFill, ingestion: Ingestion) -> None:
    ingestion.gate.clear()
    assert [use(fill, ingestion, "a", uses=1) for _ in range(3)] == [True, False, False]
    ingestion.gate.set()
    assert fill.drain(LONG)
    assert ingestion.done == ["a"]


def test_one_thread_ingests_one_passage_at_a_time(fill: LazyFill, ingestion: Ingestion) -> None:
    ingestion.gate.clear()
    names = "0123456789abcdef"
    users = [threading.Thread(target=use, args=(fill, ingestion, name), kwargs={"uses": 1}) for name in names]
    for user in users:
        user.start()
    for user in users:
        user.join()
    ingestion.gate.set()
    assert fill.drain(LONG)
    assert sorted(ingestion.done) == sorted(names)
    assert (ingestion.most_at_once, ingestion.threads) == (1, {"lmcache-rag-lazy-fill"})


def test_the_queue_and_the_memory_are_bounded(ingestion: Ingestion) -> None:
    fill = LazyFill(queue=2, remembered=3, quiet=0.0)
    ingestion.gate.clear()
    taken = [use(fill, ingestion, name, uses=1) for name in "abcdef"]
    assert fill.counts.dropped == 6 - sum(taken)
    assert 2 <= sum(taken) <= 3  # one may be under way already
    ingestion.gate.set()
    assert fill.drain(LONG)
    for name in "0123":
        use(fill, ingestion, name)
    assert not use(fill, ingestion, "0"), "the first of four was not remembered"
    assert use(fill, ingestion, "3")
    assert fill.drain(LONG)


def test_ingestion_waits_for_a_pause_between_questions(ingestion: Ingestion) -> None:
    fill = LazyFill(quiet=LONG, patience=LONG)
    fill.question()
    assert use(fill, ingestion, "a", uses=1)
    assert not fill.drain(0.2)
    assert ingestion.done == []
    fill.cancel()
    assert fill.drain(LONG)
    assert ingestion.done == []


def test_ingestion_waits_no_longer_than_its_patience(ingestion: Ingestion) -> None:
    fill = LazyFill(quiet=LONG, patience=0.01)
    assert use(fill, ingestion, "a", uses=1)
    assert fill.drain(LONG)
    assert ingestion.done == ["a"]


# -- failures and ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [EngineUnavailableError("the server is gone"), ValueError("a fault of ours")])
def test_a_failure_is_logged_once_and_pauses(
    ingestion: Ingestion, problem: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    fill = LazyFill(quiet=0.0, cool_down=LONG)
    ingestion.failures = [problem]
    ingestion.gate.clear()
    for name in "abc":
        use(fill, ingestion, name, uses=1)
    ingestion.gate.set()
    assert fill.drain(LONG)
    assert not use(fill, ingestion, "d", uses=1)
    assert (ingestion.done, fill.counts.failed) == ([], 1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(problem) in caplog.text


def test_work_goes_on_after_a_failure(fill: LazyFill, ingestion: Ingestion, caplog: pytest.LogCaptureFixture) -> None:
    ingestion.failures = [EngineUnavailableError("gone")] * 2
    for _ in range(3):
        use(fill, ingestion, "a", uses=1)
        assert fill.drain(LONG)
    assert (ingestion.done, fill.counts.failed) == (["a"], 2)
    assert len(caplog.records) == 1, "one warning for failures in a row"


def test_a_store_in_use_is_no_failure(fill: LazyFill, ingestion: Ingestion, caplog: pytest.LogCaptureFixture) -> None:
    ingestion.failures = [StoreLockedError("another process is writing")]
    for _ in range(2):
        use(fill, ingestion, "a", uses=1)
        assert fill.drain(LONG)
    assert (ingestion.done, fill.counts.failed, caplog.text) == (["a"], 0, "")


def test_cancel_ends_the_work_of_one_owner(fill: LazyFill, ingestion: Ingestion) -> None:
    ingestion.gate.clear()
    for name, owner in zip("abcd", ("x", "x", "y", "x"), strict=True):
        assert use(fill, ingestion, name, uses=1, owner=owner)
    while not ingestion.at_once:
        time.sleep(0.001)
    fill.cancel("x", timeout=LONG)
    ingestion.gate.set()
    assert fill.drain(LONG)
    assert ingestion.done == ["a", "c"], "the one under way was asked to end and did"


def test_no_thread_stays_when_there_is_no_work(fill: LazyFill, ingestion: Ingestion) -> None:
    use(fill, ingestion, "a", uses=1)
    assert fill.drain(LONG)
    deadline = time.monotonic() + LONG
    while any(thread.name == "lmcache-rag-lazy-fill" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_begins_anew(ingestion: Ingestion) -> None:
    class Some:
        pass

    engine: Any = Some()
    fill = fill_of(engine)
    ingestion.gate.clear()
    assert use(fill, ingestion, "a", uses=1)
    with fill._changed:  # as it may be held at the fork
        child = os.fork()
        if child == 0:
            other = fill_of(engine)
            good = other is not fill and use(other, Ingestion(), "b", uses=1) and other.drain(LONG)
            os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ingestion.gate.set()
    assert fill.drain(LONG)


AT_EXIT = """
import threading, time
from lmcache_rag.lazy_fill import fill_of

class Engine:
    exit_wait_s = {seconds}

begun = threading.Event()

def ingest(stop):
    begun.set()
    time.sleep(1.5)
    print("ingested", flush=True)

engine = Engine()
fill_of(engine).offer("00", ingest, uses=1, owner=None)
begun.wait(60)
"""


@pytest.mark.parametrize(("seconds", "waits"), [(60.0, True), (0.0, False)])
def test_a_process_ends_after_what_it_computes(seconds: float, waits: bool) -> None:
    """PyTorch would abort it; nobody waits for another process."""
    program = AT_EXIT.format(seconds=seconds)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, "ingested" in ended.stdout) == (0, waits), ended.stderr
    assert EmbeddedEngine.exit_wait_s > EXIT_S


def test_an_engine_is_not_kept_alive() -> None:
    class Some:
        pass

    engine: Any = Some()
    fill_of(engine)
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None


def test_an_unknown_mode_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"first, second, never"):
        lazy_fill.mode_of("always")


# -- over servers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer() -> Any:
    return light_tokenizer()


@pytest.fixture
def texts(sentences: list[str]) -> list[str]:
    return passages(sentences, 3)


@pytest.fixture
def running(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVLLM]:
    """A server over a tiny model, which indexes what is ingested and nothing else."""
    monkeypatch.setattr(lazy_fill, "QUIET_S", 0.0)
    monkeypatch.setenv("LMCACHE_RAG_MAX_TOKENS", "4")
    fresh(monkeypatch, tmp_path)
    engine = EmbeddedEngine.from_model(
        HFModel.wrap(tiny_llama(), tokenizer), name="tiny", revision="0", kv_dir=tmp_path / "kv"
    )
    with serving(engine) as made:
        yield made
        for workspace in list(_workspaces()):
            workspace.engine.close()


def _workspaces() -> list[Workspace]:
    from lmcache_rag.integrations import kv_registry

    return list(kv_registry._by_server.values())


def ingested(running: FakeVLLM) -> int:
    """How many passages were sent to be ingested."""
    return sum(bool(body["kv_transfer_params"].get("lmcache_rag.ingest")) for body in running.seen)


@pytest.mark.parametrize(
    ("mode", "misses"),
    [("first", [3, 0, 0]), ("second", [3, 3, 0]), ("never", [3, 3, 3])],
    ids=lambda value: str(value),
)
def test_passages_never_ingested_hit_after_their_use(
    running: FakeVLLM, texts: list[str], mode: str, misses: list[int]
) -> None:
    blender = Blender(as_workspace(running.url), lazy_fill=mode)
    found = []
    for number in range(3):
        done = blender.answer(blender.build_prompt(texts[number:] + texts[:number], "What is it?"))
        found.append(done.stats.chunks_missed)
        assert blender.drain(LONG)
    assert found == misses
    assert ingested(running) == (0 if mode == "never" else 3)
    assert blender.workspace.store.registry.stats().chunks == 0, "they are no documents of the store"


def test_only_what_was_missing_is_ingested(running: FakeVLLM, texts: list[str]) -> None:
    workspace = as_workspace(running.url)
    KVRegistry.of(workspace).add({"a": texts[0]})
    blender = Blender(workspace, lazy_fill="first")
    done = blender.answer(blender.build_prompt(texts[:2], "What is it?"))
    assert (done.missed, done.warnings[-1]) == ((1,), "1 passage(s) without KV are ingested now.")
    assert blender.drain(LONG)
    assert ingested(running) == 2
    assert blender.fill_counts.ingested == 1


def test_registered_passages_are_ingested_at_first_use(
    running: FakeVLLM, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lmcache_rag")
    workspace = as_workspace(running.url)
    register = KVRegistry.of(workspace)
    register.add({"a": texts[0]})
    server = running.backend
    fingerprint = server.engine.info.fingerprint(server.prompts.prefix_ids, server.prompts.tenant)
    server.engine.forget([(fingerprint, kv_key(fingerprint, workspace.prompts.chunk_ids(texts[0])))])
    blender = Blender(workspace)
    assert blender.answer(blender.build_prompt(texts[:1], "What?")).stats.chunks_missed == 1
    assert blender.drain(LONG)
    assert blender.answer(blender.build_prompt(texts[:1], "What?")).stats.chunks_missed == 0
    assert "Lazy fill ingested 1 passage(s)" in caplog.text


def test_an_answer_does_not_wait_for_ingestion(tokenizer: Any, texts: list[str], tmp_path: Path) -> None:
    with vllm_serving(tokenizer) as server:
        blender = Blender(as_workspace(server.url, store=tmp_path / "s"), lazy_fill="first")
        real, gate = server.backend.statistics, threading.Event()

        def told(number: int, body: dict[str, Any]) -> Any:
            if body["kv_transfer_params"].get("lmcache_rag.ingest"):
                gate.wait(LONG)
            return real(number, body)

        server.backend.statistics = told  # type: ignore[method-assign]
        prompted = blender.build_prompt(texts[:2], "What?")
        done = blender.answer(prompted, sampling=Sampling(max_tokens=4))
        assert done.missed == (0, 1)
        assert blender.fill_counts.ingested == 0, "the answer is there and the ingestion is not"
        gate.set()
        assert blender.drain(LONG)
        assert blender.fill_counts.ingested + blender.fill_counts.held == 2
        blender.engine.close()


def test_a_server_that_loses_its_store_is_not_filled(tokenizer: Any, texts: list[str], tmp_path: Path) -> None:
    with vllm_serving(tokenizer) as server:
        server.failure = "no server"
        blender = Blender(as_workspace(server.url, store=tmp_path / "s"), lazy_fill="first")
        done = blender.answer(blender.build_prompt(texts, "What?"), sampling=Sampling(max_tokens=4))
        assert (done.missed, done.stats.chunks_missed) == ((), 3)
        assert blender.drain(LONG)
        assert len(server.seen) == 1
        blender.engine.close()


def test_closing_ends_retries_without_waiting_for_them(tokenizer: Any, texts: list[str], tmp_path: Path) -> None:
    with vllm_serving(tokenizer) as server:
        workspace = as_workspace(server.url, store=tmp_path / "s")
        blender = Blender(workspace, lazy_fill="first")
        blender.answer(blender.build_prompt(texts[:1], "What?", max_tokens=4), sampling=Sampling(max_tokens=4))
        assert blender.drain(LONG)
        server.fail = [500] * 1000
        prompt = workspace.prompts.ingest(texts[1])
        fill_of(blender.engine).offer(
            prompt.key, lambda stop: next(iter(blender.engine.precompute([prompt], stop=stop))), uses=1, owner="x"
        )
        while len(server.fail) == 1000:
            time.sleep(0.001)
        blender.engine.close()
        assert fill_of(blender.engine).drain(LONG)
        assert len(server.fail) >= 997, "of eight tries it gave up most"


async def test_the_async_ways_are_the_same(running: FakeVLLM, texts: list[str]) -> None:
    blender = Blender(as_workspace(running.url), lazy_fill="first")
    events = [event async for event in blender.astream(blender.build_prompt(texts, "What?"))]
    assert isinstance(events[-1], Completion)
    assert await blender.adrain()
    assert (await blender.aanswer(blender.build_prompt(texts, "What?"))).stats.chunks_missed == 0
    await blender.aclose()


def test_a_full_prefill_fills_nothing(running: FakeVLLM, texts: list[str]) -> None:
    blender = Blender(as_workspace(running.url), lazy_fill="first", blend=BlendOptions(enabled=False))
    blender.answer(blender.build_prompt(texts, "What?"))
    assert blender.drain(LONG)
    assert ingested(running) == 0


def test_an_embedded_engine_keeps_registered_texts(tokenizer: Any, texts: list[str], tmp_path: Path) -> None:
    engine = EmbeddedEngine.from_model(
        HFModel.wrap(tiny_llama(), tokenizer), name="tiny", revision="0", kv_dir=tmp_path / "kv"
    )
    with Workspace.open(tmp_path / "s", engine=engine, max_tokens=4) as workspace:
        blender = Blender(workspace, lazy_fill="first")
        blender.answer(blender.build_prompt(texts, "What?"))
        assert blender.drain(LONG)
        assert all(engine.missing([workspace.prompts.ingest(text) for text in texts]))


def test_the_setting_has_all_four_sources(running: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "registry"
    assert Blender(as_workspace(running.url)).lazy_fill == "second"
    store.mkdir(exist_ok=True)
    (store / "settings.toml").write_text('lazy_fill = "never"\n')
    engine = as_workspace(running.url).engine
    workspace = Workspace.open(store, engine=engine)
    assert Blender(workspace).lazy_fill == "never"
    monkeypatch.setenv("LMCACHE_RAG_LAZY_FILL", "first")
    workspace = Workspace.open(store, engine=engine)
    assert Blender(workspace).lazy_fill == "first"
    assert Blender(workspace, lazy_fill="second").lazy_fill == "second"
    monkeypatch.setenv("LMCACHE_RAG_LAZY_FILL", "sometimes")
    with pytest.raises(ConfigError, match="lazy_fill"):
        Workspace.open(store, engine=engine)
