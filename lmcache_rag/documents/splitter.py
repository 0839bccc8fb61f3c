"""Cut a text into chunks that are sized in tokens of the model's own tokenizer."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeAlias

from lmcache_rag._utils import needs
from lmcache_rag.documents.blocks import Block, find_blocks
from lmcache_rag.documents.decoding import is_visible
from lmcache_rag.documents.formats import package_version
from lmcache_rag.documents.graphemes import is_border, last_border, next_border
from lmcache_rag.documents.types import Chunk, Document
from lmcache_rag.errors import ConfigError

MIN_CHUNK_TOKENS = 32
_ALGORITHM = (
    2  # raise when the same text and parameters give other chunks, so that a store knows which documents would change
)

# From the strongest border to the weakest. Sentences and words are ours (cut_before): the library would tokenise each.
_SEPARATORS = [r"\n#{1,6} ", r"\n```\n", r"\n(?:\*\*\*+|---+|___+)\n", r"\n\n", r"\n"]
_CHARACTERS_PER_TOKEN = 4.0  # first guess; every chunk is counted
_MOST_PER_TOKEN = (
    16  # a piece with more characters than this for each token of a chunk is cut before its tokens are counted
)
_WINDOW = 64  # characters for each token of a chunk: some 16 chunks of English
_SENTENCE_ENDS = (". ", "! ", "? ", "。", "！", "？", "; ", "।", "۔", "؟", "።", "။", "។", "།")
_WORD_ENDS = (" ", "\u200b")  # the zero-width space stands between words in Khmer, Thai and others
# Scripts that have no spaces between words, and emoji.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u2e80-\u2fdf\u3005-\u30ff"
    "\u31f0-\u31ff\u3400-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f\u2600-\u27bf\U0001f000-\U0001faff\U00020000-\U0003ffff]"
)

_Piece: TypeAlias = "tuple[int, int, int, Block | None]"  # start, stop, tokens, the table whose head is repeated


def splitter_version() -> str:
    """The begin of every splitter's fingerprint: what is not the user's choice."""
    return f"langchain-text-splitters {package_version('langchain-text-splitters')}, algorithm {_ALGORITHM}"


class Splitter:
    """Splits text at headings, paragraphs, lines, sentences and words, in that order, and inside words if it must.

    ``langchain_text_splitters`` finds the structure. It sees a window of the text at a time, and pieces without
    structure (one long line) are cut here, since it would count the tokens of every word of them: 50 MB on one line
    take 30 to 40 s on one core. The same text always gives the same chunks, independent of earlier calls.

    A code block, table or front matter that fits into a chunk is never cut; a longer one is cut between its lines, and
    a table's head is repeated in each of its chunks. No cut is inside a grapheme cluster, unless that is larger than a
    chunk.

    Args:
        encode: Token ids of a text in which nothing is special, and no token is added:
            ``SafeTokenizer(tokenizer).text``.
        chunk_tokens: Most tokens of a chunk; at least 32.
        overlap_tokens: Most tokens that a chunk repeats from the end of the one before; whole words, at most half of
            chunk_tokens. KV is kept for the repeated tokens twice. Rows of a table are not repeated.

    Raises:
        ConfigError: A size is not valid.
    """

    def __init__(
        self, encode: Callable[[str], Sequence[int]], *, chunk_tokens: int = 256, overlap_tokens: int = 0
    ) -> None:
        if chunk_tokens < MIN_CHUNK_TOKENS:
            raise ConfigError(
                f"A chunk of {chunk_tokens} tokens is too small.", remedy=f"Use at least {MIN_CHUNK_TOKENS}."
            )
        if not 0 <= overlap_tokens <= chunk_tokens // 2:
            raise ConfigError(
                f"An overlap of {overlap_tokens} tokens does not fit chunks of {chunk_tokens}.",
                remedy=f"Use 0 to {chunk_tokens // 2}.",
            )
        with needs("documents"):
            from langchain_text_splitters import RecursiveCharacterTextSplitter

        self.chunk_tokens = chunk_tokens
        self.overlap_tokens = overlap_tokens
        # The library asks for the size of each piece three times.
        self._count = lru_cache(maxsize=2048)(lambda text: len(encode(text)))
        self._limit = chunk_tokens - overlap_tokens  # without the overlap
        self._structure = RecursiveCharacterTextSplitter(
            separators=_SEPARATORS,
            is_separator_regex=True,
            keep_separator="start",
            strip_whitespace=False,
            chunk_size=self._limit,
            chunk_overlap=0,
            length_function=self._length,
        )

    @property
    def fingerprint(self) -> str:
        """Identifies everything besides the tokenizer that determines where a text is cut."""
        return f"{splitter_version()}, {self.sizes}"

    @property
    def sizes(self) -> str:
        """The end of the fingerprint: what the user chose."""
        return f"{self.chunk_tokens} tokens, overlap {self.overlap_tokens}"

    def split_document(self, document: Document) -> list[Chunk]:
        """Cut a document into chunks, each with the facts of its place, such as the page of a PDF file."""
        chunks = self.split(document.text, media_type=str(document.metadata.get("media_type", "")))
        if not document.places:
            return chunks
        return [replace(chunk, metadata=document.facts_at(chunk.start)) for chunk in chunks]

    def split(self, text: str, *, media_type: str = "") -> list[Chunk]:
        """Cut a text into chunks.

        Args:
            text: The text.
            media_type: ``text/csv`` and ``text/tab-separated-values`` are tables from their first line.

        Returns:
            Chunks in the text's order, each with visible text and none above chunk_tokens; every visible character of
            the text that has tokens is in one of them.

        Raises:
            ConfigError: One character alone has more tokens than a chunk may.
        """
        chunks: list[Chunk] = []
        previous = 0
        blocks = find_blocks(text, media_type)
        for start, stop, tokens, head in self._pieces(text, blocks):
            # Zero-width characters that a normalising tokenizer drops, or that no reader sees.
            if tokens == 0 or not is_visible(text[start:stop]):
                continue
            own, repeated = start, ""
            if head is not None:
                repeated = text[head.start : head.head]
            elif self.overlap_tokens and chunks:
                start, tokens = self._extended(text, blocks, previous, start, stop, tokens)
            chunks.append(Chunk(repeated + text[start:stop], len(chunks), start, tokens, len(repeated)))
            previous = own
        return chunks

    def _pieces(self, text: str, blocks: list[Block]) -> Iterator[_Piece]:
        """The chunks without overlap: as the structure gives them, and anew where that cuts a block."""
        if blocks and blocks[0].quoted:
            yield from self._packed(text, blocks, blocks[0].start, blocks[0].stop)
            return
        group: list[tuple[int, int, int]] = []  # spans with cut blocks between them
        left = 0  # the first block that may reach beyond the spans so far
        for start, stop, tokens in self._spans(text):
            while left < len(blocks) and blocks[left].stop <= start:
                left += 1
            crossed = left < len(blocks) and blocks[left].start < start
            if group and not crossed:
                yield from self._released(text, blocks, group)
                group = []
            group.append((start, stop, tokens))
        if group:
            yield from self._released(text, blocks, group)

    def _released(self, text: str, blocks: list[Block], group: list[tuple[int, int, int]]) -> Iterator[_Piece]:
        if len(group) == 1:
            yield (*group[0], None)
        else:
            yield from self._packed(text, blocks, group[0][0], group[-1][1])

    def _packed(self, text: str, blocks: list[Block], start: int, stop: int) -> Iterator[_Piece]:
        """Cut a span with blocks: each is kept whole, or else cut between its lines."""
        current: _Piece | None = None  # may still grow
        for begin, end, block in _parts(text, blocks, start, stop):
            joint = begin if current is None or current[3] is not None else current[0]
            tokens = self._length(text[joint:end])
            if tokens > self._limit and joint != begin:  # not together with what is before it
                alone = self._length(text[begin:end])
                if alone <= self._limit:
                    joint, tokens = begin, alone
            if tokens <= self._limit:
                if current is not None and joint == begin:
                    yield current
                current = (joint, end, tokens, None)
                continue
            if block is not None:
                before = current if joint != begin and current is not None and current[2] <= self._limit // 2 else None
                if before is None and current is not None:
                    yield current
                pieces = list(self._cut_block(text, block, begin if before is None else before[0], end))
            else:
                if current is not None:
                    yield current
                pieces = [(*span, None) for span in self._window(text, begin, end)]
            current = pieces.pop() if pieces else None
            yield from pieces
        if current is not None:
            yield current

    def _cut_block(self, text: str, block: Block, start: int, stop: int) -> Iterator[_Piece]:
        """Cut a block between its lines; what is from start to the block's begin stays with its first lines."""
        title = self._length(text[block.start : block.head])
        head = block if block.is_table and title <= self._limit // 2 else None
        if head is None:
            block = replace(block, head=block.start)
        shown: Block | None = None  # the head, where it is to be repeated
        used, end = self._length(text[start : block.head]), block.head
        for line_start, line_stop in block.lines(text):
            tokens = self._length(text[line_start:line_stop])
            if used + tokens > self._limit:
                first = shown is None and end == block.head  # nothing but the head, or what is before the block
                yield from self._emitted(text, start, block.start if first else end, shown)
                start, shown, used = line_start, head, title if head is not None else 0
            used, end = used + tokens, line_stop
        yield from self._emitted(text, start, max(end, stop), shown)

    def _emitted(self, text: str, start: int, stop: int, head: Block | None) -> Iterator[_Piece]:
        start, stop = _stripped(text, start, stop)
        if start == stop:
            return
        title = text[head.start : head.head] if head is not None else ""
        tokens = self._length(title + text[start:stop])
        if tokens <= self._limit:
            yield start, stop, tokens, head
            return
        for begin, end, own in self._fitted(
            text, start, stop, max(MIN_CHUNK_TOKENS // 4, self._limit - self._count(title))
        ):
            tokens = self._count(title + text[begin:end]) if title else own
            fits = tokens <= self._limit
            yield begin, end, tokens if fits else own, head if fits else None

    def _spans(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yield (start, stop, tokens) of each chunk, without overlap."""
        position = 0
        while position < len(text):
            stop = cut_before(text, position, position + _WINDOW * self.chunk_tokens, len(text))
            spans = list(self._window(text, position, stop))
            if stop < len(text) and len(spans) > 1:
                # A piece that ends at the window's border ends by chance: it is split again with what follows.
                stop = spans.pop()[0]
            yield from spans
            position = stop

    def _window(self, text: str, position: int, stop: int) -> Iterator[tuple[int, int, int]]:
        if text[position:stop].isspace():
            return
        scrap: tuple[int, int, int] | None = None
        for piece in self._structure.split_text(text[position:stop]):
            start = text.index(piece, position)
            position = start + len(piece)
            if piece.isspace():
                continue
            start, end = _stripped(text, start, position)
            spans = list(self._fitted(text, scrap[0] if scrap else start, end))
            # A heading before a long paragraph would be alone: it is cut together with what follows.
            scrap = spans.pop() if spans[-1][2] < self._limit // 8 else None
            yield from spans
        if scrap is not None:
            yield scrap

    def _fitted(self, text: str, start: int, stop: int, limit: int | None = None) -> Iterator[tuple[int, int, int]]:
        """Yield the piece as it is if it fits, else cut it into pieces of about equal size that do."""
        limit = limit or self._limit
        goal, per_token = float(limit), _CHARACTERS_PER_TOKEN
        if stop - start <= _MOST_PER_TOKEN * limit:
            tokens = self._count(text[start:stop])
            if tokens <= limit:
                yield start, stop, tokens
                return
            parts = math.ceil(tokens / limit)
            per_token = (stop - start) / tokens
            goal = min(limit, tokens / parts * 1.05)  # no small rest at the end: 260 tokens become two of 130
        while start < stop:
            cut, tokens, per_token = self._next_cut(text, start, stop, goal, per_token, limit)
            yield *_stripped(text, start, cut), tokens
            start = _after_space(text, cut, stop)

    def _next_cut(
        self, text: str, start: int, stop: int, goal: float, per_token: float, limit: int
    ) -> tuple[int, int, float]:
        """Find an end near goal tokens: guess, count, correct. Return (end, tokens, characters per token)."""
        best: tuple[int, int] | None = None
        reach = max(1, int(goal * per_token))
        for _ in range(40):
            cut = cut_before(text, start, start + reach, stop)
            begin, end = _stripped(text, start, cut)
            tokens = self._count(text[begin:end])
            size = (cut - start) / max(1, tokens)
            if tokens > limit:
                if best is not None:
                    break
                if last_border(text, start, cut - 1) == start:  # one cluster: a letter with very many marks
                    cut, tokens = self._part_of_cluster(text, start, cut, limit)
                    best = (cut, tokens)
                    break
                reach = max(1, min(int(goal * size * 0.95), (cut - start) - 1))
            elif cut == stop or tokens >= goal * 0.6 or (best is not None and cut <= best[0]):
                best = (cut, tokens)
                break
            else:
                best = (cut, tokens)
                reach = max(int(goal * min(size, 2 * reach / goal) * 0.97), reach + 1)
        assert best is not None  # noqa: S101  (each round without a result makes the reach smaller, down to 1)
        cut, tokens = best
        return cut, tokens, min(float(_MOST_PER_TOKEN), (cut - start) / max(1, tokens) * 0.97)

    def _part_of_cluster(self, text: str, start: int, stop: int, limit: int) -> tuple[int, int]:
        """The end of as many code points as fit, and their tokens."""
        while (tokens := self._count(text[start:stop])) > limit:
            if stop - start == 1:
                raise ConfigError(
                    f"One character ({text[start]!r}) has {tokens} tokens, more than a chunk may.",
                    remedy="Use larger chunks.",
                )
            stop = start + max(1, min((stop - start) * limit // tokens, stop - start - 1))
        return stop, tokens

    def _extended(
        self, text: str, blocks: list[Block], previous: int, start: int, stop: int, tokens: int
    ) -> tuple[int, int]:
        """Begin a chunk up to overlap_tokens earlier, at a word, but after the beginning of the chunk before.

        Where words have no spaces between them, it begins at any character; never inside a table.
        """
        reach = int(self.overlap_tokens * (stop - start) / tokens)
        while reach > 0:
            first = begin = max(previous + 1, start - reach)
            while begin < start and not (text[begin - 1].isspace() and is_border(text, begin)):
                begin += 1
            if begin == start and _UNSPACED.search(text, first, start):
                begin = next_border(text, first)
            place = bisect_right(blocks, begin, key=lambda block: block.stop)
            if place < len(blocks) and blocks[place].is_table and blocks[place].start <= begin:
                begin = blocks[place].stop
            begin, _ = _stripped(text, begin, stop)
            if begin >= start:
                break
            count = self._count(text[begin:stop])
            if count - tokens <= self.overlap_tokens and count <= self.chunk_tokens:
                return begin, count
            reach = (start - begin) * 3 // 4
        return start, tokens

    def _length(self, text: str) -> int:
        """Length of a piece for the library. A pure function, so that equal pieces are cut alike everywhere."""
        if len(text) > _MOST_PER_TOKEN * self._limit:
            return len(text) // _MOST_PER_TOKEN
        return self._count(text)


def _parts(text: str, blocks: list[Block], start: int, stop: int) -> Iterator[tuple[int, int, Block | None]]:
    """The blocks of a span and what is between them, without white space at the ends."""
    first = bisect_right(blocks, start, key=lambda block: block.stop)
    while start < stop:
        block = blocks[first] if first < len(blocks) and blocks[first].start < stop else None
        if block is not None and block.start <= start:
            end, first = min(block.stop, stop), first + 1
        else:
            end, block = block.start if block is not None else stop, None
        part = _stripped(text, start, end)
        if part[0] < part[1]:
            yield *part, block
        start = end


def _after_space(text: str, place: int, stop: int) -> int:
    """The place after white space; a space that carries a mark is none."""
    while place < stop and text[place].isspace() and (is_border(text, place + 1) or text[place] == "\r"):
        place += 1
    return place


def _stripped(text: str, start: int, stop: int) -> tuple[int, int]:
    """The span without white space at its ends."""
    start = _after_space(text, start, stop)
    while stop > start and text[stop - 1].isspace():
        stop -= 1
    return start, stop


def cut_before(text: str, start: int, stop: int, end: int) -> int:
    """The best place to end a piece that begins at start and may reach up to stop.

    The last paragraph's end in the second half of the span, else the last line's, sentence's or word's end, else a hard
    cut between grapheme clusters.

    Args:
        text: The whole text.
        start: Begin of the piece.
        stop: Furthest end; start < stop.
        end: End of the text to cut; a stop at or after it needs no cut.

    Returns:
        A position in (start, stop], or end.
    """
    if stop >= end:
        return end
    low = start + (stop - start) // 2
    for marks in (("\n\n",), ("\n",), _SENTENCE_ENDS, _WORD_ENDS):
        found = max((_last_mark(text, mark, low, stop) for mark in marks), default=-1)
        if found > start:
            return found
    found = last_border(text, start, stop)
    return found if found > start else min(end, next_border(text, stop))


def _last_mark(text: str, mark: str, low: int, stop: int) -> int:
    """The place after the last such mark that is no part of a grapheme cluster; -1 where there is none."""
    place = text.rfind(mark, low, stop)
    while place >= 0 and not is_border(text, place + len(mark)):
        place = text.rfind(mark, low, place)
    return place + len(mark) if place >= 0 else -1
