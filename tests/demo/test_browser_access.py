"""The demo's page by keyboard, in a narrow window, for screen readers, in several browsers at once."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import browser_kit as kit
import demo_page_kit
import pytest
from browser_kit import ready, visit, wait_for
from demo_page_kit import (
    ARMS,
    QUESTION,
    ask,
    broken_words,
    chunks,
    compare,
)

browser, page, page_url = demo_page_kit.browser, demo_page_kit.page, demo_page_kit.page_url
server, small_store = demo_page_kit.server, demo_page_kit.small_store

pytestmark = pytest.mark.browser


@pytest.mark.full
def test_two_browsers_have_sessions_of_their_own(browser: Any, page_url: str) -> None:
    other = "How do visitors come to Terschelling?"
    with visit(browser, page_url) as one, visit(browser, page_url) as two:
        ready(one)
        ready(two)
        for page, question in ((one, QUESTION), (two, other)):
            page.get_by_test_id("question").fill(question)
            page.get_by_test_id("ask").click()
        for page in (one, two):
            wait_for(lambda page=page: page.get_by_test_id("baseline-turn").count() == 1, "an answer in each")
            ready(page)
        first, second = compare(one), compare(two)
        assert {turn["question"] for turn in first["turns"]} == {QUESTION}
        assert {turn["question"] for turn in second["turns"]} == {other}
        two.get_by_test_id("shuffle").click()
        assert chunks(one) == [each["chunk_id"] for each in first["passages"]]


@pytest.mark.full
def test_a_reload_keeps_the_session(page: Any) -> None:
    ask(page)
    page.get_by_test_id("shuffle").click()
    before, order = compare_without_order(page), chunks(page)
    page.reload()
    ready(page)
    assert page.get_by_test_id("question").input_value() == QUESTION
    assert chunks(page) == order
    after = compare_without_order(page)
    assert after["turns"] == before["turns"]


def compare_without_order(page: Any) -> dict[str, Any]:
    return compare(page) | {"made": ""}


@pytest.mark.full
def test_all_of_it_by_keyboard(browser: Any, page_url: str) -> None:
    with visit(browser, page_url) as page:
        ready(page)
        page.get_by_test_id("question").focus()
        page.keyboard.type(QUESTION)
        page.keyboard.press("Enter")
        wait_for(lambda: page.get_by_test_id("baseline-turn").count() == 1, "the answers")
        ready(page)
        page.get_by_test_id("question").focus()
        reached: set[str] = set()
        for _ in range(120):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.closest('[data-testid]')?.dataset.testid || ''"))
        wanted = {
            "ask",
            "at-once",
            "follow-up",
            "check",
            "repeat-times",
            "repeat",
            "blended-answer",
            "export",
            "shuffle",
        }
        assert wanted <= reached, wanted - reached
        assert {"down", "up", "remove", "ratio", "cold", "warm"} <= reached, reached


@pytest.mark.full
def test_a_narrow_window_needs_no_scrolling_sideways(browser: Any, page_url: str) -> None:
    with visit(browser, page_url, viewport={"width": 360, "height": 740}) as page:
        ready(page)
        ask(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        out = page.evaluate(
            """() => [...document.querySelectorAll('[data-testid]')].filter(each => {
                const box = each.getBoundingClientRect();
                return box.width && (box.left < 0 || box.right > 361);
            }).map(each => each.dataset.testid)"""
        )
        assert out == []
        compare(page)
        assert kit.findings(page) == []
        for text in ("Words before the passages", "Add a passage"):
            page.get_by_text(text).click()
        for arm in ARMS:
            page.get_by_test_id(f"{arm}-by-passage").get_by_text("Tokens by passage").click()
        page.wait_for_timeout(600)  # until all is unfolded
        assert page.get_by_test_id("blended-passage-1-reused").is_visible()
        assert broken_words(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        table = """each => {
            const right = cell => {
                const range = document.createRange();
                range.selectNodeContents(cell);
                return Math.round(range.getBoundingClientRect().right);
            };
            const ends = [...each.querySelectorAll(":scope > .d-n")].map(right);
            return ends.length > 4 && ends.every((end, at) => Math.abs(end - ends[at % 4]) <= 1);
        }"""
        assert all(each.evaluate(table) for each in page.locator(".d-table").all()), "numbers end under their heads"
        table = "each => each.scrollWidth <= each.clientWidth"
        assert all(each.evaluate(table) for each in page.locator(".d-table").all()), "the table needs no scrolling"


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Any, page_url: str, scheme: str) -> None:
    """Contrast AA, names, roles and focus, before and after an answer, with everything opened."""
    with visit(browser, page_url, color_scheme=scheme) as page:
        ready(page)
        assert kit.findings(page) == []
        ask(page)
        for text in ("Words before the passages", "Add a passage", "Tokens by passage", "Earlier answers"):
            page.get_by_text(text).first.click()
        page.wait_for_timeout(600)  # until all is unfolded
        assert page.evaluate("document.body.classList.contains('body--dark')") is (scheme == "dark")
        assert kit.findings(page) == []


@pytest.mark.full
def test_ten_open_pages_keep_answering(browser: Any, page_url: str) -> None:
    """All ask at once; meanwhile each still takes what its user does."""
    with ExitStack() as stack:
        pages = [stack.enter_context(visit(browser, page_url)) for _ in range(10)]
        for page in pages:
            ready(page)
        for at, page in enumerate(pages):
            page.get_by_test_id("question").fill(f"{QUESTION} ({at})")
            page.get_by_test_id("ask").click()
        for page in pages:
            page.get_by_text("Add a passage").click()
            page.get_by_test_id("find").fill("ferry")
            page.get_by_test_id("find-button").click()
        for page in pages:
            page.get_by_test_id("found").first.wait_for()
        for at, page in enumerate(pages):
            wait_for(lambda page=page: page.get_by_test_id("baseline-turn").count() == 1, f"the answers of page {at}")
            ready(page)
            document = compare(page)
            assert {turn["question"] for turn in document["turns"]} == {f"{QUESTION} ({at})"}
            assert not any(turn["error"] for turn in document["turns"])
