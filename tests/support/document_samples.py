"""A small file of each kind of document that is read, and ways to damage it."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from email.message import EmailMessage

from document_kit import PDF
from docx import Document as Docx
from openpyxl import Workbook
from pptx import Presentation
from pypdf import PdfReader, PdfWriter

HTML = """<!DOCTYPE html><html><head><title>Rivers</title><style>.gone {display: none}</style></head><body>
<h1>Rivers &amp; lakes</h1><p>The <b>Nile</b> flows north.<br>It is long.</p><p class=gone>Hidden.</p>
<table><caption>Lengths</caption><tr><th>name</th><th colspan=2>km</th></tr><tr><td rowspan=2>Nile</td><td>7088</td>
<td></td></tr></table><pre>x = 1<br>y = 2</pre><ul><li>one<li>two</ul><img alt="A map" src="a.png"></body></html>"""


def docx() -> bytes:
    document = Docx()
    document.core_properties.title = "Rivers"
    document.add_heading("Rivers", 1)
    document.add_paragraph("The Nile flows north.").add_run(" Hidden words.").font.hidden = True
    document.add_paragraph("An item", style="List Bullet")
    table = document.add_table(3, 2)
    for cell, text in zip(table._cells, ["name", "km", "Nile", "7088", "Rhine", ""], strict=True):
        cell.text = text
    return saved(document.save)


def pptx() -> bytes:
    presentation = Presentation()
    for number, title in enumerate(("Rivers", "Hidden slide", "Lakes")):
        slide = presentation.slides.add_slide(presentation.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text = f"Words of slide {number + 1}."
        if number == 1:
            slide._element.set("show", "0")
        else:
            slide.notes_slide.notes_text_frame.text = f"A note on {title}."
    table = presentation.slides[2].shapes.add_table(2, 2, 0, 0, 100, 100).table
    for cell, text in zip(table.iter_cells(), ["name", "depth", "Baikal", "1642"], strict=True):
        cell.text = text
    return saved(presentation.save)


def xlsx() -> bytes:
    book = Workbook()
    book.active.title = "Lengths"
    for row in (["name", "km", None], ["Nile", 7088, None], ["Rhine", 1233.5, None]):
        book.active.append(row)
    hidden = book.create_sheet("Hidden sheet")
    hidden.append(["secret"])
    hidden.sheet_state = "hidden"
    book.create_sheet("Depths").append(["Baikal", 1642])
    return saved(book.save)


def epub() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("mimetype", "application/epub+zip")
        archive.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>',
        )
        archive.writestr(
            "OEBPS/book.opf",
            '<package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata>'
            "<dc:title>Rivers of the world</dc:title></metadata><manifest>"
            '<item id="b" href="two%20.xhtml" media-type="application/xhtml+xml"/>'
            '<item id="a" href="one.xhtml" media-type="application/xhtml+xml"/></manifest>'
            '<spine><itemref idref="a"/><itemref idref="b"/></spine></package>',
        )
        archive.writestr("OEBPS/one.xhtml", '<?xml version="1.0"?><html><h1>First</h1><p>The Nile.</p></html>')
        archive.writestr("OEBPS/two .xhtml", "<html><h1>Second</h1><p hidden='hidden'>No.</p><p>The Rhine.</p></html>")
    return out.getvalue()


def notebook() -> bytes:
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["# Tides\n", "By month."]},
        {
            "cell_type": "code",
            "source": "print(heights)",
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": ["\x1b[31m4.2\x1b[0m\n"]},
                {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo" * 500, "text/plain": ["<Figure>"]}},
            ],
        },
    ]
    return json.dumps({"cells": cells, "metadata": {"kernelspec": {"language": "python"}}, "nbformat": 4}).encode()


def mail() -> bytes:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "Ada <ada@example.org>", "bob@example.org", "Grüße: tides"
    message.set_content("The tide is high at noon, says Zoë.")
    message.add_alternative("<p>The tide is <b>high</b> at noon, says Zoë.", subtype="html")
    message.add_attachment(b"\0\1\2", maintype="application", subtype="zip", filename="data.zip")
    return message.as_bytes()


def pdf() -> bytes:
    writer = PdfWriter(clone_from=PdfReader(PDF))
    writer.add_blank_page(100, 100)
    return saved(writer.write)


def saved(save: Callable[[io.BytesIO], object]) -> bytes:
    out = io.BytesIO()
    save(out)
    return out.getvalue()


TEXT = "# Rivers\n\n| name | km |\n| --- | --- |\n| Nile | 7088 |\n\n```\nx = 1\n```\n\nGrüße, 世界 👩🏽. A river.\n"
SAMPLES: dict[str, Callable[[], bytes]] = {
    "txt": lambda: TEXT.encode("utf-16"),
    "md": TEXT.encode,
    "csv": lambda: b'name,km\n"Nile, the",7088\n"two\nlines",1\n' * 20,
    "json": lambda: json.dumps({"rivers": [{"name": "Nile", "km": 7088}] * 20}).encode(),
    "xml": lambda: '<?xml version="1.0" encoding="ISO-8859-1"?><r>Größe</r>'.encode("latin-1"),
    "html": HTML.encode,
    "pdf": pdf,
    "docx": docx,
    "pptx": pptx,
    "xlsx": xlsx,
    "epub": epub,
    "ipynb": notebook,
    "eml": mail,
}


def damaged(content: bytes, rnd: random.Random) -> bytes:
    """The file with one, two or four faults; of an archive in half of the cases one of its files."""
    if content.startswith(b"PK") and rnd.random() < 0.5:
        return _repacked(content, rnd)
    return _faults(content, rnd)


def _repacked(content: bytes, rnd: random.Random) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        names = [name for name in old.namelist() if name.endswith((".xml", ".rels", ".xhtml", ".opf"))]
        chosen = rnd.choice(names)
        for name in old.namelist():
            part = old.read(name)
            if name == chosen and rnd.random() < 0.1:
                continue
            new.writestr(name, _faults(part, rnd) if name == chosen else part)
    return out.getvalue()


_ODD = (
    b"\xff" * 8,
    b"\0" * 8,
    b"999999999999",
    b"-1",
    b"<!DOCTYPE x [<!ENTITY a 'b'>]>",
    b"<" * 50,
    b"&#0;",
    b"\x80\xfe",
    b"%%EOF",
)


def _faults(content: bytes, rnd: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rnd.choice((1, 1, 2, 4))):
        place, length = rnd.randrange(len(data) + 1), rnd.choice((1, 1, 4, 64, len(data) // 8))
        match rnd.randrange(7):
            case 0:
                data[place : place + 1] = bytes([rnd.randrange(256)])
            case 1:
                del data[place : place + length]
            case 2:
                data[place:place] = data[rnd.randrange(len(data) + 1) :][:length]
            case 3:
                data[place:place] = rnd.randbytes(min(length, 256))
            case 4:
                data[place:place] = rnd.choice(_ODD)
            case 5:
                other = rnd.randrange(len(data) + 1)
                data[place : place + length], data[other : other + length] = (
                    data[other : other + length],
                    data[place : place + length],
                )
            case 6:
                del data[max(1, place) :]
    return bytes(data)
