"""What libraries make of documents that are hard to read, how long they take and how much memory.

    python -m venv /tmp/readers
    /tmp/readers/bin/pip install '.[documents]' 'markitdown[docx,pptx,xlsx,pdf]' kreuzberg inscriptis trafilatura \
        pdfplumber mammoth nbformat
    /tmp/readers/bin/python benchmarks/document_readers.py CASES > table.md

CASES is a folder with the files of `WANTED`, one folder for each kind of fault. Each library reads each file in a
process of its own. `lmcache-rag` is `load_document`; its child process is counted too. A cell of the first table is
"yes" where all that a reader sees is there and nothing else, "warns" where it is not and a log record says so,
"refuses" where there is an error instead; of the second, seconds and the peak of the resident memory.
"""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

# File: what the text must hold, what it must not.
WANTED: dict[str, tuple[list[str], list[str]]] = {
    "04-html-table-cells/empty.html": ([], ["Ada 1852"]),
    "04-html-table-cells/spans.html": ([], ["\nL 9"]),
    "04-html-table-cells/two-words.html": ([], ["New York Los Angeles 3"]),
    "05-html-pre-lines/docusaurus.html": (["import os\nfor i in range(3):\n    print(i)"], []),
    "05-html-pre-lines/params.html": (["Param1 = Y\nParam2 = 1\n    indented = 2"], []),
    "05-html-pre-lines/divs.html": (["x = 1\ny = 2"], []),
    "07-pdf-form-values/form.pdf": (["Quimby", "quince"], []),
    "07-pdf-form-values/freetext.pdf": ([" "], []),
    "08-declared-encodings/smart.html": (["“Smart” – it’s 5 €"], []),
    "08-declared-encodings/gb2312.html": (["镕基 中文网页"], []),
    "08-declared-encodings/shift_jis.html": (["①髙橋さん"], []),
    "08-declared-encodings/x-sjis.html": (["東京の天気は晴れです"], []),
    "08-declared-encodings/euc-kr.html": (["똠방각하 햏"], []),
    "08-declared-encodings/tis-620.html": (["กรุงเทพมหานคร"], []),
    "08-declared-encodings/latin.xml": (["Größe"], []),
    "09-pdf-trailing-bytes/padded.pdf": (["Padded"], []),
    "09-pdf-trailing-bytes/page.pdf": (["Padded"], []),
    "10-pdf-lost-glyphs/ligature-nul.pdf": ([], ["\0", "�"]),
    "10-pdf-lost-glyphs/ligature-pua.pdf": ([], ["\ue000"]),
    "10-pdf-lost-glyphs/no-tounicode.pdf": ([], ["$%&'()0"]),
    "15-containers-taken-as-text/notebook.ipynb": ([], ["iVBORw0KGgo"]),
    "15-containers-taken-as-text/letter.rtf": ([], ["\\fonttbl"]),
    "15-containers-taken-as-text/mail.eml": ([], ["SGVsbG8"]),
    "15-containers-taken-as-text/page": ([], ["<script>"]),
    "made/hidden.html": (["Seen."], ["Unseen"]),
    "made/hidden.docx": (["Seen."], ["Unseen"]),
    "made/table.docx": (["Ada |  | 1852"], []),
    "made/sheet.xlsx": (["Nile", "7088"], ["Unseen"]),
    "made/slides.pptx": (["Rivers", "Note"], ["Unseen"]),
    "made/large.html": (["Row 4999"], []),
    "made/large.pdf": (["Page 200"], []),
}


PACKAGES = (
    *("markitdown", "kreuzberg", "inscriptis", "trafilatura", "beautifulsoup4", "pypdf", "pypdfium2", "pdfplumber"),
    *("mammoth", "python-docx", "openpyxl", "python-pptx", "nbformat"),
)


def _bs4(path: Path) -> str:
    from bs4 import BeautifulSoup

    return BeautifulSoup(path.read_bytes(), "html.parser").get_text(" ")


def _inscriptis(path: Path) -> str:
    from inscriptis import get_text
    from lxml.html import document_fromstring, tostring

    return get_text(tostring(document_fromstring(path.read_bytes()), encoding="unicode"))


def _trafilatura(path: Path) -> str:
    from trafilatura import extract

    return extract(path.read_bytes(), favor_recall=True) or ""


def _markitdown(path: Path) -> str:
    from markitdown import MarkItDown

    return MarkItDown(enable_plugins=False).convert_local(str(path)).markdown


def _kreuzberg(path: Path) -> str:
    from kreuzberg import extract_file_sync

    return extract_file_sync(str(path)).content


def _pypdf(path: Path) -> str:
    from pypdf import PdfReader

    return "\n".join(page.extract_text() for page in PdfReader(path).pages)


def _pypdfium2(path: Path) -> str:
    from pypdfium2 import PdfDocument

    with PdfDocument(path) as document:
        return "\n".join(page.get_textpage().get_text_range() for page in document)


def _pdfplumber(path: Path) -> str:
    import pdfplumber

    with pdfplumber.open(path) as pdf:
        return "\n".join(page.extract_text() for page in pdf.pages)


def _mammoth(path: Path) -> str:
    import mammoth

    with path.open("rb") as file:
        return mammoth.convert_to_html(file).value


def _docx(path: Path) -> str:
    from docx import Document
    from docx.table import Table

    lines = []
    for part in Document(str(path)).iter_inner_content():
        if isinstance(part, Table):
            lines += [" | ".join(cell.text for cell in row.cells) for row in part.rows]
        else:
            lines.append("".join(run.text for run in part.runs if not run.font.hidden))
    return "\n".join(lines)


def _openpyxl(path: Path) -> str:
    from openpyxl import load_workbook

    book = load_workbook(path, read_only=True, data_only=True)
    sheets = [sheet for sheet in book.worksheets if sheet.sheet_state == "visible"]
    return "\n".join(str(row) for sheet in sheets for row in sheet.iter_rows(values_only=True))


def _pptx(path: Path) -> str:
    from pptx import Presentation

    lines = []
    for slide in Presentation(str(path)).slides:
        if slide._element.get("show") == "0":
            continue
        lines += [shape.text_frame.text for shape in slide.shapes if shape.has_text_frame]
        if slide.has_notes_slide:
            lines.append(slide.notes_slide.notes_text_frame.text)
    return "\n".join(lines)


def _nbformat(path: Path) -> str:
    import nbformat

    return "\n".join(cell.source for cell in nbformat.read(str(path), as_version=4).cells)


def _email(path: Path) -> str:
    from email import message_from_bytes, policy

    body = message_from_bytes(path.read_bytes(), policy=policy.default).get_body(("plain", "html"))
    return body.get_content() if body else ""


def _ours(path: Path) -> str:
    from lmcache_rag.documents import load_document

    return load_document(path).text


READERS: dict[str, tuple[Callable[[Path], str], tuple[str, ...]]] = {
    "lmcache-rag": (_ours, ("",)),
    "markitdown": (_markitdown, ("",)),
    "kreuzberg": (_kreuzberg, ("",)),
    "inscriptis": (_inscriptis, (".html", ".xml", "page")),
    "trafilatura": (_trafilatura, (".html", ".xml", "page")),
    "bs4": (_bs4, (".html", ".xml", "page")),
    "pypdf": (_pypdf, (".pdf",)),
    "pypdfium2": (_pypdfium2, (".pdf",)),
    "pdfplumber": (_pdfplumber, (".pdf",)),
    "mammoth": (_mammoth, (".docx",)),
    "python-docx": (_docx, (".docx",)),
    "openpyxl": (_openpyxl, (".xlsx",)),
    "python-pptx": (_pptx, (".pptx",)),
    "nbformat": (_nbformat, (".ipynb",)),
    "email": (_email, (".eml",)),
}


def make(folder: Path) -> None:
    """Write the files that no case has."""
    from docx import Document
    from openpyxl import Workbook
    from pptx import Presentation

    folder.mkdir(exist_ok=True)
    (folder / "hidden.html").write_text(
        "<p>Seen.<p hidden>Unseen 1<p style='display:none'>Unseen 2<pre>Seen.<span style='display: none'>Unseen 3"
        "</span></pre><style>.x{visibility:hidden}</style><p class=x>Unseen 4<p hidden>Unseen 5"
    )
    document = Document()
    document.add_paragraph("Seen.").add_run("Unseen").font.hidden = True
    document.save(str(folder / "hidden.docx"))
    document = Document()
    table = document.add_table(2, 3)
    for cell, text in zip(table._cells, ["Name", "Born", "Died", "Ada", "", "1852"], strict=True):
        cell.text = text
    document.save(str(folder / "table.docx"))
    book = Workbook()
    for row in (["name", "km"], ["Nile", 7088]):
        book.active.append(row)
    hidden = book.create_sheet("Secret")
    hidden.append(["Unseen"])
    hidden.sheet_state = "hidden"
    book.save(folder / "sheet.xlsx")
    slides = Presentation()
    for number, title in enumerate(("Rivers", "Unseen")):
        slide = slides.slides.add_slide(slides.slide_layouts[5])
        slide.shapes.title.text = title
        if number:
            slide._element.set("show", "0")
        else:
            slide.notes_slide.notes_text_frame.text = "Note"
    slides.save(str(folder / "slides.pptx"))
    rows = "".join(f"<tr><td>Row {number}<td>{number * 7}<td>A few words more</tr>" for number in range(5000))
    (folder / "large.html").write_text(
        f"<h1>Rows</h1><table><tr><th>A<th>B<th>C</tr>{rows}</table>" + "<p>Text. " * 20_000
    )
    (folder / "large.pdf").write_bytes(_pages(200))


def _pages(count: int) -> bytes:
    """A PDF file with as many pages, each with 50 lines."""
    first = 4
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>"]
    kids = b" ".join(b"%d 0 R" % (first + 2 * number) for number in range(count))
    objects.append(b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, count))
    objects.append(b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for number in range(count):
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R /Resources << /Font << /F1 3 0 R >>"
            b" >> >>" % (first + 2 * number + 1)
        )
        lines = b"".join(
            b"(Page %d, line %d of many that a reader reads.) Tj T*\n" % (number + 1, line) for line in range(50)
        )
        body = b"BT /F1 10 Tf 12 TL 50 740 Td\n%sET" % lines
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(body), body))
    out, places = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        len(places) + 1,
        table,
        len(places) + 1,
        len(out),
    )


def read(reader: str, path: Path) -> dict[str, object]:
    """Read one file in this process."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    begin = time.perf_counter()
    try:
        text = READERS[reader][0](path)
    except Exception as error:
        text = ""
        problem = f"{type(error).__name__}: {error}"
    else:
        problem = ""
    seconds = time.perf_counter() - begin
    usage = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"text": text, "problem": problem, "seconds": seconds, "mb": usage / 1024, "warned": bool(records)}


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--read":
        print(json.dumps(read(sys.argv[2], Path(sys.argv[3]))))
        return
    cases = Path(sys.argv[1])
    names = list(READERS)
    rows: list[list[str]] = []
    costs: list[list[str]] = []
    with tempfile.TemporaryDirectory() as made:
        make(Path(made))
        for name, (wanted, unwanted) in WANTED.items():
            path = Path(made) / Path(name).name if name.startswith("made/") else cases / name
            row, cost = [name], [name]
            for reader in names:
                if not path.name.endswith(READERS[reader][1]):
                    row.append("")
                    cost.append("")
                    continue
                command = [sys.executable, __file__, "--read", reader, str(path)]
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
                    got = json.loads(done.stdout.splitlines()[-1])
                except (subprocess.TimeoutExpired, IndexError, ValueError):
                    row.append("crash")
                    cost.append("")
                    continue
                text = " ".join(got["text"].split()) if not any("\n" in part for part in wanted) else got["text"]
                good = all(part in got["text"] or part in text for part in wanted)
                good = good and not any(part in got["text"] or part in text for part in unwanted)
                bad = "warns" if got["warned"] else "no"
                row.append("refuses" if got["problem"] else "yes" if good and got["text"].strip() else bad)
                cost.append(f"{got['seconds']:.2f} s, {got['mb']:.0f} MB")
                print(name, reader, row[-1], got["problem"][:90] or repr(got["text"][:120]), file=sys.stderr)
            rows.append(row)
            if "large" in name:
                costs.append(cost)
    print("# What libraries make of documents\n")
    print("Made by `python benchmarks/document_readers.py CASES`; its docstring says what the cells mean.")
    print("Versions: " + ", ".join(f"{name} {version(name)}" for name in PACKAGES) + ".\n")
    for table in (rows, costs):
        kept = [0, *(place for place in range(1, len(names) + 1) if any(row[place] for row in table))]
        head = ["file", *names]
        print("| " + " | ".join(head[place] for place in kept) + " |")
        print("|" + " --- |" * len(kept))
        for row in table:
            print("| " + " | ".join(row[place] for place in kept) + " |")
        print()


if __name__ == "__main__":
    main()
