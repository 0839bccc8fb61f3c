"""The page of bench quality in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser_kit import chromium, lines_of_readable_page

from lmcache_rag.bench.quality.report import write_report
from lmcache_rag.bench.quality.results import Record
from lmcache_rag.bench.quality.scores import scores, verdict

pytestmark = pytest.mark.slow

ARMS = {"full": 40.0, "prefix": 39.0, "auto": 14.0, "query:0.15": 13.8, "query:0.3": 13.9, "hkvd:0.15": 13.7, "none": 5}


def page_of(path: Path) -> Path:
    """Arms of nearly the same speed and cost, and a conversation."""
    records = []
    for number in range(12):
        arms: dict[str, dict[str, Any]] = {}
        for place, (arm, ms) in enumerate(ARMS.items()):
            text = "right" if place < 2 or (number + place) % 3 else "no"
            fields = {"equal": False, "first_kl": 0.1, "along_kl": 0.123 * place, "gold_nll": -0.5 * place}
            fields |= {"counts": {}, "failure": "", "blended": True}
            arms[arm] = {"text": text, "parsed": text, "ttft_ms": ms + number, **fields}
        task = f"turn {number % 6 + 1}"
        records.append(Record(f"q{number}", "8x160:conversation", task, "Why?", ("right",), 1400, arms))
    found = scores(records)
    facts = {"model": "m", "engine": "vllm", "version": "1"}
    write_report(path, records, found, facts, "Advice.", verdict(found, "auto", 0.02))
    return path


def test_all_texts_of_the_pictures_can_be_read(tmp_path: Path) -> None:
    path = page_of(tmp_path / "page.html")
    assert lines_of_readable_page(path) == len(ARMS)


def test_the_list_of_changes_is_filtered(tmp_path: Path) -> None:
    path = page_of(tmp_path / "page.html")
    with chromium() as browser:
        page = browser.new_page()
        page.goto(path.as_uri())
        page.select_option("#kind", "lost")
        lost = page.locator("details:visible").count()
        page.select_option("#arm", "auto")
        assert 0 < page.locator("details:visible").count() < lost
        page.select_option("#kind", "gained")
        assert page.locator("details:visible").count() == 0
