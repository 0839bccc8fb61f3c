"""The text of an HTML page that a reader sees."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

from lmcache_rag.documents.decoding import decode

if TYPE_CHECKING:
    from bs4 import Tag

# Parsing takes some 100 times the page's size in memory, so a page has a limit of its own.
MAX_HTML_BYTES = 16 * 2**20

# ruff: noqa: SIM905  (a list of quoted names would fill the screen)
_DROPPED = frozenset("head script style template noscript svg iframe object canvas audio video datalist".split())
_BLOCKS = frozenset(
    """address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure
    footer form h1 h2 h3 h4 h5 h6 header hgroup hr html legend li main menu nav ol option p pre search section select
    summary table tbody textarea tfoot thead tr ul""".split()
)
_TIGHT = frozenset("dd dt li option tr".split())  # follow each other without a blank line
_HIDDEN_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_DECLARABLE = re.compile(r"(?:iso-?8859|windows-|cp125|latin|koi8|shift|euc|gb|big5|mac|us-ascii)", re.IGNORECASE)
_SPACE = re.compile(r"\s+")


def html_text(data: bytes, name: str) -> tuple[str, str]:
    """Return (visible text, title); the title is empty where the page has none.

    Scripts, styles, templates, comments and what is hidden by attribute or inline style are dropped: nobody who read
    the page saw it, and a prompt is no place for it. Blocks are parted by blank lines, list items and rows
    by line ends.

    Raises:
        DocumentError: The bytes are not text.
    """
    from bs4 import BeautifulSoup
    from bs4.dammit import EncodingDetector
    from bs4.exceptions import ParserRejectedMarkup

    declared = EncodingDetector.find_declared_encoding(data[:4096], is_html=True)
    if declared is not None and not _DECLARABLE.match(declared):
        declared = None
    markup = _defused(decode(data, name, declared=declared))
    with warnings.catch_warnings():
        # bs4 warns of text that looks like XML, a file name or an address; here it is HTML by the file's name.
        warnings.simplefilter("ignore")
        try:
            soup = BeautifulSoup(markup, "html.parser")
        except ParserRejectedMarkup:  # an unknown <![section]: show it as it stands
            soup = BeautifulSoup(markup.replace("<![", "&lt;!["), "html.parser")
    title = soup.title or soup.h1
    return _visible(soup), _SPACE.sub(" ", title.get_text(" ")).strip() if title else ""


def _defused(markup: str) -> str:
    """Turn what begins a tag or comment that never ends into text.

    Python's parser looks for the missing end from each of them anew, so that a page of 100 KB could keep it busy for
    minutes.
    """
    for begin, end in (("<!--", "-->"), ("<![", "]>"), ("<", ">")):
        last = markup.rfind(end) + 1
        if begin in markup[last:]:
            markup = markup[:last] + markup[last:].replace(begin, "&lt;" + begin[1:])
    return markup


def _visible(root: Tag) -> str:
    """Walk the tree with a stack of its own: a hostile page nests deeper than Python may recurse."""
    from bs4.element import CData, NavigableString, PageElement, Tag

    lines: list[str] = []  # finished lines; an empty one is a paragraph's border
    words: list[str] = []  # the line that is growing

    def end_line(*, blank: bool) -> None:
        line = _SPACE.sub(" ", "".join(words)).strip()
        words.clear()
        if line:
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
            if node.name in _DROPPED or _is_hidden(node):
                continue
            if node.name in _BLOCKS:
                blank = node.name not in _TIGHT
                end_line(blank=blank)
                if node.name == "pre":
                    lines.extend(node.get_text().strip("\n").splitlines())
                    end_line(blank=True)
                    continue
                if node.name == "li":
                    words.append("- ")
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


def _is_hidden(tag: Tag) -> bool:
    if not tag.attrs:
        return False
    return tag.has_attr("hidden") or _HIDDEN_STYLE.search(str(tag.get("style") or "")) is not None
