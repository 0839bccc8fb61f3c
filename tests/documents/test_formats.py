"""The text of HTML and PDF."""

from __future__ import annotations

from pathlib import Path

from document_kit import DATA, write

from lmcache_rag.documents import load_document

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
        "Home\n\n# Rivers\n\nThe Nile flows north.\nIt is long.\n\n- one\n- two\n\n| name | km |\n| --- | --- |\n"
        "| Nile | 7088 |\n\n```\n  kept   as\n    it is\n```\n\na <tag> A map"
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
