"""The documents and questions that come with the package; in the checkout they are examples/data."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

PACKAGE = "lmcache_rag.demo.sample_data"
# Few, so that the first start is short: those with the answers, and some on related subjects.
DOCUMENTS = (
    *("mountains.txt", "volcanoes-and-earthquakes.md", "canals-and-dams.pdf", "great-rivers.md"),
    *("periodic-table.pdf", "chemical-elements.html", "baikal-ru.md"),
    *("lakes-and-inland-seas.md", "oceans.pdf", "deserts.html"),
)
ENGLISH = 3  # questions from questions.json
RUSSIAN = "Какая река вытекает из Байкала, и какая в него впадает?"


def documents() -> Path:
    """The folder of the sample documents."""
    return Path(str(resources.files(PACKAGE).joinpath("documents")))


def files() -> list[Path]:
    """The files that the demo ingests at its first start."""
    return [documents() / name for name in DOCUMENTS]


def questions() -> list[str]:
    """Questions that the sample documents answer."""
    text = resources.files(PACKAGE).joinpath("questions.json").read_text(encoding="utf-8")
    return [*(entry["question"] for entry in json.loads(text)[:ENGLISH]), RUSSIAN]
