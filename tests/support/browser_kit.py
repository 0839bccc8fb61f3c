"""The demo's page as a user has it: `lmcache-rag demo` in a process of its own, in a real Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import npm_kit
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

ROOT = Path(__file__).parents[2]
CHROMIUM = os.environ.get("LMCACHE_RAG_CHROMIUM") or "/usr/bin/chromium"
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
AXE_VERSION = "4.14.1"
AXE_SHA256 = "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"
LIMIT_S = float(os.environ.get("LMCACHE_RAG_DEMO_LIMIT_S", "300"))  # against hanging
PICTURES = "LMCACHE_RAG_DEMO_PICTURES"  # a folder: the tests write their screenshots there


# -- the browser --------------------------------------------------------------------------------------------------


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium; a test that cannot have it is skipped, and fails with --must-run."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no {CHROMIUM}: apt-get install chromium, or name another in LMCACHE_RAG_CHROMIUM")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A page in a session of its own. Errors of its scripts, and requests that leave this machine, are failures."""
    context: BrowserContext = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
    context.set_default_timeout(LIMIT_S * 1e3)
    problems: list[str] = []
    page = context.new_page()
    page.on("pageerror", lambda problem: problems.append(f"script: {problem}"))

    def check(request: Any) -> None:
        if not re.match(r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|blob:|about:", request.url):
            problems.append(f"request to {request.url}")

    page.on("request", check)
    try:
        page.goto(url)
        yield page
        assert not problems, problems
    finally:
        context.close()


def axe_source() -> str:
    """axe-core's script, from npm's registry."""
    if shutil.which("npm") is None:
        pytest.skip("there is no npm, which gets axe-core")
    with npm_kit.packed("axe-core", AXE_VERSION, AXE_SHA256) as archive:
        script = archive.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


def findings(page: Page, impacts: Sequence[str] = ("serious", "critical")) -> list[str]:
    """What axe finds on a page, of these impacts."""
    page.evaluate(axe_source())
    found = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{each['id']} ({each['impact']}): {node['target']} {node['failureSummary']}"
        for each in found["violations"]
        if each["impact"] in impacts
        for node in each["nodes"]
    ]


# -- the page's server --------------------------------------------------------------------------------------------


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(true: Callable[[], Any], what: str, limit: float = LIMIT_S) -> Any:
    """Wait until something holds."""
    until = time.monotonic() + limit
    while not (found := true()):
        assert time.monotonic() < until, f"after {limit:g} s not yet: {what}"
        time.sleep(0.05)
    return found


class Process:
    """A command with a log, that is ended like Ctrl-C ends it.

    Args:
        command: What runs.
        log: Gets all that it prints.
        env: Variables on top of ours.
    """

    def __init__(self, command: Sequence[str | Path], log: Path, env: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=log.parent,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def answers(self, url: str) -> bool:
        """Whether something answers there; a process that has ended is a failure."""
        assert self.process.poll() is None, f"it has ended with {self.process.returncode}:\n{self.said}"
        try:
            with urllib.request.urlopen(url, timeout=30):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def end(self, number: int = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@contextmanager
def demo(folder: Path, *arguments: str | Path, env: dict[str, str] | None = None) -> Iterator[str]:
    """`lmcache-rag demo` until its page answers; gives the address. It ends cleanly, or the test fails."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [Path(sys.executable).parent / "lmcache-rag", "demo", "--port", str(port), *arguments]
    # No browser of the machine's own is to be opened.
    running = Process(
        command,
        folder / "demo.log",
        {"BROWSER": "true", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")} | (env or {}),
    )
    try:
        wait_for(lambda: running.answers(url), f"{url}\n{running.said}")
        yield url
        assert running.process.poll() is None, running.said
    finally:
        status = running.end()
    assert "Traceback" not in running.said, running.said
    assert status in (0, 130), running.said


# -- what a user does ---------------------------------------------------------------------------------------------


def ready(page: Page) -> None:
    """Wait for the end of the start."""
    page.get_by_test_id("ask").and_(page.locator(":not([disabled]):not(.disabled)")).wait_for()


def export(page: Page) -> dict[str, Any]:
    """The session's JSON, as the button saves it."""
    with page.expect_download() as download:
        page.get_by_test_id("export").click()
    return json.loads(Path(download.value.path()).read_text(encoding="utf-8"))


def number(text: str) -> float:
    """The first number of a text such as "1,203 ms"."""
    found = re.search(r"\d[\d,]*(\.\d+)?", text)
    assert found is not None, text
    return float(found[0].replace(",", ""))


OUTSIDE = """() => [...document.querySelectorAll("svg")].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(text => {
    const own = text.getBoundingClientRect();
    return own.left < box.left || own.right > box.right + 1 || own.top < box.top - 1 || own.bottom > box.bottom + 1;
  }).map(text => text.textContent);
})"""
OVERLAPPING = """() => {
  const all = [...document.querySelectorAll("svg text")];
  const texts = all.map(text => [text.textContent, text.getBoundingClientRect()]);
  return texts.flatMap(([one, a], i) => texts.slice(i + 1).filter(([other, b]) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4
  ).map(([other]) => [one, other]));
}"""


def lines_of_readable_page(path: Path) -> int:
    """How many lines the pictures of a page have; fails where a text of them cannot be read, wide or narrow."""
    with chromium() as browser:
        for width in (1280, 400):
            page = browser.new_page(viewport={"width": width, "height": 900})
            problems: list[str] = []
            page.on("pageerror", lambda problem, problems=problems: problems.append(str(problem)))
            page.goto(path.as_uri())
            assert page.evaluate(OUTSIDE) == []
            assert page.evaluate(OVERLAPPING) == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width  # only tables and pictures scroll
            assert problems == []
        return int(page.locator("svg polyline").count())
