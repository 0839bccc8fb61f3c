"""Words and numbers for people, and plain dictionaries for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

# A document or a model may hold terminal commands; on a screen they are shown, not obeyed.
_CONTROLS = {n: chr(0x2400 + n) for n in range(0x20) if chr(n) not in "\n\t"}
_CONTROLS |= dict.fromkeys(range(0x7F, 0xA0), "\N{REPLACEMENT CHARACTER}")


def clean(text: str) -> str:
    """Text that can be written to any terminal."""
    return text.translate(_CONTROLS).encode("utf-8", "backslashreplace").decode()


def one_line(text: str, limit: int | None = None) -> str:
    """Text on one line, cut at so many characters."""
    line = clean(" ".join(text.split()))
    return line if limit is None or len(line) <= limit else f"{line[: limit - 1].rstrip()}…"


def place(source: str) -> str:
    """A path, relative to the current folder if it is below it; control characters visible."""
    path = Path(source)
    here = Path.cwd()
    name = str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else source
    return clean(name.replace("\n", "\\n").replace("\t", "\\t"))


def count(number: int, thing: str) -> str:
    """For example "1 chunk", "1,204 chunks"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def size(nbytes: int) -> str:
    """For example "4.5 GB"."""
    return decimal(nbytes)


def duration(seconds: float) -> str:
    """For example "0.8 s", "1 min 12 s", "2 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def milliseconds(number: float) -> str:
    """For example "8.3 ms", "182 ms", "1,210 ms"."""
    return f"{number:.1f} ms" if number < 9.95 else f"{number:,.0f} ms"


def facts(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Names on the left, values on the right."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def show(console: Console, table: Table) -> None:
    """Print a table without the blanks at the ends of its lines, which would stay in a file."""
    with console.capture() as captured:
        console.print(table)
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def plain(value: Any) -> Any:
    """Dataclasses as dictionaries, to any depth, ready for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value
