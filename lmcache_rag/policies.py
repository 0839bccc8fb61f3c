"""Recompute policies: which cached tokens to compute again.

Reused chunk KV is wrong only as far as a chunk's tokens would have attended to the other chunks. Computing a few
hundred of the tokens again repairs most of that, if they are the right ones. A policy ranks them; it may first request
a pass over the model, see `Passes`. How many are computed again is the `Budget`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from lmcache_rag.budget import AUTO_RULES, AutoRule, Budget, BudgetReason, Choice
from lmcache_rag.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which tokens of a prompt have cached chunk KV.

    Attributes:
        cached: Positions in the prompt, int64 [n], ascending.
        offset: For each, its position in its chunk, int64 [n].
        length: For each, the length of its chunk, int64 [n].
        chunks: How many chunks they belong to.
    """

    cached: Tensor
    offset: Tensor
    length: Tensor
    chunks: int

    @classmethod
    def of(cls, spans: list[tuple[int, int]], device: str | None = None) -> Layout:
        """Layout of chunks at prompt[start:end], ascending and not overlapping."""
        import torch

        if not spans:
            empty = torch.empty(0, dtype=torch.int64, device=device)
            return cls(empty, empty, empty, 0)
        offsets = [torch.arange(end - start, device=device) for start, end in spans]
        return cls(
            torch.cat([offset + start for offset, (start, _) in zip(offsets, spans, strict=True)]),
            torch.cat(offsets),
            torch.cat([torch.full_like(offset, len(offset)) for offset in offsets]),
            len(spans),
        )


class Passes(Protocol):
    """Passes that an engine can run over the placed KV before the selection. Each returns float32 [cached tokens].

    A pass that is requested again is not run again: its result is kept.
    """

    def suffix_attention(self, *, window: int, from_layer: float, reduce: str) -> Tensor:
        """Attention probability that each cached token gets from the prompt's last tokens.

        Args:
            window: How many of the prompt's last tokens are observed (at most the suffix).
            from_layer: First layer that counts, as a share of the model's depth.
            reduce: "sum" or "max" over rows, heads and layers.
        """
        ...

    def deviation(self, *, layer: int) -> Tensor:
        """Squared distance of each cached token's key and value at `layer` from the freshly computed ones."""
        ...


class Policy(Protocol):
    """Ranks cached tokens. A policy is a subclass, so that it has the defaults of `check_layer` and `mass`."""

    name: ClassVar[str]

    @property
    def check_layer(self) -> int | None:
        """The layer whose deviation the policy requests: an engine then runs that pass beforehand, in pieces.

        None: it requests no deviation.
        """
        return None

    def scores(self, layout: Layout, passes: Passes) -> Tensor:
        """float32 [cached tokens]; the highest are computed again."""
        ...

    def mass(self, layout: Layout, passes: Passes) -> Tensor | None:
        """How much each cached token matters, float32 [cached tokens], not negative: what `auto` counts by.

        None: the policy does not say; `auto` then computes a fixed number of tokens for each chunk. Called after
        `scores`, with the same passes.
        """
        return None


@dataclass(frozen=True)
class QueryPolicy(Policy):
    """The tokens that the question attends to: the default.

    The question's own attention over the placed KV shows which tokens the answer depends on. Known from ProphetKV
    (arXiv 2602.02579), CacheClip (2510.10129) and A3 (2511.17560); pooling from SnapKV (2404.14469). Upper layers
    only, since lower ones attend to neighbours rather than to meaning.
    """

    name: ClassVar[str] = "query"
    window: int = 64
    from_layer: float = 0.5
    pool: int = 5
    reduce: str = "sum"

    def scores(self, layout: Layout, passes: Passes) -> Tensor:
        """Attention mass, max-pooled over `pool` tokens inside each chunk."""
        mass = passes.suffix_attention(window=self.window, from_layer=self.from_layer, reduce=self.reduce)
        return pool_inside_chunks(mass, layout, self.pool)

    def mass(self, layout: Layout, passes: Passes) -> Tensor:
        """Attention mass itself: pooled, a token would count for its neighbours too."""
        return passes.suffix_attention(window=self.window, from_layer=self.from_layer, reduce=self.reduce)


@dataclass(frozen=True)
class HKVDPolicy(Policy):
    """The tokens whose KV deviates most at a check layer (CacheBlend, arXiv 2405.16444, section 4.3)."""

    name: ClassVar[str] = "hkvd"
    layer: int = 1

    @property
    def check_layer(self) -> int:
        """The layer."""
        return self.layer

    def scores(self, layout: Layout, passes: Passes) -> Tensor:
        """Key and value deviation."""
        return passes.deviation(layer=self.layer)

    def mass(self, layout: Layout, passes: Passes) -> Tensor:
        """The deviation, too."""
        return passes.deviation(layer=self.layer)


@dataclass(frozen=True)
class HeadPolicy(Policy):
    """The first tokens of each chunk (LegoLink of EPIC, arXiv 2410.15332): computed as if first in the prompt."""

    name: ClassVar[str] = "head"

    def scores(self, layout: Layout, passes: Passes) -> Tensor:
        """Earlier in the chunk is higher; relative, so that each chunk gives the same share."""
        return 1.0 - layout.offset.float() / layout.length.float()


@dataclass(frozen=True)
class NonePolicy(Policy):
    """Full reuse: nothing is computed again."""

    name: ClassVar[str] = "none"

    def scores(self, layout: Layout, passes: Passes) -> Tensor:
        """Never called: `select` handles this policy itself."""
        return layout.offset.float()


@dataclass(frozen=True)
class AllPolicy(Policy):
    """Everything is computed again: equals a full prefill, which tests the blend."""

    name: ClassVar[str] = "all"

    def scores(self, layout: Layout, passes: Passes) -> Tensor:
        """Never called: `select` handles this policy itself."""
        return layout.offset.float()


POLICIES: dict[str, Policy] = {
    p.name: p for p in (QueryPolicy(), HKVDPolicy(), HeadPolicy(), NonePolicy(), AllPolicy())
}


def get_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ConfigError: There is none.
    """
    try:
        return POLICIES[name]
    except KeyError:
        raise ConfigError(
            f"There is no recompute policy {name!r}.", remedy=f"Choose one of: {', '.join(POLICIES)}."
        ) from None


class Selected(NamedTuple):
    """The tokens to compute again.

    Attributes:
        positions: Positions in the prompt, int64, ascending.
        reason: Why so many.
    """

    positions: Tensor
    reason: BudgetReason


def how_many(policy: Policy, budget: Budget, cached: int, chunks: int, free: int = 0) -> Choice | None:
    """How many of so many cached tokens are computed again; None: that depends on their scores.

    Args:
        policy: The policy.
        budget: The budget.
        cached: The cached tokens.
        chunks: The chunks that they belong to.
        free: So many tokens can be computed again without any more time.
    """
    if policy.name in ("none", "all"):
        return Choice(cached if policy.name == "all" else 0, BudgetReason.POLICY)
    return budget.fixed(cached) or _rule(policy).choose(chunks, cached, free)


def at_most(policy: Policy, budget: Budget, cached: int, chunks: int, free: int = 0) -> int:
    """The most tokens that are computed again, whatever their scores. Arguments as for `how_many`."""
    choice = how_many(policy, budget, cached, chunks, free)
    return choice.tokens if choice is not None else _rule(policy).most(chunks, cached, free)


def select(policy: Policy, budget: Budget, layout: Layout, passes: Passes, *, free: int = 0) -> Selected:
    """Choose the tokens to compute again: those with the highest scores, as many as the budget says.

    A pass is run only if its result matters. Ties go to the earlier token, so that every rank and every run
    selects the same. Only a count that depends on the scores waits for the GPU.
    """
    cached = len(layout.cached)
    choice = how_many(policy, budget, cached, layout.chunks, free)
    if choice is not None and choice.tokens in (0, cached):
        return Selected(layout.cached[: choice.tokens], choice.reason)
    order = policy.scores(layout, passes).argsort(descending=True, stable=True)
    if choice is None:
        rule, mass = _rule(policy), policy.mass(layout, passes)
        if mass is None:
            choice = replace(rule, tail=None).choose(layout.chunks, cached, free)
        else:
            choice = rule.choose(layout.chunks, cached, free, mass[order])
        assert choice is not None  # noqa: S101 - with the mass, or without a tail, it depends on nothing more
    return Selected(layout.cached[order[: choice.tokens].sort().values], choice.reason)


def _rule(policy: Policy) -> AutoRule:
    return AUTO_RULES.get(policy.name) or AutoRule()


def pool_inside_chunks(scores: Tensor, layout: Layout, width: int) -> Tensor:
    """Maximum over a window of `width` tokens around each token that does not cross its chunk's borders."""
    import torch

    best = scores.clone()
    last = layout.length - 1
    minus_infinity = torch.full((), float("-inf"), device=scores.device)  # torch.tensor would wait for the GPU
    for step in range(1, width // 2 + 1):
        if step >= len(scores):
            break
        later, earlier = scores.roll(-step), scores.roll(step)
        best = torch.maximum(best, torch.where(layout.offset + step <= last, later, minus_infinity))
        best = torch.maximum(best, torch.where(layout.offset >= step, earlier, minus_infinity))
    return best
