"""The sample documents and questions of examples/data."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from document_kit import DATA

from lmcache_rag.documents import load_document
from lmcache_rag.weights import DEFAULT_MODEL

CORPUS = sorted((DATA / "documents").iterdir())


def test_the_samples_are_thirty_with_four_of_each_kind() -> None:
    suffixes = [path.suffix for path in CORPUS]
    assert len(CORPUS) >= 30
    assert all(suffixes.count(suffix) >= 4 for suffix in (".md", ".txt", ".html", ".pdf"))
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 600_000


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_each_sample_document_loads_without_a_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="lmcache_rag"):
        document = load_document(path)
    assert 800 < len(document.text) < 4000
    assert "\ufffd" not in document.text
    assert "<" not in document.text
    assert "querySelector" not in document.text
    assert not caplog.records


def test_sources_name_each_sample_and_the_licence() -> None:
    sources = (DATA / "SOURCES.md").read_text()
    assert "CC BY-SA 4.0" in sources
    assert all(f"`{path.name}`" in sources for path in CORPUS)


def test_sample_questions_need_and_quote_two_documents() -> None:
    questions = json.loads((DATA / "questions.json").read_text())
    assert len({question["id"] for question in questions}) == len(questions) == 8
    texts = {path.name: " ".join(load_document(path).text.split()) for path in CORPUS}
    for question in questions:
        assert len(question["documents"]) >= 2
        assert list(question["evidence"]) == question["documents"]
        for document, quote in question["evidence"].items():
            assert [name for name, text in texts.items() if quote in text] == [document]


def test_the_samples_answer_the_quickstarts_questions() -> None:
    questions = json.loads((DATA / "quickstart.json").read_text())
    text = " ".join(" ".join(load_document(path).text.split()) for path in CORPUS)
    assert len(questions) == 5
    for question in questions:
        assert question["answer"] in question["reference"]
        assert question["answer"] in text


@pytest.mark.slow
@pytest.mark.full
def test_the_quickstart_answers_its_questions(tmp_path: Path) -> None:
    command = [sys.executable, DATA.parent / "quickstart.py", "--store", tmp_path / "s"]
    env = {**os.environ, "LMCACHE_RAG_MODEL": DEFAULT_MODEL, "COLUMNS": "160"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert "full prefill: 5 of 5 right; blended KV: 5 of 5 right" in done.stdout
