"""The suffix pass over fixed tensors, as a CUDA graph replays it, against the same pass launched layer by layer."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from paged_kit import drained

from lmcache_rag.budget import Budget
from lmcache_rag.connector import cuda_graph as captured_module
from lmcache_rag.connector.attention import PagedSequence
from lmcache_rag.connector.blend_pass import BlendPass
from lmcache_rag.connector.cuda_graph import ROWS, CapturedQueryPass
from lmcache_rag.connector.model_runner import VLLMModel, capture_unsupported_reason

BLOCK, BLOCKS, LONGEST = 16, 64, 700
HEADS, KV_HEADS, SIZE, LAYERS, WIDTH = 8, 2, 64, 4, 96

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


class SmallModel:
    """Random layers over a paged cache; positions are embedded, so that a wrong one shows.

    What has no slot is written to the last block, which is nobody's.
    """

    layers, kv_heads, max_tokens = LAYERS, KV_HEADS, 512

    def __init__(self, device: str) -> None:
        torch.manual_seed(5)
        self.device, self.captured, self.passes = device, None, 0
        self.addresses: set[int] = set()
        self._embed, self._place = (torch.randn(count, WIDTH, device=device) for count in (50, LONGEST + 100))
        self._in, self._out = (
            torch.randn(LAYERS, *shape, device=device) / shape[0] ** 0.5
            for shape in ((WIDTH, (HEADS + 2 * KV_HEADS) * SIZE), (HEADS * SIZE, WIDTH))
        )
        self.caches = torch.full((LAYERS, 2, BLOCKS, BLOCK, KV_HEADS, SIZE), float("nan"), device=device)

    def place(self, sequence: PagedSequence, positions: torch.Tensor) -> None:
        """Random KV at these positions: what was loaded."""
        slots, shape = sequence.slots(positions), (LAYERS, 2, len(positions), KV_HEADS, SIZE)
        self.caches[:, :, slots // BLOCK, slots % BLOCK] = torch.randn(shape).to(self.device)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, attention: Any) -> torch.Tensor:
        self.passes += 1
        self.addresses.add(ids.data_ptr())
        hidden = self._embed[ids.long()] + self._place[positions]
        for layer in range(LAYERS):
            normed = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
            heads = (normed @ self._in[layer]).unflatten(-1, (-1, SIZE))
            query, key, value = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
            keys, values = self.caches[layer]
            attention.before_write(layer, key, value, keys, values)
            to = slots.masked_fill(slots < 0, BLOCKS * BLOCK - 1)
            keys[to // BLOCK, to % BLOCK] = key
            values[to // BLOCK, to % BLOCK] = value
            out = torch.full_like(query, float("nan"))
            attention.attend(layer, query.contiguous(), keys, values, SIZE**-0.5, out)
            hidden = hidden + out.flatten(1) @ self._out[layer]
        return hidden

    def sum_over_ranks(self, scores: torch.Tensor) -> torch.Tensor:
        return scores


class EagerGraph:
    """Does the work again at each replay, as a graph would."""

    def __init__(self, capture_context: Any = None) -> None:
        self.replays = 0

    def capture(self, work: Callable[[], None]) -> None:
        self._work = work
        work()

    def replay(self) -> None:
        self.replays += 1
        self._work()


class CudaGraph(captured_module.CudaGraph):
    replays = 0

    def replay(self) -> None:
        self.replays += 1
        super().replay()


class Spy:
    """Policy `query` that keeps what it observed."""

    name: ClassVar[str] = "query"
    check_layer = None

    def __init__(self, window: int = 64, from_layer: float = 0.5, reduce: str = "sum") -> None:
        self._asks = {"window": window, "from_layer": from_layer, "reduce": reduce}

    def scores(self, layout: Any, passes: Any) -> torch.Tensor:
        self.observed: torch.Tensor = passes.suffix_attention(**self._asks)
        return self.observed


class Request:
    """A prompt: 32 exact tokens, chunks with a gap of 5 before each, and a suffix."""

    def __init__(self, chunks: list[int], suffix: int, seed: int) -> None:
        rng = random.Random(seed)
        end, self.spans = 32, []
        for length in chunks:
            self.spans.append((end + 5, end + 5 + length))
            end += 5 + length
        self.ids = [rng.randrange(50) for _ in range(end + suffix)]
        self.blocks = rng.sample(range(BLOCKS - 1), -(-len(self.ids) // BLOCK))

    def run(self, model: SmallModel, policy: Spy) -> tuple[Any, torch.Tensor]:
        """The outcome, and the sequence's KV up to the end of the prompt."""
        sequence = PagedSequence.of(self.blocks, BLOCK, model.device)
        torch.manual_seed(len(self.ids))
        places = [torch.arange(32), *(torch.arange(first, last) for first, last in self.spans)]
        model.place(sequence, torch.cat(places).to(model.device))
        ids = torch.tensor(self.ids, device=model.device)
        with torch.inference_mode():
            outcome = drained(
                BlendPass(model, sequence).run(ids, self.spans, 32, policy=policy, budget=Budget(share=0.2))
            )  # type: ignore[arg-type]
        kv = model.caches.flatten(2, 3)[:, :, sequence.slots(torch.arange(len(ids) - 64, len(ids)).to(model.device))]
        return outcome, kv


def captured(model: SmallModel, **changes: Any) -> Any:
    """Capture the model's pass; returns the graph."""
    graph = EagerGraph() if model.device == "cpu" else CudaGraph()
    facts: dict[str, Any] = {"from_layer": 0.5, "reduce": "sum", **changes}
    model.captured = CapturedQueryPass(
        model.forward,
        layers=LAYERS,
        kv_heads=KV_HEADS,
        block_size=BLOCK,
        longest=LONGEST,
        device=model.device,
        graph=graph,
        **facts,
    )
    model.captured.capture()
    return graph


LONG, SHORT = Request([200, 150, 200], 80, 1), Request([70, 40], 12, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_a_replay_is_the_pass_that_was_launched(device: str, reduce: str) -> None:
    launched, replayed = SmallModel(device), SmallModel(device)
    graph = captured(replayed, reduce=reduce)
    requests = [LONG, SHORT, Request([33], 64, 3), Request([90] * 4, 1, 4), LONG]
    for number, request in enumerate(requests, start=1):
        was, now = Spy(reduce=reduce), Spy(reduce=reduce)
        want, want_kv = request.run(launched, was)
        got, got_kv = request.run(replayed, now)
        assert graph.replays == number
        torch.testing.assert_close(now.observed, was.observed, atol=1e-4, rtol=1e-3)
        assert was.observed.sum() > 0
        assert (got.recomputed, got.gaps) == (want.recomputed, want.gaps)
        torch.testing.assert_close(got.observed_sum, want.observed_sum, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(got_kv, want_kv, atol=1e-3, rtol=1e-3, equal_nan=True)
        assert not want_kv[:, :, -1:].isnan().any(), "the suffix's KV was written"


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_of_others_are_left_alone(device: str) -> None:
    model = SmallModel(device)
    captured(model)
    assert model.caches[:, :, :-1].isnan().all(), "the capture wrote KV"
    SHORT.run(model, Spy())
    others = sorted(set(range(BLOCKS - 1)) - set(SHORT.blocks))
    assert model.caches[:, :, others].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_damage_shows(device: str) -> None:
    model = SmallModel(device)
    graph = captured(model)
    outcome, _ = SHORT.run(model, Spy())
    assert outcome.observed_sum.isfinite()
    place = model.place

    def damaged(sequence: PagedSequence, positions: torch.Tensor) -> None:
        place(sequence, positions)
        slot = sequence.slots(positions[40])
        model.caches[1, 1, slot // BLOCK, slot % BLOCK, 0, 3] = float("nan")

    model.place = damaged  # type: ignore[method-assign]
    outcome, _ = SHORT.run(model, Spy())
    assert not outcome.observed_sum.isfinite()
    model.place = place  # type: ignore[method-assign]
    outcome, _ = SHORT.run(model, Spy())
    assert outcome.observed_sum.isfinite(), "damage outlived its request"
    assert graph.replays == 3


@pytest.mark.parametrize(
    ("request_", "policy"),
    [
        (SHORT, {"reduce": "max"}),
        (SHORT, {"from_layer": 0.0}),
        (LONG, {"window": ROWS + 1}),
        (Request([350, 350], 12, 5), {}),  # longer than the tensors
    ],
)
def test_anything_else_is_launched(request_: Request, policy: dict[str, Any]) -> None:
    model, launched = SmallModel("cpu"), SmallModel("cpu")
    graph = captured(model)
    now, was = Spy(**policy), Spy(**policy)
    request_.run(model, now)
    request_.run(launched, was)
    assert graph.replays == 0
    assert torch.equal(now.observed, was.observed)


def test_every_replay_reads_the_same_tensors() -> None:
    model = SmallModel("cpu")
    graph = captured(model)
    model.addresses.clear()
    for request in (LONG, SHORT, LONG):
        watch = model.captured
        sequence = PagedSequence.of(request.blocks, BLOCK, "cpu")
        model.place(sequence, torch.arange(len(request.ids)))
        rows = torch.arange(len(request.ids) - 10, len(request.ids))
        watch.run(
            torch.tensor(request.ids)[rows],
            rows,
            sequence.slots(rows),
            sequence,
            end=len(request.ids),
            hidden=torch.arange(5),
        )
    assert graph.replays == 3
    assert len(model.addresses) == 1


# -- in a vLLM worker ---------------------------------------------------------------------------------------------


def config(**changes: Any) -> Any:
    facts: dict[str, Any] = {"eager": False, "ranks": 1, "tokens": 8192, "sleep": False, "prefetch": 0, **changes}
    return SimpleNamespace(
        model_config=SimpleNamespace(
            supports_multimodal_inputs=False,
            enforce_eager=facts["eager"],
            enable_sleep_mode=facts["sleep"],
            max_model_len=LONGEST,
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=facts["ranks"]),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=facts["tokens"]),
        offload_config=SimpleNamespace(prefetch=SimpleNamespace(offload_group_size=facts["prefetch"])),
        compilation_config=SimpleNamespace(static_forward_context={"a": Layer()}),
    )


class Layer:
    kv_cache_dtype = "auto"

    class Implementation:
        num_heads = HEADS

        def forward(self) -> None:
            """vLLM's."""

    impl = Implementation()
    kv_cache = torch.zeros(4, 2, BLOCK, KV_HEADS, SIZE)


@pytest.mark.parametrize("changes", [{"eager": True}, {"tokens": 63}, {"sleep": True}, {"prefetch": 2}], ids=str)
def test_what_cannot_be_captured_is_known_before(changes: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert not capture_unsupported_reason(config())
    reason = capture_unsupported_reason(config(**changes))
    assert reason
    caplog.set_level(logging.INFO, "lmcache_rag")
    assert VLLMModel(config(**changes), None)._capture(Spy()) is None  # type: ignore[arg-type]
    assert reason in caplog.text


def test_a_capture_that_fails_is_told_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refuses:
        def __init__(self, capture_context: Any) -> None:
            assert capture_context is None, "one rank records on a stream of its own"

        def capture(self, work: Callable[[], None]) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    from lmcache_rag.connector import model_runner as model_module
    from lmcache_rag.policies import QueryPolicy

    monkeypatch.setattr(model_module, "CudaGraph", Refuses)
    model = VLLMModel(config(), None)
    assert model._capture(QueryPolicy()) is None
    assert "not permitted when stream is capturing" in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING"]

    monkeypatch.setattr(model_module, "CudaGraph", EagerGraph)
    monkeypatch.setattr(model, "_pass", lambda *args, as_graphs: passes.append((len(args[0]), as_graphs)))
    passes: list[tuple[int, bool]] = []
    watch = model._capture(QueryPolicy())
    assert watch is not None
    assert passes == [(ROWS, False)]
    asked = {"from_layer": QueryPolicy().from_layer, "reduce": QueryPolicy().reduce}
    assert watch.supports(rows=QueryPolicy().window, end=LONGEST, **asked)
    assert not watch.supports(rows=1, end=LONGEST + 1, **asked)


@pytest.mark.parametrize("others", [True, False])
def test_ranks_record_together_and_all_replay_or_none(monkeypatch: pytest.MonkeyPatch, others: bool) -> None:
    from lmcache_rag.connector import model_runner as model_module
    from lmcache_rag.policies import QueryPolicy

    given: list[Any] = []

    class Records(EagerGraph):
        def __init__(self, capture_context: Any) -> None:
            super().__init__()
            given.append(capture_context)

    monkeypatch.setattr(model_module, "CudaGraph", Records)
    model = VLLMModel(config(ranks=2), None)
    monkeypatch.setattr(model, "_pass", lambda *args, as_graphs: None)
    votes: list[bool] = []
    monkeypatch.setattr(model, "all_ranks", lambda fine: votes.append(fine) or (fine and others))
    assert (model._capture(QueryPolicy()) is not None) == others
    assert votes == [True]
    assert given[0].func is model_module.vllm_internals.graph_capture_stream
