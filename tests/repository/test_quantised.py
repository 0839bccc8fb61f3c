"""The four-bit files that benchmarks/quantised.py writes, read as vLLM's auto_awq.py and auto_gptq.py read them."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from models import tiny_model
from safetensors.torch import load_file

FILE = Path(__file__).parents[2] / "benchmarks" / "quantised.py"
GROUP = 16


@pytest.fixture(scope="module")
def quantised():
    spec = importlib.util.spec_from_file_location("quantised", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def columns(words: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Eight numbers of each int32, in the order of the columns."""
    nibbles = (words.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    return nibbles[:, :, order].reshape(words.shape[0], -1)


def spread(per_group: torch.Tensor) -> torch.Tensor:
    return per_group.repeat_interleave(GROUP, 0).float()


def test_awq_weights_come_back_within_half_a_step(quantised):
    torch.manual_seed(0)
    weight = torch.randn(24, 3 * GROUP)
    kept = quantised.awq(weight, GROUP)
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # vLLM: _REVERSE_AWQ_PACK_ORDER
    scales = spread(kept["scales"])
    back = (columns(kept["qweight"], order) - spread(columns(kept["qzeros"], order))) * scales
    assert kept["qweight"].shape == (3 * GROUP, 3)
    assert ((back - weight.T).abs() / scales).max() <= 1.01  # half a step, and half for the whole zero point
    assert ((back - weight.T).abs() / scales).mean() < 0.3


def test_gptq_weights_come_back_within_half_a_step(quantised):
    torch.manual_seed(0)
    weight = torch.randn(24, 3 * GROUP)
    kept = quantised.gptq(weight, GROUP)
    scales = spread(kept["scales"])
    whole = columns(kept["qweight"].T.contiguous(), list(range(8))).T
    zeros = spread(columns(kept["qzeros"], list(range(8)))) + 1  # kept less one
    assert kept["qweight"].shape == (6, 24)
    assert torch.equal(kept["g_idx"], torch.arange(3).repeat_interleave(GROUP).int())
    assert (((whole - zeros) * scales - weight.T).abs() / scales).max() <= 0.51


@pytest.mark.parametrize("form", ["awq", "gptq"])
def test_a_folder_has_every_layer_and_its_format(quantised, form, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "in")
    layers = quantised.write(tmp_path / "in", tmp_path / "out", form, GROUP)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert layers == 4 * 7
    assert sum(name.endswith(".qweight") for name in tensors) == layers
    assert not any(name.endswith("proj.weight") for name in tensors)
    told = config["quantization_config"]
    assert (told["quant_method"], told["bits"], told["group_size"]) == (form, 4, GROUP)


def test_inputs_that_make_no_whole_groups_are_said(quantised, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "in")
    with pytest.raises(SystemExit, match="not a multiple of --group 48"):
        quantised.write(tmp_path / "in", tmp_path / "out", "awq", 48)
