"""Passages of exactly so many tokens: consecutive sentences of real text, with one planted."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from lmcache_rag.bench.quality.russian import plain_sentences
from lmcache_rag.errors import ConfigError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

Encode = Callable[[str], Sequence[int]]

_SAMPLE_DATA = "lmcache_rag.demo.sample_data"
_SHORT = (" so", " and", " .", "\n", " -", ",", " ;", " (")  # one token each, after most texts
_SHORT_RUSSIAN = (".", *_SHORT[2:], " и")


class PassageMaker:
    """Makes passages.

    Args:
        encode: The prompt's own tokenizer.
        tokens: Tokens of each passage.
        rng: Decides which sentences.
        russian: Whether they are Russian.
    """

    def __init__(self, encode: Encode, tokens: int, rng: random.Random, *, russian: bool) -> None:
        self._encode, self._tokens, self._rng = encode, tokens, rng
        self._sentences = _russian(rng) if russian else _english()
        self._short = _SHORT_RUSSIAN if russian else _SHORT
        self._russian = russian

    def passage(self, planted: str) -> str:
        """A passage with this sentence in it; "": with none.

        Raises:
            ConfigError: The sentence alone is longer.
        """
        source = self._filler()
        parts: list[str] = []
        length = len(self._encode(planted))
        if length > self._tokens:
            raise ConfigError(
                f"A passage of {self._tokens} tokens does not hold {planted!r}.",
                remedy="Choose cells with longer passages.",
            )
        while length < self._tokens:
            parts.append(next(source))
            length += len(self._encode(" " + parts[-1]))
        place = self._rng.randint(0, max(0, len(parts) - 1))
        head, tail = " ".join([*parts[:place], planted]).strip(), parts[place:]
        if len(self._encode(head)) > self._tokens:  # joined texts may have more tokens than their parts
            head, tail = planted, parts
        return self._cut(head, " ".join(tail).split())

    def filled(self, passages: Sequence[str], least: int) -> list[str]:
        """The different ones of these passages, and plain ones up to at least so many."""
        found = dict.fromkeys(passages)
        while len(found) < least:
            found[self.passage("")] = None
        return list(found)

    def _filler(self) -> Iterator[str]:
        while True:
            first = self._rng.randrange(len(self._sentences))
            yield from self._sentences[first : first + self._rng.randint(3, 6)]

    def _cut(self, head: str, words: Sequence[str]) -> str:
        """The head with as many of the words as fit, made up to exactly so many tokens with short ones."""
        low, high = 0, len(words)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self._encode(" ".join([head, *words[:middle]]).strip())) <= self._tokens:
                low = middle
            else:
                high = middle - 1
        text = " ".join([head, *words[:low]]).strip()
        if self._russian and low < len(words):  # a word may be many tokens: take its beginning
            begun = (f"{text} {words[low][:end]}" for end in range(len(words[low]), 0, -1))
            text = next((each for each in begun if len(self._encode(each)) <= self._tokens), text)
        while (length := len(self._encode(text))) < self._tokens:
            text = next(text + end for end in self._short if len(self._encode(text + end)) == length + 1)
        return text


def sample_data() -> Traversable:
    """The sample documents' folder."""
    return resources.files(_SAMPLE_DATA)


@cache
def _english() -> tuple[str, ...]:
    """Sentences of the sample documents, in their order."""
    found: list[str] = []
    for file in sorted(sample_data().joinpath("documents").iterdir(), key=lambda file: file.name):
        if file.name.endswith((".txt", ".md")) and not file.name.endswith("-ru.md"):
            found += _sentences(file.read_text(encoding="utf-8"))
    return tuple(found)


def _sentences(text: str) -> list[str]:
    lines = [" ".join(part.split()) for part in text.split("\n\n") if not part.startswith("#")]
    return [each for line in lines for each in re.split(r"(?<=[.!?])\s+", line) if 30 < len(each) < 400]


def _russian(rng: random.Random) -> tuple[str, ...]:
    return plain_sentences(
        rng, _sentences(sample_data().joinpath("documents", "baikal-ru.md").read_text(encoding="utf-8"))
    )
