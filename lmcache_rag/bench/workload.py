"""Prompts of a RAG service: a prefix, chunks in an order of their own, a question.

Random token ids, since only time counts.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from functools import lru_cache


def _draw(seed: str, count: int, vocabulary: int) -> tuple[int, ...]:
    rng = random.Random(seed)  # noqa: S311 - a workload, no secret
    return tuple(rng.randrange(300, vocabulary) for _ in range(count))


# A client that draws numbers between two tokens of another answer measures itself.
_drawn = lru_cache(maxsize=256)(_draw)


@dataclass(frozen=True)
class Workload:
    """What is asked.

    Args:
        vocabulary: Token ids are drawn below this.
        prefix: Tokens of the shared prefix; a multiple of LMCache's chunk.
        chunk: Tokens of a chunk.
        separator: Tokens between chunks.
        question: Tokens behind the chunks.
        chunks: How many different chunks there are.
        seed: Makes it repeatable.
    """

    vocabulary: int = 30000
    prefix: int = 64
    chunk: int = 1024
    separator: int = 2
    question: int = 32
    chunks: int = 40
    seed: int | str = 0

    def _ids(self, count: int, *name: object) -> list[int]:
        return list(_drawn(f"{self.seed}:{name}", count, self.vocabulary))

    def ingest(self, index: int) -> list[int]:
        """The prompt that computes one chunk's KV."""
        return self._ids(self.prefix, "prefix") + self._ids(self.chunk, "chunk", index)

    def prompt(self, tokens: int, number: int) -> list[int]:
        """A prompt of about so many tokens; each number has chunks, an order and a question of its own."""
        order = self._order(tokens, number)
        ids = self._ids(self.prefix, "prefix")
        for place, index in enumerate(order):
            if place:
                ids += self._ids(self.separator, "separator")
            ids += self._ids(self.chunk, "chunk", index)
        return ids + self._ids(self.question, "question", number)

    def fresh(self, tokens: int, number: int) -> list[int]:
        """A prompt of exactly so many tokens that begins like no other and holds no chunk."""
        return list(_draw(f"{self.seed}:fresh:{number}", tokens, self.vocabulary))

    def arrivals(self, per_second: float, count: int) -> list[float]:
        """When to send so many requests, in seconds: a Poisson process that begins with one at 0."""
        rng = random.Random("arrivals")  # noqa: S311
        gaps = [rng.expovariate(per_second) for _ in range(count - 1)]
        return list(itertools.accumulate(gaps, initial=0.0))

    def spans(self, tokens: int, number: int) -> list[list[int]]:
        """Where that prompt's chunks stand."""
        step = self.chunk + self.separator
        starts = [self.prefix + place * step for place in range(len(self._order(tokens, number)))]
        return [[start, start + self.chunk] for start in starts]

    def _order(self, tokens: int, number: int) -> list[int]:
        count = max(1, min(self.chunks, (tokens - self.prefix - self.question) // (self.chunk + self.separator)))
        return random.Random(f"{self.seed}:order:{number}").sample(range(self.chunks), count)  # noqa: S311
