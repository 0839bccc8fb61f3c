"""The demo's page in a real browser, with real engines: what a user does in the three minutes, and what goes wrong.

Each figure on the page is compared with the exported JSON, which has what the engines gave.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import browser_kit as kit
import httpx
import pytest
from browser_kit import export, number, ready, visit, wait_for

from lmcache_rag import Workspace

pytestmark = pytest.mark.browser

ARMS = ("blended", "baseline")
KINDS = ("prefix", "reused", "recomputed", "computed")
QUESTION = "When was the lighthouse of Brandaris rebuilt, and how often does its lamp turn?"
DOCUMENTS = {
    "lighthouse.txt": "The lighthouse of Brandaris stands on the island of Terschelling. It was rebuilt in 1594, after "
    "the sea had undermined the first tower. Its lamp turns once in five seconds, and ships see it from far away.",
    "island.md": "Terschelling is an island in the north of the Netherlands. Most visitors come by ferry from "
    "Harlingen, which takes two hours. The island has long beaches, dunes and forests of pine.",
    "ferry.txt": "The ferry to the island leaves Harlingen several times a day. In winter it may be held up by ice and "
    "by storms. The lighthouse shows its captain the way through the shoals at night.",
    "маяк.txt": "Маяк Брандарис стоит на острове Терсхеллинг. Его построили заново в 1594 году.",
}
HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> [link](javascript:window.hacked=3) "
    "<iframe src='https://example.com'></iframe> {{ constructor.constructor('window.hacked = 4')() }} </div></section> "
    + "".join(f"{'>' * depth} {'*' * depth}bomb{'_' * depth}" for depth in (1, 7, 20))
    + " \u202eThe Brandaris lighthouse reversed\u202c \u2066isolated\u2069 \x1b[31mred\x1b[0m \u200f."
)


# -- what runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import expect

    expect.set_options(timeout=kit.LIMIT_S * 1e3)
    with kit.chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def small_store(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four short documents and a hostile one, with their KV."""
    place = tmp_path_factory.mktemp("small")
    folder = place / "documents"
    folder.mkdir()
    for name, text in DOCUMENTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "<b>hostile<b>.txt").write_text(HOSTILE, encoding="utf-8")
    with Workspace.open(place / "store", device="cpu") as workspace:
        assert not workspace.ingestor.ingest([folder]).failed
    return place / "store"


@pytest.fixture(scope="module")
def page_url(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page over the small store, with the embedded engine."""
    folder = tmp_path_factory.mktemp("page")
    with kit.demo(folder, "--store", small_store, "--max-tokens", "12", "--top-k", "3") as url:
        yield url


@pytest.fixture
def page(browser: Any, page_url: str) -> Iterator[Any]:
    with visit(browser, page_url) as opened:
        ready(opened)
        yield opened


@contextmanager
def served(
    browser: Any, small_store: Path, folder: Path, *arguments: str | Path, **env: str
) -> Iterator[tuple[Any, str]]:
    """A page over servers, with a copy of the small store: (the page, its address)."""
    store = folder / "store"
    shutil.copytree(small_store, store)
    with (
        kit.demo(folder, "--store", store, "--max-tokens", "12", "--top-k", "3", *arguments, env=env) as url,
        visit(browser, url) as opened,
    ):
        ready(opened)
        yield opened, url


@pytest.fixture(scope="module")
def server(make_engine: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with a real engine in this process, so that this test's clock is the server's."""
    from embedded_server_kit import serving

    engine = make_engine(tmp_path_factory.mktemp("kv"))
    with serving(engine) as running:
        yield running
    engine.close()


def clocks_of(server: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list that gets, for each stream, the milliseconds from its request's arrival to the sending of its first text.

    The clock is read before the sending: after it, a busy machine may let the client go first.
    """
    handler, clocks, seen = server.RequestHandlerClass, [], set()
    sending = handler.send_event

    def send(stream: Any, document: dict[str, Any]) -> None:
        if stream not in seen and document["choices"] and document["choices"][0].get("text"):
            seen.add(stream)
            clocks.append((time.perf_counter() - stream.arrived) * 1e3)
        sending(stream, document)

    monkeypatch.setattr(handler, "send_event", send)
    return clocks


def plain_ms(client: httpx.Client, server: Any) -> float:
    """Send the latest request once more, by a client that does nothing else: milliseconds to its first text."""
    body = dict(server.questions[-1])
    path, first_ms = body.pop("path"), 0.0
    begin = time.perf_counter()
    with client.stream("POST", f"{server.url}{path}", json=body) as answer:
        for line in answer.iter_lines():
            if not first_ms and '"text": "' in line and '"text": ""' not in line:
                first_ms = (time.perf_counter() - begin) * 1e3
    return first_ms


def ask(page: Any, question: str = QUESTION) -> None:
    """Ask, and wait in the browser for both answers, so that this process leaves its cores to a server in it."""
    from playwright.sync_api import expect

    turns = page.get_by_test_id("baseline-turn")
    before = turns.count()
    page.get_by_test_id("question").fill(question)
    page.get_by_test_id("ask").click()
    expect(turns).to_have_count(before + 1)
    ready(page)


def broken_words(page: Any) -> list[str]:
    """Words of ordinary length that go on in another line, anywhere on the page."""
    return page.evaluate(
        r"""() => {
            const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), broken = [];
            while (texts.nextNode()) {
                const node = texts.currentNode;
                const parent = node.parentElement;
                if (!parent.checkVisibility() || parent.closest("script, style, .q-icon")) continue;
                for (const word of node.data.matchAll(/[\p{L}\p{N}]{2,20}/gu)) {
                    const range = document.createRange();
                    range.setStart(node, word.index);
                    range.setEnd(node, word.index + word[0].length);
                    const tops = new Set([...range.getClientRects()].filter(each => each.width)
                        .map(each => Math.round(each.top)));
                    if (tops.size > 1) broken.push(word[0]);
                }
            }
            return broken;
        }"""
    )


def sources(page: Any) -> list[str]:
    return page.get_by_test_id("passage-source").all_inner_texts()


def chunks(page: Any) -> list[int]:
    return page.get_by_test_id("passage").evaluate_all("each => each.map(card => Number(card.dataset.chunk))")


def figure(page: Any, name: str) -> float:
    return number(page.get_by_test_id(name).inner_text())


def last_turns(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {turn["arm"]: turn for turn in document["turns"]}


def compare(page: Any) -> dict[str, Any]:
    """See that each figure on the page is the export's; returns that."""
    document = export(page)
    turns = last_turns(document)
    for arm, turn in turns.items():
        stats = turn["stats"]
        for kind in KINDS:
            assert figure(page, f"{arm}-{kind}") == stats[f"{kind}_tokens"], (arm, kind)
        assert figure(page, f"{arm}-prompt") == stats["prompt_tokens"] == sum(stats[f"{kind}_tokens"] for kind in KINDS)
        assert figure(page, f"{arm}-timer") == round(turn["ttft_ms"]), arm
        ends = page.get_by_test_id(f"{arm}-ttft").inner_text()
        assert ends == f"to the first token; {turn['total_ms'] / 1e3:.1f} s to the end"
        pieces = page.get_by_test_id(f"{arm}-bar").locator("[data-tokens]")
        shown = [(piece.get_attribute("data-kind"), int(piece.get_attribute("data-tokens"))) for piece in pieces.all()]
        sums = {kind: sum(count for each, count in shown if each == kind) for kind in (*KINDS, "cached")}
        if sums["cached"]:  # a server says for the whole prompt only which of its cached tokens it recomputed
            assert sums["cached"] == stats["reused_tokens"] + stats["recomputed_tokens"], arm
            sums |= {"reused": stats["reused_tokens"], "recomputed": stats["recomputed_tokens"]}
        assert [sums[kind] for kind in KINDS] == [stats[f"{kind}_tokens"] for kind in KINDS], arm
        if turn["chunks"]:  # each part at its place in the prompt
            places = [int(piece.get_attribute("data-passage") or 0) for piece in pieces.all()]
            assert places[0] == places[-1] == 0, arm
            inside = [place for place in places if place]
            assert inside == sorted(inside), arm
            assert set(inside) == set(range(1, len(turn["chunks"]) + 1)), arm
        for index, chunk in enumerate(turn["chunks"], start=1):
            for kind in KINDS:
                cell = page.get_by_test_id(f"{arm}-passage-{index}-{kind}").text_content()
                said = chunk[f"{kind}_tokens"]
                assert cell == ("in those" if said is None else f"{said:,}"), (arm, index, kind)
        answer = page.get_by_test_id(f"{arm}-answer").inner_text()
        assert " ".join(answer.split()) == " ".join(turn["text"].split())
    if document["speedup"]:
        factor, words = document["speedup"], page.get_by_test_id("speedup").inner_text()
        assert words == (
            f"first token {factor:.1f}x faster" if factor >= 1 else f"first token {1 / factor:.1f}x slower"
        )
        assert factor == pytest.approx(turns["baseline"]["ttft_ms"] / turns["blended"]["ttft_ms"])
    cards = page.get_by_test_id("passage-facts").all_inner_texts()
    for card, passage in zip(cards, document["passages"], strict=True):
        assert card.endswith(f"{passage['tokens']:,} tokens")
        assert f"score {passage['score']:.2f}" in card or not passage["score"]
    assert sources(page) == [f"{each['source']}, part {each['part']}" for each in document["passages"]]
    assert chunks(page) == [each["chunk_id"] for each in document["passages"]]
    total = sum(each["tokens"] for each in document["passages"])
    assert page.get_by_test_id("passage-count").inner_text() == f"{len(cards)}, {total:,} tokens"
    return document


# -- in .ci/run ---------------------------------------------------------------------------------------------------


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


# -- in make test-full --------------------------------------------------------------------------------------------


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


@pytest.mark.full
def test_good_files_are_ingested_bad_ones_have_errors(browser: Any, small_store: Path, tmp_path: Path) -> None:
    good = {"name": "pier.md", "mimeType": "text/markdown", "buffer": b"The pier of Nes has nineteen benches of oak."}
    bad = {"name": "broken.pdf", "mimeType": "application/pdf", "buffer": b"%PDF-1.7 nothing of it"}
    other = {"name": "<i>x<i>.bin", "mimeType": "application/octet-stream", "buffer": bytes(range(256)) * 10}
    shutil.copytree(small_store, tmp_path / "store")
    with (
        kit.demo(tmp_path, "--store", tmp_path / "store", "--max-tokens", "8", "--top-k", "2") as url,
        visit(browser, url) as page,
    ):
        ready(page)
        page.locator("input[type=file]").set_input_files([good, bad, other])
        wait_for(lambda: page.get_by_test_id("upload-failed").count() == 2, "two files that fail")
        page.get_by_test_id("upload-done").wait_for()
        ready(page)
        assert page.get_by_test_id("upload-done").inner_text().startswith("pier.md: Ingested: 1 new passages")
        failed = page.get_by_test_id("upload-failed").all_inner_texts()
        assert any(text.startswith("broken.pdf: ") for text in failed)
        assert any(text.startswith("<i>x<i>.bin: ") for text in failed)
        assert not any(str(tmp_path) in text for text in failed), "no paths of the server"
        ask(page, "How many benches has the pier of Nes?")
        document = compare(page)
        assert "pier.md" in {each["source"] for each in document["passages"]}
        assert last_turns(document)["blended"]["stats"]["chunks_hit"] == 2
        assert [row["state"] for row in document["uploads"]] == ["done", "failed", "failed"]


@pytest.mark.full
def test_stopping_ends_the_servers_work(browser: Any, small_store: Path, server: Any, tmp_path: Path) -> None:
    with served(browser, small_store, tmp_path, "--engine", server.url, "--max-tokens", "200") as (page, _):
        server.gone.clear()
        server.pause = 0.2
        try:
            page.get_by_test_id("question").fill(QUESTION)
            page.get_by_test_id("ask").click()
            wait_for(lambda: len(page.get_by_test_id("blended-answer").inner_text()) > 10, "the begin of an answer")
            page.get_by_test_id("stop").click()
            wait_for(lambda: page.get_by_test_id("blended-state").inner_text() == "Stopped.", "the stop")
            ready(page)
            assert server.gone.wait(60), "the server still computes"
            wait_for(lambda: server.active == 0, "the end of the request")
        finally:
            server.pause = 0.0
        turns = export(page)["turns"]
        assert [(turn["arm"], turn["stopped"]) for turn in turns] == [("blended", True)]
        assert 0 < len(turns[0]["text"]) < 1000
        assert page.get_by_test_id("baseline-state").inner_text() in ("Stopped.", "Ready.")
        page.get_by_test_id("max-tokens").fill("8")
        page.get_by_test_id("max-tokens").press("Tab")
        ask(page)
        compare(page)


@pytest.mark.full
def test_an_engine_that_is_killed_and_comes_back(browser: Any, small_store: Path, tmp_path: Path) -> None:
    port = kit.free_port()
    url = f"http://127.0.0.1:{port}"
    script = Path(__file__).parents[1] / "support" / "embedded_server_kit.py"

    def start() -> kit.Process:
        command = [sys.executable, script, str(port), tmp_path / "kv"]
        running = kit.Process(command, tmp_path / "engine.log", {"OMP_NUM_THREADS": "2"})
        wait_for(lambda: running.answers(f"{url}/version"), running.said)
        return running

    engine = start()
    try:
        with served(browser, small_store, tmp_path / "page", "--engine", url) as (page, _):
            ask(page)
            assert last_turns(compare(page))["blended"]["stats"]["reused_tokens"] > 0
            engine.process.kill()
            engine.process.wait()
            ask(page)
            for arm in ARMS:
                assert page.get_by_test_id(f"{arm}-state").inner_text() == "Failed."
                error = page.get_by_test_id(f"{arm}-error")
                assert url in error.inner_text()
                assert len(error.inner_text().splitlines()) >= 2, "what happened, and the remedy"
            assert all(turn["error"] for turn in last_turns(export(page)).values())
            engine = start()
            ask(page)
            turns = last_turns(compare(page))
            assert all(turn["error"] is None for turn in turns.values())
            assert turns["blended"]["stats"]["reused_tokens"] > 0, "its KV files were still there"
            assert page.locator("[data-testid$='-error']").count() == 0
    finally:
        engine.end()


@pytest.mark.full
def test_an_error_is_shown_in_its_own_pane(browser: Any, small_store: Path, server: Any, tmp_path: Path) -> None:
    """A baseline that is down, LMCache gone, a server without our connector."""
    dead = f"http://127.0.0.1:{kit.free_port()}"
    with served(browser, small_store, tmp_path, "--engine", server.url, "--baseline", dead) as (page, _):
        ask(page)
        assert page.get_by_test_id("blended-state").inner_text() == ""
        assert page.get_by_test_id("blended-error").count() == 0
        assert dead in page.get_by_test_id("baseline-error").inner_text()
        assert page.get_by_test_id("speedup").is_hidden()
        server.failure = "LMCache does not answer"
        try:
            ask(page)
        finally:
            server.failure = ""
        stats = last_turns(export(page))["blended"]["stats"]
        assert (stats["reused_tokens"], stats["computed_tokens"]) == (0, stats["prompt_tokens"])
        assert "LMCache does not answer" in " ".join(page.get_by_test_id("blended-note").all_inner_texts())


@pytest.mark.full
def test_a_server_without_our_connector_says_so(browser: Any, small_store: Path, server: Any, tmp_path: Path) -> None:
    server.connector = False
    try:
        with served(browser, small_store, tmp_path, "--engine", server.url) as (page, _):
            ask(page)
            notes = " ".join(page.get_by_test_id("blended-note").all_inner_texts())
            assert "not blended" in notes
            assert "lmcache-rag serve" in notes
            assert page.get_by_test_id("speedup").is_hidden()
    finally:
        server.connector = True


@pytest.mark.full
def test_passages_that_do_not_fit_are_named(browser: Any, small_store: Path, server: Any, tmp_path: Path) -> None:
    usual, server.context = server.context, 400
    try:
        with served(browser, small_store, tmp_path, "--engine", server.url, "--top-k", "5") as (page, _):
            ask(page)
            turn = last_turns(export(page))["blended"]
            assert turn["dropped"] or turn["error"]
            shown = page.get_by_test_id("blended-note").or_(page.get_by_test_id("blended-error")).all_inner_texts()
            assert any("context" in each for each in shown), shown
    finally:
        server.context = usual


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
def test_the_password_lets_in_and_a_wrong_one_does_not(browser: Any, small_store: Path, tmp_path: Path) -> None:
    shutil.copytree(small_store, tmp_path / "store")
    env = {"LMCACHE_RAG_DEMO_PASSWORD": "correct horse battery"}
    with kit.demo(tmp_path, "--store", tmp_path / "store", env=env) as url, visit(browser, url) as page:
        page.get_by_test_id("password").fill("wrong horse battery")
        page.get_by_test_id("login").click()
        page.get_by_test_id("login-error").wait_for()
        assert page.get_by_test_id("ask").count() == 0
        assert kit.findings(page) == []
        page.get_by_test_id("password").fill("correct horse battery")
        page.get_by_test_id("password").press("Enter")
        ready(page)
    assert "correct horse" not in (tmp_path / "demo.log").read_text()


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


# -- the samples, and pictures of them ----------------------------------------------------------------------------


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
