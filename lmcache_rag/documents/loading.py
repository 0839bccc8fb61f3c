"""Load one file as one Document."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from lmcache_rag.documents.access import access_error, name_error, quoted, special_error
from lmcache_rag.documents.decoding import decode, tidy
from lmcache_rag.documents.formats import MAX_HTML_BYTES, html_text, pdf_text
from lmcache_rag.documents.types import Document
from lmcache_rag.errors import DocumentError

MAX_BYTES = 256 * 2**20

# Our own table: the one of the mimetypes module depends on the machine, and metadata must not.
_MEDIA_TYPES = {
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".rst": "text/x-rst",
    ".html": "text/html",
    ".htm": "text/html",
    ".xhtml": "text/html",
    ".pdf": "application/pdf",
    ".csv": "text/csv",
    ".tsv": "text/tab-separated-values",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".xml": "application/xml",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
}
_MARKDOWN_TITLE = re.compile(r"^#[ \t]+(.+?)[ \t#]*$", re.MULTILINE)
_RST_TITLE = re.compile(r"^(?P<over>([=\-~^*#])\2{2,}\n)? ?(?P<title>\S.*)\n([=\-~^*#])\4{2,}$", re.MULTILINE)


def load_document(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Document:
    """Read one file: Markdown, text, reStructuredText, HTML, PDF, or anything else that is text.

    The kind follows from the suffix, and for PDF from the content too. Text is UTF-8, or UTF-16 or UTF-32 with a byte
    order mark; HTML may declare another encoding.

    Args:
        path: The file; links are followed.
        max_bytes: Largest file that is read, in bytes.

    Raises:
        DocumentError: The file cannot be opened, is not a regular file, is too large, is binary, is not valid in its
            encoding, is empty, or is a PDF file that cannot be read. The message names the file and the remedy.
    """
    name = quoted(path)
    real, data = _read(path, max_bytes)
    suffix = real.suffix.lower()
    media_type = "application/pdf" if data.startswith(b"%PDF-") else _MEDIA_TYPES.get(suffix, "text/plain")
    metadata: dict[str, Any] = {"name": real.name, "media_type": media_type}
    if not data:
        raise DocumentError(f"{name} is empty (0 bytes).", remedy="Fill it, or leave it out.")
    if media_type == "application/pdf":
        text, facts = pdf_text(data, name)
        metadata.update(facts)
    elif media_type == "text/html":
        if len(data) > MAX_HTML_BYTES:
            raise DocumentError(
                f"{name} is an HTML page of more than {MAX_HTML_BYTES >> 20} MiB.",
                remedy="Divide it, or save it as text.",
            )
        text, title = html_text(data, name)
        if title:
            metadata["title"] = title
    else:
        text = decode(data, name)
    text = tidy(text)
    if not text.strip():
        raise DocumentError(f"{name} is empty: it holds no visible text.", remedy="Fill it, or leave it out.")
    if title := _title(text, media_type):
        metadata["title"] = title
    return Document(
        doc_id=str(real),
        text=text,
        content_hash=hashlib.sha256(data).hexdigest(),
        source=str(real),
        metadata=metadata,
    )


def _read(path: str | os.PathLike[str], max_bytes: int) -> tuple[Path, bytes]:
    """Return (resolved path, content). Never waits: pipes, sockets and devices are not opened."""
    try:
        real = os.path.realpath(path, strict=True)
        real.encode()
        if refusal := special_error(path, os.stat(real).st_mode):  # noqa: PTH116
            raise refusal
        # If a pipe replaced the file just now, opening it without O_NONBLOCK would wait for ever.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(real, flags), "rb") as file:  # noqa: PTH123
            status = os.fstat(file.fileno())
            if refusal := special_error(path, status.st_mode):
                raise refusal
            data = file.read() if status.st_size <= max_bytes else b""
    except UnicodeEncodeError as error:
        raise name_error(path) from error
    except ValueError as error:
        raise DocumentError(f"{quoted(path)} is not a path.", remedy="Name a file.") from error
    except OSError as error:
        raise access_error(path, error) from error
    if max(status.st_size, len(data)) > max_bytes:
        raise DocumentError(
            f"{quoted(path)} is larger than {max_bytes} bytes.",
            remedy="Divide it into smaller files, or raise max_bytes.",
        )
    return Path(real), data


def _title(text: str, media_type: str) -> str:
    """The first heading near the top of a Markdown or reStructuredText document."""
    head = text[:4096]
    if media_type == "text/markdown" and (match := _MARKDOWN_TITLE.search(head)):
        return match[1].strip()
    if media_type == "text/x-rst" and (match := _RST_TITLE.search(head)):
        return match["title"].strip()
    return ""
