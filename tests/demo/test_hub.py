"""The demo against servers that speak vLLM's API: cache salts, two servers, models to pick from, and failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeVLLM
from openai_kit import vllm_serving

from lmcache_rag import protocol
from lmcache_rag.demo import hub as hubs
from lmcache_rag.demo import record, samples
from lmcache_rag.demo.hub import Hub
from lmcache_rag.demo.session import Session
from lmcache_rag.settings import Settings

QUESTION = "Which of the mountains is the highest?"


@pytest.fixture(autouse=True)
def few_samples(tmp_path: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Five sample documents, each long enough for a server to keep."""
    folder = tmp_path / "samples"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(" ".join(sentences[6 * number :][:6]))
    monkeypatch.setattr(samples, "documents", lambda: folder)
    monkeypatch.setattr(samples, "files", lambda: sorted(folder.iterdir()))


@pytest.fixture
def server(tokenizer: Any) -> Iterator[FakeVLLM]:
    with vllm_serving(tokenizer) as running:
        yield running


def opened(tmp_path: Path, embedder: Any, engine: str, baseline: str | None = None) -> Hub:
    settings = Settings.load(tmp_path / "store", engine=engine, engine_timeout_s=20.0, max_tokens=8)
    hub = Hub(settings, baseline=baseline, embedder=embedder)
    hub.open()
    return hub


@pytest.fixture
def hub(server: FakeVLLM, embedder: Any, tmp_path: Path) -> Iterator[Hub]:
    """One server for both panes."""
    made = opened(tmp_path, embedder, server.url)
    assert made.start.problem is None
    yield made
    made.close()


async def done(task: asyncio.Task[None] | None) -> None:
    assert task is not None
    await asyncio.wait_for(task, 120)


def questions(server: FakeVLLM) -> list[dict[str, Any]]:
    """Requests that are no ingestion."""
    return [body for body in server.seen if "prompt" in body and body.get("stream")]


async def test_baseline_keeps_its_cache_salt_until_cold(hub: Hub, server: FakeVLLM) -> None:
    session = Session("a" * 16, hub)
    for _ in range(2):
        await done(session.ask(QUESTION))
    await done(session.cold())
    await done(session.ask(QUESTION))
    asked = questions(server)
    assert [body["kv_transfer_params"][protocol.BLEND] for body in asked] == ["on", "off"] * 3
    blended, baseline = ([body.get("cache_salt", "") for body in asked[first::2]] for first in (0, 1))
    assert blended[:2] == ["", ""]
    assert blended[2]
    assert baseline[0]
    assert baseline[0] == baseline[1] != baseline[2]
    assert len({*blended, *baseline}) == 4


async def test_sessions_have_different_salts(hub: Hub, server: FakeVLLM) -> None:
    for name in "ab":
        await done(Session(name * 16, hub).ask(QUESTION))
    salts = [body.get("cache_salt", "") for body in questions(server)[1::2]]
    assert len(set(salts)) == 2


async def test_another_order_loses_the_prefix_not_the_blend(hub: Hub) -> None:
    session = Session("a" * 16, hub)
    for _ in range(2):
        await done(session.ask(QUESTION))
    same = session.panes["baseline"].turn
    session.move(0, len(session.passages) - 1)
    await done(session.ask(QUESTION))
    blended, baseline = (session.panes[name].turn for name in ("blended", "baseline"))
    assert same is not None and same.completion is not None
    assert blended is not None and blended.completion is not None
    assert baseline is not None and baseline.completion is not None
    assert same.completion.stats.prefix_tokens > baseline.completion.stats.prefix_tokens
    hint = hub.stack().hint
    assert "the server's prefix cache finds nothing after the first passage that moved" in hint
    assert "no prefix cache" not in hint
    assert blended.completion.stats.reused_tokens > 0
    assert blended.completion.chunks
    cached = blended.completion.stats.reused_tokens + blended.completion.stats.recomputed_tokens
    assert sum(chunk.reused_tokens for chunk in blended.completion.chunks) == cached
    shown = record.segments(blended)
    assert sum(segment.tokens for segment in shown) == blended.completion.stats.prompt_tokens
    assert sum(segment.tokens for segment in shown if segment.kind == "cached") == cached


async def test_two_servers_answer_a_pane_each(server: FakeVLLM, tokenizer: Any, embedder: Any, tmp_path: Path) -> None:
    with vllm_serving(tokenizer) as stock:
        stock.connector = False
        hub = opened(tmp_path, embedder, server.url, stock.url)
        session = Session("a" * 16, hub)
        await done(session.ask(QUESTION))
        assert len(questions(server)) == len(questions(stock)) == 1
        session.set(at_once=True)
        await done(session.ask(QUESTION))
        assert all(turn.alone for turn in session.turns)
        assert {pane.state for pane in session.panes.values()} == {"done"}
        hub.close()


async def test_missing_baseline_is_an_error_of_its_pane(server: FakeVLLM, embedder: Any, tmp_path: Path) -> None:
    hub = opened(tmp_path, embedder, server.url, "http://127.0.0.1:9")
    session = Session("a" * 16, hub)
    await done(session.ask(QUESTION))
    assert session.panes["blended"].state == "done"
    problem = session.panes["baseline"].problem
    assert problem is not None
    assert "127.0.0.1:9" in problem.message
    assert problem.remedy
    hub.close()


async def test_server_that_is_down_says_so_and_comes_back(hub: Hub, server: FakeVLLM) -> None:
    session = Session("a" * 16, hub)
    server.fail = [503] * 6
    await done(session.ask(QUESTION))
    assert [pane.state for pane in session.panes.values()] == ["failed", "failed"]
    assert all(pane.problem and pane.problem.remedy for pane in session.panes.values())
    await done(session.ask(QUESTION))
    assert [pane.state for pane in session.panes.values()] == ["done", "done"]


async def test_panes_of_one_server_at_once_are_not_compared(
    hub: Hub, server: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers neither request before both are there: in turn, they would wait for ever."""
    session = Session("a" * 16, hub)
    session.set(at_once=True)
    both, told = threading.Barrier(2), server.backend.statistics

    def wait_and_tell(number: int, body: dict[str, Any]) -> dict[str, Any] | None:
        both.wait(hub.settings.engine_timeout_s)
        return told(number, body)

    monkeypatch.setattr(server.backend, "statistics", wait_and_tell)
    await done(session.ask(QUESTION))
    assert {pane.state for pane in session.panes.values()} == {"done"}
    assert not any(turn.alone for turn in session.turns)
    assert session.speedup is None


async def test_lost_lmcache_is_noted_with_the_answer(hub: Hub, server: FakeVLLM) -> None:
    session = Session("a" * 16, hub)
    server.failure = protocol.Fallback.NO_SERVER
    await done(session.ask(QUESTION))
    turn = session.panes["blended"].turn
    assert turn is not None
    assert any("LMCache does not answer" in note for note in turn.warnings)
    assert session.speedup is None


async def test_server_without_the_connector_is_named(server: FakeVLLM, embedder: Any, tmp_path: Path) -> None:
    server.connector = False
    hub = opened(tmp_path, embedder, server.url)
    session = Session("a" * 16, hub)
    await done(session.ask(QUESTION))
    assert session.panes["blended"].state == "done"
    assert "connector" in session.stack.blended.why_not
    assert session.speedup is None
    hub.close()


async def test_stop_closes_the_connection(hub: Hub, server: FakeVLLM) -> None:
    session = Session("a" * 16, hub)
    server.pause = 0.3
    task = session.ask(QUESTION)
    async with asyncio.timeout(60):
        while session.panes["blended"].state != "writing":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    session.stop()
    await done(task)
    assert session.panes["blended"].state == "stopped"
    assert await asyncio.to_thread(server.gone.wait, 30)
    assert len(questions(server)) == 1


async def test_stop_before_the_first_token_does_not_wait(hub: Hub, server: FakeVLLM) -> None:
    session = Session("a" * 16, hub)
    server.hang = 30.0
    task = session.ask(QUESTION)
    async with asyncio.timeout(20):
        while session.panes["blended"].state != "sent":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        session.stop()
        await done(task)
    assert session.panes["blended"].state == "stopped"
    server.hang = 0.0


def test_start_without_a_server_can_be_tried_again(server: FakeVLLM, embedder: Any, tmp_path: Path) -> None:
    hub = opened(tmp_path, embedder, "http://127.0.0.1:9")
    assert hub.start.phase == "failed"
    assert hub.start.problem is not None
    assert hub.start.problem.remedy
    hub.settings = hub.settings.model_copy(update={"engine": server.url})
    hub.open()
    assert hub.start.phase == "ready"
    hub.close()


async def test_models_to_pick_from_are_those_served(
    server: FakeVLLM, embedder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = opened(tmp_path, embedder, server.url)
    assert hub.models == []  # one model and an adapter
    monkeypatch.setattr("lmcache_rag.engines.vllm_client.VLLMClient.served_names", lambda _: [server.model, "another"])
    hub.open()
    assert hub.models == [server.model, "another"]
    session = Session("a" * 16, hub)
    await done(session.choose("another"))
    assert session.problem is not None  # the server has no such model
    assert session.controls.model == ""
    await done(session.choose(server.model))
    assert session.problem is None
    assert session.controls.model == server.model
    assert hub.stack("").workspace.engine.info.model == server.root
    hub.close()


async def test_a_too_long_prompt_is_an_error_of_the_panes(server: FakeVLLM, embedder: Any, tmp_path: Path) -> None:
    server.context = 256
    hub = opened(tmp_path, embedder, server.url)
    session = Session("a" * 16, hub)
    await done(session.ask("why " * 400))
    assert [pane.state for pane in session.panes.values()] == ["failed", "failed"]
    problem = session.panes["blended"].problem
    assert problem is not None
    assert problem.type == "ContextLengthError"
    assert hubs.WARM_CHUNKS > 0
    hub.close()
