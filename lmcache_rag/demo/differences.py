"""Which words of two answers differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

_WORDS = re.compile(r"\s*\S+|\s+")  # a word with the space before it


class Piece(NamedTuple):
    """A part of a text, and whether its words are not in the other text at this place."""

    text: str
    differs: bool


def compare(first: str, second: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces, words compared without the space around them; joined, the pieces give the texts."""
    one, two = _WORDS.findall(first), _WORDS.findall(second)
    matcher = SequenceMatcher(None, [word.strip() for word in one], [word.strip() for word in two], autojunk=False)
    left: list[Piece] = []
    right: list[Piece] = []
    for kind, begin, end, other_begin, other_end in matcher.get_opcodes():
        _add(left, one[begin:end], kind != "equal")
        _add(right, two[other_begin:other_end], kind != "equal")
    return left, right


def differing(pieces: Sequence[Piece]) -> int:
    """How many words differ."""
    return sum(len(piece.text.split()) for piece in pieces if piece.differs)


def _add(pieces: list[Piece], words: Sequence[str], differs: bool) -> None:
    text = "".join(words)
    space = text[: len(text) - len(text.lstrip())] if differs else ""
    if space:  # is no part of a word
        pieces.append(Piece(space, False))
    if text := text.removeprefix(space):
        pieces.append(Piece(text, differs))
