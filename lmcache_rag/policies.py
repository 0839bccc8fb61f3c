"""Recompute policies: which cached tokens to compute again.

Reused chunk KV is wrong only as far as a chunk's tokens would have attended to the other chunks. Computing a share
`ratio` of the tokens again repairs about half of that or more (docs/results/quality-smollm2-h100.md), if they are the
right ones. A policy ranks them; it may first request a pass over the model, see `Passes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

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
    """

    cached: Tensor
    offset: Tensor
    length: Tensor

    @classmethod
    def of(cls, spans: list[tuple[int, int]], device: str | None = None) -> Layout:
        """Layout of chunks at prompt[start:end], ascending and not overlapping."""
        import torch

        if not spans:
            empty = torch.empty(0, dtype=torch.int64, device=device)
            return cls(empty, empty, empty)
        offsets = [torch.arange(end - start, device=device) for start, end in spans]
        return cls(
            torch.cat([offset + start for offset, (start, _) in zip(offsets, spans, strict=True)]),
            torch.cat(offsets),
            torch.cat([torch.full_like(offset, len(offset)) for offset in offsets]),
        )


class Passes(Protocol):
    """Passes that an engine can run over the placed KV before the selection. Each returns float32 [cached tokens]."""

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
    """Ranks cached tokens. A policy is a subclass, so that it has the default `check_layer`."""

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


def how_many(policy: Policy, ratio: float, total: int) -> int:
    """How many of `total` cached tokens are computed again."""
    return {"none": 0, "all": total}.get(policy.name, round(ratio * total))


def select(policy: Policy, ratio: float, layout: Layout, passes: Passes) -> Tensor:
    """Positions to compute again: the top `ratio` of the cached tokens, int64, ascending.

    A pass is run only if its result matters. Ties go to the earlier token, so that every rank and every run
    selects the same.
    """
    total = len(layout.cached)
    count = how_many(policy, ratio, total)
    if count == 0:
        return layout.cached[:0]
    if count == total:
        return layout.cached
    order = policy.scores(layout, passes).argsort(descending=True, stable=True)
    return layout.cached[order[:count].sort().values]


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
