"""Where a text may be cut."""

from __future__ import annotations

import unicodedata

_SENTENCE_ENDS = (". ", "! ", "? ", "。", "！", "？", "; ")
_JOINERS = ("\u200d", "\ufe0e", "\ufe0f")


def cut_before(text: str, start: int, stop: int, end: int) -> int:
    """The best place to end a piece that begins at start and may reach up to stop.

    The last paragraph's end in the second half of the span, else the last line's, sentence's or word's end, else a hard
    cut that keeps a letter with its accents and an emoji with its parts.

    Args:
        text: The whole text.
        start: Begin of the piece.
        stop: Furthest end; start < stop.
        end: End of what is to be cut; a stop at or behind it needs no cut.

    Returns:
        A position in (start, stop], or end.
    """
    if stop >= end:
        return end
    low = start + (stop - start) // 2
    for marks in (("\n\n",), ("\n",), _SENTENCE_ENDS, (" ",)):
        found = max((place + len(mark) for mark in marks if (place := text.rfind(mark, low, stop)) >= 0), default=-1)
        if found > start:
            return found
    for place in range(stop, max(start + 1, stop - 32), -1):
        if not _inside_character(text, place):
            return place
    return stop


def _inside_character(text: str, place: int) -> bool:
    """Whether the code points before and after a place are drawn as one character."""
    after = text[place]
    return unicodedata.combining(after) != 0 or after in _JOINERS or text[place - 1] == "\u200d"
