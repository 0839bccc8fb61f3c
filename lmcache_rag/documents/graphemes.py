"""Where a text can be cut without parting what is drawn as one character: a letter and its marks, an emoji's parts.

These are the extended grapheme clusters of Unicode (UAX 29), as the package regex finds them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from lmcache_rag._utils import needs

_PLAIN = "\u0300"  # below, no character joins its neighbours, but for the line end \r\n
_FAR = 256  # characters that are looked at around a place; no cluster that a reader can read is longer


@cache
def _pattern() -> Any:
    with needs("documents"):
        import regex

    return regex.compile(r"\X")


def is_border(text: str, place: int) -> bool:
    """Whether no grapheme cluster reaches over this place."""
    if not 0 < place < len(text):
        return True
    if text[place] < _PLAIN and text[place - 1] < _PLAIN:
        return text[place - 1 : place + 1] != "\r\n"
    return place in _borders(text, place, place + 1)


def last_border(text: str, low: int, high: int) -> int:
    """The last border in low < place <= high; low where there is none."""
    if is_border(text, high):
        return max(low, high)
    return max((place for place in _borders(text, high, high) if low < place < high), default=low)


def next_border(text: str, place: int) -> int:
    """The first border at or after this place; in a cluster of very many characters, a place inside it."""
    if is_border(text, place):
        return place
    end = min(len(text), place + _FAR)
    return min((border for border in _borders(text, place, end) if border >= place), default=end)


def _borders(text: str, place: int, end: int) -> list[int]:
    """The borders around a place, up to the end."""
    begin, least = place - 1, max(0, place - _FAR)
    while begin > least and not (text[begin] < _PLAIN and text[begin - 1] < _PLAIN):
        begin -= 1
    certain = begin == 0 or begin > least
    while begin > 0 and _is_flag(text[begin]) and _is_flag(text[begin - 1]):
        begin, certain = begin - 1, True
    found = [begin + match.start() for match in _pattern().finditer(text[begin : end + 1])]
    return found if certain else found[1:]


def _is_flag(character: str) -> bool:
    """Whether it is a regional indicator: pairs of them are flags, counted from the run's begin."""
    return "\U0001f1e6" <= character <= "\U0001f1ff"
