"""The text of an HTML page that a reader sees, with Markdown's headings, code blocks and tables."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lmcache_rag._utils import needs
from lmcache_rag.documents.decoding import decode, xml_encoding
from lmcache_rag.documents.tables import markdown_table
from lmcache_rag.documents.types import Reading
from lmcache_rag.errors import DocumentError

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag

# Parsing takes some 100 times the page's size in memory, so HTML pages have a lower limit.
MAX_HTML_BYTES = 16 * 2**20

# ruff: noqa: SIM905  (a list of quoted names would fill the screen)
_DROPPED = frozenset(
    "head script style template noscript svg iframe object canvas audio video datalist noframes noembed".split()
)
_BLOCKS = frozenset(
    """address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure
    footer form h1 h2 h3 h4 h5 h6 header hgroup hr html legend li main menu nav ol option p pre search section select
    summary table tbody textarea tfoot thead tr ul""".split()
)
_TIGHT = frozenset("dd dt li option tr".split())  # follow each other without a blank line
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_HIDDEN_RULE = re.compile(r"(display)\s*:\s*none|(visibility)\s*:\s*(?:hidden|collapse)", re.IGNORECASE)
_SHOWN_RULE = re.compile(r"(display)\s*:\s*(?!none)\w|(visibility)\s*:\s*visible", re.IGNORECASE)
_HIDDEN_STYLE = re.compile(
    _HIDDEN_RULE.pattern + r"|(?<![-\w])(?:font-size|opacity)\s*:\s*0*\.?0+(?:[a-z]+|%)?\s*(?:!|;|$)"
    r"|(?<![-\w])color\s*:\s*transparent|text-indent\s*:\s*-\d{3}|(?<![-\w])(?:left|top)\s*:\s*-\d{4}"
    r"|clip\s*:\s*rect\(\s*[01]|clip-path\s*:\s*inset\(\s*(?:50|100)%",
    re.IGNORECASE,
)
_BLOCK_STYLE = re.compile(r"display\s*:\s*(?:block|flex|grid|list-item|table(?!-cell))", re.IGNORECASE)
_CSS_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_CSS_RULE = re.compile(r"([^{}]+)\{([^{}]*)\}")
_MAX_RULES = 2000  # of style sheets that hide or show something
_SPACE = re.compile(r"\s+")
_MOST_CELL = 2000  # characters of a cell; a table with a larger one is for layout
_MOST_REPEATED = 1_000_000  # characters that rowspan and colspan repeat


def read_html(data: bytes, name: str) -> Reading:
    """The text of a page. See html_text.

    Raises:
        DocumentError: The bytes are not text, or the page is too large.
    """
    if len(data) > MAX_HTML_BYTES:
        raise DocumentError(
            f"{name} is an HTML page of more than {MAX_HTML_BYTES >> 20} MiB.", remedy="Divide it, or save it as text."
        )
    with needs("documents"):
        from bs4.dammit import EncodingDetector

    declared = EncodingDetector.find_declared_encoding(data[:4096], is_html=True) or xml_encoding(data)
    text, title = html_text(decode(data, name, declared=declared))
    return Reading(text, {"title": title} if title else {})


def html_text(markup: str) -> tuple[str, str]:
    """Return (visible text, title); the title is empty where the page has none.

    Scripts, styles, templates, comments and content that attributes, inline styles or the page's own style sheets hide
    are dropped: no reader of the page saw them, and a prompt must not contain them. Blocks are separated by blank
    lines, list items and rows by line ends. Headings, code and tables are written as in Markdown.
    """
    with needs("documents"):
        import lxml  # noqa: F401 - ends tags where browsers do: many pages leave </td> and </li> out
        from bs4 import BeautifulSoup

    markup = _defused(markup)
    with warnings.catch_warnings():
        # bs4 warns of text that looks like XML, a file name or an address; here it is HTML by the file's name.
        warnings.simplefilter("ignore")
        soup = BeautifulSoup(markup, "lxml")
    title = soup.title or soup.h1
    visible = _Visible(_hidden_by_sheets(soup))
    return visible.text(soup), _SPACE.sub(" ", title.get_text(" ")).strip() if title else ""


def _defused(markup: str) -> str:
    """Turn the beginning of a tag or comment that never ends into text, so that what follows is not lost."""
    for begin, end in (("<!--", "-->"), ("<![", "]>"), ("<", ">")):
        last = markup.rfind(end) + 1
        if begin in markup[last:]:
            markup = markup[:last] + markup[last:].replace(begin, "&lt;" + begin[1:])
    return markup


def _hidden_by_sheets(soup: BeautifulSoup) -> frozenset[int]:
    """The ids (Python's) of the elements that the page's style sheets hide; later rules win.

    Rules inside @media and the like are left out: they hold for some screens only.
    """
    from soupsieve import SelectorSyntaxError

    hidden: dict[str, set[int]] = {"display": set(), "visibility": set()}
    rules = 0
    for sheet in soup.find_all("style"):
        for selector, body in _top_rules(_CSS_COMMENT.sub(" ", sheet.get_text())):
            hides, shows = _HIDDEN_RULE.search(body), _SHOWN_RULE.search(body)
            if not (hides or shows):
                continue
            rules += 1
            if rules > _MAX_RULES:
                break
            try:
                elements = {id(element) for element in soup.select(selector)}
            except (SelectorSyntaxError, NotImplementedError, ValueError):
                continue  # ::before, :hover and the like
            if shows:
                hidden[(shows[1] or shows[2]).lower()].difference_update(elements)
            if hides:
                hidden[(hides[1] or hides[2]).lower()].update(elements)
    return frozenset(hidden["display"] | hidden["visibility"])


def _top_rules(css: str) -> Iterator[tuple[str, str]]:
    """(selector, declarations) of the rules that are in no block."""
    depth, kept = 0, list[str]()
    for piece in re.split(r"([{}])", css):
        if piece == "{":
            depth += 1
        elif piece == "}":
            depth = max(0, depth - 1)
            if depth == 0:
                selector = kept[0].rpartition(";")[2].strip() if kept else ""
                if len(kept) == 2 and not selector.startswith("@"):
                    yield selector, kept[1]
                kept = []
            continue
        elif depth <= 1:
            kept.append(piece)
        else:
            kept.append("")  # a block in a block


class _Visible:
    """Walks a tree with an explicit stack: a hostile page nests deeper than Python may recurse."""

    def __init__(self, hidden: frozenset[int]) -> None:
        self._hidden = hidden

    def text(self, root: Tag) -> str:
        """The visible text below an element."""
        from bs4.element import CData, NavigableString, PageElement, Tag

        lines: list[str] = []  # finished lines; an empty one is a paragraph's border
        words: list[str] = []  # the line that is growing

        def end_line(*, blank: bool) -> None:
            line = _SPACE.sub(" ", "".join(words)).strip()
            words.clear()
            if line and line not in ("#", "##", "###", "####", "#####", "######"):
                lines.append(line)
            if blank and lines and lines[-1]:
                lines.append("")

        stack: list[PageElement | tuple[str, bool]] = [root]
        while stack:
            node = stack.pop()
            if isinstance(node, tuple):  # what to do where a tag ends
                if node[0]:
                    words.append(node[0])
                else:
                    end_line(blank=node[1])
            elif isinstance(node, Tag):
                if self._dropped(node):
                    continue
                if node.name in _BLOCKS:
                    blank = node.name not in _TIGHT
                    end_line(blank=blank)
                    block = self._block(node)
                    if block is not None:
                        lines.extend(block)
                        end_line(blank=True)
                        continue
                    words.append("- " if node.name == "li" else _HEADINGS.get(node.name, ""))
                    stack.append(("", blank))
                elif node.name == "br":
                    end_line(blank=False)
                elif node.name in ("td", "th"):
                    stack.append((" ", False))
                elif node.name == "img":
                    words.append(f" {node.get('alt') or ''} ")
                stack.extend(reversed(node.contents))
            elif type(node) in (NavigableString, CData):  # comments and the like are subclasses
                words.append(str(node))
        end_line(blank=False)
        return "\n".join(lines).strip()

    def _block(self, tag: Tag) -> list[str] | None:
        """The lines of a code block or of a table; None: to be walked like any other."""
        if tag.name == "pre":
            code = self._code(tag)
            if not code.strip():
                return []
            fence = "```"
            while fence in code:
                fence += "`"
            return [fence, *code.split("\n"), fence]
        return self._table(tag) if tag.name == "table" else None

    def _code(self, root: Tag) -> str:
        """The text of a code block with its lines, as a browser shows it."""
        from bs4.element import CData, NavigableString, PageElement, Tag

        parts: list[str] = []

        def end_line() -> None:
            if parts and not parts[-1].endswith("\n"):
                parts.append("\n")

        stack: list[PageElement | None] = [*reversed(root.contents)]
        while stack:
            node = stack.pop()
            if node is None:
                end_line()
            elif isinstance(node, Tag):
                if self._dropped(node):
                    continue
                if node.name == "br":
                    parts.append("\n")
                elif node.name in _BLOCKS or _BLOCK_STYLE.search(str(node.get("style") or "")):
                    end_line()
                    stack.append(None)
                stack.extend(reversed(node.contents))
            elif type(node) in (NavigableString, CData) and node:
                parts.append(str(node))
        text = "".join(parts).replace("\r\n", "\n")
        return re.sub(r"\A(?:[ \t]*\n)+", "", text).rstrip()

    def _table(self, table: Tag) -> list[str] | None:
        """A table's rows as in Markdown; None for one that only lays out the page."""
        rows = [row for row in table.find_all("tr") if not self._inside_hidden(row, table)]
        role = str(table.get("role") or "").lower()
        if role in ("presentation", "none") or table.find("table") is not None or not rows:
            return None
        cells = [
            [cell for cell in row.find_all(["td", "th"], recursive=False) if not self._dropped(cell)] for row in rows
        ]
        if max(map(len, cells)) < 2:
            return None
        texts = [[_SPACE.sub(" ", self.text(cell)) for cell in row] for row in cells]
        if any(len(text) > _MOST_CELL for row in texts for text in row):
            return None
        head = 0
        for row, found in zip(rows, cells, strict=True):
            in_head = row.parent is not None and row.parent.name == "thead"
            if not found or not (in_head or all(cell.name == "th" for cell in found)):
                break
            head += 1
        caption = table.find("caption")
        lines = [_SPACE.sub(" ", self.text(caption))] if caption is not None and not self._dropped(caption) else []
        if lines:
            lines.append("")
        return lines + markdown_table(_spread(cells, texts), head=max(1, head))

    def _dropped(self, tag: Tag) -> bool:
        if tag.name in _DROPPED:
            return True
        if id(tag) in self._hidden:
            style = str(tag.get("style") or "") if tag.attrs else ""
            return not _SHOWN_RULE.search(style) or _HIDDEN_STYLE.search(style) is not None
        if not tag.attrs:
            return tag.name == "dialog"
        if tag.has_attr("hidden") or tag.has_attr("popover") or (tag.name == "dialog" and not tag.has_attr("open")):
            return True
        return _HIDDEN_STYLE.search(str(tag.get("style") or "")) is not None

    def _inside_hidden(self, tag: Tag, top: Tag) -> bool:
        node: Tag | None = tag
        while node is not None and node is not top:
            if self._dropped(node):
                return True
            node = node.parent
        return False


def _spread(cells: list[list[Tag]], texts: list[list[str]]) -> list[list[str]]:
    """The rows of a table with one text for each column: a cell that spans rows or columns is repeated in each."""
    room = _MOST_REPEATED
    below: dict[int, tuple[int, str]] = {}  # column: rows still to come, text
    rows: list[list[str]] = []
    for found, words in zip(cells, texts, strict=True):
        row: list[str] = []
        kept: dict[int, tuple[int, str]] = {}
        for cell, text in zip(found, words, strict=True):
            _fill(row, below, kept)
            across = _number(cell.get("colspan"), 100)
            down = _number(cell.get("rowspan"), 1000)
            for place in range(across):
                shown = text if not place or room > 0 else ""
                room -= len(text) + 1 if place else 0
                if down > 1 and room > 0:
                    kept[len(row)] = (down - 1, text)
                    room -= len(text) + 1
                if place and room <= 0:
                    break
                row.append(shown)
        while below and len(row) <= max(below):
            _fill(row, below, kept)
            if below:  # a gap: the row has fewer cells than the one above
                row.append("")
        below = kept
        rows.append(row)
    return rows


def _fill(row: list[str], below: dict[int, tuple[int, str]], kept: dict[int, tuple[int, str]]) -> None:
    """Put in the cells from the rows above, at the place that the row has come to."""
    while len(row) in below:
        left, text = below.pop(len(row))
        if left > 1:
            kept[len(row)] = (left - 1, text)
        row.append(text)


def _number(value: object, most: int) -> int:
    try:
        return min(max(1, int(str(value))), most)
    except ValueError:
        return 1
