"""One file becomes one document: its id, hash, kind and title."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from document_kit import write

from lmcache_rag.documents import Document, load_document


def test_a_document_carries_path_text_hash_and_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "Hello.\n")
    assert load_document(path) == Document(
        doc_id=str(path),
        text="Hello.\n",
        content_hash=hashlib.sha256(b"Hello.\n").hexdigest(),
        source=str(path),
        metadata={"name": "a.txt", "media_type": "text/plain"},
        parser="text 1",
    )


def test_times_do_not_enter_the_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt")
    before = load_document(path)
    os.utime(path, (1, 1))
    assert load_document(path) == before


def test_a_link_and_its_target_are_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt")
    (tmp_path / "link").symlink_to(path)
    assert load_document(tmp_path / "link") == load_document(path)


@pytest.mark.parametrize(
    ("name", "content", "media_type", "title"),
    [
        ("a.md", "intro\n\n# The title #\n\n## Other\n", "text/markdown", "The title"),
        ("a.rst", "=====\nTitle\n=====\n\ntext\n", "text/x-rst", "Title"),
        ("b.rst", "A longer title\n--------------\n\ntext\n", "text/x-rst", "A longer title"),
        ("a.csv", "a,b\n1,2\n", "text/csv", None),
        ("a.json", '{"a": 1}', "application/json", None),
        ("a.log", "12:00 started\n", "text/plain", None),
        ("a.py", "def f():\n    return 1\n", "text/plain", None),
        ("README", "no suffix\n", "text/plain", None),
    ],
)
def test_kinds_of_text(tmp_path: Path, name: str, content: str, media_type: str, title: str | None) -> None:
    document = load_document(write(tmp_path / name, content))
    assert document.text == content
    assert document.metadata == {"name": name, "media_type": media_type} | ({"title": title} if title else {})


def test_documents_are_frozen_with_json_metadata(tmp_path: Path) -> None:
    document = load_document(write(tmp_path / "a.md", "# Title\n"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        document.text = "other"  # type: ignore[misc]
    assert json.loads(json.dumps(document.metadata)) == document.metadata


def test_importing_loads_no_framework_and_no_parser() -> None:
    code = (
        "import sys, lmcache_rag.documents; "
        "print(sorted({'torch', 'transformers', 'langchain_core', 'bs4', 'pypdf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
