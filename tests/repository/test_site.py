"""The documentation is built as a site, strictly; it has nothing from the network, and a wrong link fails."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from site_kit import Site

pytestmark = pytest.mark.full
PAGES = (
    *("index", "how-blending-works", "langchain", "llama-index", "serving", "demo", "command-line", "quality"),
    *("documents", "wire-format", "migrating", "limits", "security", "versions", "architecture"),
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    yield Site(folder)
    shutil.rmtree(folder)


LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "form": "action"}


class Parsed(HTMLParser):
    """What a page loads by itself, where its links lead, and its ids."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.update(value for name, value in attrs if name in ("id", "name") and value)
        if tag == "a" and values.get("href"):
            self.links.append(str(values["href"]))
        name = "href" if tag == "link" and values.get("rel") != "canonical" else LOADS.get(tag, "")
        if found := values.get(name):
            self.loaded.append(found)


def test_each_page_is_there_and_in_the_navigation(site: Site) -> None:
    start = (site.html / "index.html").read_text(encoding="utf-8")
    navigation = start[start.index("md-nav--primary") : start.index("md-content")]
    assert [name for name in PAGES if not (site.html / f"{name}.html").is_file()] == []
    assert [name for name in PAGES[1:] if f'href="{name}.html"' not in navigation] == []


def test_nothing_is_loaded_from_the_network(site: Site) -> None:
    for page in site.pages():
        assert [url for url in Parsed(page).loaded if re.match(r"(?:[a-z]+:)?//", url)] == [], page
    for sheet in site.html.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_links_and_anchors_lead_somewhere(site: Site) -> None:
    parsed = {page: Parsed(page) for page in site.pages() if page.name != "404.html"}
    for page, found in parsed.items():
        for link in found.links:
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = unquote(link).partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor and target.suffix == ".html" and not anchor.startswith("__"):
                assert anchor in parsed[target].ids, f"{page.name}: {link}"


def test_files_outside_the_documents_are_pages(site: Site) -> None:
    client = (site.html / "source" / "examples" / "typescript" / "client.ts.html").read_text(encoding="utf-8")
    assert "OpenAI" in client
    assert (site.html / "source" / "CONTRIBUTING.html").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x](nowhere.md)", "nowhere.md"),
        ("[x](serving.md#nowhere)", "nowhere"),
        ("[x](../examples/nowhere.py)", "nowhere.py"),
        ("![x](images/nowhere.png)", "nowhere.png"),
    ],
)
def test_a_wrong_link_fails(site: Site, text: str, message: str) -> None:
    copy = site.copy()
    with (copy / "docs" / "index.md").open("a") as file:
        file.write(f"\n{text}\n")
    done = site.build(copy)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_page_that_is_not_in_the_navigation_fails(site: Site) -> None:
    copy = site.copy()
    assert site.build(copy).returncode == 0
    (copy / "docs" / "forgotten.md").write_text("# Forgotten\n")
    done = site.build(copy)
    assert done.returncode == 1
    assert "forgotten.md" in done.stderr
