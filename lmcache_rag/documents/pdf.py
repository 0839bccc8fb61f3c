"""The text layer of a PDF file, with form values, free-text notes, page numbers and page labels.

PDFium (pypdfium2) reads the text: it knows the letters of fonts and scripts that pypdf loses. pypdf reads what is
around it, and notices damage that PDFium passes over in silence.
"""

from __future__ import annotations

import io
import logging
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lmcache_rag._utils import needs
from lmcache_rag.documents.types import Reading, joined
from lmcache_rag.errors import DocumentError

if TYPE_CHECKING:
    from pypdf import PageObject, PdfReader
    from pypdfium2 import PdfDocument

logger = logging.getLogger("lmcache_rag.documents")

MAX_PDF_CHARACTERS = 50_000_000
# pypdf only logs these, and continues without the page's text.
_LOSS = re.compile(r"Error -\d+ while decompressing|Pdf(?:Read|Stream)Error\(")
_HIDDEN_FLAGS = 2 | 32  # of an annotation: hidden, no view
_PASSWORD_FLAG = 1 << 13  # of a form field
# Letters that a font's map lacks (PDFium), that it maps to nothing, or to its private use area.
_LOST = re.compile("[\0\ufffd\ufffe\uffff]|(?:\\S?[\ue000-\uf8ff\U000f0000-\U0010ffff])")
_BULLETS = re.compile("[\uf0a7\uf0a8\uf0b7\uf0d8\uf0fc\uf076\uf02d]")  # of the fonts Symbol and Wingdings


def read_pdf(data: bytes, name: str) -> Reading:
    """The text of a PDF file; facts are ``pages`` and, where there is one, ``title``.

    A file that is encrypted with an empty user password opens. Unpacking is bounded by pypdf's own limits.

    Raises:
        DocumentError: Not a PDF file, encrypted, truncated, damaged, without pages, or without any text.
    """
    if b"%PDF-" not in data[:1024]:
        raise DocumentError(f"{name} is not a PDF file.", remedy="Rename it after what it is, or make it again.")
    if b"%%EOF" not in data:
        raise DocumentError(
            f"{name} is a truncated PDF: its end is missing.", remedy="Copy or download the whole file again."
        )
    with needs("documents"):
        import cryptography  # noqa: F401 - pypdf reads encrypted files with it
        from pypdf.errors import LimitReachedError, PdfReadError
        from pypdfium2 import PdfiumError

    with _pypdf_messages(name) as losses:
        try:
            try:
                return _read(data, name)
            finally:
                if losses:
                    raise PdfReadError(losses[0])
        except (DocumentError, MemoryError):
            raise
        except LimitReachedError as error:
            raise DocumentError(
                f"{name} unpacks to far more data than a document has, and was rejected ({error}).",
                remedy="Print it to a new PDF file, or leave it out.",
            ) from error
        except (Exception, PdfiumError) as error:  # pypdf raises many kinds of errors on damaged files
            raise DocumentError(
                f"{name} is a damaged PDF ({type(error).__name__}: {' '.join(str(error).split())[:200]}).",
                remedy="Repair it, for example with: qpdf OLD NEW",
            ) from error


def _read(data: bytes, name: str) -> Reading:
    from pypdf import PasswordType, PdfReader
    from pypdfium2 import PdfDocument

    reader = PdfReader(io.BytesIO(data))
    if reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED:
        raise DocumentError(
            f"{name} is encrypted and needs a password.",
            remedy="Save a copy without one, for example with: qpdf --decrypt --password=SECRET OLD NEW",
        )
    count = len(reader.pages)
    if count == 0:
        raise DocumentError(f"{name} is an empty PDF: it has no pages.", remedy="Make it again, or leave it out.")
    document = PdfDocument(data)
    if len(document) != count:
        raise ValueError(f"{count} or {len(document)} pages")
    labels = _labels(reader)
    parts: list[tuple[str, dict[str, Any]]] = []
    size = blank = lost = 0
    for number, page in enumerate(reader.pages):
        if contents := page.get_contents():
            contents.get_data()  # notices damage and bombs
        text, unknown = _page_text(document, number)
        lost += unknown
        text = "\n\n".join(filter(None, [text.strip(), *_annotations(page)]))
        size += len(text)
        if size > MAX_PDF_CHARACTERS:
            raise DocumentError(
                f"{name} holds more than {MAX_PDF_CHARACTERS} characters.", remedy="Divide it into several files."
            )
        blank += not text
        parts.append((text, {"page": number + 1, "page_label": labels[number] if labels else str(number + 1)}))
    if blank == count:
        raise DocumentError(
            f"{name} is a PDF without text ({count} page{'s' if count > 1 else ''}; perhaps scanned pictures).",
            remedy="Give it a text layer, for example with: ocrmypdf OLD NEW",
        )
    if lost * 2 > size:
        raise DocumentError(
            f"{name} holds text that cannot be read: its fonts do not say which letters they are "
            f"({lost:,} of {size:,} characters).",
            remedy="Print it to a new PDF, or give it a text layer, for example with: ocrmypdf --force-ocr OLD NEW",
        )
    facts: dict[str, Any] = {"pages": count}
    warnings = []
    if blank:
        facts["pages_without_text"] = blank
        warnings.append(f"{blank} of {count} pages hold no text and are not in the store")
    if lost:
        warnings.append(
            f"{lost:,} of {size:,} characters are not readable, since a font does not say which letters they are; "
            "print it to a new PDF file, or give it a text layer with ocrmypdf --force-ocr"
        )
    title = reader.metadata.title if reader.metadata else None
    if title and str(title).strip().lower() not in ("", "untitled"):
        facts["title"] = str(title).strip()
    text, places = joined(parts)
    return Reading(text, facts, places, tuple(warnings))


def _page_text(document: PdfDocument, number: int) -> tuple[str, int]:
    """A page's text, and how many of its characters cannot be known."""
    from pypdfium2 import raw

    page = document[number]
    try:
        found = page.get_textpage()
        try:
            text = found.get_text_range(errors="replace")
            unmapped = sum(raw.FPDFText_HasUnicodeMapError(found, place) == 1 for place in range(found.count_chars()))
        finally:
            found.close()
    finally:
        page.close()
    text = _BULLETS.sub("•", text.replace("\r\n", "\n").replace("\r", "\n").replace("\u0002", "\u00ad"))
    text = text.replace("\u00ad\n", "")  # PDFium marks a hyphen at a line's end
    lost = max(unmapped, len(_LOST.findall(text)))
    text = re.sub("[\0\ufffe\uffff]", "\ufffd", text)
    # Presentation forms: ligatures, and Arabic letters by their place in a word.
    return re.sub("[\ufb00-\ufdff\ufe70-\ufefc]+", lambda match: unicodedata.normalize("NFKC", match[0]), text), lost


def _labels(reader: PdfReader) -> list[str]:
    try:
        return list(reader.page_labels)
    except Exception:  # a label is not worth the document
        logger.debug("page labels cannot be read", exc_info=True)
        return []


def _annotations(page: PageObject) -> Iterator[str]:
    """The text of form fields and free-text notes, which is not part of the page's own text."""
    found = page.get("/Annots")
    for item in (found.get_object() if found is not None else None) or ():
        annotation = item.get_object()
        if not hasattr(annotation, "get") or int(annotation.get("/F", 0)) & _HIDDEN_FLAGS:
            continue
        kind = annotation.get("/Subtype")
        if kind == "/FreeText":
            yield str(annotation.get("/Contents") or "").strip()
        elif kind == "/Widget":
            yield _field(annotation)


def _field(annotation: Any) -> str:
    """A form field as "name: value"; empty without a value. Names and values are inherited."""
    facts: dict[str, Any] = {}
    node, steps = annotation, 0
    while node is not None and steps < 32:
        for key in ("/FT", "/V", "/TU", "/T", "/Ff"):
            if key in node and key not in facts:
                facts[key] = node[key]
        node, steps = (node["/Parent"].get_object() if "/Parent" in node else None), steps + 1
    value = facts.get("/V")
    value = value.get_object() if value is not None and hasattr(value, "get_object") else value
    if facts.get("/FT") not in ("/Tx", "/Ch") or int(facts.get("/Ff", 0)) & _PASSWORD_FLAG:
        return ""
    text = ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
    name = str(facts.get("/TU") or facts.get("/T") or "").strip()
    return f"{name}: {text.strip()}".removeprefix(": ") if text.strip() else ""


@contextmanager
def _pypdf_messages(name: str) -> Iterator[list[str]]:
    """Collect pypdf's log records, and log them at debug level instead. Yields those that report lost text."""
    losses: list[str] = []

    class Hand(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            logger.debug("%s: pypdf: %s", name, message)
            if _LOSS.search(message):
                losses.append(message)

    theirs, hand = logging.getLogger("pypdf"), Hand()
    before = theirs.propagate, theirs.level
    theirs.addHandler(hand)
    theirs.propagate = False
    theirs.setLevel(logging.WARNING)  # so that lost text is reported
    try:
        yield losses
    finally:
        theirs.propagate = before[0]
        theirs.setLevel(before[1])
        theirs.removeHandler(hand)
