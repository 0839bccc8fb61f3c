"""Round a model's weights to four bits, in the file formats of AutoAWQ and of GPTQ, to try vLLM's layers for them.

    python benchmarks/quantised.py MODEL_FOLDER OUT_FOLDER --format awq
    lmcache-rag serve OUT_FOLDER --dtype float16
    lmcache-rag bench exact examples/data/documents

Plain rounding to the nearest: neither AWQ's nor GPTQ's search, so answers are worse than with their tools. For a test
of blending only the formats count. Linear layers of a Llama-like folder are rounded, the rest is copied.

Sources: the packing of `AutoAWQ` (`awq/modules/linear/gemm.py`: eight columns an int32, in the order 0 2 4 6 1 3 5 7)
and of `GPTQModel` (eight rows an int32, zero points kept less one), as `auto_awq.py` and `auto_gptq.py` of
vLLM read them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BITS, PER_WORD = 4, 8
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
STRAIGHT = tuple(range(PER_WORD))
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pack(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Eight columns of numbers below 16 to one int32: `[rows, columns]` to `[rows, columns / 8]`."""
    grouped = values.to(torch.int64).reshape(values.shape[0], -1, PER_WORD)[:, :, list(order)]
    words = (grouped << (torch.arange(PER_WORD) * BITS)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def awq(weight: torch.Tensor, group: int) -> dict[str, torch.Tensor]:
    """A layer `[out, in]` as AutoAWQ keeps it, with a zero point for each group of inputs."""
    rows = weight.float().T.reshape(-1, group, weight.shape[0])  # [groups, group, out]
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-5).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    whole = ((rows / scales.float()[:, None]).round() + zeros[:, None]).clamp(0, 15).reshape(-1, weight.shape[0])
    return {"qweight": pack(whole, AWQ_ORDER), "qzeros": pack(zeros, AWQ_ORDER), "scales": scales}


def gptq(weight: torch.Tensor, group: int) -> dict[str, torch.Tensor]:
    """A layer `[out, in]` as GPTQ keeps it: symmetric, so that every zero point is 8."""
    rows = weight.float().T.reshape(-1, group, weight.shape[0])
    scales = (rows.abs().amax(1) / 7).clamp(min=1e-5).half()
    whole = ((rows / scales.float()[:, None]).round() + 8).clamp(0, 15).reshape(-1, weight.shape[0])
    return {
        "qweight": pack(whole.T.contiguous(), STRAIGHT).T.contiguous(),
        "qzeros": pack(torch.full(scales.shape, 7), STRAIGHT),
        "scales": scales,
        "g_idx": (torch.arange(weight.shape[1]) // group).to(torch.int32),
    }


FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "awq": (awq, {"quant_method": "awq", "version": "gemm", "zero_point": True}),
    "gptq": (gptq, {"quant_method": "gptq", "checkpoint_format": "gptq", "desc_act": False, "sym": True}),
}


def write(source: Path, out: Path, form: str, group: int) -> int:
    """Write the folder; returns how many layers were rounded."""
    rounded, settings = FORMATS[form]
    tensors: dict[str, torch.Tensor] = {}
    layers = 0
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            layer = name.removesuffix(".weight")
            if layer != name and layer.endswith(PROJECTIONS):
                if tensor.shape[1] % group:
                    raise SystemExit(f"{name} has {tensor.shape[1]} inputs: not a multiple of --group {group}.")
                tensors |= {f"{layer}.{part}": each for part, each in rounded(tensor, group).items()}
                layers += 1
            else:
                tensors[name] = tensor.half()
    if not layers:
        raise SystemExit(f"No linear layers of a Llama found in {source}/*.safetensors.")
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy(file, out)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"bits": BITS, "group_size": group, **settings}
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float16"}, indent=1))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return layers


def main() -> None:
    """Round one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--format", choices=sorted(FORMATS), required=True)
    parser.add_argument("--group", type=int, default=64, help="inputs that share a scale")
    arguments = parser.parse_args()
    print(f"{write(arguments.model, arguments.out, arguments.format, arguments.group)} layers in {arguments.out}")


if __name__ == "__main__":
    main()
