"""Tiny random models of every supported family and RoPE scaling, and texts to feed them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
}
# Besides what all have. The experts are few and small; a random model's router chooses them evenly.
OF_FAMILY: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 64,
        "decoder_sparse_step": 2,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"sliding_window": None},
    "granite": {
        "embedding_multiplier": 6.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
    },
    "cohere": {"use_qk_norm": True, "logit_scale": 0.25},
    "ernie4_5": {"use_bias": True},
}
BASIC = ("llama", "mistral", "qwen2", "qwen3")
OTHERS = {  # with the scaling that each is tested with; transformers gives Phi-3 no other than LongRoPE
    "qwen3_moe": "yarn",
    "qwen2_moe": "default",
    "mixtral": "linear",
    "phi3": "default",
    "granite": "llama3",
    "cohere": "linear",
    "ernie4_5": "yarn",
}
FAMILIES = (*BASIC, *OTHERS)
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
CASES = [*((family, scaling) for family in BASIC for scaling in SCALINGS), *OTHERS.items()]


def tiny_config(family: str, scaling: str = "default", **changes: Any) -> Any:
    """A configuration of that family: 4 layers, 4 heads, 2 KV heads of size 16."""
    facts: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_theta": 10000.0, **SCALINGS[scaling]},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return transformers.AutoConfig.for_model(family, **(facts | OF_FAMILY.get(family, {}) | changes))


def tiny_mistral3(scaling: str = "default", **changes: Any) -> Any:
    """A configuration with a tiny tower for pictures beside a tiny Mistral."""
    vision = transformers.AutoConfig.for_model("pixtral", **VISION, image_size=56, patch_size=14)
    return transformers.Mistral3Config(
        text_config=tiny_config("mistral", scaling, **changes), vision_config=vision, image_token_index=10
    )


def tiny_model(family: str, scaling: str = "default", *, seed: int = 0, **changes: Any) -> Any:
    """A random model whose attention is far from uniform, so that mistakes show."""
    torch.manual_seed(seed)
    if family == "mistral3":
        config = tiny_mistral3(scaling, **changes)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    else:
        config = tiny_config(family, scaling, **changes)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "qkv_proj.weight")):
                weight.mul_(8)
            elif "embed_tokens" in name or "lm_head" in name:
                weight.mul_(20)
    return model.eval()
