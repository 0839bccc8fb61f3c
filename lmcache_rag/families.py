"""The families of models that are blended: one entry for each class of vLLM.

The connector's check, the embedded engine, `doctor` and the table in docs/models.md take the names from here. An entry
is not enough for a model to be blended: the checks in lmcache_rag.connector.model_support, and the embedded engine's in
lmcache_rag.engines.hf_model, look at its attention, its KV cache and its positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Family:
    """Models with one class in vLLM.

    Attributes:
        title: Its name for people.
        vllm_class: vLLM's class.
        architectures: Other names in a model's config.json for which vLLM loads this class.
        model_type: Its name in transformers if the embedded engine blends it; else "".
        measured: Whether the quality of its blended answers was measured with real weights.
        interleaved: Whether RoPE's pairs are neighbours in a head, rather than its two halves.
        note: What is refused of it, or what else a user must know.
    """

    title: str
    vllm_class: str
    architectures: tuple[str, ...] = ()
    model_type: str = ""
    measured: bool = False
    interleaved: bool = False
    note: str = ""


TRANSFORMERS_BACKEND: Final = "TransformersForCausalLM"
EXPERTS: Final = "without expert parallelism, data parallelism and LoRA adapters"

FAMILIES: Final = (
    Family(
        "Llama",
        "LlamaForCausalLM",
        ("InternLM3ForCausalLM", "IQuestCoderForCausalLM", "LLaMAForCausalLM", "TeleChat3ForCausalLM"),
        model_type="llama",
        measured=True,
        note="InternLM3, IQuest-Coder and TeleChat3 are loaded as this class",
    ),
    Family(
        "Mistral",
        "MistralForCausalLM",
        ("Ministral3ForCausalLM",),
        model_type="mistral",
        note="without a sliding window",
    ),
    Family(
        "Qwen2 and Qwen2.5",
        "Qwen2ForCausalLM",
        model_type="qwen2",
        measured=True,
        note="without a sliding window and dual chunk attention",
    ),
    Family("Qwen3", "Qwen3ForCausalLM", model_type="qwen3", note="without a sliding window"),
    Family("Qwen3-MoE", "Qwen3MoeForCausalLM", model_type="qwen3_moe", note=EXPERTS),
    Family("Qwen2-MoE", "Qwen2MoeForCausalLM", model_type="qwen2_moe", note=EXPERTS),
    Family("Mixtral", "MixtralForCausalLM", model_type="mixtral", note=EXPERTS),
    Family(
        "Phi-3 and Phi-4",
        "Phi3ForCausalLM",
        model_type="phi3",
        note="Phi-4 14B; not Phi-4-mini (partial rotary), not Phi-3 with LongRoPE or a sliding window",
    ),
    Family(
        "Granite 3",
        "GraniteForCausalLM",
        model_type="granite",
        note="dense; without sliding windows, attention sinks and layers without RoPE",
    ),
    Family(
        "Command-R",
        "CohereForCausalLM",
        model_type="cohere",
        interleaved=True,
        note="not Command-A and Command-R7B (Cohere2: windows, layers without RoPE)",
    ),
    Family("Ernie 4.5", "Ernie4_5ForCausalLM", model_type="ernie4_5", interleaved=True, note="dense"),
    Family("MiMo 7B", "MiMoForCausalLM", note="not MiMo-V2 (windows); without speculative decoding"),
    Family("TeleChat2", "TeleChat2ForCausalLM"),
    Family(
        "Mistral Small 3, Ministral 3",
        "Mistral3ForConditionalGeneration",
        model_type="mistral3",
        note="text; a prompt with a picture is computed in full; without LoRA adapters on a server that takes pictures",
    ),
    Family(
        "Arcee, Jais 2, OLMo, OLMo 2, Seed-OSS",
        TRANSFORMERS_BACKEND,
        ("ArceeForCausalLM", "Jais2ForCausalLM", "OlmoForCausalLM", "Olmo2ForCausalLM", "SeedOssForCausalLM"),
        note="vLLM's Transformers backend; Llama, Mistral, Qwen2 and Qwen3 too with `--model-impl transformers`",
    ),
)

MODEL_CLASSES: Final = tuple(family.vllm_class for family in FAMILIES)
# Names in config.json for which vLLM loads one of these classes, from the registry of vLLM 0.32;
# tests/contracts/test_model.py compares them.
ARCHITECTURES: Final = (*MODEL_CLASSES, *(name for family in FAMILIES for name in family.architectures))
# Names for which vLLM loads one of these classes, but of which no model is blended.
REFUSED: Final[Mapping[str, str]] = {
    "CwmForCausalLM": "it has sliding windows",
    "GPTBigCodeForCausalLM": "it has no RoPE",
    "GPTNeoXForCausalLM": "it rotates only part of each head",
    "GlmForCausalLM": "it rotates only part of each head",
    "HunYuanDenseV1ForCausalLM": "it normalises keys after they were rotated, so they cannot be moved",
    "NanbeigeForCausalLM": "transformers does not have its code",
    "Olmo3ForCausalLM": "it has sliding windows",
    "PhiForCausalLM": "it rotates only part of each head",
    "SmolLM3ForCausalLM": "each fourth layer has no RoPE",
    "Starcoder2ForCausalLM": "it has sliding windows",
    "VaultGemmaForCausalLM": "it has sliding windows and soft caps",
    "Cohere2ForCausalLM": "it has sliding windows and layers without RoPE",
    "GraniteSWAForCausalLM": "it has sliding windows and attention sinks",
}
# Decoders of transformers that vLLM's Transformers backend may run. In each the last that is done to a key is that all
# of it is rotated, as two halves, by the decoder's `rotary_emb`. In SmolLM3's that is so where `use_rope` is not 0.
TRANSFORMERS_DECODERS: Final = (
    "ArceeModel",
    "Jais2Model",
    "LlamaModel",
    "MistralModel",
    "OlmoModel",
    "Olmo2Model",
    "Qwen2Model",
    "Qwen3Model",
    "SeedOssModel",
    "SmolLM3Model",
)

# Models with recurrent layers (Mamba, linear attention) by their names in config.json; vLLM's classes have a flag.
RECURRENT: Final = (
    "BailingMoeV2_5ForCausalLM",
    "FalconH1ForCausalLM",
    "FalconMambaForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "JambaForCausalLM",
    "KimiLinearForCausalLM",
    "Lfm2ForCausalLM",
    "Lfm2MoeForCausalLM",
    "Mamba2ForCausalLM",
    "MambaForCausalLM",
    "NemotronHForCausalLM",
    "OlmoHybridForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
    "Zamba2ForCausalLM",
)
CANNOT_RECUR: Final = (
    "has recurrent layers, whose state depends on every token before: only prompts that begin alike share work, so "
    "order=auto puts passages into a stable order"
)


def recurrent_of(architectures: Iterable[str]) -> str:
    """The first of these names in a config.json that is a model's with recurrent layers; "" if none is."""
    return next((name for name in architectures if name in RECURRENT), "")


def family_of(architectures: Iterable[str]) -> Family | None:
    """The family of a model with these names in its config.json; None if it is not blended."""
    names = set(architectures)
    return next((family for family in FAMILIES if names & {family.vllm_class, *family.architectures}), None)
