"""Office documents: .docx, .pptx and .xlsx. Macros are never run, and what Office hides is left out."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from lmcache_rag._utils import needs
from lmcache_rag.documents.tables import markdown_table
from lmcache_rag.documents.types import Reading, joined
from lmcache_rag.errors import DocumentError

if TYPE_CHECKING:
    from docx.document import Document as Docx
    from docx.table import Table

MAX_UNPACKED = 512 * 2**20
MAX_ENTRIES = 20_000
_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_SKIPPED = {
    f"{_W}{name}" for name in ("del", "moveFrom", "pPr", "txbxContent", "footnoteReference", "instrText", "delText")
} | {"{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"}
_TYPE_DEFINITION = re.compile(rb"<!(?:DOCTYPE|ENTITY)", re.IGNORECASE)


def unzip(data: bytes, name: str) -> zipfile.ZipFile:
    """Open a ZIP archive whose files together are not too large.

    Raises:
        DocumentError: It is damaged, encrypted, or unpacks to too much.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as error:
        raise damaged(name, error) from error
    size = sum(entry.file_size for entry in entries)
    if size > MAX_UNPACKED or len(entries) > MAX_ENTRIES:
        raise DocumentError(
            f"{name} unpacks to far more data than a document has ({len(entries):,} files, {size >> 20:,} MiB), "
            "and was rejected.",
            remedy="Save it again without pictures, or leave it out.",
        )
    if any(entry.flag_bits & 1 for entry in entries):
        raise DocumentError(f"{name} is encrypted.", remedy="Save a copy without a password.")
    return archive


def damaged(name: str, error: BaseException) -> DocumentError:
    """The error for a file that its parser cannot read."""
    reason = " ".join(str(error).split())[:200]
    return DocumentError(
        f"{name} is damaged ({type(error).__name__}{f': {reason}' if reason else ''}).",
        remedy="Open it in its own program and save it again, or save it as PDF.",
    )


@contextmanager
def _parsing(name: str) -> Iterator[None]:
    """A `with` block in which python-docx, python-pptx or openpyxl may raise any error on a damaged file.

    Raises:
        DocumentError: It did.
    """
    try:
        yield
    except (MemoryError, DocumentError):
        raise
    except Exception as error:
        raise damaged(name, error) from error


def _checked(data: bytes, name: str) -> None:
    """Refuse what is no sound office document: too large, or with a document type, which can hold an entity bomb."""
    with unzip(data, name) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith((".xml", ".rels", ".vml")):
                try:
                    with archive.open(entry) as file:
                        head = file.read(4096)
                except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
                    raise damaged(name, error) from error
                if _TYPE_DEFINITION.search(head.replace(b"\0", b"")):
                    raise DocumentError(
                        f"{name} holds an XML document type, which no office program writes, and was rejected.",
                        remedy="Save it again in an office program, or leave it out.",
                    )


# Word


def read_docx(data: bytes, name: str) -> Reading:
    """The text of a Word document: paragraphs, headings, lists, tables, text boxes, footnotes.

    Left out: hidden text, deleted text of tracked changes, comments, headers and footers.

    Raises:
        DocumentError: It is damaged, or too large.
    """
    _checked(data, name)
    with needs("documents"):
        from docx import Document

    with _parsing(name):
        document = Document(io.BytesIO(data))
        blocks = list(_blocks(document, document.element.body, _hidden_styles(document)))
        notes = list(_notes(document))
        title = (document.core_properties.title or "").strip()
    text = re.sub(r"\n(- .*)\n\n(?=- )", r"\n\1\n", "\n\n".join([*blocks, *notes]))
    return Reading(text, {"title": title} if title else {})


def _hidden_styles(document: Docx) -> set[str]:
    return {style.style_id for style in document.styles if getattr(getattr(style, "font", None), "hidden", None)}


def _blocks(document: Docx, body: Any, hidden: set[str]) -> Iterator[str]:
    from docx.table import Table

    for element in body:
        if element.tag == f"{_W}p":
            if text := _paragraph(document, element, hidden):
                yield text
            for box in element.iter(f"{_W}txbxContent"):
                if not any(above.tag.endswith("}Fallback") for above in box.iterancestors()):
                    yield from _blocks(document, box, hidden)
        elif element.tag == f"{_W}tbl":
            table = Table(element, document)
            if lines := _table(table, document, hidden):
                yield "\n".join(lines)
        elif element.tag in (f"{_W}sdt", f"{_W}sdtContent", f"{_W}ins", f"{_W}customXml"):
            yield from _blocks(document, element, hidden)


def _paragraph(document: Docx, paragraph: Any, hidden: set[str]) -> str:
    style_id = paragraph.pPr.pStyle.val if paragraph.pPr is not None and paragraph.pPr.pStyle is not None else None
    if style_id in hidden:
        return ""
    text = "".join(_words(paragraph, hidden)).strip()
    if not text:
        return ""
    style = next((style for style in document.styles if style.style_id == style_id), None) if style_id else None
    title = (style.name or "") if style is not None else ""
    if title == "Title":
        return f"# {text}"
    if found := re.fullmatch(r"(?i)heading ([1-6])", title):
        return f"{'#' * int(found[1])} {text}"
    in_list = title.startswith("List") or (paragraph.pPr is not None and paragraph.pPr.numPr is not None)
    return f"- {text}" if in_list else text


def _words(element: Any, hidden: set[str]) -> Iterator[str]:
    """The text of an element's runs, those of links and of accepted insertions too."""
    stack = [*reversed(element)]
    while stack:
        node = stack.pop()
        if node.tag in _SKIPPED or not isinstance(node.tag, str):
            continue
        if node.tag == f"{_W}t":
            yield node.text or ""
        elif node.tag in (f"{_W}tab", f"{_W}ptab"):
            yield "\t"
        elif node.tag in (f"{_W}br", f"{_W}cr"):
            yield "\n"
        elif node.tag == f"{_W}noBreakHyphen":
            yield "-"
        elif node.tag == f"{_W}r" and _is_hidden(node, hidden):
            continue
        else:
            stack += [*reversed(node)]


def _is_hidden(run: Any, hidden: set[str]) -> bool:
    facts = run.find(f"{_W}rPr")
    if facts is None:
        return False
    mark, style = facts.find(f"{_W}vanish"), facts.find(f"{_W}rStyle")
    if mark is not None:
        return mark.get(f"{_W}val", "1") not in ("0", "false", "off")
    return style is not None and style.get(f"{_W}val") in hidden


def _table(table: Table, document: Docx, hidden: set[str]) -> list[str]:
    rows = []
    for row in table.rows:
        # A cell over several columns or rows is named once for each: the text stands in all of them.
        rows.append([" ".join(_blocks(document, cell._tc, hidden)) for cell in row.cells])
    if rows and max(map(len, rows)) == 1:  # a box around text
        return [text for row in rows for text in row if text]
    return markdown_table(rows)


def _notes(document: Docx) -> Iterator[str]:
    """Footnotes and endnotes, in their order."""
    from docx.oxml import parse_xml

    for relation in document.part.rels.values():
        if relation.is_external or not relation.reltype.endswith(("/footnotes", "/endnotes")):
            continue
        for note in parse_xml(relation.target_part.blob):
            if note.get(f"{_W}type") is None and (text := "".join(_words(note, set())).strip()):
                yield text


# PowerPoint


def read_pptx(data: bytes, name: str) -> Reading:
    """The text of slides with their tables and notes; hidden slides are left out.

    Raises:
        DocumentError: It is damaged, or too large.
    """
    _checked(data, name)
    with needs("documents"):
        from pptx import Presentation

    with _parsing(name):
        presentation = Presentation(io.BytesIO(data))
        parts: list[tuple[str, dict[str, Any]]] = []
        hidden = 0
        for number, slide in enumerate(presentation.slides, start=1):
            if slide._element.get("show") in ("0", "false"):
                hidden += 1
                continue
            texts = list(_shapes(slide.shapes, slide.shapes.title))
            if slide.has_notes_slide and (frame := slide.notes_slide.notes_text_frame) is not None:
                texts.append(frame.text.strip())
            parts.append(("\n\n".join(filter(None, texts)), {"slide": number}))
        title = (presentation.core_properties.title or "").strip()
    text, places = joined(parts)
    text = text.replace("\v", "\n")
    warned = (f"{hidden} hidden slide{'s are' if hidden > 1 else ' is'} left out",) if hidden else ()
    known = title and title != "PowerPoint Presentation"
    return Reading(text, {"slides": len(parts) + hidden} | ({"title": title} if known else {}), places, warned)


def _shapes(shapes: Any, title: Any) -> Iterator[str]:
    stack = [*reversed(list(shapes))]
    while stack:
        shape = stack.pop()
        properties = next(iter(shape._element.xpath(".//p:cNvPr")), None)
        if properties is not None and properties.get("hidden") in ("1", "true"):
            continue
        if hasattr(shape, "shapes"):  # a group
            stack += [*reversed(list(shape.shapes))]
        elif getattr(shape, "has_table", False):
            yield "\n".join(markdown_table([[cell.text for cell in row.cells] for row in shape.table.rows]))
        elif shape.has_text_frame and (text := shape.text_frame.text.strip()):
            is_title = title is not None and shape.shape_id == title.shape_id
            yield f"# {' '.join(text.split())}" if is_title else text


# Excel


def read_xlsx(data: bytes, name: str) -> Reading:
    """The cells of each sheet as a table, with the values that formulas had when the file was saved.

    Hidden sheets are left out, and hidden rows and columns are not looked for.

    Raises:
        DocumentError: It is damaged, or too large.
    """
    _checked(data, name)
    with needs("documents"):
        import defusedxml  # noqa: F401 - openpyxl reads XML with it
        from openpyxl import load_workbook

    parts: list[tuple[str, dict[str, Any]]] = []
    hidden = 0
    with _parsing(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it does not read, such as data validation
        with closing(load_workbook(io.BytesIO(data), read_only=True, data_only=True, keep_links=False)) as book:
            for sheet in book.worksheets:
                if sheet.sheet_state != "visible":
                    hidden += 1
                    continue
                sheet.reset_dimensions()  # what the file says may be wrong
                rows = _without_blank_columns([[_value(cell) for cell in row] for row in _rows(sheet, name)])
                if rows:
                    lines = markdown_table(rows)
                    parts.append((f"## {sheet.title}\n\n" + "\n".join(lines), {"sheet": sheet.title}))
            title = (book.properties.title or "").strip()
    text, places = joined(parts)
    warned = (f"{hidden} hidden sheet{'s are' if hidden > 1 else ' is'} left out",) if hidden else ()
    return Reading(text, {"title": title} if title else {}, places, warned)


def _rows(sheet: Any, name: str) -> Iterator[tuple[Any, ...]]:
    room = 20_000_000  # cells; a row at the sheet's end alone would make as many empty ones before it
    for row in sheet.iter_rows(values_only=True):
        room -= len(row) + 1
        if room < 0:
            raise DocumentError(f"{name} has a sheet with too many cells.", remedy="Save its sheets as CSV files.")
        if any(value is not None for value in row):
            yield row


def _value(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value).removesuffix(" 00:00:00")


def _without_blank_columns(rows: list[list[str]]) -> list[list[str]]:
    width = max(map(len, rows), default=0)
    kept = [place for place in range(width) if any(place < len(row) and row[place].strip() for row in rows)]
    return [[row[place] if place < len(row) else "" for place in kept] for row in rows]
