"""Small random LoRA adapters in PEFT's format, and the same adapters merged into a transformers model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 4, 16.0


def write_adapter(folder: Path, model: Any, *, seed: int, targets: tuple[str, ...] = TARGETS) -> Path:
    """Write an adapter for a transformers model; its change is a fifth of the weights, so that mistakes show."""
    dice, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in _targets(model, targets):
        out, into = module.weight.shape
        scale = 0.2 * float(module.weight.std()) / (ALPHA / RANK)
        for half, shape, size in (("A", (RANK, into), 0.5), ("B", (out, RANK), scale)):
            tensors[f"base_model.model.{name}.lora_{half}.weight"] = torch.randn(*shape, generator=dice) * size
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    facts = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(targets),
        "bias": "none",
        "base_model_name_or_path": "tiny",
    }
    (folder / "adapter_config.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def merged(model: Any, folder: Path) -> Any:
    """A copy of a transformers model with an adapter added to its weights."""
    from safetensors.torch import load_file

    found, tensors = copy.deepcopy(model), load_file(folder / "adapter_model.safetensors")
    targets = tuple(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"])
    with torch.no_grad():
        for name, module in _targets(found, targets):
            a, b = (tensors[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
            module.weight += ALPHA / RANK * b @ a
    return found


def _targets(model: Any, targets: tuple[str, ...]) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in targets]
