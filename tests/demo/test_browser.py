"""The demo's page in a real browser, with real engines: what a user does in the three minutes.

Each figure on the page is compared with the exported JSON, which has what the engines gave. The scenarios that are not
marked `full` run in `.ci/run`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser_kit as kit
import demo_page_kit
import httpx
import pytest
from browser_kit import export, number, ready, visit, wait_for
from demo_page_kit import (
    ARMS,
    KINDS,
    QUESTION,
    ask,
    chunks,
    clocks_of,
    compare,
    figure,
    last_turns,
    plain_ms,
    served,
    sources,
)

browser, page, page_url = demo_page_kit.browser, demo_page_kit.page, demo_page_kit.page_url
server, small_store = demo_page_kit.server, demo_page_kit.small_store

pytestmark = pytest.mark.browser


def test_each_figure_on_the_page_is_the_engines(page: Any) -> None:
    """Timers run, bars appear; what the page shows is what the export holds."""
    page.get_by_test_id("question").fill(QUESTION)
    page.get_by_test_id("ask").click()
    running = re.compile(r"^\d+\.\d s$")
    timers: dict[str, set[str]] = {arm: set() for arm in ARMS}
    until = time.monotonic() + kit.LIMIT_S
    while page.get_by_test_id("baseline-turn").count() == 0:
        assert time.monotonic() < until
        for arm, seen in timers.items():
            text = page.get_by_test_id(f"{arm}-timer").inner_text()
            if running.match(text):
                seen.add(text)
    ready(page)
    assert len(timers["baseline"]) > 1, "the timer of a full prefill moves on"
    turns = last_turns(compare(page))
    assert turns["blended"]["stats"]["reused_tokens"] > 0
    assert turns["blended"]["stats"]["blended"]
    assert turns["baseline"]["stats"]["reused_tokens"] == 0
    assert not turns["baseline"]["stats"]["blended"]
    assert [each["chunk_id"] for each in turns["blended"]["passages"]] == [
        each["chunk_id"] for each in turns["baseline"]["passages"]
    ]
    assert "of 8,192 in the context" in page.get_by_test_id("context-tokens").inner_text()
    assert "this engine has no prefix cache" in page.get_by_test_id("order-hint").inner_text()
    words = page.get_by_test_id("context-tokens").inner_text()
    assert number(words) == turns["blended"]["stats"]["prompt_tokens"], words


def test_passages_moved_by_keyboard_are_reused_again(page: Any) -> None:
    ask(page)
    before = chunks(page)
    page.get_by_test_id("down").first.focus()
    page.keyboard.press("Enter")
    after = [before[1], before[0], *before[2:]]
    wait_for(lambda: chunks(page) == after, "the new order")
    focused = wait_for(
        lambda: page.evaluate("document.activeElement.closest('[data-chunk]')?.dataset.chunk"), "the focus is kept"
    )
    assert int(focused) == before[0]
    page.keyboard.press("Space")  # and further down
    after = [before[1], before[2], before[0]]
    wait_for(lambda: chunks(page) == after, "the next order")
    ask(page)
    assert chunks(page) == after, "hand-picked passages stay"
    document = compare(page)
    stats = last_turns(document)["blended"]["stats"]
    assert (stats["chunks_hit"], stats["chunks_missed"]) == (3, 0)
    assert stats["reused_tokens"] > 0
    assert [len(page.get_by_test_id(f"{arm}-turn").all()) for arm in ARMS] == [2, 2]


def test_nothing_of_a_document_becomes_html(page: Any) -> None:
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.get_by_text("Add a passage").click()
    page.get_by_test_id("find").fill("script hacked bomb reversed Brandaris")
    page.get_by_test_id("find").press("Enter")
    found = page.get_by_test_id("found").filter(has_text="window.hacked = 1")
    found.get_by_test_id("add").click()
    card = page.locator("[data-testid=passage]").filter(has_text="hostile")
    assert card.get_by_test_id("passage-source").inner_text() == "<b>hostile<b>.txt, part 1"
    card.get_by_text("Text").click()
    text = card.get_by_test_id("passage-text").inner_text()
    assert "<script>window.hacked = 1</script>" in text
    assert "bomb" in text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b]", text), "marks that turn text round do nothing"
    isolated = "each => getComputedStyle(each).unicodeBidi"  # marks that turn text round end with their text
    assert card.get_by_test_id("passage-text").evaluate(isolated) == "isolate"
    ask(page, "<img src=x onerror='window.hacked = 5'> Who wrote <b>this</b>?")
    assert "<img src=x" in page.get_by_test_id("baseline-turn").first.text_content()
    assert page.locator("main img, main iframe, main script, main b, main a[href^='javascript']").count() == 0
    assert page.evaluate("window.hacked") is None
    assert not dialogs
    compare(page)


@pytest.mark.full
def test_times_are_those_of_another_clock(
    browser: Any, small_store: Path, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is in this process; its clock runs from a request's arrival until its first text is about to leave.

    The page's time begins before that and ends after it, so it is never less. What it has more is a connection on this
    machine, and on a busy one a wait for a core. Other programs delay some answers, while a wrong figure is wrong in
    all: the nearest one counts. It is within 20 ms, or, on a slow machine, within five times what a plain client needs.
    """
    clocks = clocks_of(server, monkeypatch)
    small = ("--max-tokens", "2", "--top-k", "1")  # so that many can be asked
    with (
        served(browser, small_store, tmp_path, "--engine", server.url, *small) as (page, _),
        httpx.Client(timeout=kit.LIMIT_S) as client,
    ):
        more: dict[str, list[float]] = {arm: [] for arm in ARMS}
        plain: list[float] = []

        def near() -> bool:
            return all(min(each) < max(20, 5 * min(plain)) for each in more.values())

        for _ in range(20):
            clocks.clear()
            ask(page)
            turns = last_turns(export(page))
            plain.append(plain_ms(client, server) - clocks.pop())
            assert len(clocks) == 2  # blended first
            for arm, clock in zip(ARMS, clocks, strict=True):
                assert figure(page, f"{arm}-timer") == round(turns[arm]["ttft_ms"])
                more[arm].append(turns[arm]["ttft_ms"] - clock)
            assert all(each > 0 for each in (*plain, *more["blended"], *more["baseline"])), (more, plain)
            if near():
                break
        assert near(), (more, plain)
        document = compare(page)
        assert document["one_engine"]
        salts = {body.get("cache_salt") for body in server.questions}
        assert len(salts) == 2, "the baseline has one salt of its own, for the whole session"


@pytest.mark.full
def test_passages_can_be_moved_removed_and_added(page: Any) -> None:
    ask(page)
    before = chunks(page)
    after = [*before[1:], before[0]]
    handle, target = page.get_by_test_id("drag").first, page.get_by_test_id("passage").last
    start, end = handle.bounding_box(), target.bounding_box()
    across, top, bottom = start["x"] + 8, start["y"] + 8, end["y"] + end["height"] - 4
    page.mouse.move(across, top)
    page.mouse.down()
    for step in range(1, 11):  # by small steps, as a hand does
        page.mouse.move(across, top + (bottom - top) * step / 10)
        page.wait_for_timeout(40)

    def lies_there() -> bool:
        page.mouse.move(across, bottom - next(steps) % 2)
        return chunks(page) == after

    steps = itertools.count()
    wait_for(lies_there, "the card lies at the end, before it is let go")
    page.mouse.up()
    ranks = page.get_by_test_id("passage-rank")
    wait_for(lambda: ranks.all_inner_texts() == ["1", "2", "3"], "the ranks of the new order")
    assert chunks(page) == after
    ask(page)
    assert last_turns(compare(page))["blended"]["stats"]["reused_tokens"] > 0

    page.get_by_test_id("shuffle").click()
    wait_for(lambda: chunks(page) != after, "another order")
    shuffled = chunks(page)
    assert sorted(shuffled) == sorted(after)
    page.get_by_test_id("remove").nth(1).click()
    wait_for(lambda: chunks(page) == [shuffled[0], shuffled[2]], "one less")
    page.get_by_text("Add a passage").click()
    page.get_by_test_id("find").fill("ferry Harlingen ice storms")
    page.get_by_test_id("find-button").click()
    page.get_by_test_id("found").filter(has_text="ferry.txt").get_by_test_id("add").click()
    page.get_by_test_id("found").filter(has_text="маяк.txt").get_by_test_id("add").click()
    wait_for(lambda: "маяк.txt, part 1" in sources(page), "the Russian passage")
    ask(page)
    turns = last_turns(compare(page))
    assert turns["blended"]["stats"]["chunks_hit"] == len(turns["blended"]["passages"]) == len(chunks(page))


@pytest.mark.full
def test_differing_words_are_marked(browser: Any, small_store: Path, server: Any, tmp_path: Path) -> None:
    """The second server's model says something else; words that both say are not marked."""
    from openai_kit import vllm_serving

    with (
        vllm_serving(server.backend.engine.tokenizer) as other,
        served(browser, small_store, tmp_path, "--engine", server.url, "--baseline", other.url) as (page, _),
    ):
        ask(page)
        turns = last_turns(export(page))
        assert turns["blended"]["text"] != turns["baseline"]["text"]
        for arm in ARMS:
            marked = page.get_by_test_id(f"{arm}-answer").locator("[data-differs]").all_inner_texts()
            assert marked, arm
            assert all(piece.strip() in turns[arm]["text"] for piece in marked)


def by_hand(page: Any) -> None:
    """Let the slider choose the ratio; at first each question chooses."""
    assert page.get_by_test_id("ratio-value").inner_text() == export(page)["controls"]["ratio"] == "auto"
    assert page.get_by_test_id("ratio").get_attribute("aria-disabled") == "true"
    page.get_by_test_id("ratio-auto").click()
    wait_for(lambda: page.get_by_test_id("ratio-value").inner_text() == "0.15", "the slider's ratio")


@pytest.mark.full
def test_the_ratio_is_automatic_or_set_by_hand(page: Any) -> None:
    by_hand(page)
    assert export(page)["controls"]["ratio"] == 0.15
    page.get_by_test_id("ratio-auto").click()
    wait_for(lambda: page.get_by_test_id("ratio-value").inner_text() == "auto", "auto")
    ask(page)
    document = compare(page)
    assert document["controls"]["ratio"] == "auto"
    assert last_turns(document)["blended"]["stats"]["budget_reason"]
    assert "auto" in page.get_by_test_id("blended-budget").inner_text()


@pytest.mark.full
def test_equal_answers_have_no_marks(page: Any) -> None:
    by_hand(page)
    thumb = page.locator("[data-testid=ratio] [tabindex='0']")

    def at_the_end() -> bool:
        thumb.press("ArrowRight")
        return page.get_by_test_id("ratio-value").inner_text() == "1.00"

    wait_for(at_the_end, "ratio 1")
    ask(page)
    document = compare(page)
    assert document["controls"]["ratio"] == 1
    texts = {turn["text"] for turn in last_turns(document).values()}
    assert len(texts) == 1, "ratio 1 computes everything"
    assert page.locator("[data-differs]").count() == 0
    page.get_by_test_id("check").click()
    page.get_by_test_id("check-result").wait_for()
    (check,) = export(page)["checks"]
    assert check["equal"]
    assert page.get_by_test_id("check-result").inner_text() == f"Equal: all {check['tokens']} tokens of both answers."


@pytest.mark.full
def test_each_of_many_quick_key_presses_counts(page: Any) -> None:
    """The page and the session agree on the ratio, however fast the keys come."""
    by_hand(page)
    thumb = page.locator("[data-testid=ratio] [tabindex='0']")

    def shown() -> float:
        return round(float(page.get_by_test_id("ratio").get_attribute("aria-valuenow")), 2)

    page.evaluate(  # a slow connection: what the server says of a key comes after some more of them
        """() => {
            const emit = window.socket.emit.bind(window.socket);
            window.socket.emit = (...all) => setTimeout(() => emit(...all), 120);
        }"""
    )
    ratio = export(page)["controls"]["ratio"]
    for key, presses, pause_ms in (("ArrowRight", 14, 0), ("ArrowLeft", 12, 30), ("ArrowRight", 10, 60)):
        thumb.focus()  # the export's button had it
        for _ in range(presses):
            page.keyboard.press(key)
            page.wait_for_timeout(pause_ms)
        ratio = round(ratio + (0.05 if key == "ArrowRight" else -0.05) * presses, 2)
        wait_for(lambda wanted=ratio: export(page)["controls"]["ratio"] == wanted, f"{ratio} in the session", 60)
        assert export(page)["controls"]["ratio"] == ratio  # all that the server said of the keys came before this
        assert shown() == ratio
        assert page.get_by_test_id("ratio-value").inner_text() == f"{ratio:.2f}"
    page.reload()
    ready(page)
    assert shown() == ratio


@pytest.mark.full
def test_text_fields_are_high_enough_and_grow(page: Any) -> None:
    def open_fields() -> list[Any]:
        page.get_by_text("Words before the passages").click()
        fields = [page.locator(f"textarea[data-testid={name}]") for name in ("system", "instruction")]
        for field in fields:
            field.wait_for()
        return fields

    def wait_for_lines(field: Any, least: float) -> None:
        lines = "each => each.clientHeight / parseFloat(getComputedStyle(each).lineHeight)"
        wait_for(lambda: field.evaluate(lines) >= least, f"{least} lines")
        wait_for(lambda: field.evaluate("each => each.scrollHeight <= each.clientHeight + 1"), "all of the words")

    for field in open_fields():
        wait_for_lines(field, 3)
        field.fill("A line of it.\n" * 15)
        wait_for_lines(field, 15)
    wait_for(lambda: export(page)["controls"]["instruction"].count("\n") == 15, "the words in the session")
    page.reload()
    ready(page)
    for field in open_fields():
        wait_for_lines(field, 15)


@pytest.mark.full
def test_repetitions_show_the_medians_of_the_export(page: Any) -> None:
    ask(page)
    page.get_by_test_id("repeat-times").fill("4")
    page.get_by_test_id("repeat-times").press("Tab")
    page.get_by_test_id("repeat").click()
    wait_for(lambda: page.get_by_test_id("repeat-progress").inner_text() == "4 of 4, done", "four repetitions")
    ready(page)
    (run,) = export(page)["repeats"]
    medians = page.get_by_test_id("repeat-medians").inner_text()
    pairs = run["pairs"]

    def median(name: str) -> float:
        values = sorted(pair[name] for pair in pairs)
        return (values[1] + values[2]) / 2

    wanted = f"{median('blended_ms'):,.0f} ms blended, {median('baseline_ms'):,.0f} ms full prefill"
    assert medians == f"Median first token: {wanted}"
    differing = sum(pair["differ"] for pair in pairs)
    assert page.get_by_test_id("repeat-differing").inner_text() == f"{differing} of 4 answers differ"
    assert len({tuple(pair["order"]) for pair in pairs}) > 1
    assert all(pair["reused_tokens"] > 0 for pair in pairs)
    assert page.get_by_test_id("repeat-plot").locator("canvas, svg").count() == 1


@pytest.mark.full
def test_cold_computes_everything_and_warm_reuses(page: Any) -> None:
    ask(page)
    page.get_by_test_id("cold").click()
    wait_for(lambda: "Cold" in page.get_by_test_id("note").inner_text(), "cold")
    ready(page)
    ask(page)
    stats = last_turns(compare(page))["blended"]["stats"]
    assert (stats["reused_tokens"], stats["chunks_hit"]) == (0, 0)
    assert page.get_by_test_id("speedup").is_hidden(), "nothing was reused: no factor"
    page.get_by_test_id("warm").click()
    wait_for(lambda: "Warm" in page.get_by_test_id("note").inner_text(), "warm")
    ready(page)
    ask(page)
    assert last_turns(compare(page))["blended"]["stats"]["reused_tokens"] > 0


@pytest.fixture(scope="module")
def samples(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """A first start, with its sample documents: (the page's address, what it said of its progress).

    A store of an earlier run, named in LMCACHE_RAG_DEMO_SAMPLES, is copied: then there is nothing to ingest.
    """
    folder = tmp_path_factory.mktemp("first")
    if kept := os.environ.get("LMCACHE_RAG_DEMO_SAMPLES"):
        shutil.copytree(kept, folder / "store")
    said: list[str] = []
    with kit.demo(folder, "--store", folder / "store", "--max-tokens", "48") as url, visit(browser, url) as page:
        until = time.monotonic() + 3600
        page.get_by_test_id("start-phase").wait_for(state="attached")
        while page.get_by_test_id("start-phase").is_visible():
            assert time.monotonic() < until, said[-1:]
            for name in ("start-phase", "start-progress"):
                for text in page.get_by_test_id(name).all_inner_texts():
                    if text not in said:
                        said.append(text)
            time.sleep(0.2)
        ready(page)
        yield url, said


@pytest.mark.full
def test_a_first_start_ingests_samples_with_progress(browser: Any, samples: Any) -> None:
    url, said = samples
    if not os.environ.get("LMCACHE_RAG_DEMO_SAMPLES"):
        assert "First start: ingesting the sample documents, each passage's KV is computed once" in said
        progress = [re.findall(r"\d+", text) for text in said if text.endswith("passages")]
        assert len(progress) > 10
        assert int(progress[-1][-2]) > int(progress[0][-2])
    with visit(browser, url) as page:
        ready(page)
        page.get_by_test_id("sample-1").click()
        question = wait_for(lambda: page.get_by_test_id("question").input_value(), "the sample's question")
        ask(page, question)
        document = compare(page)
        stats = last_turns(document)["blended"]["stats"]
        assert (stats["chunks_hit"], stats["chunks_missed"]) == (4, 0)
        page.get_by_text("Add a passage").click()
        page.get_by_test_id("find").fill("Волга, самая длинная река Европы")
        page.get_by_test_id("find-button").click()
        page.get_by_test_id("found").first.wait_for()
        assert re.search("[а-я]", " ".join(page.get_by_test_id("found").all_inner_texts())), "the Russian sample"


@pytest.mark.full
def test_pictures_of_the_three_minutes(browser: Any, samples: Any, tmp_path: Path) -> None:
    """The steps of docs/demo.md; what they measured is beside the pictures."""
    from playwright.sync_api import expect

    url, _ = samples
    to = Path(os.environ.get(kit.PICTURES) or tmp_path)
    to.mkdir(parents=True, exist_ok=True)
    with visit(browser, url, viewport={"width": 1280, "height": 940}) as page:

        def picture(name: str, element: str = "") -> None:
            page.mouse.move(0, 0)
            page.wait_for_timeout(500)
            expect(page.locator(".q-tooltip")).to_have_count(0)  # that of a button that was pressed
            if element:
                page.locator(element).screenshot(path=to / f"{name}.png")
            else:
                page.screenshot(path=to / f"{name}.png")
            assert (to / f"{name}.png").stat().st_size > 5_000

        ready(page)
        page.get_by_test_id("sample-1").click()
        question = wait_for(lambda: page.get_by_test_id("question").input_value(), "the sample's question")
        ask(page, question)
        picture("demo-answers")
        page.get_by_test_id("shuffle").click()
        ask(page, question)
        compare(page)
        picture("demo-reordered")
        page.get_by_test_id("check").click()
        page.get_by_test_id("check-result").wait_for()
        ready(page)
        page.get_by_test_id("repeat-times").fill("6")
        page.get_by_test_id("repeat-times").press("Tab")
        page.get_by_test_id("repeat").click()
        wait_for(lambda: page.get_by_test_id("repeat-progress").inner_text() == "6 of 6, done", "the repetitions")
        ready(page)
        page.get_by_test_id("check").scroll_into_view_if_needed()
        picture("demo-repeat", "section[aria-label='Repeat']")
        page.evaluate("scrollTo(0, 0)")
        page.get_by_test_id("dark").click()
        picture("demo-dark")
        document = compare(page)
        page.get_by_test_id("dark").click()
        page.set_viewport_size({"width": 360, "height": 740})
        page.evaluate("document.querySelector('[data-testid=speedup]').scrollIntoView()")
        picture("demo-narrow")
    turns = [
        {
            "arm": turn["arm"],
            "ttft_ms": round(turn["ttft_ms"]),
            **{kind: turn["stats"][f"{kind}_tokens"] for kind in KINDS},
        }
        for turn in document["turns"]
    ]
    assert all(turn["reused"] > 0 for turn in turns if turn["arm"] == "blended")
    (to / "demo.json").write_text(
        json.dumps({"question": question, "turns": turns, "repeats": document["repeats"]}, indent=1, ensure_ascii=False)
    )
