"""Files that hold documents inside: e-books (.epub), mail and saved pages (.eml, .mht), notebooks (.ipynb)."""

from __future__ import annotations

import json
import posixpath
import re
import zipfile
from collections.abc import Iterator
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any
from urllib.parse import unquote

from lmcache_rag._utils import needs
from lmcache_rag.documents.decoding import decode, xml_encoding
from lmcache_rag.documents.html import MAX_HTML_BYTES, html_text, read_html
from lmcache_rag.documents.office import damaged, unzip
from lmcache_rag.documents.types import Reading, joined
from lmcache_rag.errors import DocumentError

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_MOST_OUTPUT = 20_000  # characters of one output of a notebook's cell
_MOST_PARTS = 1000  # of a mail


def read_epub(data: bytes, name: str) -> Reading:
    """The chapters of an e-book in reading order.

    Raises:
        DocumentError: It is damaged, too large, or protected against copying.
    """
    with needs("documents"):
        from defusedxml import DefusedXmlException
        from defusedxml.ElementTree import ParseError

    with unzip(data, name) as archive:
        try:
            title, places = _spine(archive)
        except (
            KeyError,
            ParseError,
            DefusedXmlException,
            UnicodeError,
            LookupError,
            ValueError,
            OSError,
            EOFError,
        ) as e:
            raise damaged(name, e) from e
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise damaged(name, error) from error
        parts: list[tuple[str, dict[str, Any]]] = []
        missing = 0
        for number, place in enumerate(places, start=1):
            try:
                page = archive.read(place)
                if len(page) > MAX_HTML_BYTES:
                    raise DocumentError(f"{name} has a chapter that is too large.", remedy="Save it as text.")
                text, _ = html_text(decode(page, f"{name} ({place})", declared=xml_encoding(page)))
            except (KeyError, zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError):
                missing += 1
                continue
            except DocumentError as error:
                if "is binary" not in error.message:
                    raise
                raise DocumentError(
                    f"{name} is protected against copying, or damaged.", remedy="Name a copy without protection."
                ) from error
            parts.append((text, {"chapter": number}))
    if places and missing == len(places):
        raise damaged(name, ValueError("none of its chapters can be read"))
    text, starts = joined(parts)
    warned = (f"{missing} of {len(places)} chapters cannot be read and are not in the store",) if missing else ()
    return Reading(text, {"title": title} if title else {}, starts, warned)


def _spine(archive: zipfile.ZipFile) -> tuple[str, list[str]]:
    """The title, and the paths of the chapters in reading order."""
    from defusedxml.ElementTree import fromstring

    container = fromstring(archive.read("META-INF/container.xml"), forbid_dtd=True)
    root = next(node.attrib["full-path"] for node in container.iter() if node.tag.endswith("}rootfile"))
    package = fromstring(archive.read(root))
    files = {
        node.attrib["id"]: node.attrib.get("href", "")
        for node in package.iter()
        if str(node.tag).endswith("}item") and "html" in node.attrib.get("media-type", "")
    }
    title = next((node.text or "" for node in package.iter() if str(node.tag).endswith("}title")), "")
    order = [node.attrib.get("idref", "") for node in package.iter() if str(node.tag).endswith("}itemref")]
    folder = posixpath.dirname(root)
    places = [posixpath.normpath(posixpath.join(folder, unquote(files[key]))) for key in order if key in files]
    return " ".join(title.split()), places


def read_mail(data: bytes, name: str) -> Reading:
    """A mail's or a saved page's sender, receivers, date, subject and text; attachments are left out.

    Raises:
        DocumentError: It holds no text, or is damaged.
    """
    try:
        message = message_from_bytes(data, policy=policy.default)
        assert isinstance(message, EmailMessage)  # noqa: S101 - what this policy makes
        head = [
            f"{key}: {value}" for key in ("From", "To", "Cc", "Date", "Subject") if (value := _header(message, key))
        ]
        body = message.get_body(("plain", "html"))
        text = _body(body, name) if body is not None else ""
        left = sum(1 for part in _limited(message) if part is not body and _is_attachment(part, body))
    except (DocumentError, MemoryError):
        raise
    except Exception as error:  # the package raises many kinds of errors on damaged mail
        raise damaged(name, error) from error
    if not text.strip():
        kind = "only attachments" if left else "no text"
        raise DocumentError(f"{name} holds {kind}.", remedy="Save what it holds as files, or leave it out.")
    title = _header(message, "Subject")
    is_page = message.get("Snapshot-Content-Location") is not None
    shown = text if is_page else "\n".join(head) + "\n\n" + text.strip()
    warned = (f"{left} attachment{'s are' if left > 1 else ' is'} left out",) if left and not is_page else ()
    return Reading(shown.strip(), {"title": title} if title else {}, (), warned)


def _header(message: EmailMessage, key: str) -> str:
    try:
        return " ".join(str(message.get(key) or "").split())
    except (ValueError, IndexError, AttributeError, TypeError):  # a damaged header
        return ""


def _body(part: Any, name: str) -> str:
    payload = part.get_payload(decode=True)
    if not isinstance(payload, bytes):
        return ""
    if part.get_content_subtype() == "html":
        declared = part.get_content_charset()
        if declared and b"charset" not in payload[:4096]:
            payload = decode(payload, name, declared=declared).encode("utf-8", "replace")
        return read_html(payload, name).text
    return decode(payload, name, declared=part.get_content_charset())


def _limited(message: EmailMessage) -> Iterator[Any]:
    for number, part in enumerate(message.walk()):
        if number >= _MOST_PARTS:
            return
        yield part


def _is_attachment(part: Any, body: Any) -> bool:
    """Whether a part holds something of its own: not the same text as HTML, and no picture of the body."""
    if part.is_multipart():
        return bool(part.get_content_type() == "message/rfc822")
    if part.get_content_disposition() == "attachment":
        return True
    return body is not None and part.get_content_maintype() not in ("text", "image") and not part.get("Content-ID")


def read_notebook(data: bytes, name: str) -> Reading:
    """A notebook's cells, with what they printed; pictures are left out.

    Raises:
        DocumentError: It is no notebook.
    """
    try:
        notebook = json.loads(decode(data, name))
        metadata = notebook.get("metadata") or {}
        cells = notebook["cells"] if "cells" in notebook else notebook["worksheets"][0]["cells"]
        info = metadata.get("kernelspec") or metadata.get("language_info") or {}
        language = str(info.get("language") or info.get("name") or "")
        blocks = [block for cell in cells for block in _cell(cell, language)]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DocumentError(
            f"{name} is not a notebook ({type(error).__name__}).",
            remedy="Open and save it in Jupyter, or rename it after what it is.",
        ) from error
    return Reading("\n\n".join(blocks))


def _cell(cell: Any, language: str) -> Iterator[str]:
    source = _text(cell.get("source", cell.get("input", ""))).strip("\n")
    if not source.strip():
        return
    if cell.get("cell_type") != "code":
        # Pictures can stand inside the text.
        yield re.sub(r"\(data:[^)\s]{200,}\)", "()", source)
        return
    yield _fenced(source, re.sub(r"[^A-Za-z0-9+#-].*", "", language))
    for output in cell.get("outputs") or ():
        kind = output.get("output_type")
        found = output.get("text") if kind in ("stream", "pyout") else (output.get("data") or {}).get("text/plain")
        text = _ANSI.sub("", _text(found)).strip("\n")
        if kind in ("stream", "execute_result", "display_data", "pyout") and text.strip():
            yield _fenced(text[:_MOST_OUTPUT], "")


def _text(value: Any) -> str:
    return "".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _fenced(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
