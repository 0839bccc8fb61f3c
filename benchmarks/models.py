"""Write folders of models in their true shapes, with as many layers as fit, and print the commands that measure them.

    python benchmarks/models.py OUT --tokenizer MODEL_FOLDER --memory 100

Without --weights no weights are written, and vLLM makes random ones (`--load-format dummy`): for times alone, since
they are all so small that each token attends to all others alike. With --weights DEVICE they are drawn as transformers
initialises such a model. The tokenizer is another model's, so the vocabulary is that tokenizer's size at least. For
each folder these are to be run on a machine with a GPU, which benchmarks/measure_models.py does:

    lmcache-rag serve OUT/NAME --load-format dummy ...                  # the self-check at start must pass
    lmcache-rag bench exact examples/data/documents --prompts 30        # ratio 1 equal but for near ties
    lmcache-rag bench speed --tokens 8192 ...                           # TTFT beside stock vLLM

Llama 3 8B is there for two options of vLLM: `--kv-cache-dtype fp8`, and LoRA, for which random adapters are written.
Their tests come first: pytest -m gpu tests/servers/test_fp8_on_gpu.py tests/servers/test_lora_on_gpu.py
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

DEFAULT_ROPE = {"rope_type": "default"}
# Of each model's own config.json, as far as shapes and attention go.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": (
        "llama",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "rope_parameters": DEFAULT_ROPE | {"rope_theta": 5e5},
        },
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
            "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
            "moe_intermediate_size": 768, "norm_topk_prob": True, "vocab_size": 151936,
            "rope_parameters": DEFAULT_ROPE | {"rope_theta": 1e6},
        },
    ),
    "mixtral-8x7b": (
        "mixtral",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
            "sliding_window": None, "rope_parameters": DEFAULT_ROPE | {"rope_theta": 1e6},
        },
    ),
    "mistral-small-3-24b": (
        "mistral",
        {
            "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072, "sliding_window": None,
            "rope_parameters": DEFAULT_ROPE | {"rope_theta": 1e8},
        },
    ),
    "phi-4": (
        "phi3",
        {
            "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40,
            "num_key_value_heads": 10, "vocab_size": 100352, "sliding_window": None,
            "rope_parameters": DEFAULT_ROPE | {"rope_theta": 250000.0},
        },
    ),
    "granite-3-8b": (
        "granite",
        {
            "hidden_size": 4096, "intermediate_size": 12800, "num_hidden_layers": 40, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 49155, "embedding_multiplier": 12.0, "logits_scaling": 16.0,
            "residual_multiplier": 0.22, "attention_multiplier": 0.0078125, "tie_word_embeddings": True,
            "rope_parameters": DEFAULT_ROPE | {"rope_theta": 1e7},
        },
    ),
    "command-r-35b": (
        "cohere",
        {
            "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 40, "num_attention_heads": 64,
            "num_key_value_heads": 64, "vocab_size": 256000, "logit_scale": 0.0625,
            "rope_parameters": DEFAULT_ROPE | {"rope_theta": 8e6},
        },
    ),
}  # fmt: skip


LORA = ("llama-3-8b",)  # shapes that adapters are written for
ADAPTERS, RANK = ("one", "two"), 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Options of vLLM that are measured beside the shape as it is; in both servers alike, but for the connector's.
OPTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "llama-3-8b": {
        "FP8 KV": ("--kv-cache-dtype fp8", "--connector lmcache_rag.fp8_kv=true"),
        "LoRA": ("--enable-lora --max-loras 2 --max-lora-rank 16 --lora-modules {adapters}", ""),
    }
}


def config_of(name: str, layers: int, vocabulary: int = 0) -> Any:
    """The configuration of a shape with that many layers."""
    family, facts = SHAPES[name]
    vocabulary = max(vocabulary, facts["vocab_size"])
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    more = {"num_hidden_layers": layers, "vocab_size": vocabulary, "max_position_embeddings": 40960}
    return AutoConfig.for_model(family, **(facts | ids | more))


def weights_gb(name: str, layers: int) -> float:
    """Gigabytes of its weights in 16 bits."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name, layers))
    return 2 * sum(weight.numel() for weight in model.parameters()) / 1e9


def layers_that_fit(name: str, memory: float) -> int:
    """Number of layers whose weights take at most that many gigabytes; at least one, at most the model's own."""
    one, two = weights_gb(name, 1), weights_gb(name, 2)
    return max(1, min(int(SHAPES[name][1]["num_hidden_layers"]), 1 + int((memory - one) / (two - one))))


def write_adapter(config: Any, out: Path, seed: int) -> None:
    """Write a random LoRA adapter in PEFT's format; its change is about as large as vLLM's dummy weights."""
    from safetensors.torch import save_file

    dice, tensors = torch.Generator().manual_seed(seed), {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            wide, into = module.weight.shape
            for half, shape, size in (("A", (RANK, into), into**-0.5), ("B", (wide, RANK), 1e-3)):
                drawn = torch.randn(*shape, generator=dice) * size
                tensors[f"base_model.model.{name}.lora_{half}.weight"] = drawn.to(torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    facts |= {"target_modules": list(TARGETS), "base_model_name_or_path": config.model_type}
    (out / "adapter_config.json").write_text(json.dumps(facts), encoding="utf-8")


def commands(name: str, folder: Path, how: str = "") -> list[str]:
    """The commands that measure a folder, with options of vLLM that OPTIONS names."""
    common, ours = OPTIONS[name][how] if how else ("", "")
    common = common.format(adapters=" ".join(f"{each}={folder / each}" for each in ADAPTERS))
    model = ADAPTERS[0] if how == "LoRA" else folder
    served = f"{folder} --load-format dummy --max-model-len 33000"
    lines = [
        f"lmcache-rag serve {served} --l1-gb 20 {common} {ours}",
        f"lmcache-rag bench exact examples/data/documents --model {model} --prompts 30 --json",
        "lmcache-rag bench speed --tokens 8192 --baseline http://localhost:8001 --json",
        f"vllm serve {served} --port 8001 {common}  # the baseline",
    ]
    return [" ".join(line.split()) for line in lines]


def write(name: str, out: Path, tokenizer: Path, memory: float, weights: str = "") -> int:
    """Write one folder, with weights drawn on the device `weights` if that is named; returns its number of layers."""
    layers = layers_that_fit(name, memory)
    config = config_of(name, layers, vocabulary=int(AutoConfig.from_pretrained(tokenizer).vocab_size))
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.dtype = "bfloat16"
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    if weights:
        torch.manual_seed(0)
        with torch.device(weights):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(out, max_shard_size="4GB")
    for pattern in ("tokenizer*", "vocab*", "merges*", "special_tokens*", "chat_template*"):
        for file in tokenizer.glob(pattern):
            shutil.copy(file, out)
    for seed, adapter in enumerate(ADAPTERS if name in LORA else ()):
        write_adapter(config, out / adapter, seed)
    return layers


def main() -> None:
    """Write the folders that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a model whose tokenizer is taken")
    parser.add_argument("--memory", type=float, default=100.0, help="gigabytes that weights may take")
    parser.add_argument("--weights", default="", metavar="DEVICE", help="also draw weights, on this device")
    parser.add_argument("--only", choices=sorted(SHAPES), nargs="+", default=sorted(SHAPES))
    arguments = parser.parse_args()
    for name in arguments.only:
        folder = arguments.out / name
        layers = write(name, folder, arguments.tokenizer, arguments.memory, arguments.weights)
        print(f"# {name}: {layers} of {SHAPES[name][1]['num_hidden_layers']} layers")
        for how in ("", *OPTIONS.get(name, ())):
            print(*([f"# {name}, {how}"] if how else []), *commands(name, folder, how), sep="\n")


if __name__ == "__main__":
    main()
