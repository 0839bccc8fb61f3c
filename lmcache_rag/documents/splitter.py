"""Cut a text into chunks that are sized in tokens of the model's own tokenizer."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib.metadata import version

from lmcache_rag._utils import needs
from lmcache_rag.documents.types import Chunk
from lmcache_rag.errors import ConfigError

MIN_CHUNK_TOKENS = 32
_ALGORITHM = 1  # raise when the same text and parameters give other chunks, so that stored ones count as stale

# From the strongest border to the weakest. Sentences and words are ours (cut_before): the library would tokenise each.
_SEPARATORS = [r"\n#{1,6} ", r"\n```\n", r"\n(?:\*\*\*+|---+|___+)\n", r"\n\n", r"\n"]
_CHARACTERS_PER_TOKEN = 4.0  # first guess; every chunk is counted
_MOST_PER_TOKEN = (
    16  # a piece with more characters than this for each token of a chunk is cut before its tokens are counted
)
_WINDOW = 64  # characters for each token of a chunk: some 16 chunks of English
_SENTENCE_ENDS = (". ", "! ", "? ", "。", "！", "？", "; ")
_JOINERS = ("\u200d", "\ufe0e", "\ufe0f")


class Splitter:
    """Splits text at headings, paragraphs, lines, sentences and words, in that order, and inside words if it must.

    ``langchain_text_splitters`` finds the structure. It sees a window of the text at a time, and pieces without
    structure (one long line) are cut here, since it would count the tokens of every word of them: 50 MB on one line
    take 30 to 40 s on one core. The same text always gives the same chunks, independent of earlier calls.

    Args:
        encode: Token ids of a text in which nothing is special, and no token is added:
            ``SafeTokenizer(tokenizer).text``.
        chunk_tokens: Most tokens of a chunk; at least 32.
        overlap_tokens: Most tokens that a chunk repeats from the end of the one before; whole words, at most half of
            chunk_tokens. KV is kept for the repeated tokens twice.

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
        library = f"langchain-text-splitters {version('langchain-text-splitters')}"
        return f"{library}, algorithm {_ALGORITHM}, {self.chunk_tokens} tokens, overlap {self.overlap_tokens}"

    def split(self, text: str) -> list[Chunk]:
        """Cut a text into chunks.

        Returns:
            Chunks in the text's order, none blank and none above chunk_tokens; every character of the text that is not
            white space, and has tokens, is in one of them. A blank text has none.

        Raises:
            ConfigError: One character alone has more tokens than a chunk may.
        """
        chunks: list[Chunk] = []
        previous = 0
        for start, stop, tokens in self._spans(text):
            if tokens == 0:  # zero-width characters that a normalising tokenizer drops: nothing to compute from
                continue
            own = start
            if self.overlap_tokens and chunks:
                start, tokens = self._extended(text, previous, start, stop, tokens)
            chunks.append(Chunk(text=text[start:stop], index=len(chunks), start=start, tokens=tokens))
            previous = own
        return chunks

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

    def _fitted(self, text: str, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the piece as it is if it fits, else cut it into pieces of about equal size that do."""
        goal, per_token = float(self._limit), _CHARACTERS_PER_TOKEN
        if stop - start <= _MOST_PER_TOKEN * self._limit:
            tokens = self._count(text[start:stop])
            if tokens <= self._limit:
                yield start, stop, tokens
                return
            parts = math.ceil(tokens / self._limit)
            per_token = (stop - start) / tokens
            goal = min(self._limit, tokens / parts * 1.05)  # no small rest at the end: 260 tokens become two of 130
        while start < stop:
            cut, tokens, per_token = self._next_cut(text, start, stop, goal, per_token)
            yield *_stripped(text, start, cut), tokens
            while cut < stop and text[cut].isspace():
                cut += 1
            start = cut

    def _next_cut(self, text: str, start: int, stop: int, goal: float, per_token: float) -> tuple[int, int, float]:
        """Find an end near goal tokens: guess, count, correct. Return (end, tokens, characters per token)."""
        best: tuple[int, int] | None = None
        reach = max(1, int(goal * per_token))
        for _ in range(40):
            cut = cut_before(text, start, start + reach, stop)
            begin, end = _stripped(text, start, cut)
            tokens = self._count(text[begin:end])
            size = (cut - start) / max(1, tokens)
            if tokens > self._limit:
                if best is not None:
                    break
                if cut - start == 1:
                    raise ConfigError(
                        f"One character ({text[start]!r}) has {tokens} tokens, more than a chunk may.",
                        remedy="Use larger chunks.",
                    )
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

    def _extended(self, text: str, previous: int, start: int, stop: int, tokens: int) -> tuple[int, int]:
        """Begin a chunk up to overlap_tokens earlier, at a word, but after the beginning of the chunk before."""
        reach = int(self.overlap_tokens * (stop - start) / tokens)
        while reach > 0:
            begin = max(previous + 1, start - reach)
            while begin < start and not text[begin - 1].isspace():
                begin += 1
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


def _stripped(text: str, start: int, stop: int) -> tuple[int, int]:
    """The span without white space at its ends."""
    while start < stop and text[start].isspace():
        start += 1
    while stop > start and text[stop - 1].isspace():
        stop -= 1
    return start, stop


def cut_before(text: str, start: int, stop: int, end: int) -> int:
    """The best place to end a piece that begins at start and may reach up to stop.

    The last paragraph's end in the second half of the span, else the last line's, sentence's or word's end, else a hard
    cut that keeps a letter with its accents and an emoji with its parts.

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
    for marks in (("\n\n",), ("\n",), _SENTENCE_ENDS, (" ",)):
        found = max((place + len(mark) for mark in marks if (place := text.rfind(mark, low, stop)) >= 0), default=-1)
        if found > start:
            return found
    for place in range(stop, max(start + 1, stop - 32), -1):
        if not _inside_character(text, place):
            return place
    return stop


def _inside_character(text: str, place: int) -> bool:
    """Whether the code points before and after a place are drawn as one character."""
    after = text[place]
    return unicodedata.combining(after) != 0 or after in _JOINERS or text[place - 1] == "\u200d"
