"""What a prefill and a blend's passes take on this model and GPU, measured once, before the first request.

Costs that earlier starts measured or that requests showed since are kept in a file per model, GPU and build: a start
that finds it measures nothing. Look-ups and loads are not measured here but with the first requests, such as those by
which `lmcache-rag serve` warms the servers.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lmcache_rag.budget import Budget
from lmcache_rag.connector.attention import PagedSequence
from lmcache_rag.connector.blend_pass import BlendPass
from lmcache_rag.connector.job import CudaTimer
from lmcache_rag.connector.self_check import CheckedModel, check_name, take_steps
from lmcache_rag.costs import CostModel
from lmcache_rag.policies import QueryPolicy
from lmcache_rag.weights.packages import cache_folder

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("lmcache_rag")

PREFILLS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
PASSES = (16, 64, 128, 256, 512, 1024, 2048)
CONTEXTS = (1024, 4096, 16384)  # sequences that passes are measured in
TIMES, LONG = 3, 2048  # each size is measured so many times, one above LONG once
MOST_S = 4.0  # sizes that are left after so many seconds are not measured
_WORD = 1000  # a token of plain text in the usual vocabularies


class MeasuredModel(CheckedModel, Protocol):
    """What the measurement needs of a model in addition to what the self-check does."""

    def has_memory(self, tokens: int, length: int) -> bool:
        """Whether this rank has memory for passes of that many tokens in a sequence of that length."""
        ...


def costs_file(vllm_config: Any) -> Path | None:
    """Where costs of this model on this GPU and build are kept; None where the build cannot be identified."""
    name = check_name(vllm_config)
    return cache_folder() / "costs" / f"{name}.json" if name else None


def measure_costs(
    vllm_config: Any, model: MeasuredModel, file: Path | None, on_all_ranks: Callable[[bool], bool]
) -> dict[str, Any] | None:
    """The costs that are kept, or else a new measurement; None where it failed: they are learned from requests then.

    Args:
        vllm_config: vLLM's configuration.
        model: The model, ready to blend. No request may have run: blocks of its cache are written, and cleared again.
        file: Where costs are kept.
        on_all_ranks: Whether something is true on all tensor-parallel ranks; every rank must call it.
    """
    kept = _read(file)
    if on_all_ranks(kept is not None):
        return kept
    begun = time.perf_counter()
    try:
        costs = measured(model, longest=int(vllm_config.model_config.max_model_len), on_all_ranks=on_all_ranks)
    except Exception:
        log.warning("What passes take could not be measured; it is learned from requests", exc_info=True)
        return None
    log.info("What passes take was measured (%.1f s): %s", time.perf_counter() - begun, costs.figures())
    return costs.as_dict()


def _read(file: Path | None) -> dict[str, Any] | None:
    try:
        state = json.loads(file.read_text(encoding="ascii")) if file is not None else None
    except (OSError, ValueError):
        return None
    return state if CostModel().update(state) else None


def measured(
    model: MeasuredModel, *, longest: int, on_all_ranks: Callable[[bool], bool], most_s: float = MOST_S
) -> CostModel:
    """Measure prefills, selections and recomputations of several sizes.

    Args:
        model: The model.
        longest: Most tokens of a sequence.
        on_all_ranks: As in measure_costs: ranks measure the same sizes.
        most_s: No size is begun after so many seconds.
    """
    import torch

    keys = model.cache(0)[0]
    most = min((keys.shape[0] - 1) * model.block_size, longest - 1, max(CONTEXTS))
    costs = CostModel(model.max_tokens)
    with torch.inference_mode():
        measurement = _Measurement(model, most)
        until = time.perf_counter() + most_s
        try:
            for observe, size in measurement.sizes(costs):
                # A rank that ran out of memory in a pass would leave the others waiting for it.
                if not on_all_ranks(time.perf_counter() < until and model.has_memory(size, most)):
                    break
                observe()
                for _ in range(TIMES if size <= LONG else 1):
                    observe(True)
        finally:
            measurement.clear()
    return costs


class _Measurement:
    def __init__(self, model: MeasuredModel, most: int) -> None:
        import torch

        self._model, self._most = model, most
        device = model.cache(0)[0].device
        blocks = -(-most // model.block_size)
        self._sequence = PagedSequence.of(range(1, 1 + blocks), model.block_size, str(device))  # 0 is vLLM's null block
        self._ids = torch.full((most,), _WORD, dtype=torch.int64, device=device)
        self.clear()  # a cache may hold anything, and what is not a number may be slow

    def clear(self) -> None:
        """Clear the blocks."""
        for layer in range(self._model.layers):
            for cache in self._model.cache(layer):
                cache[1 : 1 + len(self._sequence.blocks)] = 0.0

    def sizes(self, costs: CostModel) -> Iterator[tuple[Callable[..., None], int]]:
        """What to measure, the smallest first; called with True, it is observed."""
        contexts = [context for context in CONTEXTS if context <= self._most] or [self._most]
        for tokens in PREFILLS:
            if tokens <= min(self._most, self._model.max_tokens):
                yield self._prefill(costs, tokens, 0), tokens
        for context in contexts:
            some = min(512, context // 2, self._model.max_tokens)
            yield self._prefill(costs, some, context - some), some
            yield self._select(costs, context), context // 8
            for tokens in PASSES:
                if tokens < context and tokens <= self._model.max_tokens:
                    yield self._recompute(costs, tokens, context), tokens

    def _time(self, work: Callable[[], object]) -> float:
        timer = CudaTimer()
        timer.loaded()
        timer.begin()
        work()
        timer.end()
        return timer.read()[1]

    def _prefill(self, costs: CostModel, tokens: int, context: int) -> Callable[..., None]:
        positions = self._positions(context, context + tokens)

        def observe(counts: bool = False) -> None:
            ms = self._time(lambda: self._model.prefill(self._ids[positions], positions, self._sequence))
            if counts:
                costs.prefill.observe((tokens, context, 0), ms)

        return observe

    def _select(self, costs: CostModel, context: int) -> Callable[..., None]:
        policy, suffix = QueryPolicy(), min(33, context // 4)
        ids, spans = self._ids[:context], [(context // 8, context - suffix)]

        def observe(counts: bool = False) -> None:
            blend = BlendPass(self._model, self._sequence)
            ms = self._time(
                lambda: take_steps(blend.select(ids, spans, spans[0][0], policy=policy, budget=Budget(share=0.1)))
            )
            if counts:
                costs.observe_passes(policy.name, 0, context, ms)

        return observe

    def _recompute(self, costs: CostModel, tokens: int, context: int) -> Callable[..., None]:
        # Apart from each other, as selected tokens are.
        positions = (self._positions(0, tokens) * (context - 1)) // max(tokens - 1, 1)

        def observe(counts: bool = False) -> None:
            blend = BlendPass(self._model, self._sequence)
            ms = self._time(lambda: take_steps(blend.compute(self._ids, positions, context)))
            if counts:
                costs.observe_passes(QueryPolicy.name, tokens, context, ms, selects=False)

        return observe

    def _positions(self, first: int, last: int) -> Tensor:
        import torch

        return torch.arange(first, last, device=self._ids.device)
