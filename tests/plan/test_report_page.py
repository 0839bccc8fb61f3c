"""The page of `plan` in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser_kit import chromium
from typer.testing import CliRunner

from lmcache_rag.cli.app import app

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize(("chunks", "gigabytes"), [(3000, 20), (3000, 0.1), (40, 900)])
def test_all_texts_of_the_curve_can_be_read(tmp_path: Path, chunks: int, gigabytes: float) -> None:
    path = tmp_path / "page.html"
    words = f"plan --layers 32 --kv-heads 8 --head-size 128 --questions 1500 --chunks {chunks} --l1-gb {gigabytes}"
    result = CliRunner().invoke(app, [*words.split(), "--tier", "disk:1000:8", "--report", str(path)])
    assert result.exit_code == 0, result.output
    with chromium() as browser:
        for width in (1280, 400):
            page = browser.new_page(viewport={"width": width, "height": 900})
            problems: list[str] = []
            page.on("pageerror", lambda problem, problems=problems: problems.append(str(problem)))
            page.goto(path.as_uri())
            assert page.evaluate(OUTSIDE) == []
            assert page.evaluate(OVERLAPPING) == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width  # only tables and pictures scroll
            assert page.locator("svg polyline").count() == 3
            assert problems == []
