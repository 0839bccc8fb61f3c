"""No field of a model's configuration makes the embedded engine wrong: it is right, or it refuses the model by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from blend_kit import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import FAMILIES, tiny_config, tiny_model

from lmcache_rag.budget import Budget
from lmcache_rag.engines.hf_blend import blended_prefill, shift_keys, shift_tables
from lmcache_rag.engines.hf_model import HFModel, unsupported_reason
from lmcache_rag.errors import EngineError
from lmcache_rag.policies import get_policy

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "yarn with a factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7},
    "yarn with mscale": {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn, untruncated": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 8.0, "beta_slow": 2.0},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "factor": 4.0},
    "partial": {"partial_rotary_factor": 0.5},
    "multimodal": {"mrope_section": [2, 3, 3]},
    "another base": {"rope_theta": 1e6},
}
FIELDS: dict[str, Any] = {
    "sliding_window": [None, 8],
    "use_sliding_window": [True],
    "layer_types": [["full_attention"] * 4, ["full_attention"] * 3 + ["sliding_attention"], ["chunked_attention"] * 4],
    "attention_chunk_size": [16],
    "no_rope_layers": [[1, 1, 1, 0]],
    "attn_logit_softcapping": [2.0],
    "clip_qkv": [0.5],
    "is_causal": [False],
    "use_bidirectional_attention": [True],
    "attention_bias": [True],
    "attention_multiplier": [0.7],
    "residual_multiplier": [0.2],
    "use_qk_norm": [True, False],
    "partial_rotary_factor": [0.5],
    "num_key_value_heads": [1, 4],
    "norm_topk_prob": [True, False],
    "decoder_sparse_step": [1, 3],
}
changes = st.dictionaries(st.sampled_from(list(FIELDS)), st.integers(0, 5), max_size=3).map(
    lambda drawn: {name: FIELDS[name][index % len(FIELDS[name])] for name, index in drawn.items()}
)


def loaded(family: str, rope: dict[str, Any], fields: dict[str, Any]) -> HFModel | str:
    """The model; or why there is none: transformers refuses the configuration, or the engine does."""
    given = fields | {"intermediate_size": 32}
    rope = {"rope_type": "default", "rope_theta": 1e4, "original_max_position_embeddings": 512, **rope}
    try:
        config = tiny_config(family, rope_parameters=rope, **given)
        why_not = unsupported_reason(config)
        if why_not:
            return why_not
        return HFModel.wrap(tiny_model(family, rope_parameters=rope, **given), None)
    except Exception as problem:  # transformers' own validation has errors of several kinds
        return f"transformers: {problem}"


def check(model: HFModel) -> None:
    """Keys moved equal keys computed, and a blend that computes everything is a full prefill, with any hits."""
    ids = torch.randint(5, 49000, (1, 24))

    def keys(start: int) -> torch.Tensor:
        cache = model.buffer(24)
        model.forward(ids, torch.arange(start, start + 24), cache)
        return cache.layers[0].keys[0]

    for old, new in ((64, 700), (3000, 10)):
        cos, sin = shift_tables(model.rotary, torch.arange(old, old + 24), torch.arange(new, new + 24))
        moved = shift_keys(keys(old), cos, sin, interleaved=model.interleaved)
        torch.testing.assert_close(moved, keys(new), atol=1e-4, rtol=1e-4)
    it = Case(model, [20, 12, 16], [3, 0, 5], 8, 1)
    prompt = torch.tensor(it.ids)
    plain = plain_prefill(model, prompt)
    cache = model.buffer(len(prompt))
    done = blended_prefill(model, it.prompt, prompt, cache, it.kv[0], it.hits, get_policy("all"), Budget(share=1.0))
    for layer, want in zip(cache.layers, plain, strict=True):
        torch.testing.assert_close(layer.keys[0], want[0][:, : done.length], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(layer.values[0], want[1][:, : done.length], atol=1e-3, rtol=1e-3)


def plain_prefill(model: HFModel, prompt: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer by transformers alone, with its own attention."""
    model.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            found = model.model(prompt[None], use_cache=True).past_key_values
    finally:
        model.model.set_attn_implementation("lmcache_rag")
    return [(layer.keys[0], layer.values[0]) for layer in found.layers]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(family=st.sampled_from(FAMILIES), rope=st.sampled_from(list(ROPES)), fields=changes)
def test_an_odd_model_is_right_or_refused(family: str, rope: str, fields: dict[str, Any]) -> None:
    model = loaded(family, ROPES[rope], fields)
    if isinstance(model, HFModel):
        check(model)


@pytest.mark.parametrize(
    ("family", "rope", "fields", "reason"),
    [
        ("qwen3_moe", "dynamic", {}, "dynamic"),
        ("mixtral", "default", {"sliding_window": 8}, "sliding"),
        ("phi3", "default", {"sliding_window": 8}, "sliding"),
        ("phi3", "partial", {}, "only a part of each head"),
        ("phi3", "longrope", {}, "longrope"),
        ("granite", "multimodal", {}, "multimodal"),
        ("qwen2_moe", "default", {"use_sliding_window": True, "sliding_window": 8}, "sliding"),
        ("qwen3_moe", "default", {"use_sliding_window": True, "sliding_window": 8}, "sliding"),
        ("qwen3_moe", "default", {"use_sliding_window": True, "layer_types": ["full_attention"] * 4}, "sliding"),
        ("mixtral", "default", {"sliding_window": 8, "layer_types": ["full_attention"] * 4}, "sliding"),
        ("cohere", "default", {"is_causal": False}, "not causal"),
        ("llama", "default", {"use_bidirectional_attention": True}, "not causal"),
        ("llama", "default", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ("llama", "default", {"attention_chunk_size": 16}, "in chunks"),
    ],
)
def test_what_is_refused(family: str, rope: str, fields: dict[str, Any], reason: str) -> None:
    found = loaded(family, ROPES[rope], fields)
    assert isinstance(found, str)
    assert not found.startswith("transformers:")
    assert reason in found


@pytest.mark.parametrize("family", ["cohere2", "smollm3", "olmo2", "granite_swa", "glm", "qwen3_next"])
def test_other_families_are_refused_by_name(family: str) -> None:
    if family not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"this version of transformers has no {family}")
    assert f"models of type {family!r} are not supported" in unsupported_reason(tiny_config(family))


def test_ropes_of_several_kinds_of_layers_are_refused() -> None:
    config = tiny_config("llama")
    config.rope_parameters = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    assert "different rotary embeddings" in unsupported_reason(config)


def test_a_model_that_takes_pictures_is_refused() -> None:
    """Its configuration has the language model's inside."""
    config = transformers.Gemma3Config(text_config={"num_hidden_layers": 1}, vision_config={"num_hidden_layers": 1})
    with pytest.raises(EngineError, match="'gemma3' takes pictures") as problem:
        HFModel(config, None, dtype=torch.float32, device=torch.device("cpu"), load=lambda: None)
    assert "vLLM" in str(problem.value.remedy)
