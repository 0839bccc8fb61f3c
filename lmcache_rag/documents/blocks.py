"""Parts of a text that are best kept whole: code blocks, tables and front matter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_MARK = re.compile(
    r"^[ \t]*+(?:(?P<fence>`{3,}+|~{3,}+)[^\n]*"
    r"|(?P<rule>\|?+[ \t]*+:?+-++:?+[ \t]*+(?:\|[ \t]*+:?+-++:?+[ \t]*+)*+\|?+[ \t]*+))$",
    re.MULTILINE,
)
_FRONT = re.compile(r"\A(?:---[ \t]*\n.{0,20000}?\n---|\+\+\+[ \t]*\n.{0,20000}?\n\+\+\+)[ \t]*(?=\n|\Z)", re.DOTALL)
_TABLES = {"text/csv", "text/tab-separated-values"}
_MOST_MARKS = 2000  # lines like ``` in which a code block's end is looked for
_MOST_ROW = 1 << 16  # characters; a quote that opens a longer one is taken for text


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a text.

    Attributes:
        start: Where it begins, at a line's begin.
        stop: Where it ends, without the last line end.
        head: Where a table's head ends and its rows begin; start for what has no head.
        quoted: Rows can hold line ends in quotes (CSV).
    """

    start: int
    stop: int
    head: int
    quoted: bool = False

    @property
    def is_table(self) -> bool:
        """Whether it has a head."""
        return self.head > self.start

    def lines(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, stop) of its lines or rows, after the head; the line end belongs to the line."""
        if self.quoted:
            yield from _rows(text, self.head, self.stop)
            return
        start = self.head
        while start < self.stop:
            stop = text.find("\n", start, self.stop) + 1 or self.stop
            yield start, stop
            start = stop


def find_blocks(text: str, media_type: str = "") -> list[Block]:
    """The blocks of a text, in its order. A CSV file is one table."""
    if media_type in _TABLES:
        start = len(text) - len(text.lstrip())
        stop = len(text.rstrip())
        head = next(_rows(text, start, stop), (start, stop))[1]
        return [Block(start, stop, head, quoted=True)] if start < head < stop else []
    found: list[Block] = []
    position = 0
    if front := _FRONT.match(text):
        found.append(Block(0, front.end(), 0))
        position = front.end()
    while mark := _MARK.search(text, position):
        block = _fenced(text, mark) if mark["fence"] else _table(text, mark, position)
        if block is not None:
            found.append(block)
        position = max(block.stop if block is not None else mark.end(), mark.end())
    return found


def _fenced(text: str, mark: re.Match[str]) -> Block | None:
    fence, position = mark["fence"], mark.end()
    if fence[0] == "`" and "`" in text[mark.end("fence") : mark.end()]:  # code in a line
        return None
    for _ in range(_MOST_MARKS):
        end = _MARK.search(text, position)
        if end is None:
            return None
        if end["fence"] and end["fence"].startswith(fence) and not text[end.end("fence") : end.end()].strip():
            return Block(mark.start(), end.end(), mark.start())
        position = end.end()
    return None


def _table(text: str, mark: re.Match[str], least: int) -> Block | None:
    """The table with this line under its head."""
    start = text.rfind("\n", least, max(least, mark.start() - 1)) + 1 or least
    if "|" not in mark["rule"] or mark.start() == 0 or "|" not in text[start : mark.start()]:
        return None
    stop = mark.end()
    while stop < len(text):
        end = text.find("\n", stop + 1)
        end = len(text) if end < 0 else end
        if "|" not in text[stop + 1 : end]:
            break
        stop = end
    head = mark.end() + 1
    return Block(start, stop, head) if stop > head else None


def _rows(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rows of a CSV text; a line end in quotes does not end a row."""
    while start < stop:
        end = line = text.find("\n", start, stop) + 1 or stop
        while end < stop and text.count('"', start, end) % 2:
            if end - start > _MOST_ROW:  # a quote that is no quote
                end = line
                break
            end = text.find("\n", end, stop) + 1 or stop
        if text.count('"', start, end) % 2:  # it never closes
            end = line
        yield start, end
        start = end
