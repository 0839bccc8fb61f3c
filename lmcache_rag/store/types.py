"""Data types between the store and its callers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector: TypeAlias = NDArray[np.float32]
else:  # a client's store has no vectors, and needs no numpy
    Vector: TypeAlias = Any
PutStatus: TypeAlias = Literal["added", "updated", "unchanged"]


def text_hash(text: str) -> str:
    """Name a chunk's text, as 64 hex digits; equal texts are one chunk.

    Raises:
        UnicodeEncodeError: The text holds a lone surrogate.
    """
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A piece of a document that is to be stored.

    Attributes:
        text: The chunk's text.
        tokens: Its length in tokens.
        start: Where it begins in the document's text, in characters.
        embedding: Vector of shape [dimension], or None when the store already holds the embedding of this text.
        metadata: Facts about its place, such as the page of a PDF file.
    """

    text: str
    tokens: int
    start: int
    embedding: Vector | Sequence[float] | None = field(default=None, compare=False, repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NewDocument:
    """A document that is to be stored, whole. parser names what made its text from a file, with its version."""

    doc_id: str
    content_hash: str
    splitter: str
    source: str
    chunks: Sequence[NewChunk]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    parser: str = ""


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk as the store holds it. chunk_id is never used for another text."""

    chunk_id: int
    text: str
    tokens: int
    text_hash: str


@dataclass(frozen=True, slots=True)
class DocumentRecord:
    """The store's record of one document. chunks is a count, updated_at a Unix time in seconds.

    parser names what made its text from a file, with its version; empty where that is not known.
    """

    doc_id: str
    content_hash: str
    splitter: str
    source: str
    metadata: dict[str, Any]
    chunks: int
    updated_at: float
    parser: str = ""


@dataclass(frozen=True, slots=True)
class DocumentRef:
    """Position of a chunk: the ordinal-th chunk of a document, beginning at character start.

    metadata are the facts about the document and about this place in it, such as the page of a PDF file.
    """

    doc_id: str
    source: str
    ordinal: int
    metadata: dict[str, Any]
    start: int = 0


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk that a search found. score is the cosine similarity; documents are those that hold the chunk."""

    chunk_id: int
    text: str
    score: float
    tokens: int
    documents: tuple[DocumentRef, ...]


@dataclass(frozen=True, slots=True)
class PutResult:
    """Result of storing one document.

    Attributes:
        doc_id: The document.
        status: "unchanged" when the store was not touched.
        added_chunks: Chunks that the store did not hold before.
        removed_chunks: Chunks that were removed, because this was their last document.
        kept_chunks: Chunks of this document that the store held already.
    """

    doc_id: str
    status: PutStatus
    added_chunks: int
    removed_chunks: int
    kept_chunks: int


@dataclass(frozen=True, slots=True)
class KVPurge:
    """Result of removing KV that no document needs.

    Attributes:
        dropped: Chunks whose KV was removed everywhere.
        waiting: Chunks whose KV is still on a server; the next command that reaches it continues.
        why: Why.
        before: How many objects of these chunks each tier held before, if they were counted.
        left: The same afterwards.
    """

    dropped: int = 0
    waiting: int = 0
    why: str = ""
    before: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left, as far as is known."""
        return not self.waiting and not any(self.left.values())

    def __add__(self, other: KVPurge) -> KVPurge:
        return KVPurge(
            self.dropped + other.dropped,
            self.waiting + other.waiting,
            self.why or other.why,
            _sum(self.before, other.before),
            _sum(self.left, other.left),
        )


@dataclass(frozen=True, slots=True)
class RemoveResult:
    """Result of removing documents.

    Attributes:
        documents: How many there were.
        removed_chunks: Chunks that only they held.
        kept_chunks: Chunks that stay in other documents.
        unknown: Ids that the store did not hold.
        kv: What became of the KV of the removed chunks, and of that which still waited.
    """

    documents: int
    removed_chunks: int
    kept_chunks: int
    unknown: tuple[str, ...] = ()
    kv: KVPurge = field(default_factory=KVPurge)


@dataclass(frozen=True, slots=True)
class KVRow:
    """KV of one chunk that an engine has computed and stored."""

    chunk_id: int
    key: str
    tokens: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TrashRow:
    """KV that no chunk needs any more; text: of its last chunk, None where it is not known."""

    fingerprint: str
    key: str
    text: str | None


@dataclass(frozen=True, slots=True)
class FingerprintStats:
    """KV recorded under one fingerprint. stale: it is not the current one, so nothing will read this KV again."""

    fingerprint: str
    facts: dict[str, Any]
    created_at: float
    keys: int
    tokens: int
    nbytes: int
    stale: bool


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts over the whole store.

    Attributes:
        documents: Documents.
        chunks: Chunks; one that occurs in several documents counts once.
        tokens: Tokens of all chunks.
        chunks_without_embedding: Chunks that no search can find, because their embedding is still to be computed.
        chunks_without_kv: Chunks without recorded KV of the current fingerprint; 0 when none was named.
        embedder: The embedder of this store, None before the first embedding.
        dimension: Length of its vectors, None before the first embedding.
        kv: KV by fingerprint, the current one first.
        trash: KV that no chunk needs any more and that the engine has yet to drop.
        database_bytes: Size of the database file.
    """

    documents: int
    chunks: int
    tokens: int
    chunks_without_embedding: int
    chunks_without_kv: int
    embedder: str | None
    dimension: int | None
    kv: tuple[FingerprintStats, ...]
    trash: int
    database_bytes: int

    @property
    def kv_bytes(self) -> int:
        """KV of all fingerprints, in bytes."""
        return sum(part.nbytes for part in self.kv)

    @property
    def stale_bytes(self) -> int:
        """KV that nothing will read again, in bytes."""
        return sum(part.nbytes for part in self.kv if part.stale)


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {
        tier: one.get(tier, 0) + other.get(tier, 0) for tier in (*one, *(name for name in other if name not in one))
    }
