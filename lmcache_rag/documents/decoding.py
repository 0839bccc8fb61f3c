"""Bytes to text: the encoding is never guessed, and no character is replaced silently."""

from __future__ import annotations

import codecs
import re

from lmcache_rag.errors import DocumentError

# UTF-32 comes before UTF-16: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_SIGNATURES = (
    (b"PK\x03\x04", "a ZIP archive or an office document"),
    (b"\xd0\xcf\x11\xe0", "an old office document"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"BZh", "compressed with bzip2"),
    (b"\xfd7zXZ", "compressed with xz"),
    (b"(\xb5/\xfd", "compressed with zstd"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"\x7fELF", "a program"),
    (b"SQLite format 3", "a SQLite database"),
)

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))


def decode(data: bytes, name: str, *, declared: str | None = None) -> str:
    """Decode a document's bytes.

    A byte order mark decides (UTF-8, UTF-16, UTF-32); else it is UTF-8, or what the document itself declares.

    Args:
        data: The raw bytes.
        name: The document, for messages.
        declared: Encoding that the document names inside itself (HTML), used when the bytes are not UTF-8.

    Raises:
        DocumentError: The bytes are not text, or broken; the message has the byte's position.
    """
    for mark, marked in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return _checked(data, name, marked)
    if b"\0" in data:
        raise _binary(data, name)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if declared is not None:
            return _checked(data, name, declared)
        sample = data[:8192]
        if _signature(data) or len(sample) - len(sample.translate(None, _CONTROL)) > len(sample) // 50:
            raise _binary(data, name) from error
        raise _broken(data, name, error) from error


def tidy(text: str) -> str:
    r"""One kind of line end (``\n``), and no code points that cannot be stored."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "�")
    return _LONE_SURROGATE.sub("�", text)


def _checked(data: bytes, name: str, encoding: str) -> str:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _broken(data, name, error) from error
    except (LookupError, ValueError) as error:
        raise DocumentError(
            f"{name} declares the encoding {encoding!r}, which is not known.", remedy="Save it as UTF-8."
        ) from error
    if "\0" in text:
        raise _binary(data, name)
    return text


def _signature(data: bytes) -> str:
    return next((kind for mark, kind in _SIGNATURES if data.startswith(mark)), "")


def _binary(data: bytes, name: str) -> DocumentError:
    sample = data[:4096]
    if not _signature(data) and max(sample[::2].count(0), sample[1::2].count(0)) > len(sample) * 0.35:
        return DocumentError(
            f"{name} is binary, or UTF-16 text without a byte order mark.", remedy="If it is text, save it as UTF-8."
        )
    kind = _signature(data)
    return DocumentError(
        f"{name} is binary{f' ({kind})' if kind else ''}, not text.",
        remedy="Convert it to text, Markdown, HTML or PDF, or leave it out.",
    )


def _broken(data: bytes, name: str, error: UnicodeDecodeError) -> DocumentError:
    shown = data[error.start : error.start + 1].hex()
    line = data.count(b"\n", 0, error.start) + 1
    return DocumentError(
        f"{name} is not valid {error.encoding.upper()}: byte 0x{shown} at offset {error.start} (line {line}).",
        remedy="Save it as UTF-8, for example with: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW",
    )
