"""The blend of one request on a paged KV cache: select tokens, compute them and the gaps anew.

Chunk KV was placed in the sequence's blocks, keys turned. A forward pass is the model's own, over some positions of the
prompt; lmcache_rag.connector.attention is what it does in each layer.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from lmcache_rag.blend.policies import Layout, Policy, how_many, select
from lmcache_rag.connector.attention import Check, PagedAttention, Redo, StopForward, Watch, on_device

if TYPE_CHECKING:
    from torch import Tensor

    from lmcache_rag.connector.attention import Attention, PagedSequence
    from lmcache_rag.connector.cuda_graph import CapturedWatch

T = TypeVar("T")
# Work with rests; what is yielded is how many tokens it took. 0: there is no room for the next pass (BlendPass.room).
Steps = Generator[int, None, T]


class Model(Protocol):
    """A model whose KV lies in a paged cache."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        ...

    @property
    def kv_heads(self) -> int:
        """Key and value heads of this rank."""
        ...

    @property
    def most_tokens(self) -> int:
        """Most tokens of one pass."""
        ...

    @property
    def captured(self) -> CapturedWatch | None:
        """The suffix's pass as one CUDA graph, where there is one."""
        ...

    def forward(self, ids: Tensor, positions: Tensor, slots: Tensor, attention: Attention) -> Tensor:
        """Run all layers for their KV: ids and positions int64 [m], slots int64 [m].

        Returns:
            The hidden states behind the last norm, [m, width]; the next pass may overwrite them.
        """
        ...

    def sum_over_ranks(self, scores: Tensor) -> Tensor:
        """The sum of a tensor over the tensor-parallel ranks: each sees its own heads only."""
        ...


@dataclass(frozen=True)
class BlendOutcome:
    """What a blend did.

    Attributes:
        recomputed: Tokens selected and computed again.
        gaps: Tokens computed because nothing was cached for them.
        watched: A number that is not finite when any key before the end, or any value below the last layer, was not;
            None when no pass looked at all of them.
        selected: Positions of the selected tokens, int64 [recomputed], ascending or not.
        hidden: Hidden state of the prompt's last token, [1, width], where that was computed too.
    """

    recomputed: int
    gaps: int
    watched: Tensor | None = None
    selected: Tensor | None = None
    hidden: Tensor | None = None

    def digest(self) -> str:
        """A few letters of which tokens were selected: ranks that agree say the same. Waits for the GPU."""
        if self.selected is None:
            return "none"
        return hashlib.sha256(self.selected.sort().values.cpu().numpy().tobytes()).hexdigest()[:12]


class _Passes:
    """What a policy may ask; see lmcache_rag.blend.policies.Passes."""

    def __init__(
        self, blend: BlendPass, ids: Tensor, layout: Layout, gaps: Tensor, start: int, end: int, suffix: Tensor
    ) -> None:
        self._by, self._ids, self._layout, self._gaps = blend, ids, layout, gaps
        self._start, self._end, self._suffix = start, end, suffix
        self.watched: Tensor | None = None
        self.cost = 0  # of the suffix's pass: tokens through all layers that would have taken as long
        self._deviations: dict[int, Tensor] = {}

    def suffix_attention(self, *, window: int, from_layer: float, reduce: str) -> Tensor:
        """See Passes. A long suffix is watched from its end; what stands between is hidden from the rows."""
        import torch

        rows = self._suffix[-window:]
        last = self._end + len(self._suffix)
        first = last - len(rows)
        hidden = torch.cat([self._gaps, torch.arange(self._end, first, device=rows.device)])
        model, sequence = self._by.model, self._by.sequence
        ids, slots = self._ids[rows], sequence.slots(rows)
        captured = model.captured
        if captured is not None and captured.takes(rows=len(rows), end=last, from_layer=from_layer, reduce=reduce):
            mass = captured.watch(ids, rows, slots, sequence, end=last, hidden=hidden)[:, : self._end]
        else:
            attention = PagedAttention(sequence, rows.to(torch.int32), last, hidden)
            mass = torch.zeros((model.kv_heads, self._end), dtype=torch.float32, device=rows.device)
            watch = Watch(attention, mass, int(from_layer * model.layers), reduce, last_layer=model.layers - 1)
            with contextlib.suppress(StopForward):
                model.forward(ids, rows, slots, watch)
        looked = mass.sum(0) if reduce == "sum" else mass.amax(0)
        self.watched = looked.sum()
        self.cost += len(rows)
        return model.sum_over_ranks(looked)[self._layout.cached]

    def deviation(self, *, layer: int) -> Tensor:
        """See Passes."""
        if layer not in self._deviations:
            for _ in self.check(layer):
                pass
        return self._deviations[layer]

    def check(self, layer: int) -> Steps[None]:
        """Run the pass that `deviation` needs.

        Yields:
            For each piece, how many tokens through all layers would have taken as long.
        """
        import torch

        model, first = self._by.model, self._start
        parts = []
        while first < self._end:
            while not (size := self._by.next_piece):
                yield 0
            last = min(first + min(model.most_tokens, max(size * model.layers // (layer + 1), 1)), self._end)
            piece = torch.arange(first, last, device=self._ids.device)
            slots = self._by.sequence.slots(piece)
            attention = PagedAttention(self._by.sequence, piece.to(torch.int32), last)
            check = Check(attention, slots, layer)
            with contextlib.suppress(StopForward):
                model.forward(self._ids[piece], piece, slots, check)
            assert check.deviation is not None  # noqa: S101 - the check layer always stops the pass
            parts.append(check.deviation)
            first = last
            yield -(-len(piece) * (layer + 1) // model.layers)
        self._deviations[layer] = model.sum_over_ranks(torch.cat(parts))[self._layout.cached - self._start]


class BlendPass:
    """Blends one request.

    Args:
        model: The model.
        sequence: The request's blocks, with room for the prompt's last tokens too.
        piece: Most tokens to compute in one forward pass; 0: as many as the model takes.

    Attributes:
        room: Most tokens of the next forward pass: whoever takes the steps may change it between them. The pass of a
            selection by attention is not cut by it.
    """

    def __init__(self, model: Model, sequence: PagedSequence, *, piece: int = 0) -> None:
        self.model, self.sequence = model, sequence
        self.piece = min(piece or model.most_tokens, model.most_tokens)
        self.room = self.piece

    @property
    def next_piece(self) -> int:
        """Most tokens of the next forward pass; 0: there is room for none."""
        return min(self.piece, self.room)

    def steps(
        self,
        ids: Tensor,
        spans: Sequence[tuple[int, int]],
        start: int,
        *,
        policy: Policy,
        ratio: float,
        end: int = 0,
        last_too: bool = False,
        look: Callable[[Tensor, Tensor | None], None] = lambda cached, watched: None,
    ) -> Steps[BlendOutcome]:
        """Make the KV of prompt[start:end] (or to the last span's end) what the policy says it should be.

        Args:
            ids: The whole prompt, int64 [n].
            spans: Where cached KV was placed, (first, last + 1) of each chunk, ascending, from `start` on.
            start: First position whose KV is not exact.
            policy: Chooses what to recompute.
            ratio: Share of the cached tokens.
            end: What stands between the last span and here is computed too; 0: nothing.
            last_too: Whether the token at `end`, the prompt's last, rides along. It counts as none of the gaps.
            look: Called between selection and recomputation with the cached positions (int64; none if all of them are
                computed again) and BlendOutcome.watched. Recomputation, which takes most of the time, is queued behind:
                whoever waits for what is looked up here does not wait for that.

        Yields:
            After each forward pass: how many tokens went through all layers since the last one, or what cost as much.

        Returns:
            What was done.
        """
        import torch

        device = ids.device
        layout = Layout.of(list(spans), device=str(device))
        cached_end = spans[-1][1]
        absent = torch.ones(cached_end, dtype=torch.bool)
        absent[:start] = False
        for first, last in spans:
            absent[first:last] = False
        gaps = on_device(absent.nonzero()[:, 0], torch.int64, device)
        suffix = torch.arange(cached_end, min(len(ids), self.sequence.capacity), device=device)
        passes = _Passes(self, ids, layout, gaps, start, cached_end, suffix)
        check_layer, cached = getattr(policy, "check_layer", None), len(layout.cached)
        if check_layer is not None and 0 < how_many(policy, ratio, cached) < cached:
            yield from passes.check(check_layer)
        chosen = select(policy, ratio, layout, passes)
        look(layout.cached if len(chosen) < cached else layout.cached[:0], passes.watched)
        if passes.cost:
            yield passes.cost
        end = max(end, cached_end)
        tail = torch.arange(cached_end, end + last_too, device=device)
        positions = torch.cat([torch.cat([chosen, gaps]).sort().values, tail])
        hidden = yield from self.compute(ids, positions, end + last_too)
        computed = len(gaps) + end - cached_end
        return BlendOutcome(len(chosen), computed, passes.watched, chosen, hidden if last_too else None)

    def compute(self, ids: Tensor, positions: Tensor, end: int) -> Steps[Tensor | None]:
        """Compute the KV of these positions (int64, ascending) through all layers, in pieces that fit a pass.

        A later piece sees what the earlier ones wrote, so the order makes pieces equal to one pass.

        Yields:
            The tokens of each piece.

        Returns:
            The last position's hidden state, [1, width]; None without positions.
        """
        import torch

        hidden, done = None, 0
        while done < len(positions):
            while not (size := self.next_piece):
                yield 0
            piece = positions[done : done + size]
            done += len(piece)
            attention = PagedAttention(self.sequence, piece.to(torch.int32), end)
            states = self.model.forward(ids[piece], piece, self.sequence.slots(piece), Redo(attention))
            hidden = states[-1:].clone()
            yield len(piece)
        return hidden
