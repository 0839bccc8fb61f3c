"""How many cached tokens of a prompt are recomputed: a share, a number of tokens, or chosen for each request (`auto`).

What an answer needs is some tokens of each chunk, more where the question attends to many places, and a growing share
of long chunks and of long prompts. `auto` therefore takes as many tokens as leave no more than a `tail` of the policy's
mass outside the selection, between a floor and a ceiling that grow with the number of chunks, and at least what costs
no time on this GPU. The constants are in `AutoRule` alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from lmcache_rag.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

AUTO: Final = "auto"
TOKENS: Final = "tokens"
MOST_TOKENS: Final = 2**31 - 1  # no prompt is longer
FORMS: Final = 'between 0 and 1, nor "auto", nor {"tokens": N}'
_REMEDY: Final = 'A share of the cached tokens, for example 0.15; "auto"; or a number of tokens: {"tokens": 400}.'
_REMEDY_OF_TEXT: Final = "A share of the cached tokens, for example 0.15; auto; or a number of tokens: tokens=400."

# A budget as requests, settings and arguments hold it: a share, "auto", or {"tokens": N}.
Ratio: TypeAlias = float | str | Mapping[str, int]


class BudgetReason(StrEnum):
    """Why so many tokens were recomputed: `budget_reason` in the statistics, and the label `reason` of a counter."""

    RATIO = "ratio"  # the request's share
    TOKENS = "tokens"  # the request's number of tokens
    POLICY = "policy"  # the policies `none` and `all` have no choice
    SCORES = "scores"  # auto: as many as the scores' tail asks for
    FLOOR = "floor"  # auto: the scores ask for fewer
    CEILING = "ceiling"  # auto: the scores ask for more
    CHUNKS = "chunks"  # auto: a fixed number for each chunk, as the policy has no tail
    FREE = "free"  # auto: more than needed, since they cost no time
    ALL = "all"  # auto: nearly all, so all of them


class Choice(NamedTuple):
    """How many tokens are recomputed, and why."""

    tokens: int
    reason: BudgetReason


@dataclass(frozen=True)
class Budget:
    """How much to recompute; without a share and a number of tokens it is chosen for each request.

    Attributes:
        share: Share of the cached tokens, in [0, 1].
        tokens: Number of tokens; at most all cached ones are recomputed.
    """

    share: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.share is not None and self.tokens is not None:
            raise ConfigError("A budget is a share or a number of tokens, not both.", remedy=_REMEDY)
        if self.share is not None and not 0 <= self.share <= 1:
            raise ConfigError(f"A share must be between 0 and 1; got {self.share}.", remedy=_REMEDY)
        if self.tokens is not None and not 0 <= self.tokens <= MOST_TOKENS:
            raise ConfigError("A number of tokens must be between 0 and 2147483647.", remedy=_REMEDY)

    @property
    def auto(self) -> bool:
        """Whether it is chosen for each request."""
        return self.share is None and self.tokens is None

    @property
    def wire(self) -> Ratio:
        """As a request holds it: a number, "auto" or {"tokens": N}."""
        if self.share is not None:
            return self.share
        return AUTO if self.tokens is None else {TOKENS: self.tokens}

    def __str__(self) -> str:
        """As the command line takes it: "0.15", "auto" or "tokens=400"."""
        return f"{self.share:g}" if self.share is not None else AUTO if self.tokens is None else f"tokens={self.tokens}"

    def fixed(self, cached: int) -> Choice | None:
        """How many of the cached tokens; None: that is chosen for each request."""
        if self.share is not None:
            return Choice(round(self.share * cached), BudgetReason.RATIO)
        return None if self.tokens is None else Choice(min(self.tokens, cached), BudgetReason.TOKENS)


def read_budget(value: Any) -> Budget | None:
    """A budget from a request's `lmcache_rag.ratio`; None if the value is none. Never raises, whatever the value."""
    if isinstance(value, str):
        return Budget() if value == AUTO else None
    if isinstance(value, Mapping):
        tokens = value.get(TOKENS) if len(value) == 1 else None
        if isinstance(tokens, int) and not isinstance(tokens, bool) and 0 <= tokens <= MOST_TOKENS:
            return Budget(tokens=tokens)
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return Budget(share=float(value))
    return None


def parse_budget(value: Any) -> Budget:
    """A budget from an argument or a setting: a number between 0 and 1, "auto" or {"tokens": N}.

    Raises:
        ConfigError: It is neither.
    """
    if (budget := read_budget(value)) is None:
        raise ConfigError(f"The recompute ratio is not {FORMS}; got {_shown(value)}.", remedy=_REMEDY)
    return budget


def parse_budget_text(text: str) -> Budget:
    """A budget from the command line or the environment: "0.15", "auto" or "tokens=400".

    Raises:
        ConfigError: It is neither.
    """
    name, _, number = text.strip().partition("=")
    value: Any = text.strip()
    if name == TOKENS and number.isascii() and number.isdigit() and len(number) <= len(str(MOST_TOKENS)):
        value = {TOKENS: int(number)}
    elif value != AUTO:
        try:
            value = float(value)
        except ValueError:
            value = None
    if (budget := read_budget(value)) is None:
        raise ConfigError(
            f"The recompute ratio is not between 0 and 1, nor auto, nor tokens=N; got {_shown(text)}.",
            remedy=_REMEDY_OF_TEXT,
        )
    return budget


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | float | bool | None) else type(value).__name__
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= 64:
        text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# -- auto -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AutoRule:
    """The constants of `auto`, from the run in docs/results/budget-h200.md: 127 prompts of nine kinds, one model.

    Attributes:
        tail: Most of the policy's mass that may lie outside the selection, as a share; None: the scores decide
            nothing, and the floor is recomputed.
        per_chunk: Fewest tokens for each chunk; None: neither floor nor ceiling, the tail alone decides.
        per_prompt: Fewest tokens of a prompt.
        most_per_chunk: Most tokens for each chunk.
        most_per_prompt: A prompt of few chunks may have so many nevertheless.
        long: In a prompt of so many cached tokens all of them are recomputed, in one of half the length half of them:
            at least a share that grows with the length, and with the share of the text that a chunk was computed
            without: half of it with two chunks, none with one. None: no more than its chunks need.
        long_chunk: The same for the mean length of a prompt's chunks.
        nearly_all: From this share of the cached tokens on, all of them are recomputed, which is exact.
    """

    # Bounded by 50 and 80 tokens for each chunk, this loses 0.0085 nats and 1 of 127 hits with 534 tokens on average;
    # 60 for each chunk 0.0084 and 2 with 541; a share of 0.2 loses 0.034 and 6 with 499.
    tail: float | None = 0.3
    per_chunk: int | None = 50  # 40 for each chunk lose 4 of 127 hits, 50 lose 2, 60 lose 2, 80 lose 1
    per_prompt: int = 128  # 3 chunks of 512 lose nothing with 16 tokens, 6 of 1,024 nothing with 64
    most_per_chunk: int = 80  # with 100 instead, no hit more
    # 8 chunks of 160 with a long instruction lose 2 hits of 14 with 256 tokens, none with 320.
    most_per_prompt: int = 384
    # 30 chunks of 1,024 tokens lose 0.13 of the hits with 5,100 tokens, 0.07 with 8,000 and 0.02 with 15,200; 30 of 512
    # lose 0.04 with 2,400 and nothing with 5,900. 6 of 1,024 lose 0.04 with 570, 0.02 with 1,160, nothing with 1,900,
    # where 12 of 512 lose 0.01 with 960: docs/results/neutral-h200.md.
    long: int | None = 59_000
    long_chunk: int | None = 3_500
    nearly_all: float = 0.9  # not from the run: a tenth of the tokens saves hardly any time, and all of them are exact

    def __post_init__(self) -> None:
        if self.tail is None and self.per_chunk is None:
            raise ConfigError("A rule needs a tail, a number of tokens for each chunk, or both.")

    def bounds(self, chunks: int, cached: int) -> tuple[int, int]:
        """(floor, ceiling) of a prompt with so many chunks and cached tokens, before anything is free."""
        if self.per_chunk is None:
            return 0, cached
        apart = cached**2 * (chunks - 1)  # zero for a single chunk, which no other one precedes
        long = apart // (chunks * self.long) if apart > 0 and self.long else 0
        long_chunk = apart // (chunks**2 * self.long_chunk) if apart > 0 and self.long_chunk else 0
        floor = max(self.per_prompt, self.per_chunk * chunks, long, long_chunk)
        ceiling = floor if self.tail is None else max(floor, self.most_per_prompt, self.most_per_chunk * chunks)
        return min(floor, cached), min(ceiling, cached)

    def most(self, chunks: int, cached: int, free: int = 0) -> int:
        """The highest count that `choose` can give, whatever the scores."""
        return self._rounded(max(self.bounds(chunks, cached)[1], min(free, cached)), cached)

    def choose(self, chunks: int, cached: int, free: int = 0, mass: Tensor | None = None) -> Choice | None:
        """How many cached tokens to recompute. The same on all tensor-parallel ranks, see `tail_count`.

        Args:
            chunks: Chunks in the prompt that have cached KV.
            cached: Their tokens.
            free: So many tokens can be recomputed without any more time.
            mass: How much each token matters, in the order in which they are selected, [cached], not negative.

        Returns:
            The choice; None if it depends on the mass, and that is not given.
        """
        floor, ceiling = self.bounds(chunks, cached)
        free = min(free, cached)
        if self._rounded(max(floor, free), cached) == cached:
            return Choice(cached, BudgetReason.ALL)
        if floor == ceiling:
            choice = Choice(floor, BudgetReason.CHUNKS if self.tail is None else BudgetReason.FLOOR)
        elif free >= ceiling:
            return Choice(free, BudgetReason.FREE)
        elif mass is None or self.tail is None:
            return None
        else:
            count = tail_count(mass, self.tail)
            reason = BudgetReason.SCORES
            if count < floor:
                count, reason = floor, BudgetReason.FLOOR
            elif count > ceiling:
                count, reason = ceiling, BudgetReason.CEILING
            choice = Choice(count, reason)
        if free > choice.tokens:
            return Choice(free, BudgetReason.FREE)
        return Choice(cached, BudgetReason.ALL) if self._rounded(choice.tokens, cached) == cached else choice

    def _rounded(self, count: int, cached: int) -> int:
        return cached if count >= math.ceil(self.nearly_all * cached) else count


# By policy. What HKVD's deviation and a chunk's first tokens say of the answer was not measured: see docs/results.
AUTO_RULES: Final[Mapping[str, AutoRule]] = {
    "query": AutoRule(),
    "hkvd": AutoRule(),
    "head": AutoRule(tail=None),
}


def tail_count(mass: Tensor, tail: float) -> int:
    """The smallest number of leading tokens that leave at most `tail` of the whole mass to the others.

    The sum runs over one dimension in float64 on the CPU, where it is always added in the same order; on a GPU the
    order, and so the last bit, may differ. Ranks whose masses are equal bit for bit, as a sum over ranks gives them,
    thus count the same. Waits for the GPU.
    """
    sums = mass.cpu().double().cumsum(0)
    return min(int((sums < (1 - tail) * sums[-1]).sum()) + 1, len(sums))
