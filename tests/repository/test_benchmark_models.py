"""benchmarks/models.py writes folders that are blended."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import safe_open

from lmcache_rag.serving import machine

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "models.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shapes_are_written_with_the_layers_that_fit(script: ModuleType, tmp_path: Path, smollm2_path: Path) -> None:
    for name in script.SHAPES:
        layers = script.write(name, tmp_path / name, smollm2_path, memory=20.0)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["num_hidden_layers"] == layers
        assert (tmp_path / name / "tokenizer.json").is_file()
        assert machine.model(str(tmp_path / name)).state == "ok"
        assert layers == 1 or script.weights_gb(name, layers) <= 20.0


def test_adapters_and_options_of_vllm_are_measured(script: ModuleType, tmp_path: Path, smollm2_path: Path) -> None:
    script.write("llama-3-8b", tmp_path / "llama", smollm2_path, memory=1.0)
    for adapter in script.ADAPTERS:
        with safe_open(tmp_path / "llama" / adapter / "adapter_model.safetensors", "pt") as tensors:
            shape = tensors.get_tensor("base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight").shape
        assert shape == (1024, script.RANK)
    lora, fp8 = (script.commands("llama-3-8b", tmp_path / "llama", how) for how in ("LoRA", "FP8 KV"))
    assert f"one={tmp_path / 'llama' / 'one'} two={tmp_path / 'llama' / 'two'}" in lora[0]
    assert "--model one " in lora[1]
    assert "--kv-cache-dtype fp8 --connector lmcache_rag.fp8_kv=true" in fp8[0]
    assert "--kv-cache-dtype fp8" in fp8[3]
    assert "lmcache_rag" not in fp8[3]


def test_the_true_sizes_are_met(script: ModuleType) -> None:
    """Billions of parameters, as the models are named; two bytes each."""
    for name, billions in {
        "qwen3-30b-a3b": 30.5,
        "mixtral-8x7b": 46.7,
        "phi-4": 14.7,
        "granite-3-8b": 8.2,
        "llama-3-8b": 8.0,
    }.items():
        own = script.SHAPES[name][1]["num_hidden_layers"]
        assert script.weights_gb(name, own) / 2 == pytest.approx(billions, rel=0.03)
