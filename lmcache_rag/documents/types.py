"""Data types of loading, splitting and ingestion."""

from __future__ import annotations

from collections.abc import Mapping
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
    """

    doc_id: str
    text: str
    content_hash: str
    source: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document's text, without white space at its ends.

    Attributes:
        text: ``document.text[start:start + len(text)]``.
        index: Position among the document's chunks, from 0.
        start: Offset in the document's text, in characters.
        tokens: Length in tokens of the model's own tokenizer.
    """

    text: str
    index: int
    start: int
    tokens: int
