"""Which models are blended, by the names of vLLM's classes and by those that stand in a model's config.json."""

from __future__ import annotations

from typing import Final

MODEL_CLASSES: Final = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# What config.json may name for vLLM to load one of these classes: from the registry of vLLM 0.32, against which
# tests/test_connector_contract_model.py holds it.
ARCHITECTURES: Final = (
    *MODEL_CLASSES,
    "InternLM3ForCausalLM",
    "IQuestCoderForCausalLM",
    "LLaMAForCausalLM",
    "Ministral3ForCausalLM",
    "TeleChat3ForCausalLM",
)
