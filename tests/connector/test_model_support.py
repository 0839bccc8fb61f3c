"""What the connector's check refuses, on fake layers; tests/contracts/test_model.py has vLLM's own.

Whatever changes attention or positions is refused by name, alone and together with anything else that is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_rag.connector import model_support, vllm_internals
from lmcache_rag.connector.model_support import BACKENDS, ROTARIES, unsupported_reason
from lmcache_rag.connector.rotary import decoder_of, rotary_of
from lmcache_rag.families import MODEL_CLASSES, TRANSFORMERS_BACKEND
from lmcache_rag.protocol import CannotBlend

SIZE, BLOCK = 16, 16
# tests/contracts/test_transformers_backend.py has what is refused of the other one.
CLASSES = [name for name in MODEL_CLASSES if name != TRANSFORMERS_BACKEND]


def named(name: str, **facts: Any) -> Any:
    """An object of a class with that name."""
    made = type(name, (), {})()
    vars(made).update(facts)
    return made


def rotary(name: str = "RotaryEmbedding", **facts: Any) -> Any:
    plain = {"rotary_dim": SIZE, "head_size": SIZE, "is_neox_style": True, "cos_sin_cache": torch.ones(4, SIZE)}
    return named(name, **(plain | facts))


class Loaded:
    """A model of three layers as vLLM holds it, with experts where its family has them."""

    def __init__(self, kind: str, backend: str = BACKENDS[0], rope: str = ROTARIES[0], *, neox: bool = True) -> None:
        self.neox, shared = neox, rotary(rope, is_neox_style=neox)
        names = [f"model.layers.{index}.self_attn.attn" for index in range(3)]
        self.layers = [
            named(
                "Attention",
                impl=named(backend, logits_soft_cap=None, alibi_slopes=None, sinks=None),
                attn_type="decoder",
                sliding_window=None,
                kv_sharing_target_layer_name=None,
                kv_cache_dtype="auto",
                head_size=SIZE,
                kv_cache=torch.zeros(4, 2, BLOCK, 2, SIZE),
            )
            for _ in names
        ]
        self.attentions = [SimpleNamespace(rotary_emb=shared, attn=layer) for layer in self.layers]
        decoder = SimpleNamespace(layers=[SimpleNamespace(self_attn=attention) for attention in self.attentions])
        inside = named("MistralForCausalLM", model=decoder)
        self.model = named(kind, language_model=inside) if kind.startswith("Mistral3") else named(kind, model=decoder)
        experts = [f"model.layers.{index}.mlp.experts" for index in range(3)] if "Moe" in kind or "Mix" in kind else []
        context = dict(zip(names, self.layers, strict=True)) | {name: named("MoERunner") for name in experts}
        self.config = SimpleNamespace(
            model_config=SimpleNamespace(
                enable_sleep_mode=False,
                hf_text_config=SimpleNamespace(num_hidden_layers=3),
                supports_multimodal_inputs=False,
            ),
            parallel_config=SimpleNamespace(
                pipeline_parallel_size=1,
                decode_context_parallel_size=1,
                prefill_context_parallel_size=1,
                enable_expert_parallel=False,
                enable_eplb=False,
                data_parallel_size=1,
                is_moe_model=bool(experts),
            ),
            speculative_config=None,
            lora_config=None,
            cache_config=SimpleNamespace(block_size=BLOCK),
            compilation_config=SimpleNamespace(
                pass_config=SimpleNamespace(fuse_attn_quant=False),
                static_forward_context=context,
                static_all_moe_layers=experts,
            ),
        )


def of_layer(name: str, value: Any) -> Callable[[Loaded, int], Any]:
    return lambda it, index: setattr(it.layers[index], name, value)


def of_impl(name: str, value: Any) -> Callable[[Loaded, int], Any]:
    return lambda it, index: setattr(it.layers[index].impl, name, value)


def of_rotary(made: Callable[[], Any]) -> Callable[[Loaded, int], Any]:
    return lambda it, index: setattr(it.attentions[index], "rotary_emb", made())


def of_ranks(name: str, value: Any) -> Callable[[Loaded, int], Any]:
    return lambda it, index: setattr(it.config.parallel_config, name, value)


# Each is what a field of a model's configuration, or an option, does to the loaded model.
ODD: dict[str, Callable[[Loaded, int], Any]] = {
    "sliding_window": of_layer("sliding_window", 128),
    "attention in chunks (Llama 4)": of_layer("__class__", type("ChunkedLocalAttention", (), {})),
    "attn_logit_softcapping": of_impl("logits_soft_cap", 50.0),
    "attention_sinks": of_impl("sinks", torch.zeros(4)),
    "alibi": of_impl("alibi_slopes", torch.zeros(4)),
    "is_causal: false": of_layer("attn_type", "encoder_only"),
    "num_kv_shared_layers": of_layer("kv_sharing_target_layer_name", "model.layers.0.self_attn.attn"),
    "kv_cache_dtype": of_layer("kv_cache_dtype", "fp8"),
    "kv_cache_dtype with a scale for each token": of_layer("kv_cache_dtype", "fp8_per_token_head"),
    "kv_cache_dtype_skip_layers": of_layer("kv_cache", torch.zeros(4, 2, BLOCK, 2, SIZE, dtype=torch.bfloat16)),
    "heads of two sizes": of_layer("kv_cache", torch.zeros(4, 2, BLOCK, 2, 2 * SIZE)),
    "dual_chunk_attention_config": of_rotary(lambda: rotary("DualChunkRotaryEmbedding")),
    "mrope_section": of_rotary(lambda: rotary("MRotaryEmbedding")),
    "longrope": of_rotary(lambda: rotary("Phi3LongRoPEScaledRotaryEmbedding")),
    "mscale_all_dim (DeepSeek)": of_rotary(lambda: rotary("DeepseekScalingRotaryEmbedding")),
    "LoRA with experts": lambda it, index: (
        setattr(it.config, "lora_config", object()),
        it.config.compilation_config.static_all_moe_layers.append("model.layers.0.mlp.experts"),
    ),
    "LoRA on a second stream": lambda it, index: (
        setattr(it.config, "lora_config", object()),
        it.config.compilation_config.static_forward_context.update({"qkv_proj.lora_linear_async": object()}),
    ),
    "partial_rotary_factor": of_rotary(lambda: rotary(rotary_dim=SIZE // 2)),
    "rope_theta of a layer": of_rotary(lambda: rotary(cos_sin_cache=torch.zeros(4, SIZE))),
    "pairs of a layer": lambda it, index: setattr(
        it.attentions[index], "rotary_emb", rotary(is_neox_style=not it.neox)
    ),
    "no_rope_layers": lambda it, index: vars(it.attentions[index]).pop("rotary_emb", None),
    "no_rope_layers (Granite)": lambda it, index: setattr(it.attentions[index], "use_rope", False),
    "no_rope_layers (Cohere2)": lambda it, index: setattr(it.attentions[index], "v1", False),
    "a layer that is no attention": lambda it, index: it.config.compilation_config.static_forward_context.update(
        {f"model.layers.{index}.mamba": named("MambaMixer2")}
    ),
    "another model": lambda it, index: setattr(it, "model", named("OddForCausalLM", model=decoder_of(it.model))),
    "enable_expert_parallel": of_ranks("enable_expert_parallel", True),
    "enable_eplb": of_ranks("enable_eplb", True),
    "pipeline_parallel_size": of_ranks("pipeline_parallel_size", 2),
    "enable_return_routed_experts": lambda it, index: setattr(
        it.config.model_config, "enable_return_routed_experts", True
    ),
    "enable_return_routed_experts since vLLM 0.32": lambda it, index: setattr(
        it.config, "aux_output_config", SimpleNamespace(enable_return_routed_experts=True)
    ),
}
supported = st.builds(
    Loaded, st.sampled_from(CLASSES), st.sampled_from(BACKENDS), st.sampled_from(ROTARIES), neox=st.booleans()
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_internals, "in_multi_connector", lambda: False)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(it=supported, odd=st.dictionaries(st.sampled_from(list(ODD)), st.integers(0, 2), max_size=3))
def test_anything_odd_is_refused_and_nothing_else(it: Loaded, odd: dict[str, int]) -> None:
    for name in sorted(odd, key=list(ODD).index):  # a layer that was left without RoPE does not get another one
        ODD[name](it, odd[name])
    found = unsupported_reason(it.config, it.model)
    assert (found is not None) == bool(odd)
    if found is not None:
        assert found.code in set(CannotBlend) - {CannotBlend.ERROR}
        assert found.detail


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("index", [0, 2])
def test_each_odd_field_alone_is_refused(odd: str, index: int) -> None:
    it = Loaded("Qwen3MoeForCausalLM")
    assert unsupported_reason(it.config, it.model) is None
    ODD[odd](it, index)
    assert unsupported_reason(it.config, it.model) is not None


@pytest.mark.parametrize("kind", CLASSES)
def test_data_parallelism_stops_only_experts(kind: str) -> None:
    it = Loaded(kind)
    it.config.parallel_config.data_parallel_size = 2
    found = unsupported_reason(it.config, it.model)
    assert (found is not None) == bool(it.config.compilation_config.static_all_moe_layers)
    it.config.parallel_config.is_moe_model = None  # vLLM does not know yet
    assert "experts" in str(unsupported_reason(it.config, it.model))


def test_what_is_inside_a_model_with_pictures_counts() -> None:
    it = Loaded("Mistral3ForConditionalGeneration")
    it.config.model_config.supports_multimodal_inputs = True
    assert unsupported_reason(it.config, it.model) is None
    it.config.lora_config = object()
    assert "takes pictures" in str(unsupported_reason(it.config, it.model))
    it.model.language_model = named("Gemma3ForCausalLM", model=it.model.language_model.model)
    assert "Gemma3ForCausalLM inside" in str(unsupported_reason(it.config, it.model))


def test_adapters_in_the_transformers_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_support, "_transformers_model", lambda decoder: None)
    for kind, refused in (("TransformersForCausalLM", True), ("LlamaForCausalLM", False)):
        it = Loaded(kind)
        it.config.lora_config = object()
        found = model_support._features(it.config, it.model)
        assert (found is not None and found.code is CannotBlend.LORA) == refused


def with_fp8(*, allowed: bool = True) -> Loaded:
    """A model with an FP8 KV cache."""
    it = Loaded("LlamaForCausalLM")
    it.config.kv_transfer_config = SimpleNamespace(get_from_extra_config=lambda key, default: allowed)
    for layer in it.layers:
        layer.kv_cache_dtype, layer.kv_cache = "fp8", torch.zeros(4, 2, BLOCK, 2, SIZE, dtype=torch.uint8)
        for name in ("q", "k", "v"):
            setattr(layer, f"_{name}_scale", torch.tensor(0.5))
            setattr(layer, f"_{name}_scale_float", 0.5)
    return it


def test_an_fp8_cache_is_blended_only_if_asked_for() -> None:
    assert unsupported_reason((it := with_fp8()).config, it.model) is None
    found = unsupported_reason((it := with_fp8(allowed=False)).config, it.model)
    assert found is not None
    assert found.code is CannotBlend.KV_CACHE
    assert "--connector lmcache_rag.fp8_kv=true" in found.detail
    del it.config.kv_transfer_config
    assert unsupported_reason(it.config, it.model) is not None


FP8_ODD: dict[str, Callable[[Loaded], Any]] = {
    "of type fp8_e5m2": lambda it: setattr(it.layers[1], "kv_cache_dtype", "fp8_e5m2"),
    "of type fp8_per_token_head": lambda it: setattr(it.layers[1], "kv_cache_dtype", "fp8_per_token_head"),
    "of type nvfp4": lambda it: setattr(it.layers[1], "kv_cache_dtype", "nvfp4"),
    "that holds torch.float16": lambda it: setattr(it.layers[1], "kv_cache", it.layers[1].kv_cache.to(torch.float16)),
    "caches differ": lambda it: (
        setattr(it.layers[1], "kv_cache_dtype", "auto"),
        setattr(it.layers[1], "kv_cache", it.layers[1].kv_cache.to(torch.bfloat16)),
    ),
    "that holds torch.uint8": lambda it: setattr(it.layers[1], "kv_cache_dtype", "auto"),
    "scale for each head": lambda it: setattr(it.layers[1], "_k_scale", torch.ones(2)),
    "with scales (0.5, 0.5, 0.0)": lambda it: setattr(it.layers[1], "_v_scale_float", 0.0),
    "with scales (nan, 0.5, 0.5)": lambda it: setattr(it.layers[1], "_q_scale_float", float("nan")),
    "calculated while vLLM runs": lambda it: setattr(it.config.cache_config, "calculate_kv_scales", True),
}


@pytest.mark.parametrize("odd", FP8_ODD)
def test_other_fp8_caches_are_refused(odd: str) -> None:
    FP8_ODD[odd](it := with_fp8())
    found = unsupported_reason(it.config, it.model)
    assert found is not None
    assert found.code is CannotBlend.KV_CACHE
    assert odd in found.detail


def test_an_fp8_cache_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    it = with_fp8()
    for layer in it.layers:
        layer.kv_cache = named("Cache", is_cuda=True, device="cuda:0", dtype=torch.float8_e4m3fn)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert "capability 8.9" in str(unsupported_reason(it.config, it.model))


def test_experts_are_no_attention_layers() -> None:
    it = Loaded("MixtralForCausalLM")
    assert list(vllm_internals.attention_layers(it.config).values()) == it.layers
    assert rotary_of(it.model) is it.attentions[0].rotary_emb


@pytest.mark.parametrize("flag", ["is_hybrid", "has_inner_state"])
def test_recurrent_layers_are_refused_by_their_name(flag: str) -> None:
    """vLLM's classes have these flags; see test_model.py of the contracts."""
    it = Loaded("LlamaForCausalLM")
    it.model = named("Qwen3NextForCausalLM", **{flag: True})
    found = unsupported_reason(it.config, it.model)
    assert found is not None
    assert found.code is CannotBlend.RECURRENT
    assert "Qwen3NextForCausalLM has recurrent layers" in found.detail
