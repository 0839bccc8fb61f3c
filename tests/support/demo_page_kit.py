"""The demo's page in a real browser, over a small store: what a test opens, clicks, reads and compares.

Each figure on the page is compared with the exported JSON, which has what the engines gave.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import browser_kit as kit
import httpx
import pytest
from browser_kit import export, number, ready, visit

from lmcache_rag import Workspace

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
