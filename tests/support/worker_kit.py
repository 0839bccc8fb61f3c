"""A connector's worker with one request, over a paged model and a stand-in for LMCache's client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from blend_kit import PREFIX, Case
from paged_kit import PagedModel

from lmcache_rag.budget import Ratio, parse_budget
from lmcache_rag.connector import metrics
from lmcache_rag.connector.admission import Allowance
from lmcache_rag.connector.attention import PagedSequence
from lmcache_rag.connector.metadata import BlendPlan, Match
from lmcache_rag.connector.worker import BlendWorker
from lmcache_rag.engines.hf_model import HFModel

BLOCK = 16


class Model(PagedModel):
    """A paged model with what else a worker asks of it."""

    block_size = BLOCK
    device = torch.device("cpu")

    def cache(self, layer: int) -> Any:
        return self.caches[layer]

    adapter: Any = None  # of the pass
    slots = True  # whether another adapter fits beside those of vLLM's step

    def all_ranks(self, fine: bool) -> bool:
        return fine

    @contextlib.contextmanager
    def using(self, adapter: Any) -> Iterator[None]:
        before, self.adapter = self.adapter, adapter
        try:
            yield
        finally:
            self.adapter = before

    def step_adapters(self) -> Any:
        return contextlib.nullcontext()

    def has_slot(self, adapter: Any) -> bool:
        return adapter is None or self.slots


class Link:
    """LMCache's end: places the case's KV, or fails in the way that is wanted."""

    def __init__(self, case: Case, hf: HFModel, model: Model, sequence: PagedSequence, fault: str = "") -> None:
        self._place = lambda: case.place(hf, model, sequence)
        self._model, self.fault = model, fault
        self.is_healthy = fault != "dead"
        self.asked: list[str] = []

    deadline = 0.05

    def submit_exact(self, plan: BlendPlan) -> str:
        self.asked.append("exact")
        return "exact"

    def submit_matches(self, plan: BlendPlan, matches: Any) -> str:
        self.asked.append("matches")
        return "matches"

    def give_back(self, plan: BlendPlan) -> None:
        self.asked.append("give back")

    def lost(self, since: float) -> bool:
        return self.fault == "ended"

    def answered(self, future: str, seconds: float) -> bool:
        return self.fault != "late"

    def there(self, future: str) -> bool:
        return self.fault != "late"

    def arrived(self, future: str, seconds: float) -> bool:
        if self.fault == "late":
            return False
        self._place()
        if self.fault in ("damaged key", "damaged value", "damaged last value"):
            # A whole block, of which no policy selects all; above hkvd's check layer, which would heal it.
            layer = self._model.layers - 1 if "last" in self.fault else 2
            self._model.caches[layer]["value" in self.fault][5, :, 0, 0] = float("nan")
        return True


class World:
    """A worker with one request: a prefix that vLLM holds, chunks that LMCache holds, a question."""

    def __init__(self, hf: HFModel, fault: str = "", policy: str = "query", ratio: Ratio = 0.3, **options: Any) -> None:
        self.hf, self.case = hf, Case(hf, [40, 30, 50], [3, 0, 7], 12, 1)
        self.model = self.make_model(hf)
        self.sequence = PagedSequence.of(range(2, 16), BLOCK, "cpu")
        prefix = self.case.kv[0]
        for layer in range(hf.layers):
            self.model.write(self.sequence, layer, 0, prefix.keys[layer], prefix.values[layer])
        self.link = Link(self.case, hf, self.model, self.sequence, fault)
        self.worker = BlendWorker(self.model, self.link, **options)  # type: ignore[arg-type]
        matches = tuple(Match(a, b, PREFIX, PREFIX + b - a) for a, b in self.case.spans)
        self.end = len(self.case.ids) - 1
        self.plan = BlendPlan(
            "r",
            tuple(self.case.ids),
            PREFIX,
            PREFIX,
            matches,
            self.end,
            tuple(range(2, 16)),
            policy,
            parse_budget(ratio),
        )

    def make_model(self, hf: HFModel) -> Model:
        return Model(hf, layout="NHD", block=BLOCK, blocks=20)

    def run(self, *, early: bool = False) -> Any:
        if early:
            self.worker.run_now([self.plan])
        self.worker.run([] if early else [self.plan], Allowance())
        self.worker.finish()
        (result,) = self.worker.take_results()
        assert not result.failure or result.failure in metrics.REASONS
        return result

    def is_full_prefill(self) -> bool:
        full = self.hf.buffer(len(self.case.ids))
        ids = torch.tensor(self.case.ids)
        self.hf.forward(ids[None], torch.arange(len(ids)), full)
        pairs = [
            (got, want[0, :, : self.end])
            for layer in range(self.hf.layers)
            for got, want in zip(
                self.model.read(self.sequence, layer, self.end),
                (full.layers[layer].keys, full.layers[layer].values),
                strict=True,
            )
        ]
        return all(torch.allclose(got, want, atol=1e-3, rtol=1e-3) for got, want in pairs)
