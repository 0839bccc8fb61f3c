"""The blend of one request on a paged KV cache: select tokens, then recompute them and the gaps.

Chunk KV has been placed in the sequence's blocks, its keys rotated. A forward pass is the model's own, over some
positions of the prompt; lmcache_rag.connector.attention is what replaces the attention of its layers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from lmcache_rag.connector.attention import (
    DeviationCheck,
    ObserveAttention,
    PagedAttention,
    RecomputeAttention,
    StopForward,
    to_device_async,
)
from lmcache_rag.policies import Layout, Policy, how_many, select

if TYPE_CHECKING:
    from torch import Tensor

    from lmcache_rag.budget import Budget
    from lmcache_rag.connector.attention import Attention, PagedSequence
    from lmcache_rag.connector.cuda_graph import CapturedQueryPass

T = TypeVar("T")
# A resumable computation; yields the token cost of each step, 0 if the budget has no room for the next pass.
StepIterator = Generator[int, None, T]


class Model(Protocol):
    """A model whose KV is in a paged cache."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        ...

    @property
    def kv_heads(self) -> int:
        """Key and value heads of this rank."""
        ...

    @property
    def max_tokens(self) -> int:
        """Most tokens of one pass."""
        ...

    @property
    def captured(self) -> CapturedQueryPass | None:
        """The suffix's pass as one CUDA graph, if it was captured."""
        ...

    def kv_scales(self, layer: int) -> tuple[float, float]:
        """What the cached keys and values of a layer are to be multiplied by; not 1.0 only if they are quantised."""
        ...

    def forward(self, ids: Tensor, positions: Tensor, slots: Tensor, attention: Attention) -> Tensor:
        """Run all layers to write their KV: ids and positions int64 [m], slots int64 [m].

        Returns:
            The hidden states after the last norm, [m, width]; the next pass may overwrite them.
        """
        ...

    def sum_over_ranks(self, scores: Tensor) -> Tensor:
        """The sum of a tensor over the tensor-parallel ranks, each of which has its own heads only."""
        ...


@dataclass(frozen=True)
class Selection:
    """Tokens that a policy selected for recomputation.

    Attributes:
        chosen: Positions of the selected tokens, int64, ascending or not.
        gaps: Positions before `end` without cached KV, int64, ascending.
        checked: Cached positions whose KV must be finite, int64; none if all of them are recomputed.
        observed_sum: See BlendOutcome.
        cost: Cost of the selection's last pass, in tokens through all layers.
        end: End of the last cached chunk.
        reason: Why so many tokens were selected (a BudgetReason).
    """

    chosen: Tensor
    gaps: Tensor
    checked: Tensor
    observed_sum: Tensor | None
    cost: int
    end: int
    reason: str


@dataclass(frozen=True)
class BlendOutcome:
    """The result of a blend.

    Attributes:
        recomputed: Tokens selected and recomputed.
        gaps: Tokens computed because nothing was cached for them.
        observed_sum: Sum of the attention that the suffix pass observed. That pass reads every key before the end, and
            every value below the last layer, so the sum is not finite if one of them is not. None if no suffix pass
            ran: it shows nothing then.
        selected: Positions of the selected tokens, int64 [recomputed], ascending or not.
        hidden: Hidden state of the prompt's last token, [1, width], if that was computed too.
        reason: Why so many tokens were recomputed (a BudgetReason); empty when nothing was blended.
    """

    recomputed: int
    gaps: int
    observed_sum: Tensor | None = None
    selected: Tensor | None = None
    hidden: Tensor | None = None
    reason: str = ""

    def digest(self) -> str:
        """A short hash of the selected positions, equal on ranks that agree. Waits for the GPU."""
        if self.selected is None:
            return "none"
        return hashlib.sha256(self.selected.sort().values.cpu().numpy().tobytes()).hexdigest()[:12]


class ModelPasses:
    """The passes that a policy may request; see lmcache_rag.policies.Passes."""

    def __init__(
        self, blend: BlendPass, ids: Tensor, layout: Layout, gaps: Tensor, start: int, end: int, suffix: Tensor
    ) -> None:
        self._blend, self._ids, self._layout, self._gaps = blend, ids, layout, gaps
        self._start, self._end, self._suffix = start, end, suffix
        self.observed_sum: Tensor | None = None
        self.cost = 0  # of the suffix's pass: tokens through all layers that would take as long
        self._deviations: dict[int, Tensor] = {}
        self._observed: dict[tuple[int, float, str], Tensor] = {}

    def suffix_attention(self, *, window: int, from_layer: float, reduce: str) -> Tensor:
        """See Passes. Of a long suffix only its end is observed; tokens before that are masked for these rows."""
        how = (window, from_layer, reduce)
        if how not in self._observed:
            self._observed[how] = self._observe(*how)
        return self._observed[how]

    def _observe(self, window: int, from_layer: float, reduce: str) -> Tensor:
        import torch

        rows = self._suffix[-window:]
        last = self._end + len(self._suffix)
        first = last - len(rows)
        hidden = torch.cat([self._gaps, torch.arange(self._end, first, device=rows.device)])
        model, sequence = self._blend.model, self._blend.sequence
        ids, slots = self._ids[rows], sequence.slots(rows)
        captured = model.captured
        if captured is not None and captured.supports(rows=len(rows), end=last, from_layer=from_layer, reduce=reduce):
            mass = captured.run(ids, rows, slots, sequence, end=last, hidden=hidden)[:, : self._end]
        else:
            attention = PagedAttention(sequence, rows.to(torch.int32), last, hidden)
            mass = torch.zeros((model.kv_heads, self._end), dtype=torch.float32, device=rows.device)
            first_layer = int(from_layer * model.layers)
            observe = ObserveAttention(attention, mass, first_layer, reduce, last_layer=model.layers - 1)
            with contextlib.suppress(StopForward):
                model.forward(ids, rows, slots, observe)
        observed = mass.sum(0) if reduce == "sum" else mass.amax(0)
        self.observed_sum = observed.sum()
        self.cost += len(rows)
        return model.sum_over_ranks(observed)[self._layout.cached]

    def deviation(self, *, layer: int) -> Tensor:
        """See Passes."""
        layer = min(layer, self._blend.model.layers - 1)
        if layer not in self._deviations:
            for _ in self.check(layer):
                pass
        return self._deviations[layer]

    def check(self, layer: int) -> StepIterator[None]:
        """Run the pass that `deviation` needs, in chunks.

        Yields:
            For each chunk, how many tokens through all layers would take as long.
        """
        import torch

        model, first = self._blend.model, self._start
        layer = min(layer, model.layers - 1)  # a policy's layer may be beyond those of a very small model
        parts = []
        while first < self._end:
            while not (size := self._blend.next_chunk_size):
                yield 0
            last = min(first + min(model.max_tokens, max(size * model.layers // (layer + 1), 1)), self._end)
            chunk = torch.arange(first, last, device=self._ids.device)
            slots = self._blend.sequence.slots(chunk)
            attention = PagedAttention(self._blend.sequence, chunk.to(torch.int32), last)
            check = DeviationCheck(attention, slots, layer, model.kv_scales(layer))
            with contextlib.suppress(StopForward):
                model.forward(self._ids[chunk], chunk, slots, check)
            assert check.deviation is not None  # noqa: S101 - the check layer always stops the pass
            parts.append(check.deviation)
            first = last
            yield -(-len(chunk) * (layer + 1) // model.layers)
        self._deviations[layer] = model.sum_over_ranks(torch.cat(parts))[self._layout.cached - self._start]


class BlendPass:
    """Blends one request.

    Args:
        model: The model.
        sequence: The request's blocks, with room for the prompt's last tokens too.
        chunk_size: Most tokens to compute in one forward pass; 0: as many as the model takes.

    Attributes:
        budget: Most tokens of the next forward pass; may be changed between steps. A selection's pass over the suffix
            ignores it.
    """

    def __init__(self, model: Model, sequence: PagedSequence, *, chunk_size: int = 0) -> None:
        self.model, self.sequence = model, sequence
        self.chunk_size = min(chunk_size or model.max_tokens, model.max_tokens)
        self.budget = self.chunk_size

    @property
    def next_chunk_size(self) -> int:
        """Most tokens of the next forward pass; 0: the budget is used up."""
        return min(self.chunk_size, self.budget)

    def run(
        self,
        ids: Tensor,
        spans: Sequence[tuple[int, int]],
        start: int,
        *,
        policy: Policy,
        budget: Budget,
        free: int = 0,
        end: int = 0,
        with_last_token: bool = False,
    ) -> StepIterator[BlendOutcome]:
        """Blend: `select`, then `recompute`, which document the arguments."""
        selection = yield from self.select(ids, spans, start, policy=policy, budget=budget, free=free)
        return (yield from self.recompute(ids, selection, end=end, with_last_token=with_last_token))

    def select(
        self,
        ids: Tensor,
        spans: Sequence[tuple[int, int]],
        start: int,
        *,
        policy: Policy,
        budget: Budget,
        free: int = 0,
    ) -> StepIterator[Selection]:
        """Let the policy choose which cached tokens to recompute. With the budget `auto` the CPU waits for its pass.

        Args:
            ids: The whole prompt, int64 [n].
            spans: Where cached KV was placed, (first, last + 1) of each chunk, ascending, from `start` on.
            start: First position whose KV is not exact.
            policy: Chooses what to recompute.
            budget: How many.
            free: So many can be recomputed without any more time; the same on all ranks.

        Yields:
            After each forward pass but the last: how many tokens through all layers would take as long.
        """
        import torch

        device = ids.device
        layout = Layout.of(list(spans), device=str(device))
        cached_end = spans[-1][1]
        absent = torch.ones(cached_end, dtype=torch.bool)
        absent[:start] = False
        for first, last in spans:
            absent[first:last] = False
        gaps = to_device_async(absent.nonzero()[:, 0], torch.int64, device)
        suffix = torch.arange(cached_end, min(len(ids), self.sequence.capacity), device=device)
        passes = ModelPasses(self, ids, layout, gaps, start, cached_end, suffix)
        check_layer, cached = policy.check_layer, len(layout.cached)
        known = how_many(policy, budget, cached, layout.chunks, free)
        if check_layer is not None and (known is None or 0 < known.tokens < cached):
            yield from passes.check(check_layer)
        chosen, reason = select(policy, budget, layout, passes, free=free)
        checked = layout.cached if len(chosen) < cached else layout.cached[:0]
        return Selection(chosen, gaps, checked, passes.observed_sum, passes.cost, cached_end, str(reason))

    def recompute(
        self, ids: Tensor, selection: Selection, *, end: int = 0, with_last_token: bool = False
    ) -> StepIterator[BlendOutcome]:
        """Compute the selected tokens and the gaps, so that the KV up to the last span's end is as the policy wants it.

        Args:
            ids: The whole prompt, int64 [n].
            selection: What `select` returned.
            end: Tokens between the last span and here are computed too; 0: none.
            with_last_token: Whether to compute the token at `end`, the prompt's last, too. It does not count as a gap.

        Yields:
            After each forward pass: how many tokens went through all layers since the last one, or would take as long.
        """
        import torch

        if selection.cost:
            yield selection.cost
        chosen, gaps, cached_end = selection.chosen, selection.gaps, selection.end
        end = max(end, cached_end)
        tail = torch.arange(cached_end, end + with_last_token, device=ids.device)
        positions = torch.cat([torch.cat([chosen, gaps]).sort().values, tail])
        hidden = yield from self.compute(ids, positions, end + with_last_token)
        computed = len(gaps) + end - cached_end
        last = hidden if with_last_token else None
        return BlendOutcome(len(chosen), computed, selection.observed_sum, chosen, last, selection.reason)

    def compute(self, ids: Tensor, positions: Tensor, end: int) -> StepIterator[Tensor | None]:
        """Compute the KV of these positions (int64, ascending) through all layers, in chunks that fit a pass.

        A later chunk attends to what the earlier ones wrote, so ascending chunks equal one pass.

        Yields:
            The tokens of each chunk.

        Returns:
            The last position's hidden state, [1, width]; None without positions.
        """
        import torch

        hidden, done = None, 0
        while done < len(positions):
            while not (size := self.next_chunk_size):
                yield 0
            chunk = positions[done : done + size]
            done += len(chunk)
            attention = PagedAttention(self.sequence, chunk.to(torch.int32), end)
            states = self.model.forward(ids[chunk], chunk, self.sequence.slots(chunk), RecomputeAttention(attention))
            hidden = states[-1:].clone()
            yield len(chunk)
        return hidden
