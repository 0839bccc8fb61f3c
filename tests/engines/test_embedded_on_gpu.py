"""The embedded engine on a GPU. Skipped where no CUDA device is."""

from __future__ import annotations

import pytest
import torch

from lmcache_rag.engines.base import BlendOptions, Sampling
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.prompt import PromptBuilder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def engine_and_prompt(path, folder, sentences, dtype):
    model = HFModel.open(path, device="cuda", dtype=dtype)
    engine = EmbeddedEngine.from_model(model, name="smollm2", revision=str(dtype), kv_dir=folder)
    builder = PromptBuilder(engine.tokenizer, engine.info)
    chunks = [" ".join(sentences[i : i + 6]) for i in range(0, 36, 6)]
    done = list(engine.precompute(builder.ingest(chunk) for chunk in chunks))
    assert [r.computed for r in done] == [True] * 6
    return engine, builder.query(chunks[::-1], "What is said of the first subject?")


def test_all_equals_a_full_prefill_in_float32(smollm2_path, sentences, tmp_path):
    engine, prompt = engine_and_prompt(smollm2_path, tmp_path, sentences, "float32")
    wanted = engine.prefill(prompt, BlendOptions(enabled=False)).logits
    got = engine.prefill(prompt, BlendOptions("all")).logits
    assert (got - wanted).abs().max() < 1e-2


def test_bfloat16_is_the_default_and_alike_at_ratio_1(smollm2_path, sentences, tmp_path):
    engine, prompt = engine_and_prompt(smollm2_path, tmp_path, sentences, None)
    assert engine.info.dtype == "bfloat16"
    full = engine.generate(prompt, Sampling(max_tokens=8), BlendOptions(enabled=False))
    blended = engine.generate(prompt, Sampling(max_tokens=8), BlendOptions("query", 0.15, always=True))
    again = engine.generate(prompt, Sampling(max_tokens=8), BlendOptions("all"))
    assert again.token_ids[0] == full.token_ids[0]
    assert blended.stats.chunks_hit == 6
    assert blended.stats.reused_tokens > 0


def test_kv_computed_in_a_batch_verifies_one_by_one(smollm2_path, sentences, tmp_path):
    engine, _ = engine_and_prompt(smollm2_path, tmp_path, sentences, None)
    builder = PromptBuilder(engine.tokenizer, engine.info)
    result = engine.verify(builder.ingest(" ".join(sentences[6:12])))
    assert result.status == "ok"
