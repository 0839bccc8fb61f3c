"""How much is recomputed: the forms of a budget, the rule of `auto`, and what both engines make of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from blend_kit import Case
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model
from paged_kit import PagedModel, drained

from lmcache_rag.budget import (
    AUTO_RULES,
    MOST_TOKENS,
    AutoRule,
    Budget,
    BudgetReason,
    parse_budget,
    parse_budget_text,
    read_budget,
    tail_count,
)
from lmcache_rag.connector.attention import PagedSequence
from lmcache_rag.connector.blend_pass import BlendPass
from lmcache_rag.connector.metadata import Claim, Match
from lmcache_rag.engines.base import BlendOptions
from lmcache_rag.engines.hf_blend import blended_prefill
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.errors import ConfigError
from lmcache_rag.policies import HKVDPolicy, Layout, Policy, QueryPolicy, at_most, get_policy, how_many, select
from lmcache_rag.prompt import PromptBuilder

RULE = AutoRule(tail=0.1, per_chunk=10, per_prompt=20, most_per_chunk=40, most_per_prompt=60, nearly_all=0.9)

# -- its forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "budget"),
    [
        ("auto", Budget()),
        (0.15, Budget(share=0.15)),
        (1, Budget(share=1.0)),
        (0, Budget(share=0.0)),
        ({"tokens": 400}, Budget(tokens=400)),
        ({"tokens": 0}, Budget(tokens=0)),
        ({"tokens": MOST_TOKENS}, Budget(tokens=MOST_TOKENS)),
    ],
)
def test_each_form_is_read_and_written(value: Any, budget: Budget) -> None:
    assert parse_budget(value) == parse_budget(budget.wire) == parse_budget_text(str(budget)) == budget


HOSTILE = [
    *(None, True, False, "0.15", "Auto", "", "tokens=4", [], [0.1], b"auto", -0.1, 1.5, float("nan"), float("inf")),
    *(10**400, -(10**400), {}, {"tokens": None}, {"tokens": True}, {"tokens": -1}, {"tokens": 4.0}, {"tokens": "4"}),
    *({"tokens": MOST_TOKENS + 1}, {"tokens": 10**400}, {"tokens": 4, "ratio": 0.1}, {"ratio": 0.1}, {1: 2}),
    *({"tokens": {"tokens": 4}}, {"tokens": [4]}, {"tokens": float("nan")}),
]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:30])
def test_what_is_no_budget_is_refused_with_a_remedy(value: Any) -> None:
    assert read_budget(value) is None
    with pytest.raises(ConfigError) as caught:
        parse_budget(value)
    assert '{"tokens": 400}' in caught.value.remedy
    assert len(caught.value.message) < 250
    with pytest.raises(ConfigError):
        BlendOptions(ratio=value)


@pytest.mark.parametrize("text", ["", "much", "1.5", "-0.1", "nan", "tokens", "tokens=", "tokens=-1", "tokens=1e3"])
def test_a_text_that_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="tokens=N"):
        parse_budget_text(text)
    with pytest.raises(ConfigError):
        parse_budget_text(f"tokens={'9' * 5000}")


def test_a_number_of_tokens_is_at_most_all() -> None:
    assert [Budget(tokens=400).fixed(cached) for cached in (399, 1000)] == [(399, "tokens"), (400, "tokens")]
    assert Budget(share=0.15).fixed(100) == (15, "ratio")
    assert Budget().fixed(100) is None


# -- the rule ---------------------------------------------------------------------------------------------------------


def test_the_tail_is_what_may_be_left_out() -> None:
    mass = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])
    assert [tail_count(mass, tail) for tail in (0.0, 0.0625, 0.124, 0.125, 0.25, 0.49, 0.5, 1.0)] == [
        *(5, 4, 4, 3, 2, 2, 1, 1)
    ]
    assert tail_count(torch.zeros(7), 0.1) == tail_count(torch.full((7,), float("nan")), 0.1) == 1


masses = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=60).map(torch.tensor)
rules = st.builds(
    AutoRule,
    tail=st.floats(0, 1),
    per_chunk=st.integers(0, 9) | st.none(),
    per_prompt=st.integers(0, 30),
    most_per_chunk=st.integers(0, 30),
    most_per_prompt=st.integers(0, 60),
    nearly_all=st.floats(0.5, 1),
)


@given(masses, rules, st.integers(1, 6), st.integers(0, 80), st.floats(0, 1))
def test_a_count_keeps_its_bounds_and_falls_with_tail(
    mass: torch.Tensor, rule: AutoRule, chunks: int, free: int, other: float
) -> None:
    mass = mass.sort(descending=True).values
    cached = len(mass)

    def count(rule: AutoRule) -> int:
        choice = rule.choose(chunks, cached, free, mass)
        assert choice is not None
        assert (choice.reason == "all") <= (choice.tokens == cached)
        assert choice.tokens <= rule.most(chunks, cached, free)
        return choice.tokens

    low, high = sorted((rule.tail or 0.0, other))
    assert count(replace(rule, tail=high)) <= count(replace(rule, tail=low))
    floor, ceiling = rule.bounds(chunks, cached)
    assert 0 <= floor <= ceiling <= cached
    assert count(rule) >= max(floor, min(free, cached))
    known = rule.choose(chunks, cached, free)  # without the mass: if at all, then the same
    assert known is None or known == rule.choose(chunks, cached, free, mass)


@given(masses, st.floats(0, 1), st.randoms(use_true_random=False))
def test_equal_masses_in_another_order_count_alike(mass: torch.Tensor, tail: float, random: Any) -> None:
    order = list(range(len(mass)))
    random.shuffle(order)
    mass = mass.round()
    assert tail_count(mass[order].sort(descending=True).values, tail) == tail_count(
        mass.sort(descending=True).values, tail
    )


@pytest.mark.parametrize(
    ("rule", "mass", "free", "choice"),
    [
        (RULE, [100.0] * 15 + [0.0] * 485, 0, (20, "floor")),
        (RULE, [100.0] * 50 + [0.0] * 450, 0, (45, "scores")),
        (RULE, [1.0] * 500, 0, (80, "ceiling")),
        (RULE, [100.0] * 50 + [0.0] * 450, 70, (70, "free")),
        (RULE, [100.0] * 50 + [0.0] * 450, 300, (300, "free")),
        (RULE, [1.0] * 500, 450, (500, "all")),
        (RULE, [1.0] * 22, 0, (22, "all")),
        (replace(RULE, tail=None), [1.0] * 500, 0, (20, "chunks")),  # the ablation: a fixed count for each chunk
        (replace(RULE, per_chunk=None), [1.0] * 500, 0, (500, "all")),  # the ablation: the tail alone
        (replace(RULE, per_chunk=None), [100.0] + [0.0] * 499, 0, (1, "scores")),
    ],
)
def test_why_so_many(rule: AutoRule, mass: list[float], free: int, choice: tuple[int, str]) -> None:
    assert rule.choose(2, len(mass), free, torch.tensor(mass)) == choice


def test_a_rule_without_any_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="tail"):
        AutoRule(tail=None, per_chunk=None)


def test_every_chunk_adds_to_the_bounds() -> None:
    rule = AutoRule()
    assert rule.per_chunk is not None
    assert [rule.bounds(chunks, 3000)[0] for chunks in (20, 40)] == [20 * rule.per_chunk, 40 * rule.per_chunk]
    assert rule.bounds(1, 3000) == (rule.per_prompt, rule.most_per_prompt)


def test_a_long_prompt_needs_a_growing_share() -> None:
    rule = AutoRule(long_chunk=None)
    assert rule.long is not None
    shares = [rule.bounds(30, cached)[0] / cached for cached in (rule.long // 4, rule.long // 2)]
    assert shares == pytest.approx([29 / 30 / 4, 29 / 30 / 2], rel=1e-2)
    assert rule.bounds(30, 2 * rule.long) == (2 * rule.long, 2 * rule.long)
    assert replace(rule, long=None).bounds(30, 30_000) == (30 * rule.per_chunk, 30 * rule.most_per_chunk)
    assert set(AUTO_RULES) <= {"query", "hkvd", "head"}


def test_long_chunks_need_a_growing_share() -> None:
    rule = AutoRule(long=None)
    assert rule.long_chunk is not None
    shares = [rule.bounds(6, 6 * each)[0] / (6 * each) for each in (rule.long_chunk // 4, rule.long_chunk // 2)]
    assert shares == pytest.approx([5 / 6 / 4, 5 / 6 / 2], rel=1e-2)
    assert rule.bounds(12, 12 * 512)[1] == AutoRule(long=None, long_chunk=None).bounds(12, 12 * 512)[1]


def test_a_single_long_chunk_needs_no_share() -> None:
    """It misses no other chunk's text."""
    rule = AutoRule()
    assert rule.bounds(1, 20_000) == (rule.per_prompt, rule.most_per_prompt)
    assert rule.bounds(0, 0) == (0, 0)


# -- what policies make of it -----------------------------------------------------------------------------------------


class Given:
    """Passes with given results, which count how often they run."""

    def __init__(self, mass: torch.Tensor) -> None:
        self.mass, self.asked = mass, 0

    def suffix_attention(self, **how: Any) -> torch.Tensor:
        self.asked += 1
        return self.mass

    def deviation(self, **how: Any) -> torch.Tensor:
        return self.suffix_attention()


LAYOUT = Layout.of([(0, 500), (600, 1100)])


def test_attention_counts_unpooled() -> None:
    """Pooling selects a peak's neighbours too; their own attention, not the peak's, is what they leave out."""
    mass = torch.full((1000,), 1e-6)
    mass[::10] = 1.0  # 100 peaks, each with four neighbours that are selected with it
    chosen, reason = select(QueryPolicy(), Budget(), LAYOUT, Given(mass))
    rule, (floor, ceiling) = AUTO_RULES["query"], AUTO_RULES["query"].bounds(2, 1000)
    order = QueryPolicy().scores(LAYOUT, Given(mass)).argsort(descending=True, stable=True)
    assert rule.tail is not None
    assert (len(chosen), reason) == (min(max(tail_count(mass[order], rule.tail), floor), ceiling), "scores")
    assert select(HKVDPolicy(), Budget(), LAYOUT, Given(mass)).reason == "floor"  # 90 peaks, and nothing between


def test_a_policy_without_mass_takes_a_fixed_count() -> None:
    class Own(Policy):
        name = "own"  # type: ignore[misc]

        def scores(self, layout: Layout, passes: Any) -> torch.Tensor:
            return -layout.offset.float()

    for policy in (Own(), get_policy("head")):
        chosen, reason = select(policy, Budget(), LAYOUT, Given(torch.ones(1000)))
        floor, _ = AutoRule().bounds(2, 1000)
        assert (len(chosen), reason) == (floor, "chunks")
        assert chosen.tolist() == [*range(floor // 2), *range(600, 600 + floor // 2)]


@pytest.mark.parametrize("name", ["query", "hkvd", "head", "none", "all"])
@pytest.mark.parametrize("budget", [Budget(), Budget(share=0.3), Budget(tokens=50)], ids=str)
def test_no_selection_is_above_its_bound(name: str, budget: Budget) -> None:
    policy = get_policy(name)
    for mass in (torch.ones(1000), torch.linspace(0, 1, 1000) ** 30, torch.zeros(1000)):
        most = at_most(policy, budget, 1000, 2)
        assert len(select(policy, budget, LAYOUT, Given(mass)).positions) <= most
    assert at_most(policy, budget, 0, 0) == 0
    known = how_many(policy, budget, 1000, 2)
    assert (known is None) == (budget.auto and name in ("query", "hkvd"))


def test_admission_counts_with_the_bound() -> None:
    matches = tuple(Match(64 + at, 80 + at, at, at + 16) for at in range(0, 8000, 16))
    claimed = Claim(64, matches, 8100)
    most = at_most(get_policy("query"), Budget(), 8000, 1)
    assert most == AutoRule().bounds(1, 8000)[1]
    assert claimed.computed("query", Budget()) == most + 36
    assert claimed.computed("query", Budget(tokens=100)) == 136
    assert claimed.computed("query", Budget(), free=5000) == 5036


# -- what both engines make of it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> HFModel:
    return HFModel.wrap(tiny_model("llama"), None)


@pytest.mark.parametrize("policy", ["query", "hkvd", "head"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("free", [0, 200])
def test_both_engines_choose_the_same(
    model: HFModel, policy: str, seed: int, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = AutoRule(tail=0.5, per_chunk=5, per_prompt=10, most_per_chunk=100, most_per_prompt=200)
    monkeypatch.setattr("lmcache_rag.policies.AUTO_RULES", {"query": rule, "hkvd": rule, "head": AUTO_RULES["head"]})
    case = Case(model, [60, 90, 70, 80], [3, 5, 0, 7], 20, seed)
    ids = torch.tensor(case.ids)
    cache = model.buffer(len(ids))
    given = (model, case.prompt, ids, cache, case.kv[0], case.hits)
    want = blended_prefill(*given, get_policy(policy), Budget(), free=free)
    sequence, paged = PagedSequence.of(range(30), 16, "cpu"), PagedModel(model, layout="NHD", block=16, blocks=30)
    case.place(model, paged, sequence)
    with torch.inference_mode():
        blend = BlendPass(paged, sequence).run(
            ids, case.spans, case.exact, policy=get_policy(policy), budget=Budget(), free=free
        )
        got = drained(blend)
    assert got.selected is not None
    assert (tuple(sorted(got.selected.tolist())), got.reason) == (want.selected, want.reason)
    assert want.reason == ("chunks" if policy == "head" else "free" if free else "scores")
    assert 0 < want.recomputed_tokens == len(want.selected)


@pytest.mark.parametrize("policy", ["query", "hkvd"])
def test_a_pass_runs_once(model: HFModel, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mass comes from the pass that gave the scores."""
    rule = AutoRule(tail=0.5, per_chunk=5, per_prompt=10)
    monkeypatch.setattr("lmcache_rag.policies.AUTO_RULES", {"query": rule, "hkvd": rule})
    case = Case(model, [60, 90], [3, 5], 20, 1)
    sequence, paged = PagedSequence.of(range(20), 16, "cpu"), PagedModel(model, layout="NHD", block=16, blocks=20)
    case.place(model, paged, sequence)
    ran: list[int] = []
    real = paged.forward
    monkeypatch.setattr(paged, "forward", lambda ids, *rest: (ran.append(len(ids)), real(ids, *rest))[1])
    with torch.inference_mode():
        blend = BlendPass(paged, sequence)
        budget = Budget()
        drained(blend.select(torch.tensor(case.ids), case.spans, case.exact, policy=get_policy(policy), budget=budget))
        assert len(ran) == 1
        embedded: list[int] = []
        real_forward = model.forward
        monkeypatch.setattr(
            model, "forward", lambda ids, *rest: (embedded.append(ids.shape[1]), real_forward(ids, *rest))[1]
        )
        cache = model.buffer(len(case.ids))
        ids = torch.tensor(case.ids)
        blended_prefill(model, case.prompt, ids, cache, case.kv[0], case.hits, get_policy(policy), budget)
        assert len(embedded) == 2  # the policy's, and the recomputation


@pytest.fixture
def questions(smollm2_engine: Any, sentences: list[str]) -> Any:
    """Prompts over eight chunks of real text."""
    builder = PromptBuilder(smollm2_engine.tokenizer, smollm2_engine.info)
    chunks = [" ".join(sentences[i : i + 5]) for i in range(0, 40, 5)]
    list(smollm2_engine.precompute([builder.ingest(chunk) for chunk in chunks]))
    return lambda question: builder.query(chunks, question)


POINTED = "Who discovered the nucleus of the atom?"
BROAD = "Now please say what each is about."


def blended(engine: Any, prompt: Any, ratio: Any = "auto") -> Any:
    from lmcache_rag.engines.base import Sampling

    return engine.generate(prompt, Sampling(max_tokens=1), BlendOptions(ratio=ratio)).stats


def test_the_scores_of_a_real_model_decide(
    smollm2_engine: Any, questions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts of the same length; a rule without a tail takes as many for both."""
    prompts = [questions(POINTED), questions(BROAD)]
    assert len(prompts[0]) == len(prompts[1])

    def chosen(rule: AutoRule) -> list[tuple[int, str]]:
        monkeypatch.setattr("lmcache_rag.policies.AUTO_RULES", {"query": rule})
        found = [blended(smollm2_engine, prompt) for prompt in prompts]
        assert [stats.recomputed_tokens for stats in found] == [stats.budget_tokens for stats in found]
        return [(stats.budget_tokens, stats.budget_reason) for stats in found]

    for tail in (0.1, 0.3):
        one, two = chosen(AutoRule(tail=tail, per_chunk=10, per_prompt=50, most_per_chunk=100))
        assert one[1] == two[1] == "scores"
        assert abs(one[0] - two[0]) > 10
        assert {one, two} == set(chosen(AutoRule(tail=tail, per_chunk=None)))  # no bound took part
    assert chosen(AutoRule(tail=None, per_chunk=30, per_prompt=100)) == [(240, "chunks")] * 2  # of eight chunks


def test_an_engine_says_which_budget_it_took(smollm2_engine: Any, questions: Any) -> None:
    prompt = questions(POINTED)
    for ratio, reason in ((0.15, "ratio"), ({"tokens": 77}, "tokens"), (1, "ratio")):
        stats = blended(smollm2_engine, prompt, ratio)
        assert (stats.budget_tokens, stats.budget_reason) == (stats.recomputed_tokens, reason)
        assert stats.as_dict()["budget_reason"] == reason
    assert blended(smollm2_engine, prompt, {"tokens": 77}).recomputed_tokens == 77
    assert blended(smollm2_engine, prompt, {"tokens": MOST_TOKENS}).reused_tokens == 0
    assert set(BudgetReason) >= {blended(smollm2_engine, prompt).budget_reason}
