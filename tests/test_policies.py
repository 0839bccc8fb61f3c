"""Which tokens each policy computes again: by hand, in the embedded engine, on a paged cache; see test_ranks.py too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blend_kit import Case
from models import tiny_model
from paged_kit import PagedModel, drained

from lmcache_rag.budget import Budget
from lmcache_rag.connector import blend_pass
from lmcache_rag.connector.attention import PagedSequence
from lmcache_rag.engines import hf_blend
from lmcache_rag.engines.hf_blend import ModelPasses
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.policies import HKVDPolicy, Layout, QueryPolicy, get_policy, how_many, pool_inside_chunks, select

SPANS = [(10, 20), (25, 29)]  # 10 and 4 tokens
ATTENTION = [*(0.1, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0, 0.2, 0.0, 0.3), *(0.8, 0.0, 0.0, 0.4)]
DEVIATION = [*(5.0, 1.0, 9.0, 1.0, 2.0, 0.0, 9.0, 0.0, 3.0, 4.0), *(6.0, 0.5, 7.0, 8.0)]


class Made:
    """Passes with results made by hand."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def suffix_attention(self, **how: Any) -> torch.Tensor:
        self.asked.append(how)
        return torch.tensor(ATTENTION)

    def deviation(self, **how: Any) -> torch.Tensor:
        self.asked.append(how)
        return torch.tensor(DEVIATION)


def selected(policy: Any, share: float) -> list[int]:
    return select(policy, Budget(share=share), Layout.of(SPANS), Made()).positions.tolist()


def test_query_takes_what_the_question_attends_to_most() -> None:
    alone = QueryPolicy(pool=1)
    assert selected(alone, 1 / 14) == [13]
    assert selected(alone, 2 / 14) == [13, 25]
    assert selected(alone, 4 / 14) == [13, 19, 25, 28]
    assert selected(alone, 6 / 14) == [10, 13, 17, 19, 25, 28]


def test_query_takes_their_neighbours_in_the_chunk() -> None:
    query = get_policy("query")
    assert selected(query, 5 / 14) == [11, 12, 13, 14, 15]  # two on either side
    assert selected(query, 8 / 14) == [11, 12, 13, 14, 15, 25, 26, 27]  # and never those of another chunk
    assert selected(query, 9 / 14) == [11, 12, 13, 14, 15, 25, 26, 27, 28]


def test_query_uses_the_last_tokens_and_upper_half() -> None:
    made = Made()
    select(get_policy("query"), Budget(share=0.3), Layout.of(SPANS), made)
    assert made.asked == [{"window": 64, "from_layer": 0.5, "reduce": "sum"}]


def test_hkvd_takes_what_deviates_most() -> None:
    assert selected(get_policy("hkvd"), 2 / 14) == [12, 16]
    assert selected(get_policy("hkvd"), 5 / 14) == [12, 16, 25, 27, 28]
    made = Made()
    select(HKVDPolicy(layer=3), Budget(share=0.3), Layout.of(SPANS), made)
    assert made.asked == [{"layer": 3}]


def test_head_takes_the_beginning_of_each_chunk() -> None:
    assert selected(get_policy("head"), 2 / 14) == [10, 25]
    assert selected(get_policy("head"), 7 / 14) == [10, 11, 12, 13, 14, 25, 26]  # half of each, however long


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_none_and_all_ask_for_no_pass(share: float) -> None:
    made, layout, budget = Made(), Layout.of(SPANS), Budget(share=share)
    assert select(get_policy("none"), budget, layout, made).positions.tolist() == []
    assert select(get_policy("all"), budget, layout, made).positions.tolist() == layout.cached.tolist()
    for policy in ("query", "hkvd", "head"):
        if share != 0.5:
            assert len(select(get_policy(policy), budget, layout, made).positions) == share * 14
    assert made.asked == []


def test_of_equal_scores_the_earlier_is_taken() -> None:
    class Equal(Made):
        def suffix_attention(self, **how: Any) -> torch.Tensor:
            return torch.ones(3000)

    chosen = select(QueryPolicy(), Budget(share=0.1), Layout.of([(0, 1000), (2000, 4000)]), Equal())
    assert chosen.positions.tolist() == list(range(300))


def tokens(policy: Any, budget: Budget, cached: int) -> int:
    choice = how_many(policy, budget, cached, 1)
    assert choice is not None
    return choice.tokens


def test_how_many_is_the_nearest_number() -> None:
    query = get_policy("query")
    share = Budget(share=0.15)
    assert [tokens(query, share, total) for total in (0, 3, 4, 10, 64, 100)] == [0, 0, 1, 2, 10, 15]
    assert tokens(get_policy("none"), Budget(share=0.5), 10) == 0
    assert tokens(get_policy("all"), Budget(share=0.5), 10) == 10


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 9, 99])
def test_pooling_stays_inside_each_chunk(width: int) -> None:
    layout, scores = Layout.of(SPANS), torch.tensor(ATTENTION)
    want = []
    for first, last in ((0, 10), (10, 14)):
        want += [max(ATTENTION[max(first, i - width // 2) : min(last, i + width // 2 + 1)]) for i in range(first, last)]
    assert pool_inside_chunks(scores, layout, width).tolist() == torch.tensor(want).tolist()


# -- what both engines make of it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> HFModel:
    return HFModel.wrap(tiny_model("llama"), None)


def differing(
    got: list[tuple[torch.Tensor, torch.Tensor]], kept: list[tuple[torch.Tensor, torch.Tensor]], case: Case
) -> list[int]:
    """Positions in the chunks whose keys differ in the last layer."""
    apart = (got[-1][0] - kept[-1][0]).abs().amax((0, 2)) > 1e-6
    return [place for start, end in case.spans for place in range(start, end) if apart[place]]


def embedded(model: HFModel, case: Case, policy: str, share: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = torch.tensor(case.ids)
    cache = model.buffer(len(ids))
    hf_blend.blended_prefill(
        model, case.prompt, ids, cache, case.kv[0], case.hits, get_policy(policy), Budget(share=share)
    )
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def paged(model: HFModel, case: Case, policy: str, share: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    sequence = PagedSequence.of(range(12), 16, "cpu")
    holder = PagedModel(model, layout="NHD", block=16, blocks=12)
    case.place(model, holder, sequence)
    ids = torch.tensor(case.ids)
    with torch.inference_mode():
        drained(
            blend_pass.BlendPass(holder, sequence).run(
                ids, case.spans, case.exact, policy=get_policy(policy), budget=Budget(share=share)
            )
        )
    end = case.spans[-1][1]
    return [holder.read(sequence, layer, end) for layer in range(model.layers)]


@pytest.mark.parametrize("engine", [embedded, paged])
@pytest.mark.parametrize("policy", ["query", "hkvd", "head"])
def test_an_engine_recomputes_what_the_policy_picks(
    engine: Any, policy: str, model: HFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(model, [10, 4], [1, 5], 6, 0)
    (first, _), (second, _) = case.spans
    for passes in (ModelPasses, blend_pass.ModelPasses):
        monkeypatch.setattr(passes, "suffix_attention", lambda self, **how: torch.tensor(ATTENTION))
        monkeypatch.setattr(passes, "deviation", lambda self, **how: torch.tensor(DEVIATION))
    kept = engine(model, case, "none", 0.0)
    again = engine(model, case, policy, 5 / 14)
    want = {
        "query": [first + 1, first + 2, first + 3, first + 4, first + 5],
        "hkvd": [first + 2, first + 6, second, second + 2, second + 3],
        "head": [first, first + 1, first + 2, second, second + 1],
    }[policy]
    assert differing(again, kept, case) == want


# -- the real model ---------------------------------------------------------------------------------------------------


class Reversed:
    """A policy's scores with the order turned round."""

    name = "query"

    def scores(self, layout: Layout, passes: Any) -> torch.Tensor:
        return -get_policy("query").scores(layout, passes)


class Random:
    """Any tokens."""

    name = "query"

    def scores(self, layout: Layout, passes: Any) -> torch.Tensor:
        return torch.rand(len(layout.cached), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_query_is_nearer_to_exact_than_other_tokens(
    smollm2_engine: Any, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the real model, with a share of 0.15: mean distance of the first token's distribution over some questions."""
    from lmcache_rag.engines.base import BlendOptions
    from lmcache_rag.prompt import PromptBuilder

    builder, corpus = PromptBuilder(smollm2_engine.tokenizer, smollm2_engine.info), corpus[:4]
    list(smollm2_engine.precompute([builder.ingest(chunk) for chunk in corpus]))
    questions = ["What is described?", "Who is named in the text?"]
    prompts = [builder.query(corpus[1 + at :] + corpus[: 1 + at], question) for at, question in enumerate(questions)]

    def distributions(blend: BlendOptions) -> list[torch.Tensor]:
        return [smollm2_engine.prefill(prompt, blend).logits.float().log_softmax(-1) for prompt in prompts]

    exact = distributions(BlendOptions(enabled=False))

    def distance(policy: Any) -> float:
        monkeypatch.setattr(hf_blend, "select", lambda p, *rest, **options: select(policy or p, *rest, **options))
        near = distributions(BlendOptions("query", 0.15))
        return sum(float((one.exp() * (one - other)).sum()) for one, other in zip(exact, near, strict=True))

    ours, others = distance(None), {"random": distance(Random()), "reversed": distance(Reversed())}
    print(f"KL: query {ours:.4f}, {others}")
    assert all(ours < other for other in others.values())
