"""The packaged SmolLM2 after its conversion: tokenizer, template, weights, and what it says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmcache_rag.weights import find_model, packages
from lmcache_rag.weights.find import what_is_missing
from lmcache_rag.weights.gguf import halves_together, hf_name

TEXTS = [
    "In 2024, 12,345 people — 3.14% — paid $99.",
    "x = 10**12\n\n\tdef f():  # naïve café",
    "日本語 🎉 ½ ٣٤ \u200b zero width",
    " leading and trailing ",
    "",
]


@pytest.fixture(scope="session")
def packaged() -> Path:
    """The folder that was prepared from the package, whatever else this machine has."""
    package = packages.package_for("HuggingFaceTB/SmolLM2-135M-Instruct", "model")
    assert package is not None
    return packages.prepare(package)


@pytest.fixture(scope="module")
def chat(packaged: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(packaged)


def test_the_folder_is_whole_without_package_files(packaged: Path) -> None:
    assert what_is_missing(packaged, "model") == ""
    assert {file.suffix for file in packaged.iterdir()} == {".json", ".jinja", ".safetensors"}


def test_a_folder_that_is_named_can_be_the_packages(packaged: Path) -> None:
    assert find_model(packaged).path == packaged


def test_the_configuration_is_the_published_one(packaged: Path) -> None:
    config = json.loads((packaged / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "bfloat16",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    }
    assert {name: config[name] for name in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == 100_000
    assert "quantization_config" not in config


def test_weights_are_bit_equal_on_every_machine(packaged: Path) -> None:
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for name, weight in sorted(load_file(packaged / "model.safetensors").items()):
        assert weight.dtype == torch.bfloat16
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.view(torch.int16).numpy().tobytes())
    assert digest.hexdigest() == "6f4bd9280ccfc81a646d45118db929b7ea839fdb24f8bf72bdc4edcb1c20ef4e"


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_gives_back_every_text(chat: Any, text: str) -> None:
    assert chat.decode(chat(text).input_ids) == text


def test_digits_are_tokens_of_their_own(chat: Any) -> None:
    assert chat.tokenize("2024") == ["2", "0", "2", "4"]


def test_special_tokens_are_the_published_ones(chat: Any) -> None:
    assert (chat.bos_token, chat.eos_token, chat.pad_token, chat.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert chat("<|im_start|>").input_ids == [1]
    assert chat("<jupyter_code>").input_ids == [13]
    assert chat("plain").input_ids == chat("plain", add_special_tokens=False).input_ids
    assert chat.model_max_length == 8192


def test_the_chat_template_makes_turns(chat: Any) -> None:
    text = chat.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_the_model_answers_sensibly_and_ends_its_turn(packaged: Path, chat: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(packaged, dtype=torch.float32).eval()
    turns = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = chat.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert chat.decode(answer) == "The capital of France is Paris.<|im_end|>"


def write_tiny_gguf(file: Path) -> dict[str, np.ndarray]:
    """A Llama model as llama.cpp writes it, and the weights that went in under transformers' names.

    One layer of 4 heads and 2 KV heads; quantised as SmolLM2's file is.
    """
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(6)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|unk|>", "<|start|>", "<|end|>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {
        "token_embd": (6, 64),
        "output_norm": (64,),
        "blk.0.attn_norm": (64,),
        "blk.0.attn_q": (64, 64),
        "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64),
        "blk.0.attn_output": (64, 64),
        "blk.0.ffn_norm": (64,),
        "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96),
    }
    random = np.random.default_rng(0)
    kept: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd" else gguf.GGMLQuantizationType.Q4_1
        kept[hf_name(f"{name}.weight")] = values
        heads = {"blk.0.attn_q": 4, "blk.0.attn_k": 2}.get(name)
        if heads:  # what llama.cpp's own converter does to the rows
            values = values.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(shape)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def test_a_gguf_file_becomes_a_transformers_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    raw, folder = tmp_path / "raw", tmp_path / "folder"
    raw.mkdir()
    folder.mkdir()
    package = packages.package_for("HuggingFaceTB/SmolLM2-135M-Instruct", "model")
    assert package is not None
    (name,) = package.files
    weights = write_tiny_gguf(raw / name)
    package.unpack(raw, folder)

    assert what_is_missing(folder, "model") == ""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.rope_parameters["rope_theta"] == 5000
    loaded = model.state_dict()
    assert torch.equal(loaded["lm_head.weight"], loaded["model.embed_tokens.weight"])
    for weight_name, values in weights.items():
        error = np.abs(loaded[weight_name].numpy() - values).max()
        assert error < (0.3 if "layers" in weight_name else 0.05), weight_name  # half a step of 4 bits, or of 8
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("<|start|>abba<|end|>").input_ids == [1, 5, 4, 3, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<|start|>", "<|end|>", "<|unk|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_rows_that_rope_pairs_are_half_a_head_apart() -> None:
    two_heads = np.arange(8, dtype=np.float32)[:, None].repeat(3, axis=1)
    assert halves_together(two_heads, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_names_are_transformers_names() -> None:
    assert hf_name("blk.12.attn_output.weight") == "model.layers.12.self_attn.o_proj.weight"
    assert hf_name("output_norm.weight") == "model.norm.weight"
