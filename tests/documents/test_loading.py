"""Finding files and reading the ordinary kinds of documents."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmcache_rag.documents import Document, find_files, load_document
from lmcache_rag.errors import DocumentError

DATA = Path(__file__).parents[2] / "examples" / "data"
CORPUS = sorted((DATA / "documents").iterdir())


def write(path: Path, content: str | bytes = "Some text.") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def found(*paths: str | os.PathLike[str]) -> list[Path]:
    items = list(find_files(paths))
    assert all(isinstance(item, Path) for item in items), items
    return items  # type: ignore[return-value]


def problem(*paths: str | os.PathLike[str]) -> str:
    (item,) = find_files(paths)
    assert isinstance(item, DocumentError)
    assert item.remedy
    return str(item)


# Finding


def test_a_folder_means_all_files_below_it_by_name(tmp_path: Path) -> None:
    names = ["b.txt", "a/z.md", "a/b/c.html", "c.pdf"]
    for name in names:
        write(tmp_path / name)
    assert found(tmp_path) == [tmp_path / name for name in ("a/b/c.html", "a/z.md", "b.txt", "c.pdf")]


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / ".secret.txt")
    write(tmp_path / ".git/config")
    kept = write(tmp_path / "kept.txt")
    assert found(tmp_path) == [kept]
    assert found(str(tmp_path / "**" / "*")) == [kept]


def test_a_hidden_file_named_outright_is_found(tmp_path: Path) -> None:
    hidden = write(tmp_path / ".secret.txt")
    assert found(hidden) == [hidden]
    assert found(str(tmp_path / ".s*")) == [hidden]


def test_binaries_in_folders_are_skipped_unless_named(tmp_path: Path) -> None:
    picture = write(tmp_path / "a.png", b"\x89PNG\r\n\x1a\n\0")
    write(tmp_path / "a.pyc", b"\0")
    text = write(tmp_path / "a.txt")
    assert found(tmp_path) == [text]
    assert found(picture) == [picture]


def test_a_glob_with_two_stars_walks_into_folders(tmp_path: Path) -> None:
    top, deep = write(tmp_path / "docs/top.md"), write(tmp_path / "docs/x/y/deep.md")
    write(tmp_path / "docs/x/other.txt")
    assert found(str(tmp_path / "docs/**/*.md")) == [top, deep]


def test_a_folder_that_a_glob_matches_means_its_files(tmp_path: Path) -> None:
    inner = write(tmp_path / "docs-1/inner.md")
    assert found(str(tmp_path / "docs-*")) == [inner]


def test_a_name_with_glob_characters_is_literal(tmp_path: Path) -> None:
    literal = write(tmp_path / "notes[1].txt")
    write(tmp_path / "notes1.txt")
    assert found(str(literal)) == [literal]


def test_no_file_is_found_twice_whatever_leads_to_it(tmp_path: Path) -> None:
    file = write(tmp_path / "docs/a.txt")
    (tmp_path / "link.txt").symlink_to(file)
    assert found(file, tmp_path / "docs", str(tmp_path / "docs" / "*.txt"), tmp_path / "link.txt", file) == [file]


def test_relative_paths_and_home_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("a.txt") == found("~/a.txt") == found("./*.txt") == [file]


def test_a_path_that_matches_nothing_is_an_entry(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt")
    items = list(find_files([tmp_path / "missing.txt", str(tmp_path / "*.rst"), "", "a\0b", file]))
    texts = [str(item) for item in items]
    assert "missing.txt' does not exist" in texts[0]
    assert "*.rst' matches nothing" in texts[1]
    assert "'' is not a path" in texts[2]
    assert "is not a path" in texts[3]
    assert items[4:] == [file]


def test_a_folder_without_documents_is_an_entry(tmp_path: Path) -> None:
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    assert "holds no documents" in problem(tmp_path / "empty")


def test_a_folder_named_twice_is_no_error(tmp_path: Path) -> None:
    file = write(tmp_path / "docs/a.txt")
    assert found(tmp_path / "docs", tmp_path / "docs") == [file]


# Reading


def test_a_document_carries_path_text_hash_and_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "Hello.\n")
    assert load_document(path) == Document(
        doc_id=str(path),
        text="Hello.\n",
        content_hash=hashlib.sha256(b"Hello.\n").hexdigest(),
        source=str(path),
        metadata={"name": "a.txt", "media_type": "text/plain"},
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


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
def test_line_ends_become_newlines(tmp_path: Path, end: str) -> None:
    assert load_document(write(tmp_path / "a.txt", f"one{end}two{end}")).text == "one\ntwo\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_in_utf8_or_with_a_bom_is_decoded(tmp_path: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    path = write(tmp_path / "a.txt", (mark + "Grüße, 世界 🎈\r\n").encode(encoding))
    assert load_document(path).text == "Grüße, 世界 🎈\n"


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


PAGE = """<!DOCTYPE html>
<html><head><title>Rivers &amp; lakes</title><style>p {color: red}</style></head>
<body><nav><a href="/">Home</a></nav>
<h1>Rivers</h1>
<p>The <b>Nile</b> flows
   north.<br>It is long.</p>
<ul><li>one</li><li>two</li></ul>
<table><tr><th>name</th><th>km</th></tr><tr><td>Nile</td><td>7088</td></tr></table>
<pre>
  kept   as
    it is</pre>
<p>a&nbsp;&lt;tag&gt; <img src="x" alt="A map"></p>
</body></html>"""


def test_html_gives_visible_blocks_and_title(tmp_path: Path) -> None:
    document = load_document(write(tmp_path / "a.html", PAGE))
    assert document.metadata["title"] == "Rivers & lakes"
    assert document.text == (
        "Home\n\nRivers\n\nThe Nile flows north.\nIt is long.\n\n- one\n- two\n\nname km\nNile 7088\n\n"
        "  kept   as\n    it is\n\na <tag> A map"
    )


def test_html_is_decoded_in_its_declared_encoding(tmp_path: Path) -> None:
    page = '<meta charset="iso-8859-1"><p>Café</p>'.encode("latin-1")
    assert load_document(write(tmp_path / "a.html", page)).text == "Café"


def test_a_pdf_gives_its_text_page_count_and_title() -> None:
    document = load_document(DATA / "documents" / "whales.pdf")
    assert document.metadata == {
        "name": "whales.pdf",
        "media_type": "application/pdf",
        "pages": 1,
        "title": "Whales",
    }
    assert "the largest animal known to have ever existed" in " ".join(document.text.split())


def test_a_pdf_under_another_name_is_read_as_pdf(tmp_path: Path) -> None:
    content = (DATA / "documents" / "whales.pdf").read_bytes()
    assert load_document(write(tmp_path / "whales.txt", content)).metadata["pages"] == 1


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


# The sample corpus


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
