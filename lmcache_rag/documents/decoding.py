"""Bytes to text: the encoding is never guessed, and no character is replaced silently."""

from __future__ import annotations

import codecs
import re

from lmcache_rag._utils import needs
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
        declared: Encoding that the document names inside itself (HTML, XML, mail), used when the bytes are not UTF-8.
            The name means what browsers take it for: ISO-8859-1 is WINDOWS-1252, GB2312 is GB18030.

    Raises:
        DocumentError: The bytes are not text, or broken; the message has the byte's position.
    """
    for mark, marked in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return _checked(data, name, marked)
    if b"\0" in data:
        raise _binary(data, name)
    declared = codec_of(declared) if declared else None
    if declared == "iso2022_jp" and b"\x1b$" in data:  # all of it is ASCII, and so UTF-8
        return _checked(data, name, declared)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if declared is not None:
            return _checked(data, name, declared)
        if _signature(data) or _controls(data[:8192]):
            raise _binary(data, name) from error
        raise _broken(data, name, error) from error


# Python's codecs for the encodings of the WHATWG standard, where webencodings names narrower ones.
_BROWSERS = {
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc-kr": "cp949",
    "big5": "big5hkscs",
    "windows-874": "cp874",
    "iso-8859-8-i": "iso8859_8",
    "iso-2022-jp": "iso2022_jp",
    "x-mac-cyrillic": "mac_cyrillic",
    "macintosh": "mac_roman",
}
_XML_DECLARATION = re.compile(rb"""<\?xml\s[^>]{0,200}?encoding\s*=\s*["']([A-Za-z0-9._:-]{1,40})["']""")


def codec_of(label: str) -> str | None:
    """Python's codec for an encoding's name in HTML, XML or mail, as browsers understand it; None: not known."""
    with needs("documents"):
        import webencodings

    found = webencodings.lookup(label.strip())
    if found is None or found.name.startswith(("x-user-defined", "replacement", "utf-16")):
        return None
    codec = str(found.name)
    return _BROWSERS.get(codec, codec)


def xml_encoding(data: bytes) -> str | None:
    """The encoding that an XML declaration names."""
    found = _XML_DECLARATION.match(data[:400].lstrip())
    return found[1].decode() if found else None


def tidy(text: str) -> str:
    r"""One kind of line end (``\n``), and no code points that cannot be stored."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "�")
    return _LONE_SURROGATE.sub("�", text)


_VISIBLE = re.compile(
    "[^\\s\\x00-\\x1f\\x7f-\\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)


def is_visible(text: str) -> bool:
    """Whether a reader sees any character: not only white space, control characters, fillers and the like."""
    return _VISIBLE.search(text) is not None


# Copies of ASCII that no font shows: text can be hidden in them. Flags of regions are written with them after U+1F3F4.
_TAGS = re.compile("(\U0001f3f4[\U000e0020-\U000e007f]{1,8})|[\U000e0000-\U000e007f]+")


def without_tags(text: str) -> tuple[str, int]:
    """The text without invisible tag characters, and how many there were."""
    found = [match for match in _TAGS.finditer(text) if not match[1]]
    if not found:
        return text, 0
    return _TAGS.sub(lambda match: match[1] or "", text), sum(len(match[0]) for match in found)


def _checked(data: bytes, name: str, encoding: str) -> str:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _broken(data, name, error) from error
    if "\0" in text:
        raise _binary(data, name)
    return text


def _controls(sample: bytes) -> bool:
    """Whether there are more control characters than a text has."""
    return len(sample) - len(sample.translate(None, _CONTROL)) > len(sample) // 50


def _is_text(data: bytes) -> bool:
    try:
        return bool(data.decode().strip()) and not _controls(data[:8192])
    except UnicodeDecodeError:
        return False


def _line(data: bytes, place: int) -> int:
    return data.count(b"\n", 0, place) + 1


def _signature(data: bytes) -> str:
    return next((kind for mark, kind in _SIGNATURES if data.startswith(mark)), "")


def _binary(data: bytes, name: str) -> DocumentError:
    sample = data[:4096]
    if not _signature(data) and abs(sample[::2].count(0) - sample[1::2].count(0)) > len(sample) * 0.35:
        return DocumentError(
            f"{name} is binary, or UTF-16 text without a byte order mark.", remedy="If it is text, save it as UTF-8."
        )
    kind = _signature(data)
    if not kind and b"\0" in data and _is_text(data.replace(b"\0", b"")):
        place, number = data.index(0), data.count(0)
        held, first = ("a NUL byte", "") if number == 1 else (f"{number:,} NUL bytes", "the first ")
        return DocumentError(
            f"{name} holds {held}, as binary files do: {first}at offset {place} (line {_line(data, place)}).",
            remedy="If it is text, take such bytes out: tr -d '\\000' < OLD > NEW",
        )
    return DocumentError(
        f"{name} is binary{f' ({kind})' if kind else ''}, not text.",
        remedy="Convert it to text, Markdown, HTML or PDF, or leave it out.",
    )


def _broken(data: bytes, name: str, error: UnicodeDecodeError) -> DocumentError:
    shown = data[error.start : error.start + 1].hex()
    likely = likely_encodings(data)
    known = f"its encoding, probably {' or '.join(likely)}" if likely else "its encoding, for example WINDOWS-1252"
    return DocumentError(
        f"{name} is not valid {error.encoding.upper()}: byte 0x{shown} at offset {error.start} "
        f"(line {_line(data, error.start)}).",
        remedy=f"Save it as UTF-8, for example with: iconv -f ENCODING -t UTF-8 OLD > NEW, where ENCODING is {known}.",
    )


# Encodings that are in use, as iconv names them, by Python's names. Of several that give the same text the first is
# named.
_ENCODINGS = {
    "cp1252": "WINDOWS-1252",
    "latin_1": "ISO-8859-1",
    "iso8859_15": "ISO-8859-15",
    "cp932": "CP932 (Shift JIS)",
    "shift_jis": "SHIFT_JIS",
    "euc_jp": "EUC-JP",
    "gb18030": "GB18030",
    "gb2312": "GB2312",
    "big5": "BIG5",
    "cp949": "CP949 (EUC-KR)",
    "euc_kr": "EUC-KR",
    "koi8_r": "KOI8-R",
    "iso8859_2": "ISO-8859-2",
} | {f"cp{number}": f"WINDOWS-{number}" for number in (1250, 1251, 1253, 1254, 1255, 1256, 1257, 1258)}


def likely_encodings(data: bytes, most: int = 3) -> list[str]:
    """The encodings that text in no Unicode encoding is probably in, the likeliest first; none where that is unknown.

    Only for messages: an encoding is never guessed to read a document.
    """
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return []
    found = []
    for match in from_bytes(data[: 1 << 16]):
        same = {match.encoding, *match.could_be_from_charset}
        found += [name for code, name in _ENCODINGS.items() if code in same][:1]
    return list(dict.fromkeys(found))[:most]
