"""Bytes become text: encodings and line ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from document_kit import write

from lmcache_rag.documents import load_document


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
def test_line_ends_become_newlines(tmp_path: Path, end: str) -> None:
    assert load_document(write(tmp_path / "a.txt", f"one{end}two{end}")).text == "one\ntwo\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_in_utf8_or_with_a_bom_is_decoded(tmp_path: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    path = write(tmp_path / "a.txt", (mark + "Grüße, 世界 🎈\r\n").encode(encoding))
    assert load_document(path).text == "Grüße, 世界 🎈\n"
