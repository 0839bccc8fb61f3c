"""Which models are blended in vLLM: one check for each capability, on the loaded model and its KV caches.

A model is blended if its class is in lmcache_rag.families and none of the checks finds a reason against it. What a
check does not know is refused: a wrong blend shows in no log.
"""

from __future__ import annotations

from typing import Any

from lmcache_rag.connector import kv_quant, vllm_internals
from lmcache_rag.connector.attention import keys_and_values
from lmcache_rag.connector.rotary import TransformersRotary, decoder_of, rotaries_of
from lmcache_rag.families import CANNOT_RECUR, MODEL_CLASSES, TRANSFORMERS_BACKEND, TRANSFORMERS_DECODERS
from lmcache_rag.protocol import CannotBlend, Unsupported

BACKENDS = ("FlashAttentionImpl", "FlashInferImpl", "TritonAttentionImpl")
FP8_CAPABILITY = (8, 9)  # Triton has no e4m3 below
# Rotary embeddings whose angles depend on the position alone and are in a table: a key is moved by rotating it.
ROTARIES = (
    "RotaryEmbedding",
    "LinearScalingRotaryEmbedding",
    "DynamicNTKScalingRotaryEmbedding",
    "DynamicNTKAlphaRotaryEmbedding",
    "NTKScalingRotaryEmbedding",
    "Llama3RotaryEmbedding",
    "YaRNScalingRotaryEmbedding",
)
# The same by transformers' names. Its "dynamic" depends on the longest prompt so far.
SCALINGS = ("default", "linear", "llama3", "yarn")


def unsupported_reason(vllm_config: Any, model: Any) -> Unsupported | None:
    """Why this model cannot be blended in vLLM; None if it can. Its KV caches must exist.

    An FP8 KV cache is blended only with the connector's setting lmcache_rag.fp8_kv.
    """
    checks = (_machine, _parallelism, _model_class, _features, _attention_and_cache, _layers, _positions)
    return next((reason for check in checks if (reason := check(vllm_config, model))), None)


# -- machine and ranks ------------------------------------------------------------------------------------------------


def _machine(vllm_config: Any, model: Any) -> Unsupported | None:
    import torch

    if torch.version.hip is not None:
        return Unsupported(CannotBlend.ROCM, "AMD GPUs (ROCm) are not supported")
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        detail = "sleep mode releases GPU memory that a blend needs and LMCache has mapped"
        return Unsupported(CannotBlend.SLEEP_MODE, detail)
    if vllm_internals.in_multi_connector():
        detail = "with other connectors (MultiConnector) approximate KV would be stored as exact"
        return Unsupported(CannotBlend.MULTI_CONNECTOR, detail)
    return None


def _parallelism(vllm_config: Any, model: Any) -> Unsupported | None:
    parallel, detail = vllm_config.parallel_config, ""
    if parallel.pipeline_parallel_size > 1:
        detail = "pipeline parallelism is not supported"
    elif parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        detail = "context parallelism is not supported: each rank would hold a part of the tokens"
    elif getattr(parallel, "enable_expert_parallel", False) or getattr(parallel, "enable_eplb", False):
        detail = "expert parallelism is not supported: each pass needs the other ranks"
    elif getattr(parallel, "data_parallel_size", 1) > 1 and getattr(parallel, "is_moe_model", None) is not False:
        detail = "data parallelism of a model with experts is not supported: each pass needs the other ranks"
    return Unsupported(CannotBlend.PARALLELISM, detail) if detail else None


# -- model class and what is switched on ------------------------------------------------------------------------------


def _model_class(vllm_config: Any, model: Any) -> Unsupported | None:
    name = type(model).__name__
    if getattr(model, "is_hybrid", False) or getattr(model, "has_inner_state", False):
        return Unsupported(CannotBlend.RECURRENT, f"{name} {CANNOT_RECUR}")
    if name not in MODEL_CLASSES:
        return Unsupported(CannotBlend.MODEL, f"{name} is not supported (supported: {', '.join(MODEL_CLASSES)})")
    if name == TRANSFORMERS_BACKEND:
        return _transformers_model(decoder_of(model))
    inside = getattr(model, "language_model", None)
    if inside is None:
        return None
    if type(inside).__name__ not in MODEL_CLASSES:
        return Unsupported(CannotBlend.MODEL, f"{name} with {type(inside).__name__} inside is not supported")
    return None


def _transformers_model(decoder: Any) -> Unsupported | None:
    """The Transformers backend runs any model of transformers: those are blended whose code was read."""
    name, module = type(decoder).__name__, type(decoder).__module__
    if name not in TRANSFORMERS_DECODERS or not module.startswith("transformers.models."):
        detail = f"{name} of {module} in vLLM's Transformers backend is not supported"
        return Unsupported(CannotBlend.MODEL, f"{detail} (supported: {', '.join(TRANSFORMERS_DECODERS)})")
    if any(hasattr(layer.self_attn, "rotary_emb") for layer in decoder.layers):
        return Unsupported(CannotBlend.ROTARY, "layers with a rotary embedding of their own are not supported")
    return None


def _features(vllm_config: Any, model: Any) -> Unsupported | None:
    if getattr(vllm_config, "speculative_config", None) is not None:
        return Unsupported(CannotBlend.SPECULATIVE, "speculative decoding is not supported")
    if getattr(vllm_config, "lora_config", None) is not None and (detail := _lora(vllm_config, model)):
        return Unsupported(CannotBlend.LORA, detail)
    if _returns_experts(vllm_config):
        detail = "vLLM returns each token's experts (enable_return_routed_experts), and reused tokens meet none"
        return Unsupported(CannotBlend.MODEL, detail)
    if getattr(vllm_config.compilation_config.pass_config, "fuse_attn_quant", False):
        detail = "attention that is fused with a quantisation of its output is not supported"
        return Unsupported(CannotBlend.ATTENTION, detail)
    return None


def _lora(vllm_config: Any, model: Any) -> str:
    compilation = vllm_config.compilation_config
    if type(model).__name__ == TRANSFORMERS_BACKEND:
        return "LoRA adapters of models in vLLM's Transformers backend are not supported"
    if getattr(compilation, "static_all_moe_layers", ()):
        return "LoRA adapters of a model with experts are not supported"
    if vllm_internals.takes_embeddings(vllm_config):
        return "LoRA adapters of a model that takes pictures or embeddings are not supported"
    if any(name.endswith(".lora_linear_async") for name in compilation.static_forward_context):
        return "LoRA layers on a second stream (VLLM_LORA_ENABLE_DUAL_STREAM) are not supported"
    return ""


def _returns_experts(vllm_config: Any) -> bool:
    """Whether a pass records the experts of its tokens; a blend's passes would be recorded as the step's."""
    places = (vllm_config.model_config, getattr(vllm_config, "aux_output_config", None))  # vLLM 0.25, and since 0.32
    return any(getattr(place, "enable_return_routed_experts", False) for place in places)


# -- attention --------------------------------------------------------------------------------------------------------


def _attention_and_cache(vllm_config: Any, model: Any) -> Unsupported | None:
    for key, layer in vllm_internals.attention_layers(vllm_config).items():
        if detail := _attention(key, layer):
            return Unsupported(CannotBlend.ATTENTION, detail)
        if detail := _numbers(vllm_config, layer) or _cache(layer, vllm_config.cache_config.block_size):
            return Unsupported(CannotBlend.KV_CACHE, detail)
    return None


def _attention(name: str, layer: Any) -> str:
    impl = getattr(layer, "impl", None)
    if impl is None:
        return f"{name} is not an attention layer"
    if type(layer).__name__ != "Attention" or layer.attn_type != "decoder":
        return f"{name} is not causal attention ({type(layer).__name__}, {layer.attn_type})"
    if layer.sliding_window is not None:
        return "sliding window attention is not supported"
    if getattr(impl, "logits_soft_cap", None) not in (None, 0, 0.0):
        return "soft caps on attention scores are not supported"
    if getattr(impl, "alibi_slopes", None) is not None or getattr(impl, "sinks", None) is not None:
        return "ALiBi and attention sinks are not supported"
    if layer.kv_sharing_target_layer_name is not None:
        return "layers that share their KV are not supported"
    if type(impl).__name__ not in BACKENDS:
        return f"attention backend {type(impl).__name__} is not supported"
    return ""


# -- KV cache ---------------------------------------------------------------------------------------------------------


def _numbers(vllm_config: Any, layer: Any) -> str:
    """What the cache's numbers are: floats of 16 or 32 bits, or FP8 (e4m3) with one scale for each layer."""
    import torch

    name, cache = layer.kv_cache_dtype, layer.kv_cache
    if name in ("auto", "bfloat16", "float16"):
        return (
            "" if cache.is_floating_point() else f"a KV cache of type {name} that holds {cache.dtype} is not supported"
        )
    if name not in kv_quant.FP8_NAMES:
        return f"a KV cache of type {name} is not supported"
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    if transfer is None or transfer.get_from_extra_config("lmcache_rag.fp8_kv", False) is not True:
        return "an FP8 KV cache was not measured on a GPU yet: --connector lmcache_rag.fp8_kv=true blends it"
    if kv_quant.as_numbers(cache).dtype != torch.float8_e4m3fn:
        return f"an FP8 KV cache that holds {cache.dtype} is not supported"
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):  # vLLM 0.25
        return "scales of an FP8 KV cache that are calculated while vLLM runs are not supported"
    for scale in (layer._k_scale, layer._v_scale, layer._q_scale):
        if scale.numel() != 1:
            return "an FP8 KV cache with a scale for each head is not supported"
    if any(not number > 0 or number == float("inf") for number in kv_quant.scales(layer)):
        return f"an FP8 KV cache with scales {kv_quant.scales(layer)} is not supported"
    if cache.is_cuda and torch.cuda.get_device_capability(cache.device) < FP8_CAPABILITY:
        return "an FP8 KV cache needs a GPU of compute capability 8.9 or newer"
    return ""


def _cache(layer: Any, block_size: int) -> str:
    try:
        keys, values = keys_and_values(layer.kv_cache)
    except ValueError as problem:
        return str(problem)
    if keys.shape[1] != block_size:  # plans have vLLM's block ids, but the cache is read by the backend's blocks
        return f"blocks of {block_size} tokens that the attention backend divides into blocks of {keys.shape[1]}"
    if {keys.shape[3], values.shape[3]} != {layer.head_size}:
        return f"a KV cache of heads of {keys.shape[3]} where the model's are of {layer.head_size} is not supported"
    return ""


# -- layers -----------------------------------------------------------------------------------------------------------


def _layers(vllm_config: Any, model: Any) -> Unsupported | None:
    layers = list(vllm_internals.attention_layers(vllm_config).values())
    if len(layers) != vllm_config.model_config.hf_text_config.num_hidden_layers:
        return Unsupported(CannotBlend.MODEL, "the model has other layers with KV than its decoder's")
    first = layers[0].kv_cache
    same = (first.shape, first.stride(), first.dtype)
    if any((x.kv_cache.shape, x.kv_cache.stride(), x.kv_cache.dtype) != same for x in layers):
        return Unsupported(CannotBlend.KV_CACHE, "layers whose KV caches differ are not supported")
    return None


# -- positions --------------------------------------------------------------------------------------------------------


def _positions(vllm_config: Any, model: Any) -> Unsupported | None:
    size = next(iter(vllm_internals.attention_layers(vllm_config).values())).head_size
    rotaries = rotaries_of(model)
    if any(rotary is None for rotary in rotaries):
        return Unsupported(CannotBlend.ROTARY, "layers without a rotary embedding (NoPE) are not supported")
    details = (_rotary(rotary, rotaries[0], size) for rotary in rotaries)
    return next((Unsupported(CannotBlend.ROTARY, detail) for detail in details if detail), None)


def _rotary(rotary: Any, first: Any, size: int) -> str:
    import torch

    name = type(rotary).__name__
    if isinstance(rotary, TransformersRotary):
        if rotary.kind not in SCALINGS:
            return f"RoPE of the type {rotary.kind} is not supported"
    elif name not in ROTARIES:
        return f"{name} is not supported"
    if (rotary.rotary_dim, rotary.head_size) != (size, size):
        return "a rotary embedding that rotates only part of each head is not supported"
    if rotary is first:
        return ""
    same = rotary.is_neox_style == first.is_neox_style and torch.equal(rotary.cos_sin_cache, first.cos_sin_cache)
    return "" if same else "layers with different rotary embeddings are not supported"
