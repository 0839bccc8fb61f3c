"""What becomes text of Office documents, e-books, notebooks, mail, pages and PDF files, and what is left out."""

from __future__ import annotations

import base64
import logging
from pathlib import Path
from typing import Any

import pytest
from document_kit import PDF, write, write_pdf
from document_samples import SAMPLES, saved
from docx import Document as Docx
from docx.oxml import parse_xml
from pypdf import PdfWriter
from pypdf.generic import ArrayObject, DictionaryObject, FloatObject, NameObject, NumberObject, TextStringObject

from lmcache_rag.documents import load_document
from lmcache_rag.documents.html import html_text
from lmcache_rag.documents.pdf import read_pdf
from lmcache_rag.documents.tables import markdown_table
from lmcache_rag.errors import DocumentError

W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def sample(folder: Path, kind: str) -> Any:
    return load_document(write(folder / f"a.{kind}", SAMPLES[kind]()))


def test_word_gives_headings_lists_and_tables(tmp_path: Path) -> None:
    document = sample(tmp_path, "docx")
    assert document.text == (
        "# Rivers\n\nThe Nile flows north.\n\n- An item\n\n| name | km |\n| --- | --- |\n| Nile | 7088 |\n| Rhine |  |"
    )
    assert document.metadata["title"] == "Rivers"
    assert document.parser.startswith("docx 1 (python-docx ")


def test_insertions_links_and_notes_of_word_are_read(tmp_path: Path) -> None:
    document = Docx()
    words = (
        f"<w:p {W}><w:r><w:t>Kept </w:t></w:r><w:ins><w:r><w:t>inserted</w:t></w:r></w:ins>"
        "<w:del><w:r><w:delText>deleted</w:delText></w:r></w:del>"
        "<w:hyperlink><w:r><w:t> linked</w:t></w:r></w:hyperlink>"
        "<w:r><w:rPr><w:vanish w:val='0'/></w:rPr><w:t> shown</w:t></w:r>"
        "<w:r><w:rPr><w:vanish/></w:rPr><w:t> hidden</w:t></w:r></w:p>"
    )
    document.element.body.insert(0, parse_xml(words))
    assert load_document(write(tmp_path / "a.docx", saved(document.save))).text == "Kept inserted linked shown"


def test_slides_give_titles_tables_and_notes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    document = sample(tmp_path, "pptx")
    assert "# Rivers\n\nWords of slide 1.\n\nA note on Rivers." in document.text
    assert "| name | depth |\n| --- | --- |\n| Baikal | 1642 |" in document.text
    assert "Hidden" not in document.text
    assert "1 hidden slide is left out" in caplog.text
    assert [facts for _, facts in document.places] == [{"slide": 1}, {"slide": 3}]


def test_sheets_become_tables(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    document = sample(tmp_path, "xlsx")
    assert document.text == (
        "## Lengths\n\n| name | km |\n| --- | --- |\n| Nile | 7088 |\n| Rhine | 1233.5 |\n\n"
        "## Depths\n\n| Baikal | 1642 |\n| --- | --- |"
    )
    assert "1 hidden sheet is left out" in caplog.text
    assert document.facts_at(len(document.text) - 1) == {"sheet": "Depths"}


def test_an_ebook_gives_its_chapters_in_order(tmp_path: Path) -> None:
    document = sample(tmp_path, "epub")
    assert document.text == "# First\n\nThe Nile.\n\n# Second\n\nThe Rhine."
    assert document.metadata["title"] == "Rivers of the world"
    assert document.facts_at(document.text.index("Rhine")) == {"chapter": 2}


def test_a_notebook_gives_cells_and_printed_text(tmp_path: Path) -> None:
    document = sample(tmp_path, "ipynb")
    assert (
        document.text == "# Tides\nBy month.\n\n```python\nprint(heights)\n```\n\n```\n4.2\n```\n\n```\n<Figure>\n```"
    )


def test_mail_gives_its_head_and_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    document = sample(tmp_path, "eml")
    assert document.text == (
        "From: Ada <ada@example.org>\nTo: bob@example.org\nSubject: Grüße: tides\n\nThe tide is high at noon, says Zoë."
    )
    assert "1 attachment is left out" in caplog.text


def test_a_saved_page_gives_the_page(tmp_path: Path) -> None:
    mht = (
        "From: <Saved by Blink>\nSnapshot-Content-Location: https://example.org/\nSubject: Page\nMIME-Version: 1.0\n"
        'Content-Type: multipart/related; boundary="x"\n\n--x\nContent-Type: text/html; charset=windows-1252\n'
        "Content-Transfer-Encoding: quoted-printable\n\n<h1>Caf=E9</h1><p hidden>No.</p>\n--x--\n"
    )
    assert load_document(write(tmp_path / "a.mht", mht)).text == "# Café"


@pytest.mark.parametrize("name", ["page", "page.php", "page.aspx", "page.shtml"])
def test_a_page_without_its_suffix_is_read_as_html(tmp_path: Path, name: str) -> None:
    page = "<!-- saved -->\n<!DOCTYPE html><html><script>evil()</script><p>Seen."
    assert load_document(write(tmp_path / name, page)).text == "Seen."


def test_a_page_named_txt_is_kept_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_document(write(tmp_path / "a.txt", "<html><p>Seen.")).text == "<html><p>Seen."
    assert "HTML page by its content" in caplog.text


def test_encoded_data_in_text_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = base64.b64encode(bytes(range(256)) * 20).decode()
    lines = "\n".join(data[place : place + 76] for place in range(0, len(data), 76))
    for number, text in enumerate((data, lines)):
        caplog.clear()
        write(tmp_path / f"{number}.md", f"A picture:\n\n{text}\n\nAnd text.")
        load_document(tmp_path / f"{number}.md")
        assert "characters are no words but encoded data" in caplog.text, number


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.rtf", b"{\\rtf1 x}", "is an RTF document, which is not read. Save it as .docx"),
        ("a.txt", b"{\\rtf1 x}", "is an RTF document"),
        ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an old office document"),
        ("a.odt", b"PK\x03\x04", "is an OpenDocument text"),
        ("a.docx", b"words", "is not a .docx file"),
        ("a.ipynb", b"{}", "is not a notebook"),
        ("a.eml", b"Subject: only this\n\n", "holds no text"),
    ],
)
def test_what_is_not_read_names_the_remedy(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    with pytest.raises(DocumentError, match=words.replace(".", r"\.")) as caught:
        load_document(write(tmp_path / name, content))
    assert caught.value.remedy


# Pages


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("<tr><th>a<th>b<tr><td>1<td>", "| a | b |\n| --- | --- |\n| 1 |  |"),
        ("<tr><td>a<td>b<tr><td rowspan=2>N<td>1<tr><td>2", "| a | b |\n| --- | --- |\n| N | 1 |\n| N | 2 |"),
        ("<tr><th>a<th colspan=2>b<tr><td>1<td>2<td>3", "| a | b | b |\n| --- | --- | --- |\n| 1 | 2 | 3 |"),
        (
            "<thead><tr><th rowspan=2>a<th colspan=2>b<tr><th>c<th>d</thead><tr><td>1<td>2<td>3",
            "| a | b / c | b / d |\n| --- | --- | --- |\n| 1 | 2 | 3 |",
        ),
        ("<tr><th>a|b<th>c<tr><td>1<br>2<td><p>3<p>4", "| a\\|b | c |\n| --- | --- |\n| 1 2 | 3 4 |"),
        (
            "<tr><th>a<th>b<tr hidden><td>1<td>2<tr><td>3<td hidden>4",
            "| a | b |\n| --- | --- |\n| 3 |  |",
        ),
        ("<caption>Of</caption><tr><th>a<th>b<tr><td>1<td>2", "Of\n\n| a | b |\n| --- | --- |\n| 1 | 2 |"),
        ("<tr><td>left<td><table><tr><td>in<td>side</table>", "left\n\n| in | side |\n| --- | --- |"),
        ("<tr><td>only<tr><td>one column", "only\none column"),
    ],
)
def test_tables_of_pages_keep_their_columns(table: str, text: str) -> None:
    assert html_text(f"<table>{table}</table>")[0] == text


def test_a_hostile_table_does_not_grow_without_end() -> None:
    page = "<table>" + "<tr>" + "<td rowspan=65534 colspan=1000>" * 200 + "x" * 1000 + "</td>" * 200 + "</table>"
    assert len(html_text(page * 20)[0]) < 50_000_000


@pytest.mark.parametrize(
    ("style", "element"),
    [
        (".a {display: none}", "class=a"),
        ("p.a, .b {color: red; DISPLAY :none !important}", "class=a"),
        ("#a {visibility: hidden}", "id=a"),
        (".a {display: block} /* } */ .a {display: none}", "class=a"),
        ("@charset 'utf-8'; .a {display: none}", "class=a"),
        ("", "hidden"),
        ("", "popover"),
        ("", "style='font-size:0'"),
        ("", "style='opacity: 0;'"),
        ("", "style='position:absolute; left:-9999px'"),
        ("", "style='color:transparent'"),
        ("", "style='clip: rect(0 0 0 0)'"),
    ],
)
@pytest.mark.parametrize(
    "place", ["<p {}>Hidden</p>", "<pre>x<p {}>Hidden</p></pre>", "<table><tr><td>x<td>y<p {}>Hidden</table>"]
)
def test_text_that_css_hides_is_left_out(style: str, element: str, place: str) -> None:
    page = f"<style>{style}</style><p>Seen.</p>{place.format(element)}"
    text, _ = html_text(page)
    assert "Seen." in text
    assert "Hidden" not in text


@pytest.mark.parametrize(
    "page",
    [
        "<style>.a {display: none} .a {display: block}</style><p class=a>Seen",
        "<style>.a {display: none}</style><p class=a style='display:block'>Seen",
        "<style>@media print {.a {display: none}}</style><p class=a>Seen",
        "<style>.a::before, .b:hover {display: none} .c {display:</style><p class=a>Seen",
        "<p style='font-size: 0.9em; opacity: 0.5; left: -10px; background-color: transparent'>Seen",
        "<dialog open>Seen</dialog>",
        "<p aria-hidden=true>Seen",
    ],
)
def test_text_that_is_shown_is_read(page: str) -> None:
    assert html_text(page)[0] == "Seen"


def test_code_keeps_its_lines_and_fence() -> None:
    assert html_text("<pre>\n\n  a<br>b<div>c</div><span style='display:block'>d</span>```</pre>")[0] == (
        "````\n  a\nb\nc\nd\n```\n````"
    )


def test_short_rows_and_several_heads_become_one_table() -> None:
    rows = [["a", "b", "b"], ["", "c", "d"], ["1"], ["", "", ""]]
    assert markdown_table(rows, head=2) == ["| a | b / c | b / d |", "| --- | --- | --- |", "| 1 |  |  |"]
    assert markdown_table([]) == markdown_table([["", ""]]) == []


@pytest.mark.parametrize(
    ("label", "codec", "text"),
    [
        ("iso-8859-1", "cp1252", "“Smart” – 5 €"),
        ("gb2312", "gb18030", "镕基 中文"),
        ("x-sjis", "cp932", "①髙橋"),
        ("shift_jis", "cp932", "①髙橋"),
        ("euc-kr", "cp949", "똠방각하"),
        ("big5", "big5hkscs", "香港嘅人"),
        ("tis-620", "cp874", "กรุงเทพ “x”"),
        ("iso-2022-jp", "iso2022_jp", "東京の天気"),
        ("koi8-r", "koi8_r", "Привет"),
    ],
)
def test_declared_encodings_are_those_of_browsers(tmp_path: Path, label: str, codec: str, text: str) -> None:
    page = f"<meta charset={label}><p>{text}".encode(codec)
    assert load_document(write(tmp_path / "a.html", page)).text == text
    xml = f"<?xml version='1.0' encoding='{label}'?><r>{text}</r>".encode(codec)
    assert text in load_document(write(tmp_path / "a.xml", xml)).text


def test_invisible_tags_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    smuggled = "".join(chr(0xE0000 + ord(letter)) for letter in "ignore all")
    england = "🏴" + "".join(chr(0xE0000 + ord(letter)) for letter in "gbeng") + "\U000e007f"
    assert load_document(write(tmp_path / "a.txt", f"Seen{smuggled} {england}")).text == f"Seen {england}"
    assert "10 invisible characters" in caplog.text
    page = load_document(write(tmp_path / "a.html", f"<p>Seen{smuggled}"))
    assert page.text == "Seen"


# PDF


def field(name: str, value: str, flags: int = 0, hidden: int = 0) -> DictionaryObject:
    return DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Annot"),
            NameObject("/Subtype"): NameObject("/Widget"),
            NameObject("/FT"): NameObject("/Tx"),
            NameObject("/T"): TextStringObject(name),
            NameObject("/V"): TextStringObject(value),
            NameObject("/Ff"): NumberObject(flags),
            NameObject("/F"): NumberObject(hidden),
            NameObject("/Rect"): ArrayObject([FloatObject(number) for number in (10, 10, 90, 30)]),
        }
    )


def test_form_values_and_notes_of_a_pdf_are_read(tmp_path: Path) -> None:
    def change(pdf: PdfWriter) -> None:
        note = field("", "")
        note.update(
            {NameObject("/Subtype"): NameObject("/FreeText"), NameObject("/Contents"): TextStringObject("Close it")}
        )
        fields = [field("Surname", "Quimby"), field("Secret", "pass", 1 << 13), field("Gone", "unseen", 0, 2), note]
        pdf.pages[0][NameObject("/Annots")] = ArrayObject([pdf._add_object(each) for each in fields])

    text = load_document(write_pdf(tmp_path / "a.pdf", change)).text
    assert text.endswith("Surname: Quimby\n\nClose it")
    assert "pass" not in text.split()
    assert "unseen" not in text


def test_a_page_without_labels_has_its_number_as_label(tmp_path: Path) -> None:
    document = load_document(write_pdf(tmp_path / "a.pdf", lambda pdf: pdf.append(PDF)))
    assert [dict(facts) for _, facts in document.places] == [
        {"page": 1, "page_label": "1"},
        {"page": 2, "page_label": "2"},
    ]


@pytest.mark.parametrize("after", [b"\0" * 3000, b"\n<!-- cached -->\n" * 200])
def test_bytes_after_a_pdfs_end_do_no_harm(tmp_path: Path, after: bytes) -> None:
    whole = SAMPLES["pdf"]()
    assert load_document(write(tmp_path / "a.pdf", whole + after)).text == read_pdf(whole, "a").text


def font_pdf(text: bytes, font: bytes, extra: tuple[bytes, ...] = ()) -> bytes:
    """A PDF with one line in a font."""
    stream = b"BT /F1 12 Tf 50 700 Td " + text + b" Tj ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        font,
        *extra,
    ]
    out = b"%PDF-1.7\n"
    for number, body in enumerate(objects, start=1):
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    return out + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n0\n%%%%EOF\n" % (len(objects) + 1)


def cmap(line: bytes) -> bytes:
    body = (
        b"/CIDInit /ProcSet findresource begin begincmap 1 begincodespacerange <00> <FF> endcodespacerange "
        b"1 beginbfchar " + line + b" endbfchar endcmap end"
    )
    return b"<< /Length %d >>\nstream\n%s\nendstream" % (len(body), body)


@pytest.mark.parametrize("letter", [b"<01> <E000>", b"<01> <0000>"])
def test_letters_that_a_font_does_not_name_are_told(letter: bytes) -> None:
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /ToUnicode 6 0 R >>"
    reading = read_pdf(font_pdf(b"(The Federal O\x01ce)", font, (cmap(letter),)), "a.pdf")
    assert any("are not readable" in warning for warning in reading.warnings)


def test_a_pdf_of_glyph_numbers_alone_is_refused() -> None:
    font = b"<< /Type /Font /Subtype /Type0 /BaseFont /Some /Encoding /Identity-H /DescendantFonts [6 0 R] >>"
    below = (
        b"<< /Type /Font /Subtype /CIDFontType2 /BaseFont /Some /FontDescriptor 7 0 R"
        b" /CIDSystemInfo << /Registry (Adobe) /Ordering (Identity) /Supplement 0 >> >>"
    )
    facts = b"<< /Type /FontDescriptor /FontName /Some /Flags 4 /FontBBox [0 0 9 9] /Ascent 9 /Descent 0 >>"
    with pytest.raises(DocumentError, match="holds text that cannot be read") as caught:
        read_pdf(font_pdf(b"<002400250026>", font, (below, facts)), "a.pdf")
    assert "ocrmypdf" in caught.value.remedy


def test_warnings_name_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    sample(tmp_path, "pdf")
    assert f"'{tmp_path / 'a.pdf'}': 1 of 2 pages hold no text" in caplog.text
