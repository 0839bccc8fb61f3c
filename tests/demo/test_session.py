"""A session of the demo, with the embedded engine: what it asks, measures, keeps and exports."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_rag.demo import record, samples
from lmcache_rag.demo.arms import Traffic, join_threads
from lmcache_rag.demo.hub import Hub
from lmcache_rag.demo.record import speedup_words
from lmcache_rag.demo.session import Session
from lmcache_rag.settings import Settings

QUESTION = "Which of the mountains is the highest?"
WAIT = 120.0


@pytest.fixture
def hub(
    tiny: Any, embedder: Any, tmp_path: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """A hub over a tiny model, with five short sample documents."""
    folder = tmp_path / "samples"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(" ".join(sentences[3 * number :][:3]))
    monkeypatch.setattr(samples, "documents", lambda: folder)
    monkeypatch.setattr(samples, "files", lambda: sorted(folder.iterdir()))
    made = Hub(Settings.load(tmp_path / "store", max_tokens=6, top_k=4, ratio=0.15), engine=tiny, embedder=embedder)
    made.open()
    assert made.start.problem is None
    yield made
    made.close()


@pytest.fixture
def session(hub: Hub) -> Session:
    """A session of it."""
    return Session("0123456789abcdef", hub)


async def done(task: asyncio.Task[None] | None) -> None:
    """Wait for an action of a session."""
    assert task is not None
    await asyncio.wait_for(task, WAIT)


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(WAIT):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_start_ingests_samples_once_and_says_how_far(hub: Hub) -> None:
    assert hub.start.phase == "ready"
    assert hub.start.documents == (5, 5)
    done, known = hub.start.chunks
    assert done == known > 0
    before = hub.stack().workspace.store.registry.stats().chunks
    hub.open()
    assert hub.stack().workspace.store.registry.stats().chunks == before


def test_store_with_other_documents_gets_no_samples(
    hub: Hub, tiny: Any, embedder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "mine.txt"
    other.write_text("A document of the user's own.")
    hub.stack().ingestor(lambda step: None).ingest([other])
    (samples.documents() / "late.txt").write_text("A sample that came later.")
    hub.open()
    names = {Path(each.source).name for each in hub.stack().workspace.store.registry.documents()}
    assert "mine.txt" in names
    assert "late.txt" not in names


async def test_both_arms_answer_with_what_the_engine_counted(session: Session) -> None:
    await done(session.ask(QUESTION))
    blended, baseline = (session.panes[name].turn for name in ("blended", "baseline"))
    assert blended is not None
    assert baseline is not None
    assert blended.completion is not None
    assert baseline.completion is not None
    assert len(blended.passages) == 4
    assert blended.passages == baseline.passages
    assert blended.completion.stats.reused_tokens > 0
    assert baseline.completion.stats.computed_tokens == baseline.completion.stats.prompt_tokens
    assert session.panes["blended"].state == session.panes["baseline"].state == "done"
    expected = baseline.completion.stats.ttft_ms / blended.completion.stats.ttft_ms
    assert session.speedup == pytest.approx(expected)


async def test_counts_by_passage_add_up(session: Session) -> None:
    await done(session.ask(QUESTION))
    for pane in session.panes.values():
        turn = pane.turn
        assert turn is not None
        assert turn.completion is not None
        assert len(turn.completion.chunks) == len(turn.passages)
        for hit, chunk in zip(turn.passages, turn.completion.chunks, strict=True):
            parts = (chunk.prefix_tokens, chunk.reused_tokens, chunk.recomputed_tokens or 0, chunk.computed_tokens)
            assert sum(parts) == len(session.stack.blended.prompts(session.wording).chunk_ids(hit.text))
        stats = turn.completion.stats
        assert sum(chunk.reused_tokens for chunk in turn.completion.chunks) == stats.reused_tokens
        assert sum(chunk.recomputed_tokens or 0 for chunk in turn.completion.chunks) == stats.recomputed_tokens
        shown = dict.fromkeys(record.KINDS, 0)
        for segment in record.segments(turn):
            shown[segment.kind] += segment.tokens
        assert shown == record.totals(turn)


async def test_bar_shows_each_part_at_its_place(session: Session) -> None:
    """Tokens before the passages come first, those after them last, in both panes and in any order."""
    for _ in range(2):
        await done(session.ask(QUESTION))
        for pane in session.panes.values():
            turn = pane.turn
            assert turn is not None
            prompt, _ = session.stack.blended.prompt(session._request("blended", QUESTION, turn.passages))
            wanted, at = [], 0
            for index, chunk in enumerate(prompt.chunks):
                wanted += [(None, chunk.start - at), (index, chunk.end - chunk.start)]
                at = chunk.end
            wanted.append((None, len(prompt) - at))
            shown: list[tuple[int | None, int]] = []
            for segment in record.segments(turn):
                if shown and shown[-1][0] == segment.passage:
                    shown[-1] = (segment.passage, shown[-1][1] + segment.tokens)
                else:
                    shown.append((segment.passage, segment.tokens))
            assert shown == [part for part in wanted if part[1]]
            assert shown[0] == (None, prompt.prefix_tokens)
        session.move(0, 2)


async def test_hint_says_what_the_embedded_engine_finds(hub: Hub, session: Session) -> None:
    """What it says is so: a full prefill finds nothing, a blended prompt what all begin with, in any order."""
    hint = hub.stack().hint
    assert "Without blending, this engine has no prefix cache: it computes the whole prompt each time." in hint
    assert "An exact prefix hit there: what all prompts begin with." in hint
    for _ in range(3):
        await done(session.ask(QUESTION))
        blended, baseline = (session.panes[name].turn for name in ("blended", "baseline"))
        assert blended is not None and blended.completion is not None
        assert baseline is not None and baseline.completion is not None
        assert baseline.completion.stats.prefix_tokens == 0
        (first, _), *_ = blended.spans
        assert 0 < blended.completion.stats.prefix_tokens == first
        session.move(0, 2)


async def test_another_order_is_kept_and_still_reused(session: Session) -> None:
    await done(session.ask(QUESTION))
    order = [hit.chunk_id for hit in session.passages]
    session.move(0, 3)
    assert [hit.chunk_id for hit in session.passages] == [*order[1:], order[0]]
    assert not session.controls.retrieve
    await done(session.ask(QUESTION))
    turn = session.panes["blended"].turn
    assert turn is not None
    assert turn.completion is not None
    assert [hit.chunk_id for hit in turn.passages] == [*order[1:], order[0]]
    assert turn.completion.stats.reused_tokens > 0
    assert turn.completion.stats.chunks_missed == 0


async def test_passages_can_be_picked_by_hand(session: Session) -> None:
    found = await session.find("a river", 5)
    session.add(found[0])
    session.add(found[0])
    session.add(found[1])
    session.remove(0)
    assert [hit.chunk_id for hit in session.passages] == [found[1].chunk_id]
    session.add(found[2])
    before = list(session.passages)
    session.shuffle()
    assert session.passages != before
    await done(session.ask(QUESTION))
    turn = session.panes["blended"].turn
    assert turn is not None
    assert list(turn.passages) == session.passages


async def test_cold_answers_reuse_nothing_and_later_ones_do(session: Session) -> None:
    await done(session.ask(QUESTION))
    await done(session.cold())
    await done(session.ask(QUESTION))
    cold = session.panes["blended"].turn
    assert cold is not None
    assert cold.completion is not None
    assert cold.completion.stats.reused_tokens == 0
    assert session.speedup is None
    await done(session.ask(QUESTION))
    again = session.panes["blended"].turn
    assert again is not None
    assert again.completion is not None
    assert again.completion.stats.reused_tokens > 0
    await done(session.warm())
    assert session.problem is None
    assert not session._own_kv


async def test_other_words_are_computed_once_and_then_reused(session: Session) -> None:
    session.set(system="You are brief.")
    for reused in (False, True):
        await done(session.ask(QUESTION))
        turn = session.panes["blended"].turn
        assert turn is not None
        assert turn.completion is not None
        assert (turn.completion.stats.reused_tokens > 0) is reused


async def test_ratio_one_equals_full_prefill(session: Session) -> None:
    await done(session.ask(QUESTION))
    await done(session.check())
    assert session.problem is None
    [check] = session.checks
    assert check.equal
    assert check.recomputed.completion is not None
    assert check.recomputed.completion.stats.reused_tokens == 0


async def test_repeat_measures_pairs_in_changing_order(session: Session) -> None:
    await done(session.ask(QUESTION))
    await done(session.repeat(6))
    [run] = session.repeats
    assert len(run.pairs) == 6
    assert len({pair.order for pair in run.pairs}) > 1
    assert run.medians is not None
    assert min(run.medians) > 0
    assert run.speedup == pytest.approx(run.medians[1] / run.medians[0])
    assert 0 <= run.differing <= 6


@pytest.mark.parametrize("at_once", [False, True])
async def test_stop_ends_the_answer_and_the_engine_goes_on(session: Session, at_once: bool) -> None:
    session.set(max_tokens=2000, at_once=at_once)
    task = session.ask(QUESTION)
    await until(lambda: session.panes["blended"].state == "writing")
    session.stop()
    await done(task)
    turn = session.panes["blended"].turn
    assert turn is not None
    assert turn.stopped
    assert turn.text
    assert not session.busy
    session.set(max_tokens=4)
    await done(session.ask(QUESTION))
    assert {pane.state for pane in session.panes.values()} == {"done"}


async def test_failure_of_one_arm_stays_in_its_pane(session: Session) -> None:
    def gone() -> Any:
        from lmcache_rag.errors import EngineUnavailableError

        raise EngineUnavailableError("The server cannot be reached.", remedy="Start it.")

    arm = session.stack.baseline
    opener, arm._open = arm._open, gone
    await done(session.ask(QUESTION))
    assert session.panes["blended"].state == "done"
    problem = session.panes["baseline"].problem
    assert problem is not None
    assert (problem.message, problem.remedy) == ("The server cannot be reached.", "Start it.")
    assert session.speedup is None
    arm._open = opener
    await done(session.ask(QUESTION))
    assert session.panes["baseline"].state == "done"


@pytest.mark.parametrize("fails", [False, True])
async def test_at_once_sends_after_both_prompts_are_made(
    session: Session, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    session.set(at_once=True)
    baseline, blended = session.stack.baseline, session.stack.blended
    events: list[str] = []
    make, answer = baseline.prompt, blended.answer

    def slow(request: Any) -> Any:
        time.sleep(0.5)
        if fails:
            raise ValueError("no prompt")
        made = make(request)
        events.append("baseline's prompt")
        return made

    async def watched(request: Any, on_text: Any, on_sent: Any, *more: Any) -> Any:
        def sent() -> None:
            events.append("blended is sent")
            on_sent()

        return await answer(request, on_text, sent, *more)

    monkeypatch.setattr(baseline, "prompt", slow)
    monkeypatch.setattr(blended, "answer", watched)
    await done(session.ask(QUESTION))
    assert session.panes["blended"].state == "done"
    assert session.panes["baseline"].state == ("failed" if fails else "done")
    assert events == (["blended is sent"] if fails else ["baseline's prompt", "blended is sent"])


async def test_history_is_sent_along_only_when_wanted(session: Session) -> None:
    await done(session.ask(QUESTION))
    alone = await session.tokens()
    session.set(follow_up=True)
    with_history = await session.tokens()
    assert alone is not None
    assert with_history is not None
    assert with_history[0] > alone[0]
    await done(session.ask("And the lowest?"))
    assert [len(pane.turns) for pane in session.panes.values()] == [2, 2]


async def test_upload_is_ingested_and_a_bad_file_says_why(session: Session) -> None:
    files = [("fact.txt", b"The lamp of the lighthouse turns every five seconds."), ("bad.pdf", b"%PDF-1.7 nothing")]
    await done(session.upload(files))
    good, bad = session.uploads
    assert good.state == "done"
    assert bad.state == "failed"
    assert bad.detail
    [hit, *_] = await session.find("How often does the lamp of the lighthouse turn?")
    assert "lighthouse" in hit.text
    assert hit.documents[0].source.endswith("fact.txt")


async def test_upload_cannot_leave_its_folder(session: Session, tmp_path: Path) -> None:
    await done(session.upload([("../../../escape.txt", b"A text that wants to be elsewhere.")]))
    assert session.uploads[0].state == "done"
    [kept] = tmp_path.rglob("*escape.txt")  # noqa: ASYNC240
    assert kept.is_relative_to(tmp_path / "store" / "uploads")


async def test_two_sessions_share_nothing_of_their_own(hub: Hub) -> None:
    first, second = Session("a" * 16, hub), Session("b" * 16, hub)
    await asyncio.gather(done(first.ask(QUESTION)), done(second.ask("What is a desert?")))
    assert first.question != second.question
    assert len(first.turns) == len(second.turns) == 2
    tenants = {each._tenant("baseline") for each in (first, second)}
    assert len(tenants) == 2
    assert first._tenant("blended") == second._tenant("blended") == ""


async def test_export_holds_the_engines_own_numbers(session: Session) -> None:
    await done(session.ask(QUESTION))
    await done(session.check())
    await done(session.repeat(1))
    document = json.loads(json.dumps(session.as_dict()))
    assert [turn["arm"] for turn in document["turns"]] == ["blended", "baseline"]
    turn = session.panes["blended"].turn
    assert turn is not None
    assert turn.completion is not None
    assert document["turns"][0]["stats"] == turn.completion.stats.as_dict()
    assert document["turns"][0]["ttft_ms"] == turn.completion.stats.ttft_ms
    assert document["speedup"] == session.speedup
    assert document["checks"][0]["equal"] is True
    assert document["repeats"][0]["pairs"]


async def test_one_action_at_a_time(session: Session) -> None:
    task = session.ask(QUESTION)
    assert session.ask(QUESTION) is None
    await done(task)


async def test_empty_question_is_a_problem_of_the_page(session: Session) -> None:
    await done(session.ask("  "))
    assert session.problem is not None
    assert session.problem.message == "The question is empty."


async def test_an_engine_takes_turns_and_times_exclude_waits(hub: Hub) -> None:
    sessions = [Session(name * 16, hub) for name in "abc"]
    for each in sessions:
        each.set(at_once=True)
    begin = time.perf_counter()
    await asyncio.gather(*(done(each.ask(QUESTION)) for each in sessions))
    took = (time.perf_counter() - begin) * 1e3
    turns = [turn for each in sessions for turn in each.turns]
    assert len(turns) == 6
    assert all(turn.alone for turn in turns)
    assert sum(turn.total_ms for turn in turns) <= took
    assert all(each.speedup for each in sessions)


async def test_no_factor_where_something_else_was_computed(session: Session) -> None:
    with session.stack.blended.traffic.work():  # as an upload of another browser's
        await done(session.ask(QUESTION))
        await done(session.repeat(2))
    assert {pane.state for pane in session.panes.values()} == {"done"}
    assert session.speedup is None
    [run] = session.repeats
    assert run.disturbed == 2
    assert run.medians is None
    await done(session.ask(QUESTION))
    assert session.speedup is not None


async def test_work_after_the_first_token_disturbs_nothing() -> None:
    traffic = Traffic(exclusive=False)
    async with traffic.request() as first:
        first.measured = True
        async with traffic.request() as second:
            assert first.alone
            assert not second.alone
    async with traffic.request() as third:
        async with traffic.request():
            pass
        assert not third.alone


def test_speedup_words_say_slower_too() -> None:
    assert speedup_words(4.13) == "first token 4.1x faster"
    assert speedup_words(0.5) == "first token 2.0x slower"


def test_close_ends_an_ingestion_at_its_next_passage(
    tiny: Any, embedder: Any, tmp_path: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(" ".join(sentences[3 * number :][:3]))
    monkeypatch.setattr(samples, "documents", lambda: folder)
    monkeypatch.setattr(samples, "files", lambda: sorted(folder.iterdir()))
    hub = Hub(Settings.load(tmp_path / "store"), engine=tiny, embedder=embedder)
    first = threading.Event()
    check_open = hub._check_open

    def slowly() -> None:
        first.set()
        hub._closing.wait(WAIT)
        check_open()

    monkeypatch.setattr(hub, "_check_open", slowly)
    opener = hub.begin()
    assert first.wait(WAIT)
    hub.close()
    assert not opener.is_alive()
    assert hub.start.phase == "failed"
    assert hub.start.documents[0] <= 1


async def test_engine_threads_are_waited_for_after_a_stop(session: Session) -> None:
    session.set(max_tokens=2000)
    task = session.ask(QUESTION)
    await until(lambda: session.panes["blended"].state == "writing")
    session.stop()
    await done(task)
    await asyncio.to_thread(join_threads, WAIT)
    assert not any(thread.name == "lmcache-rag-demo" for thread in threading.enumerate())
