"""The demo's page in a real browser when something is wrong: files, servers, engines, passwords."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import browser_kit as kit
import demo_page_kit
import pytest
from browser_kit import export, ready, visit, wait_for
from demo_page_kit import (
    ARMS,
    QUESTION,
    ask,
    compare,
    last_turns,
    served,
)

browser, page, page_url = demo_page_kit.browser, demo_page_kit.page, demo_page_kit.page_url
server, small_store = demo_page_kit.server, demo_page_kit.small_store

pytestmark = pytest.mark.browser


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
