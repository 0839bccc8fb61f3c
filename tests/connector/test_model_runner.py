"""What tensor-parallel ranks ask for before a blend. The numbers are as on a GPU, whose counters are played here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_rag.connector import model_runner
from lmcache_rag.connector.model_runner import MARGIN, PassMemory, measure_pass_memory

HEADS, KV_HEADS, SIZE, SPLITS = 8, 2, 64, 32
CACHE = (torch.zeros(4, 16, KV_HEADS, SIZE, dtype=torch.bfloat16),) * 2


class Counters:
    """torch.cuda's, of a model whose passes take `fixed` and so much for each token, beside what was there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fixed: int, token: int) -> None:
        self.fixed, self.token, self.passes, self.there, self.peak = fixed, token, [], 5000, 10**9
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "peak", self.there))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.there)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)

    def run(self, ids: Any, positions: Any, slots: Any) -> None:
        assert len(ids) == len(positions) == len(slots)
        assert set(slots.tolist()) == {-1}, "nothing is written"
        self.passes.append(len(ids))
        self.peak = self.there + self.fixed + self.token * len(ids)

    def measured(self, most: int) -> PassMemory:
        return measure_pass_memory(self.run, most, heads=HEADS, cache=CACHE, splits=SPLITS)


@pytest.mark.parametrize(("most", "passes"), [(8192, [512, 2048]), (1000, [512, 1000]), (300, [300, 300])])
def test_what_passes_take_is_told_from_two_of_them(
    monkeypatch: pytest.MonkeyPatch, most: int, passes: list[int]
) -> None:
    counters = Counters(monkeypatch, fixed=1_000_000, token=3_000)
    found = counters.measured(most)
    assert counters.passes == passes
    for tokens in (16, most):
        taken = 1_000_000 + 3_000 * tokens if most > 300 else 1_000_000 * tokens // most + 3_000 * tokens
        assert found.need(tokens, 0) >= MARGIN * taken
    assert found.need(most, 0) < 2 * MARGIN * (1_000_000 + 3_000 * most) + 100_000_000


def test_longer_passes_and_longer_prompts_take_more(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Counters(monkeypatch, fixed=0, token=3_000).measured(8192)
    assert found.need(2000, 0) - found.need(1000, 0) >= MARGIN * 3_000_000 - 1
    kv = 2 * KV_HEADS * SIZE * 2  # bytes that a look at one layer copies for each token
    assert found.need(1000, 20_000) - found.need(1000, 10_000) >= MARGIN * 10_000 * kv - 1
    partial = SPLITS * 128 * HEADS * SIZE * 4  # float32 results of few rows, in parts
    assert found.need(16, 0) >= partial


def test_there_is_room_or_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def empty(size: int, **how: Any) -> Any:
        asked.append(size)
        if size > 10_000:
            raise torch.OutOfMemoryError
        return SimpleNamespace()

    found = PassMemory(fixed=100.0, per_token=10.0, per_context_token=1.0, device="cpu")
    assert found.reserve(16, 100)
    monkeypatch.setattr(torch, "empty", empty)
    assert found.reserve(100, 100)
    assert not found.reserve(1000, 100)
    assert asked == [found.need(100, 100), found.need(1000, 100)] == [1500, 12750]
    assert model_runner.MARGIN == 1.25
