"""Recomputing everything equals a full prefill: the test of the whole machinery."""

from __future__ import annotations

import random

import pytest
import torch
from models import CASES, SCALINGS, tiny_model

from lmcache_rag.engines.base import BlendOptions, Sampling
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_blend import shift_keys, shift_tables
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.policies import get_policy
from lmcache_rag.prompt import PromptBuilder, PromptFormat


def blended_logits(engine: EmbeddedEngine, prompt, policy: str, ratio: float = 0.15) -> torch.Tensor:
    """Logits of the prompt's last token after a blended prefill, [vocabulary]."""
    return engine.prefill(prompt, BlendOptions(policy, ratio)).logits


def check_prompts(engine: EmbeddedEngine, plain, sentences: list[str], prompts: int) -> float:
    """The largest difference of logits between policy `all` and a plain prefill over that many prompts."""
    builder = PromptBuilder(engine.tokenizer, engine.info)
    rng = random.Random(7)
    worst = 0.0
    for index in range(prompts):
        count = 1 + index % 8
        chunks = [" ".join(rng.sample(sentences, rng.randint(1, 4))) for _ in range(count)]
        list(engine.precompute(builder.ingest(chunk) for chunk in chunks))
        rng.shuffle(chunks)
        prompt = builder.query(chunks, "What is this about?")
        with torch.inference_mode():
            wanted = plain(torch.tensor(prompt.token_ids)[None], logits_to_keep=1).logits[0, -1]
        worst = max(worst, float((blended_logits(engine, prompt, "all") - wanted).abs().max()))
    return worst


def test_all_equals_a_plain_prefill_on_smollm2(smollm2_engine, smollm2_plain, sentences):
    assert check_prompts(smollm2_engine, smollm2_plain, sentences, 20) < 1e-3


@pytest.mark.parametrize(("family", "scaling"), [*CASES, ("mistral3", "yarn")])
def test_all_equals_a_plain_prefill_in_every_family(family, scaling, tokenizer, sentences, tmp_path):
    plain = tiny_model(family, scaling)
    engine = EmbeddedEngine.from_model(
        HFModel.wrap(tiny_model(family, scaling), tokenizer), name="tiny", revision="0", kv_dir=tmp_path
    )
    assert getattr(plain.config, "text_config", plain.config)._attn_implementation == "sdpa"
    assert check_prompts(engine, plain, sentences, 20) < 1e-3


@pytest.mark.parametrize(("family", "scaling"), [*CASES, ("mistral3", "yarn")])
def test_a_moved_key_equals_the_key_computed_there(family, scaling, tokenizer):
    model = HFModel.wrap(tiny_model(family, scaling), tokenizer)
    ids = torch.randint(300, 15000, (1, 48))

    def keys(start: int) -> torch.Tensor:
        cache = model.buffer(48)
        model.forward(ids, torch.arange(start, start + 48), cache)
        return cache.layers[0].keys[0]

    for old, new in ((64, 64), (64, 700), (64, 4000), (3000, 10)):
        cos, sin = shift_tables(model.rotary, torch.arange(old, old + 48), torch.arange(new, new + 48))
        moved = shift_keys(keys(old), cos, sin, interleaved=model.interleaved)
        assert (moved - keys(new)).abs().max() < 1e-4
        if old != new:
            assert (keys(old) - keys(new)).abs().max() > 1e-2  # the move was not for nothing


def test_a_model_beside_a_tower_is_opened_and_answers(tokenizer, sentences, tmp_path):
    """Mistral Small 3 has its language model inside; a prompt of text is computed as if there were no tower."""
    plain = tiny_model("mistral3", "llama3")
    plain.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    engine = EmbeddedEngine(str(tmp_path / "model"), kv_dir=tmp_path / "kv", device="cpu")
    assert engine.info.can_blend, engine.info.why_not
    builder = PromptBuilder(engine.tokenizer, engine.info)
    chunks = [" ".join(sentences[place : place + 3]) for place in (0, 3, 6)]
    list(engine.precompute(builder.ingest(chunk) for chunk in chunks))
    for order in ((0, 1, 2), (2, 0, 1), (1, 2)):
        prompt = builder.query([chunks[place] for place in order], "What is this about?")
        done = engine.generate(prompt, Sampling(max_tokens=4), BlendOptions("all", always=True))
        assert (done.stats.chunks_hit, done.stats.chunks_missed) == (len(order), 0)
        ids = torch.tensor(prompt.token_ids)[None]
        wanted = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert list(done.token_ids) == wanted[0, ids.shape[1] :].tolist()
    engine.close()


def turned(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Keys [..., n, size] at positions with these cosines and sines, in float64."""
    first, second = keys.double().chunk(2, -1)
    return keys.double() * cos.double() + torch.cat([-second, first], -1) * sin.double()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("old", "new"), [(120_000, 64), (64, 120_000), (100_003, 131_000)])
def test_a_key_far_away_has_the_models_own_rounding(scaling: str, old: int, new: int) -> None:
    """The model's angles are float32: at position 100,000 they are wrong by a thousandth, and a moved key's too."""
    rotary = tiny_model("llama", scaling, max_position_embeddings=1 << 18).model.rotary_emb
    was, is_now = torch.arange(old, old + 48), torch.arange(new, new + 48)
    tables = lambda places: [table[0] for table in rotary(torch.empty(0), places[None])]  # noqa: E731
    key = torch.rand(2, 48, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = shift_tables(rotary, was, is_now)
    moved = shift_keys(turned(key, *tables(was)).float(), cos, sin)
    assert (moved - turned(key, *tables(is_now))).abs().max() < 1e-5
    if new > old:  # to read the table at the distance would be another rounding
        cos, sin = tables(is_now - was)
        assert (turned(turned(key, *tables(was)), cos, sin) - turned(key, *tables(is_now))).abs().max() > 1e-4


def test_an_angle_is_rounded_once_to_float32(tokenizer) -> None:
    model = HFModel.wrap(tiny_model("llama"), tokenizer)
    old, new = torch.arange(100_000, 101_000), torch.arange(1000)
    (cos_a, sin_a), (cos_b, sin_b) = (
        [table[0].double() for table in model.rotary(torch.empty(0), places[None])] for places in (old, new)
    )
    cos, sin = shift_tables(model.rotary, old, new)
    square = cos_a**2 + sin_a**2
    half = 2.0**-25 * (1 + 1e-6)  # of float32's last bit below 1
    for found, exact in ((cos, cos_a * cos_b + sin_a * sin_b), (sin, sin_b * cos_a - cos_b * sin_a)):
        assert (found - (exact / square)[:, : found.shape[1]]).abs().max() <= half


@pytest.mark.parametrize("into", [False, True])
def test_a_bfloat16_key_is_rounded_once(tokenizer, into: bool) -> None:
    model = HFModel.wrap(tiny_model("llama"), tokenizer)
    key = torch.randn(2, 500, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = shift_tables(model.rotary, torch.arange(500), torch.arange(2000, 2500))
    out = torch.empty_like(key) if into else None
    moved = shift_keys(key, cos, sin, out=out)
    assert out is None or moved is out
    wrong = (moved != turned(key, cos.repeat(1, 2), sin.repeat(1, 2)).bfloat16()).double().mean()
    assert wrong < 1e-3, "float32 may fall on the other side of a half now and then"


def test_what_is_reused_is_really_reused(smollm2_engine, smollm2_plain, sentences):
    """The other side of exactness: without recomputation the answer is an approximation."""
    builder = PromptBuilder(smollm2_engine.tokenizer, smollm2_engine.info)
    chunks = [" ".join(sentences[i : i + 3]) for i in range(0, 12, 3)]
    list(smollm2_engine.precompute(builder.ingest(chunk) for chunk in chunks))
    prompt = builder.query(chunks[::-1], "What is said of the first subject?")
    with torch.inference_mode():
        wanted = smollm2_plain(torch.tensor(prompt.token_ids)[None], logits_to_keep=1).logits[0, -1]
    errors = {r: float((blended_logits(smollm2_engine, prompt, "query", r) - wanted).norm()) for r in (0, 1)}
    assert errors[0] > 10 * errors[1]


def test_a_first_chunk_in_its_own_place_is_exact(smollm2_engine, smollm2_plain, sentences):
    form = PromptFormat(neutral=())  # its KV is computed right after the prefix
    builder = PromptBuilder(smollm2_engine.tokenizer, smollm2_engine.info, format=form)
    chunk = " ".join(sentences[:5])
    list(smollm2_engine.precompute([builder.ingest(chunk)]))
    prompt = builder.query([chunk], "What is it?")
    with torch.inference_mode():
        wanted = smollm2_plain(torch.tensor(prompt.token_ids)[None], logits_to_keep=1).logits[0, -1]
    assert (blended_logits(smollm2_engine, prompt, "none") - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("policy", ["query", "hkvd", "head", "none", "all"])
def test_a_pass_leaves_no_trace_of_what_it_looked_at(policy, smollm2_engine, sentences):
    """Running a policy's own passes must not change the KV that is blended: twice gives the same to the bit."""
    builder = PromptBuilder(smollm2_engine.tokenizer, smollm2_engine.info)
    chunks = [" ".join(sentences[i : i + 3]) for i in (0, 3, 6)]
    list(smollm2_engine.precompute(builder.ingest(chunk) for chunk in chunks))
    prompt = builder.query(chunks, "Which?")
    first = blended_logits(smollm2_engine, prompt, policy)
    assert torch.equal(first, blended_logits(smollm2_engine, prompt, policy))
    assert get_policy(policy).name == policy
