"""The embedded engine blends a prompt only where that is predicted to start its answer earlier."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model

from lmcache_rag.costs import EXPLORE, KEEP
from lmcache_rag.engines.base import BlendOptions, Completion, QueryPrompt, Sampling
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_blend import shift_keys, shift_tables
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.prompt import PromptBuilder, PromptFormat

SHORT = Sampling(max_tokens=1)


class World:
    """An engine over a tiny model, and a prompt of which it has all chunks."""

    def __init__(
        self, tokenizer: Any, folder: Path, texts: list[str], *, form: PromptFormat | None = None, **options: Any
    ) -> None:
        model = HFModel.wrap(tiny_model("llama"), tokenizer)
        self.engine = EmbeddedEngine.from_model(model, name="tiny", revision="0", kv_dir=folder, **options)
        self.builder = PromptBuilder(tokenizer, self.engine.info, format=form)
        self.texts = texts
        list(self.engine.precompute(map(self.builder.ingest, texts)))
        self.gate = self.engine._gate

    def prompt(self, question: str = "What?") -> QueryPrompt:
        return self.builder.query(self.texts[::-1], question)

    def ask(self, blend: BlendOptions | None = None) -> Completion:
        return self.engine.generate(self.prompt(), SHORT, blend or BlendOptions())

    def teach(self, *, prefill: float, passes: float = 0.001, load: float = 0.001) -> None:
        """Milliseconds for each token; those of a load are for all of it."""
        costs = self.gate.costs = type(self.gate.costs)()
        for size in (16, 64, 256, 1024) * KEEP:
            costs.prefill.observe((size, 0, 0), size * prefill)
            costs.load.observe((0, size, 0), load)
            costs.load.observe((0, 0, size), load)
            costs.observe_passes("query", size, 1024, size * passes)


@pytest.fixture
def world(tokenizer: Any, tmp_path: Path, corpus: list[str]) -> World:
    return World(tokenizer, tmp_path, corpus, min_gain=0.1)


def test_what_is_unknown_is_blended_and_measured(world: World) -> None:
    first = world.ask()
    assert (first.stats.decision, first.stats.blended) == ("blended: costs unknown", True)
    costs = world.gate.costs
    assert (costs.load.count, costs.passes["query"].count, costs.prefill.count) == (1, 1, 1)


def test_a_prompt_that_is_computed_as_fast_is_computed(world: World) -> None:
    world.teach(prefill=0.001, passes=3.0)
    done = world.ask()
    assert (done.stats.decision, done.stats.blended) == ("computed: not faster", False)
    assert (done.warnings, done.missed, done.stats.chunks_missed) == ((), (), 0), "no chunk is missing"
    assert 0 < done.stats.predicted_compute_ms < done.stats.predicted_blend_ms
    exact = world.ask(BlendOptions(enabled=False))
    assert done.token_ids == exact.token_ids
    assert exact.stats.decision == ""


def test_a_chunk_after_the_prefix_is_exact_in_both(tokenizer: Any, tmp_path: Path, corpus: list[str]) -> None:
    world = World(tokenizer, tmp_path, corpus, form=PromptFormat(neutral=()), min_gain=0.1)
    world.teach(prefill=0.001, passes=3.0)
    prompt = world.prompt()
    held = world.engine._chunks.held(prompt)
    (first, *_) = prompt.chunks
    assert set(held) == set(prompt.chunks)
    done = world.ask()
    assert first.start == prompt.prefix_tokens
    assert done.stats.prefix_tokens == first.end


def test_after_neutral_passages_no_chunk_is_exact(world: World) -> None:
    prompt = world.prompt()
    assert prompt.chunks[0].start == prompt.prefix_tokens
    done = world.ask(BlendOptions("none", 0.0))
    cached = sum(span.end - span.start for span in prompt.chunks)
    assert (done.stats.prefix_tokens, done.stats.reused_tokens) == (prompt.prefix_tokens, cached)
    world.teach(prefill=0.001, passes=3.0)
    done = world.ask()
    assert (done.stats.decision, done.stats.prefix_tokens) == ("computed: not faster", prompt.prefix_tokens)


def test_keys_move_from_after_neutral_passages(world: World) -> None:
    """KV that is reused as it is, against that of a forward pass over prefix, neutral passages and chunk."""
    engine, builder, text = world.engine, world.builder, world.texts[0]
    prompt = builder.query([text], "What?")
    (span,) = prompt.chunks
    state = engine.prefill(prompt, BlendOptions("none", 0.0, always=True), room=1)
    ingest = builder.ingest(text)
    model = engine._model
    cache = model.buffer(len(ingest.token_ids))
    ids, places = torch.tensor(ingest.token_ids), torch.arange(len(ingest.token_ids))
    model.forward(ids[None], places, cache)
    cos, sin = shift_tables(model.rotary, places[ingest.chunk_start :], torch.arange(span.start, span.end))
    for mine, fresh in zip(state._cache.layers, cache.layers, strict=True):
        want = shift_keys(fresh.all_keys[0, :, ingest.chunk_start :], cos, sin)
        torch.testing.assert_close(mine.all_keys[0, :, span.start : span.end], want, atol=1e-4, rtol=1e-4)


def test_a_blend_that_is_faster_is_made(world: World) -> None:
    world.teach(prefill=1.0)
    done = world.ask()
    assert (done.stats.decision, done.stats.blended) == ("blended", True)
    assert done.stats.predicted_blend_ms < done.stats.predicted_compute_ms


def test_a_slower_store_moves_the_boundary(world: World) -> None:
    world.teach(prefill=0.1)
    assert world.ask().stats.decision == "blended"
    world.teach(prefill=0.1, load=50.0)
    assert world.ask().stats.decision == "computed: not faster"


def test_auto_counts_what_blends_recompute(world: World) -> None:
    first = world.ask().stats
    held = world.engine._chunks.held(world.prompt())
    world.teach(prefill=1.0, passes=1.0)
    most = world.gate.decide(world.prompt(), held, BlendOptions())["predicted_blend_ms"]
    world.gate.costs.observe_recomputed("query", first.recomputed_tokens, 10 * first.recomputed_tokens)
    assert world.gate.decide(world.prompt(), held, BlendOptions())["predicted_blend_ms"] < 0.7 * most
    fixed = [world.gate.decide(world.prompt(), held, BlendOptions(ratio=1.0))["predicted_blend_ms"] for _ in range(2)]
    assert fixed[0] == fixed[1] > most / 2, "a share is what it is"


def test_a_blend_shows_how_much_auto_recomputes(world: World) -> None:
    done = world.ask().stats
    assert world.gate.costs.recomputed("query", 10**6) < 10**6 or done.budget_reason in ("ceiling", "all")
    world.gate.costs = type(world.gate.costs)()
    world.ask(BlendOptions(ratio=0.1))
    assert world.gate.costs.recomputed("query", 1000) == 1000, "only auto shows that"


@pytest.mark.parametrize("how", ["request", "engine"])
def test_always_means_whatever_it_takes(tokenizer: Any, tmp_path: Path, corpus: list[str], how: str) -> None:
    world = World(tokenizer, tmp_path, corpus, min_gain=None if how == "engine" else 0.1)
    world.teach(prefill=0.001, passes=3.0)
    done = world.ask(BlendOptions(always=how == "request"))
    assert (done.stats.decision, done.stats.blended) == ("blended: always", True)


def test_a_prefill_for_logits_is_always_blended(world: World) -> None:
    world.teach(prefill=0.001, passes=3.0)
    spent = world.engine.prefill(world.prompt(), BlendOptions()).spent
    assert spent["selection"] > 0


def test_nothing_is_decided_without_chunks(world: World) -> None:
    world.teach(prefill=0.001, passes=3.0)
    world.engine.forget([(world.prompt().fingerprint, chunk.key) for chunk in world.prompt().chunks])
    done = world.ask()
    assert (done.stats.decision, done.stats.chunks_missed) == ("", len(world.texts))
    assert done.missed == tuple(range(len(world.texts)))


def test_costs_are_measured_again_once_in_a_while(world: World) -> None:
    world.teach(prefill=0.01, passes=0.001, load=4.0)
    held = world.engine._chunks.held(world.prompt())
    decided = [str(world.gate.decide(world.prompt(), held, BlendOptions())["decision"]) for _ in range(2 * EXPLORE)]
    assert decided.count("blended: costs measured again") in (1, 2)
    assert decided.count("computed: not faster") >= 2 * EXPLORE - 2


def test_memory_and_files_are_told_apart(world: World) -> None:
    prompt = world.prompt()
    world.engine._chunks.clear_memory()
    assert set(world.engine._chunks.held(prompt).values()) == {"l2"}
    world.ask()
    assert set(world.engine._chunks.held(prompt).values()) == {"l1"}


def test_several_threads_may_ask(world: World) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(3):
                world.ask()
        except BaseException as problem:
            failed.append(problem)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
