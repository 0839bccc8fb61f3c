"""Which parser reads which file, and in which version."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath

from lmcache_rag.errors import DocumentError


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of file.

    Attributes:
        name: Short name.
        media_type: For the document's metadata.
        suffixes: Of file names.
        version: Raise it when the same bytes give another text, so that stores know which documents would change.
        packages: Libraries whose version matters too.
        reader: The parser, as module:function; it runs in a child process. Empty: the bytes are decoded, nothing else.
    """

    name: str
    media_type: str
    suffixes: tuple[str, ...]
    version: int
    packages: tuple[str, ...] = ()
    reader: str = ""

    @property
    def parser(self) -> str:
        """Names the parser with its version and its libraries'."""
        libraries = ", ".join(f"{package} {package_version(package)}" for package in self.packages)
        return f"{self.name} {self.version}" + (f" ({libraries})" if libraries else "")


@cache
def package_version(package: str) -> str:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


_OFFICE = "application/vnd.openxmlformats-officedocument."
_HERE = "lmcache_rag.documents."
TEXT = Format("text", "text/plain", (), 1)
HTML = Format(
    "html", "text/html", (".html", ".htm", ".xhtml", ".shtml"), 2, ("beautifulsoup4", "lxml"), f"{_HERE}html:read_html"
)
PDF = Format("pdf", "application/pdf", (".pdf",), 2, ("pypdfium2", "pypdf"), f"{_HERE}pdf:read_pdf")
MAIL = Format("mail", "message/rfc822", (".eml", ".mht", ".mhtml"), 1, (), f"{_HERE}containers:read_mail")
EPUB = Format("epub", "application/epub+zip", (".epub",), 1, ("beautifulsoup4", "lxml"), f"{_HERE}containers:read_epub")
DOCX = Format(
    "docx", f"{_OFFICE}wordprocessingml.document", (".docx",), 1, ("python-docx",), f"{_HERE}office:read_docx"
)
PPTX = Format(
    "pptx", f"{_OFFICE}presentationml.presentation", (".pptx",), 1, ("python-pptx",), f"{_HERE}office:read_pptx"
)
XLSX = Format("xlsx", f"{_OFFICE}spreadsheetml.sheet", (".xlsx", ".xlsm"), 1, ("openpyxl",), f"{_HERE}office:read_xlsx")
NOTEBOOK = Format("notebook", "application/x-ipynb+json", (".ipynb",), 1, (), f"{_HERE}containers:read_notebook")

# Our own table of names: the one of the mimetypes module depends on the machine, and metadata must not.
FORMATS: tuple[Format, ...] = (
    Format("text", "text/markdown", (".md", ".markdown"), 1),
    Format("text", "text/x-rst", (".rst",), 1),
    Format("text", "text/csv", (".csv",), 1),
    Format("text", "text/tab-separated-values", (".tsv",), 1),
    Format("text", "application/json", (".json",), 1),
    Format("text", "application/jsonl", (".jsonl",), 1),
    Format("text", "application/xml", (".xml",), 1),
    Format("text", "application/yaml", (".yaml", ".yml"), 1),
    HTML,
    PDF,
    DOCX,
    PPTX,
    XLSX,
    EPUB,
    MAIL,
    NOTEBOOK,
)
_BY_SUFFIX: Mapping[str, Format] = {suffix: each for each in FORMATS for suffix in each.suffixes}
_PLAIN = frozenset(
    (".txt", ".text", ".log", ".tex", ".py", ".js", ".ts", ".css", ".java", ".c", ".h", ".go", ".rs", ".sh")
)

_PAGE = re.compile(
    rb"\s*(?:<\?xml[^>]{0,200}\?>\s*)?(?:<!--.{0,2000}?-->\s*)*<(?:!doctype\s+html|html[\s>])", re.I | re.S
)
_OLD_OFFICE = b"\xd0\xcf\x11\xe0"
_NOT_READ = {
    ".docm": ("a Word document with macros", ".docx"),
    ".pptm": ("a presentation with macros", ".pptx"),
    ".odt": ("an OpenDocument text", ".docx"),
    ".ods": ("an OpenDocument spreadsheet", ".xlsx"),
    ".odp": ("an OpenDocument presentation", ".pptx"),
    ".xlsb": ("a binary spreadsheet", ".xlsx"),
    ".pages": ("a Pages document", ".docx"),
    ".numbers": ("a Numbers document", ".xlsx"),
    ".key": ("a Keynote document", ".pptx"),
    ".rtf": ("an RTF document", ".docx"),
    ".ps": ("a PostScript file", ".pdf"),
    ".eps": ("a PostScript file", ".pdf"),
    ".msg": ("an Outlook mail", ".eml"),
}


def format_of(name: str, data: bytes, shown: str) -> Format:
    """The format of a file, by its content where that is plain, else by its name.

    Args:
        name: The file's name.
        data: Its content.
        shown: The file, for messages.

    Raises:
        DocumentError: It is of a kind that is not read; the message names the kind to convert it to.
    """
    suffix = PurePath(name).suffix.lower()
    if data.startswith(b"%PDF-"):
        return PDF
    if data.startswith(b"PK\x03\x04"):
        return _archive(data, suffix, shown)
    if data.startswith(_OLD_OFFICE):
        raise _refused(
            shown, "an old office document, or an encrypted one", ".docx, .xlsx, .pptx or PDF, without a password"
        )
    if data.startswith((b"{\\rtf", b"%!PS")):
        suffix = ".rtf" if data.startswith(b"{") else ".ps"
    if suffix in _NOT_READ:
        raise _refused(shown, *_NOT_READ[suffix])
    known = _BY_SUFFIX.get(suffix)
    if known in (DOCX, PPTX, XLSX, EPUB):
        raise DocumentError(
            f"{shown} is not a .{known.name} file.", remedy="Rename it after what it is, or make it again."
        )
    if known is None and suffix not in _PLAIN and is_page(data):
        return HTML  # a page without its suffix, or as a server made it: .php, .aspx
    return known or TEXT


def is_page(data: bytes) -> bool:
    """Whether a file begins as an HTML page does."""
    return _PAGE.match(data[:4096].removeprefix(b"\xef\xbb\xbf")) is not None


def format_by_record(media_type: str, name: str) -> Format:
    """The format with which a file of this name would be read today, given the media type that was recorded."""
    known = next((each for each in FORMATS if each.media_type == media_type), None)
    if known is None or not known.reader:  # what was once read as text may have a parser of its own now
        by_name = _BY_SUFFIX.get(PurePath(name).suffix.lower())
        known = by_name if by_name is not None and by_name.reader else known
    return known or TEXT


def parser_of_record(parser: str, media_type: str) -> str:
    """The parser of a stored document; before stores remembered it, it was the first of its kind."""
    if parser:
        return parser
    return {HTML.media_type: "html 1", PDF.media_type: "pdf 1"}.get(media_type, TEXT.parser)


def _archive(data: bytes, suffix: str, shown: str) -> Format:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = set(archive.namelist())
            kind = archive.read("mimetype")[:100].decode("latin-1") if "mimetype" in names else ""
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        if suffix in _NOT_READ:
            raise _refused(shown, *_NOT_READ[suffix]) from error
        known = _BY_SUFFIX.get(suffix)
        if known is not None and known.reader:  # its parser has the better message
            return known
        raise _zip(shown) from error
    if suffix in _NOT_READ:
        raise _refused(shown, *_NOT_READ[suffix])
    for place, found in (("word/", DOCX), ("ppt/", PPTX), ("xl/", XLSX)):
        if any(name.startswith(place) for name in names):
            return found
    if kind.startswith("application/epub") or "META-INF/container.xml" in names:
        return EPUB
    if "opendocument" in kind:
        raise _refused(shown, "an OpenDocument file", ".docx, .xlsx, .pptx or PDF")
    raise _zip(shown)


def _zip(shown: str) -> DocumentError:
    return DocumentError(
        f"{shown} is binary (a ZIP archive or an office document), not text.",
        remedy="Unpack it and ingest its files, or leave it out.",
    )


def _refused(shown: str, kind: str, better: str) -> DocumentError:
    return DocumentError(f"{shown} is {kind}, which is not read.", remedy=f"Save it as {better}, or leave it out.")
