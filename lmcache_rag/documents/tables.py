"""Tables as Markdown: every parser writes them so, and the splitter repeats their heads."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(rows: Sequence[Sequence[str]], *, head: int = 1) -> list[str]:
    """The lines of a table; an empty cell stays a cell.

    Args:
        rows: Texts of the cells; a short row is filled up.
        head: How many rows are the head. Several become one: the texts above each other, without repetitions.
    """
    width = max((len(row) for row in rows), default=0)
    full = [[_cell(text) for text in row] + [""] * (width - len(row)) for row in rows]
    full = [row for row in full if any(row)]
    head = min(head, len(full))
    if not full or not width:
        return []
    titles = [" / ".join(dict.fromkeys(filter(None, column))) for column in zip(*full[:head], strict=True)]
    return [_line(titles), _line(["---"] * width), *(_line(row) for row in full[head:])]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
