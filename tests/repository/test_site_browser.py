"""The documentation in a real browser: every page, the search, both colour schemes, a narrow window."""

from __future__ import annotations

import functools
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from browser_kit import chromium, findings, visit
from site_kit import Site

pytestmark = [pytest.mark.full, pytest.mark.browser]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    yield Site(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def url(site: Site) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site.html)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def test_each_page_is_shown_without_faults(browser: Any, site: Site, url: str) -> None:
    pages = [page.relative_to(site.html).as_posix() for page in site.pages()]
    with visit(browser, f"{url}/index.html") as page:
        for name in pages:
            page.goto(f"{url}/{name}")
            assert page.get_by_role("heading", level=1).first.is_visible(), name
            broken = "() => [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
            page.wait_for_load_state("load")
            assert page.evaluate(broken) == [], name


def test_the_search_finds_a_page(browser: Any, url: str) -> None:
    with visit(browser, f"{url}/index.html") as page:
        page.get_by_role("textbox", name="Search").fill("neutral passages")
        found = page.locator(".md-search-result__link").filter(has_text="The wire format").first
        found.wait_for()
        found.click()
        page.wait_for_url("**/wire-format.html*")


def test_the_search_shows_documents_first(browser: Any, url: str) -> None:
    with visit(browser, f"{url}/index.html") as page:
        page.get_by_role("textbox", name="Search").fill("ingest key")
        first = page.locator(".md-search-result__link").first
        first.wait_for()
        assert "results/" not in (first.get_attribute("href") or "")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_fits_its_window(browser: Any, url: str, scheme: str, width: int) -> None:
    window = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    with visit(browser, f"{url}/wire-format.html", **window) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") is (scheme == "light")
        if width == 1280:
            assert findings(page, ("critical",)) == []
