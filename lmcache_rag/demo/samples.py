"""The documents and questions that come with the package; in the checkout they are examples/data."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

PACKAGE = "lmcache_rag.demo.sample_data"
ENGLISH = 3  # questions from questions.json
RUSSIAN = "Какая река вытекает из Байкала, и какая в него впадает?"


def documents() -> Path:
    """The folder of the sample documents."""
    return Path(str(files(PACKAGE).joinpath("documents")))


def questions() -> list[str]:
    """Questions that the sample documents answer."""
    text = files(PACKAGE).joinpath("questions.json").read_text(encoding="utf-8")
    return [*(entry["question"] for entry in json.loads(text)[:ENGLISH]), RUSSIAN]
