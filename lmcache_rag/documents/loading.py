"""Load one file as one Document."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from lmcache_rag.documents.access import access_error, name_error, quoted, special_error
from lmcache_rag.documents.decoding import decode, is_visible, tidy, without_tags, xml_encoding
from lmcache_rag.documents.formats import format_of, is_page
from lmcache_rag.documents.isolation import ReadLimits, read_in_child
from lmcache_rag.documents.types import Document, Reading
from lmcache_rag.errors import DocumentError

logger = logging.getLogger("lmcache_rag.documents")

MAX_BYTES = 256 * 2**20

_MARKDOWN_TITLE = re.compile(r"^#[ \t]+(.+?)[ \t#]*$", re.MULTILINE)
_RST_TITLE = re.compile(r"^(?P<over>([=\-~^*#])\2{2,}\n)? ?(?P<title>\S.*)\n([=\-~^*#])\4{2,}$", re.MULTILINE)


def load_document(
    path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES, limits: ReadLimits | None = None
) -> Document:
    """Read one file: Markdown, text, HTML, PDF, Office, e-books, mail, notebooks, or anything else that is text.

    The kind follows from the content where that is plain, else from the suffix. Text is UTF-8, or UTF-16 or UTF-32 with
    a byte order mark; HTML, XML and mail may declare another encoding. Everything but plain text is parsed in a child
    process, with limits of time and memory, without network and without other programs.

    Args:
        path: The file; links are followed.
        max_bytes: Largest file that is read, in bytes.
        limits: Most time and memory; None: by environment, else 120 s and 2 GiB.

    Raises:
        DocumentError: The file cannot be opened, is not a regular file, is too large, is binary, is not valid in its
            encoding, is empty, is of a kind that is not read, is damaged, or takes more than the limits. The message
            names the file and the remedy.
    """
    document = load_changed(path, lambda doc_id, content_hash: False, max_bytes=max_bytes, limits=limits)
    assert isinstance(document, Document)  # noqa: S101 - nothing is known
    return document


def load_changed(
    path: str | os.PathLike[str],
    is_known: Callable[[str, str], bool],
    *,
    max_bytes: int = MAX_BYTES,
    limits: ReadLimits | None = None,
) -> Document | str:
    """As load_document, but a file that is known is not parsed: its document id is returned.

    Args:
        path: The file.
        is_known: By document id and content hash.
        max_bytes: Largest file that is read, in bytes.
        limits: Most time and memory.

    Raises:
        DocumentError: As load_document.
    """
    name = quoted(path)
    real, data = _read(path, max_bytes)
    content_hash = hashlib.sha256(data).hexdigest()
    if is_known(str(real), content_hash):
        return str(real)
    if not data:
        raise DocumentError(f"{name} is empty (0 bytes).", remedy="Fill it, or leave it out.")
    kind = format_of(real.name, data, name)
    if kind.reader:
        reading = read_in_child(kind, data, name, limits or ReadLimits.of())
    else:
        reading = Reading(decode(data, name, declared=xml_encoding(data)))
    text, places, tags = _cleaned(reading)
    if not is_visible(text):
        raise DocumentError(f"{name} is empty: it holds no visible text.", remedy="Fill it, or leave it out.")
    metadata: dict[str, Any] = {"name": real.name, "media_type": kind.media_type, **reading.metadata}
    if title := _title(text, kind.media_type):
        metadata["title"] = title
    doubts = [f"{tags:,} invisible characters (Unicode tags), which can hide text, were left out"] if tags else []
    if not kind.reader:
        doubts += _doubts(text, data)
    for warning in (*reading.warnings, *doubts):
        logger.warning("%s: %s", quoted(real), warning)
    return Document(
        doc_id=str(real),
        text=text,
        content_hash=content_hash,
        source=str(real),
        metadata=metadata,
        places=places,
        parser=kind.parser,
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


def _cleaned(reading: Reading) -> tuple[str, tuple[tuple[int, Mapping[str, Any]], ...], int]:
    """The text without what cannot be stored or seen, its places, and how many invisible tags were left out."""
    borders = [0, *(start for start, _ in reading.places), len(reading.text)]
    parts, starts, tags = list[str](), list[int](), 0
    for start, stop in pairwise(borders):
        starts.append(sum(map(len, parts[-1:])) + (starts[-1] if starts else 0))
        part, found = without_tags(tidy(reading.text[start:stop]))
        parts.append(part)
        tags += found
    facts = (facts for _, facts in reading.places)
    return "".join(parts), tuple(zip(starts[1:], facts, strict=True)), tags


_ENCODED = re.compile(r"[A-Za-z0-9+/]{1000,}")
_ENCODED_LINE = re.compile(r"[A-Za-z0-9+/]{60,}={0,2}")
_MOST_ENCODED = 4000  # characters


def _doubts(text: str, data: bytes) -> Iterator[str]:
    """What a text file seems to hold that is no text for a reader."""
    if is_page(data):
        yield "this is an HTML page by its content, and is kept with its tags; name it .html to have it read as one"
    encoded = 0
    for match in _ENCODED.finditer(text):
        kinds = match[0][:1000]
        if re.search("[A-Z]", kinds) and re.search("[a-z]", kinds) and re.search("[0-9]", kinds):
            encoded += len(match[0])
    if len(text) < 1 << 24:
        run = 0
        for line in text.splitlines():
            run = run + len(line) if len(line) < 1000 and _ENCODED_LINE.fullmatch(line.strip()) else 0
            encoded += run if run > 600 else 0
            run = 0 if run > 600 else run
    if encoded > _MOST_ENCODED:
        yield (
            f"about {encoded:,} of {len(text):,} characters are no words but encoded data (base64), for which KV is "
            "computed too; take it out, or name the file after what it is"
        )


def _title(text: str, media_type: str) -> str:
    """The first heading near the top of a Markdown or reStructuredText document."""
    head = text[:4096]
    if media_type == "text/markdown" and (match := _MARKDOWN_TITLE.search(head)):
        return match[1].strip()
    if media_type == "text/x-rst" and (match := _RST_TITLE.search(head)):
        return match["title"].strip()
    return ""
