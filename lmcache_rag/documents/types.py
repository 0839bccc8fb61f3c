"""Data types of loading, splitting and ingestion."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Document:
    r"""One readable document. Equal bytes under the same name give an equal Document: no time stamp is in it.

    Attributes:
        doc_id: Identifies the document in a store; for a file its resolved absolute path.
        text: The text, with line ends as ``\n``, never blank.
        content_hash: SHA-256 of the raw bytes, as 64 hex digits.
        source: Where a reader finds it; for a file its path.
        metadata: JSON-able facts: ``name``, ``media_type``, where known ``title``; for a PDF file ``pages`` and, if
            some pages hold no text, ``pages_without_text``.
        places: Where the pages, slides, sheets or chapters begin, in characters, with their facts: ``page`` (from 1)
            and ``page_label`` of a PDF file, ``slide``, ``sheet``, ``chapter``.
        parser: The parser that made the text, with its version; empty for a document that a program gave.
    """

    doc_id: str
    text: str
    content_hash: str
    source: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    places: tuple[tuple[int, Mapping[str, Any]], ...] = ()
    parser: str = ""

    def facts_at(self, start: int) -> dict[str, Any]:
        """The facts of the page, slide, sheet or chapter that this character is in."""
        place = bisect_right(self.places, start, key=lambda place: place[0])
        return dict(self.places[place - 1][1]) if place else {}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document's text, without white space at its ends.

    Attributes:
        text: ``document.text[start:stop]``; before it, in a chunk with a table's later rows, the table's head.
        index: Position among the document's chunks, from 0.
        start: Offset of its own text in the document's text, in characters.
        tokens: Length in tokens of the model's own tokenizer.
        repeated: How many characters at its beginning are the table's head.
        metadata: Facts of its place in the document: see Document.places.
    """

    text: str
    index: int
    start: int
    tokens: int
    repeated: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a parser gives.

    Attributes:
        text: The text.
        metadata: Facts for Document.metadata.
        places: As Document.places.
        warnings: What was left out, each as the end of a sentence that begins with the file's name.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    places: tuple[tuple[int, Mapping[str, Any]], ...] = ()
    warnings: tuple[str, ...] = ()


def joined(parts: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[str, tuple[tuple[int, Mapping[str, Any]], ...]]:
    """Texts with their facts as one text, with blank lines between them, and the places where they begin."""
    texts, places, length = list[str](), list[tuple[int, Mapping[str, Any]]](), 0
    for text, facts in parts:
        if text := text.strip():
            places.append((length, facts))
            texts.append(text)
            length += len(text) + 2
    return "\n\n".join(texts), tuple(places)


def place_words(facts: Mapping[str, Any]) -> str:
    """The page, slide, sheet or chapter of a chunk, for example ", page iii"; "" where there is none."""
    if "page" in facts:
        return f", page {facts.get('page_label') or facts['page']}"
    found = next((name for name in ("slide", "sheet", "chapter") if name in facts), None)
    return f", {found} {facts[found]}" if found else ""
