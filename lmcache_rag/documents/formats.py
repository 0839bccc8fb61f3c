"""The text of an HTML page that a reader sees, and the text layer of a PDF file."""

from __future__ import annotations

import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lmcache_rag._utils import needs
from lmcache_rag.documents.decoding import decode
from lmcache_rag.errors import DocumentError

if TYPE_CHECKING:
    from bs4 import Tag

logger = logging.getLogger("lmcache_rag.documents")

# Parsing takes some 100 times the page's size in memory, so HTML pages have a lower limit.
MAX_HTML_BYTES = 16 * 2**20

# ruff: noqa: SIM905  (a list of quoted names would fill the screen)
_DROPPED = frozenset("head script style template noscript svg iframe object canvas audio video datalist".split())
_BLOCKS = frozenset(
    """address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure
    footer form h1 h2 h3 h4 h5 h6 header hgroup hr html legend li main menu nav ol option p pre search section select
    summary table tbody textarea tfoot thead tr ul""".split()
)
_TIGHT = frozenset("dd dt li option tr".split())  # follow each other without a blank line
_HIDDEN_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_DECLARABLE = re.compile(r"(?:iso-?8859|windows-|cp125|latin|koi8|shift|euc|gb|big5|mac|us-ascii)", re.IGNORECASE)
_SPACE = re.compile(r"\s+")

MAX_PDF_CHARACTERS = 50_000_000
_TAIL = 2048  # the specification requires the end marker in the last 1024 bytes; real writers are less exact
# pypdf only logs these, and continues without the page's text.
_LOSS = re.compile(r"Error -\d+ while decompressing|Pdf(?:Read|Stream)Error\(")
_one_at_a_time = threading.Lock()


def html_text(data: bytes, name: str) -> tuple[str, str]:
    """Return (visible text, title); the title is empty where the page has none.

    Scripts, styles, templates, comments and content hidden by attribute or inline style are dropped: no reader of
    the page saw them, and a prompt must not contain them. Blocks are separated by blank lines, list items and rows
    by line ends.

    Raises:
        DocumentError: The bytes are not text.
    """
    with needs("documents"):
        from bs4 import BeautifulSoup
        from bs4.dammit import EncodingDetector
        from bs4.exceptions import ParserRejectedMarkup

    declared = EncodingDetector.find_declared_encoding(data[:4096], is_html=True)
    if declared is not None and not _DECLARABLE.match(declared):
        declared = None
    markup = _defused(decode(data, name, declared=declared))
    with warnings.catch_warnings():
        # bs4 warns of text that looks like XML, a file name or an address; here it is HTML by the file's name.
        warnings.simplefilter("ignore")
        try:
            soup = BeautifulSoup(markup, "html.parser")
        except ParserRejectedMarkup:  # an unknown <![section]: use the markup as text
            soup = BeautifulSoup(markup.replace("<![", "&lt;!["), "html.parser")
    title = soup.title or soup.h1
    return _visible(soup), _SPACE.sub(" ", title.get_text(" ")).strip() if title else ""


def _defused(markup: str) -> str:
    """Turn the beginning of a tag or comment that never ends into text.

    Python's parser searches for the missing end from each of them again, so that a page of 100 KB could keep it busy
    for minutes.
    """
    for begin, end in (("<!--", "-->"), ("<![", "]>"), ("<", ">")):
        last = markup.rfind(end) + 1
        if begin in markup[last:]:
            markup = markup[:last] + markup[last:].replace(begin, "&lt;" + begin[1:])
    return markup


def _visible(root: Tag) -> str:
    """Walk the tree with an explicit stack: a hostile page nests deeper than Python may recurse."""
    from bs4.element import CData, NavigableString, PageElement, Tag

    lines: list[str] = []  # finished lines; an empty one is a paragraph's border
    words: list[str] = []  # the line that is growing

    def end_line(*, blank: bool) -> None:
        line = _SPACE.sub(" ", "".join(words)).strip()
        words.clear()
        if line:
            lines.append(line)
        if blank and lines and lines[-1]:
            lines.append("")

    stack: list[PageElement | tuple[str, bool]] = [root]
    while stack:
        node = stack.pop()
        if isinstance(node, tuple):  # what to do where a tag ends
            if node[0]:
                words.append(node[0])
            else:
                end_line(blank=node[1])
        elif isinstance(node, Tag):
            if node.name in _DROPPED or _is_hidden(node):
                continue
            if node.name in _BLOCKS:
                blank = node.name not in _TIGHT
                end_line(blank=blank)
                if node.name == "pre":
                    lines.extend(node.get_text().strip("\n").splitlines())
                    end_line(blank=True)
                    continue
                if node.name == "li":
                    words.append("- ")
                stack.append(("", blank))
            elif node.name == "br":
                end_line(blank=False)
            elif node.name in ("td", "th"):
                stack.append((" ", False))
            elif node.name == "img":
                words.append(f" {node.get('alt') or ''} ")
            stack.extend(reversed(node.contents))
        elif type(node) in (NavigableString, CData):  # comments and the like are subclasses
            words.append(str(node))
    end_line(blank=False)
    return "\n".join(lines).strip()


def _is_hidden(tag: Tag) -> bool:
    if not tag.attrs:
        return False
    return tag.has_attr("hidden") or _HIDDEN_STYLE.search(str(tag.get("style") or "")) is not None


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
    with needs("documents"):
        import cryptography  # noqa: F401 - pypdf reads encrypted files with it
        from pypdf.errors import LimitReachedError, PdfReadError

    with _pypdf_messages(name) as losses:
        try:
            try:
                return _read_pdf(data, name)
            finally:
                if losses:
                    raise PdfReadError(losses[0])
        except DocumentError:
            raise
        except LimitReachedError as error:
            raise DocumentError(
                f"{name} unpacks to far more data than a document has, and was rejected ({error}).",
                remedy="Print it to a new PDF file, or leave it out.",
            ) from error
        except Exception as error:  # pypdf raises many kinds of errors on damaged files
            raise DocumentError(
                f"{name} is a damaged PDF ({type(error).__name__}: {error}).",
                remedy="Repair it, for example with: qpdf OLD NEW",
            ) from error


def _read_pdf(data: bytes, name: str) -> tuple[str, dict[str, int | str]]:
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
    with _one_at_a_time:  # the logger is shared by all threads
        before = theirs.propagate, theirs.level
        theirs.addHandler(hand)
        theirs.propagate = False
        theirs.setLevel(logging.WARNING)  # so that lost text is reported even in a program that silenced pypdf
        try:
            yield losses
        finally:
            theirs.propagate = before[0]
            theirs.setLevel(before[1])
            theirs.removeHandler(hand)
