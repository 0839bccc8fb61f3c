"""The size of a model's KV, from its config.json or from plain numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmcache_rag.errors import ConfigError
from lmcache_rag.plan.geometry import ALIGN, from_config, from_numbers, objects, read_config

LLAMA: dict[str, Any] = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "torch_dtype": "bfloat16",
}


def test_an_8b_llama_takes_131_kb_a_token() -> None:
    model = from_config(LLAMA, name="8B")
    assert model.bytes_per_token == 131_072
    assert model.with_dtype("fp8").bytes_per_token == 65_536
    assert 2_000_000 * 1000 * model.bytes_per_token / 1e12 == pytest.approx(262.1, abs=0.1)  # TB
    assert model.parameters / 1e9 == pytest.approx(6.98, abs=0.01)  # without embeddings
    assert from_numbers(32, 8, 128).bytes_per_token == 131_072


def test_it_is_what_the_engine_itself_reports(smollm2_path: Path) -> None:
    from lmcache_rag.weights import kv_bytes_per_token

    assert read_config(str(smollm2_path)).bytes_per_token == kv_bytes_per_token(smollm2_path)
    assert read_config(str(smollm2_path / "config.json")) == read_config(str(smollm2_path))


def test_only_whole_lmcache_chunks_are_kept() -> None:
    model = from_config(LLAMA)
    assert [objects(tokens) for tokens in (63, 64, 1000, 1024)] == [0, 1, 15, 16]
    assert model.chunk_bytes(1000) == 15 * 64 * 131_072
    assert model.chunk_bytes(1000, chunk=256) == 3 * 256 * 131_072


def test_an_object_is_rounded_up_on_each_rank() -> None:
    model = from_numbers(3, 1, 8)  # 96 bytes a token, 6,144 an object
    assert model.object_bytes() == 2 * ALIGN
    assert model.object_bytes(ranks=2) == 2 * ALIGN  # 3,072 bytes each
    assert from_numbers(32, 8, 128).object_bytes(ranks=4) == 64 * 131_072


def test_recurrent_layers_and_latent_kv_are_counted() -> None:
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 8
    hybrid = from_config({**LLAMA, "layer_types": kinds})
    assert hybrid.layers == 8
    assert "24 of 32 layers are recurrent" in hybrid.notes[0]
    mamba = from_config({**LLAMA, "layer_types": ["mamba"] * 28 + ["attention"] * 4})
    assert mamba.layers == 4
    windows = from_config({**LLAMA, "layer_types": ["sliding_attention", "full_attention"] * 16})
    assert (windows.layers, windows.notes) == (32, ())
    latent = from_config({**LLAMA, "kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert latent.bytes_per_token == 32 * 576 * 2
    inner = from_config({"model_type": "mistral3", "text_config": {**LLAMA, "dtype": "float32"}})
    assert inner.bytes_per_token == 2 * 131_072


def test_of_experts_only_those_of_a_token_count() -> None:
    experts = {**LLAMA, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    assert from_config(experts).parameters < from_config(LLAMA).parameters / 1.8


def test_what_is_missing_is_named_with_its_remedy(tmp_path: Path) -> None:
    broken = tmp_path / "config.json"
    for text, message in (("{", "cannot be read"), ("[]", "is not a configuration"), ("{}", "num_hidden_layers")):
        broken.write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            read_config(str(broken))
        assert "--layers" in caught.value.remedy
    with pytest.raises(ConfigError, match="is not on this machine"):
        read_config("nobody/nothing")
    with pytest.raises(ConfigError, match="is not known"):
        from_numbers(1, 1, 1, dtype="fp3")
    with pytest.raises(ConfigError, match="above 0"):
        from_numbers(0, 1, 1)
    with pytest.raises(ConfigError, match="above 0"):
        from_config({**LLAMA, "layer_types": ["mamba"] * 32})  # nothing is kept of any token
    broken.write_text(json.dumps(LLAMA))
    assert read_config(str(broken)).name == tmp_path.name
