"""Time of the attention of recomputed tokens in one layer of an 8B Llama's shape, on a CUDA device.

python benchmarks/attention.py [--ratio 0.15] [--tokens 8400 --tokens 16600 ...]
"""

from __future__ import annotations

import argparse

import torch

HEADS, KV_HEADS, SIZE, BLOCK = 32, 8, 128, 16
PREFIX = 1088


def microseconds(tokens: int, rows: int, repeats: int) -> tuple[float, float]:
    """Time of one layer, and the floating-point operations that it takes."""
    from lmcache_rag.connector import kernels  # needs Triton

    torch.manual_seed(0)
    blocks = -(-tokens // BLOCK)
    cache = torch.randn((blocks + 64, 2, BLOCK, KV_HEADS, SIZE), device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(blocks + 64, device="cuda")[:blocks].int()
    positions = (torch.randperm(tokens - PREFIX, device="cuda")[:rows].sort().values + PREFIX).int()
    query = torch.randn((rows, HEADS, SIZE), device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(query)

    def run() -> None:
        kernels.attend(query, cache[:, 0], cache[:, 1], table, positions, None, SIZE**-0.5, out, end=tokens)

    run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats * 1e3, 4.0 * SIZE * HEADS * float((positions.double() + 1).sum())


def main() -> None:
    """Print a line for each length."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tokens", type=int, action="append", help="length of a prompt; 8400, 16600 and 30900")
    options.add_argument("--ratio", type=float, default=0.15, help="share of the tokens after the prefix")
    options.add_argument("--repeats", type=int, default=20)
    arguments = options.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    print(torch.cuda.get_device_name())
    for tokens in arguments.tokens or (8400, 16600, 30900):
        rows = round(arguments.ratio * (tokens - PREFIX))
        took, work = microseconds(tokens, rows, arguments.repeats)
        print(f"{rows:6d} of {tokens:6d} tokens: {took:6.0f} us a layer, {work / took / 1e6:4.0f} TFLOP/s")


if __name__ == "__main__":
    main()
