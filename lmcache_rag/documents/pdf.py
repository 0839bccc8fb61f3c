"""The text layer of a PDF file."""

from __future__ import annotations

import io
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lmcache_rag.errors import DocumentError

logger = logging.getLogger("lmcache_rag.documents")

MAX_PDF_CHARACTERS = 50_000_000
_TAIL = 2048  # the specification wants the end marker in the last 1024 bytes; real writers are less exact
# pypdf only logs these, and goes on without the page's text.
_LOSS = re.compile(r"Error -\d+ while decompressing|Pdf(?:Read|Stream)Error\(")
_one_at_a_time = threading.Lock()


def pdf_text(data: bytes, name: str) -> tuple[str, dict[str, int | str]]:
    """Return (text, facts), where facts holds ``pages`` and, where there is one, ``title``.

    A file that is encrypted with an empty user password opens. Unpacking is bounded by pypdf's own limits.

    Raises:
        DocumentError: Not a PDF file, encrypted, truncated, damaged, without pages, or without any text.
    """
    if b"%PDF-" not in data[:1024]:
        raise DocumentError(f"{name} is not a PDF file.", remedy="Rename it after what it is, or make it again.")
    if b"%%EOF" not in data[-_TAIL:]:
        raise DocumentError(
            f"{name} is a truncated PDF: its end is missing.", remedy="Copy or download the whole file again."
        )
    from pypdf.errors import LimitReachedError, PdfReadError

    with _pypdf_heard(name) as losses:
        try:
            try:
                return _read(data, name)
            finally:
                if losses:
                    raise PdfReadError(losses[0])
        except DocumentError:
            raise
        except LimitReachedError as error:
            raise DocumentError(
                f"{name} unpacks to far more than a document holds, and was refused ({error}).",
                remedy="Print it to a new PDF file, or leave it out.",
            ) from error
        except Exception as error:  # pypdf raises nearly anything on damaged files
            raise DocumentError(
                f"{name} is a damaged PDF ({type(error).__name__}: {error}).",
                remedy="Repair it, for example with: qpdf OLD NEW",
            ) from error


def _read(data: bytes, name: str) -> tuple[str, dict[str, int | str]]:
    from pypdf import PasswordType, PdfReader

    reader = PdfReader(io.BytesIO(data))
    if reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED:
        raise DocumentError(
            f"{name} is encrypted and needs a password.",
            remedy="Save a copy without one, for example with: qpdf --decrypt --password=SECRET OLD NEW",
        )
    count = len(reader.pages)
    if count == 0:
        raise DocumentError(f"{name} is an empty PDF: it has no pages.", remedy="Make it again, or leave it out.")
    pages: list[str] = []
    size = 0
    for page in reader.pages:
        text = page.extract_text().strip()
        size += len(text)
        if size > MAX_PDF_CHARACTERS:
            raise DocumentError(
                f"{name} holds more than {MAX_PDF_CHARACTERS} characters.", remedy="Divide it into several files."
            )
        pages.append(text)
    blank = pages.count("")
    if blank == count:
        raise DocumentError(
            f"{name} is a PDF without text ({count} page{'s' if count > 1 else ''}; perhaps scanned pictures).",
            remedy="Give it a text layer, for example with: ocrmypdf OLD NEW",
        )
    facts: dict[str, int | str] = {"pages": count}
    if blank:
        facts["pages_without_text"] = blank
        logger.warning("%s: %d of %d pages hold no text and are not in the store", name, blank, count)
    title = reader.metadata.title if reader.metadata else None
    if title and str(title).strip().lower() not in ("", "untitled"):
        facts["title"] = str(title).strip()
    return "\n\n".join(text for text in pages if text), facts


@contextmanager
def _pypdf_heard(name: str) -> Iterator[list[str]]:
    """Keep pypdf's log records off the screen: they are ours at debug level. Yields those that mean lost text."""
    losses: list[str] = []

    class Hand(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            logger.debug("%s: pypdf: %s", name, message)
            if _LOSS.search(message):
                losses.append(message)

    theirs, hand = logging.getLogger("pypdf"), Hand()
    with _one_at_a_time:  # the logger is shared by all threads
        before = theirs.propagate, theirs.level
        theirs.addHandler(hand)
        theirs.propagate = False
        theirs.setLevel(logging.WARNING)  # a program that silenced pypdf must not lose what it says of lost text
        try:
            yield losses
        finally:
            theirs.propagate = before[0]
            theirs.setLevel(before[1])
            theirs.removeHandler(hand)
