"""The blend's pass through vLLM's own model on a CPU, against transformers and against vLLM's own attention kernels.

See test_internals.py. vLLM loads a tiny random model from its weights. Its CPU kernels serve the reference;
a blend cannot stand on the KV cache that they write, which a test shows, so the pass of ours writes a plain one.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from forward_kit import BLOCK, LENGTH, NEAR, Pair
    from models import OTHERS

    from lmcache_rag.connector import model_support

pytestmark = [pytest.mark.own_version, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("group")]


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """Of the family and scaling that the test names; a Llama otherwise."""
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's runner for CPUs does
    return Pair(tmp_path, *getattr(request, "param", ("llama", "llama3")))


@pytest.mark.parametrize(
    "pair",
    [("llama", "llama3"), ("mistral", "yarn"), ("qwen2", "linear"), ("qwen3", "default"), *OTHERS.items()],
    indirect=True,
    ids="-".join,
)
def test_our_pass_gives_the_logits_of_vllms_own(pair: Pair) -> None:
    own = pair.prefill()
    torch.testing.assert_close(own, pair.logits, **NEAR)
    blendable = pair.plain()
    pieces = torch.arange(LENGTH).split(70)
    ours = torch.cat([pair.forward(blendable, piece, int(piece[-1]) + 1) for piece in pieces])
    torch.testing.assert_close(ours, own, **NEAR)
    torch.testing.assert_close(ours, pair.logits, **NEAR)
    for layer, kv in enumerate(pair.kv):
        torch.testing.assert_close(pair.stored(layer), kv, **NEAR)


def test_a_pass_over_chosen_positions_mends_their_kv(pair: Pair) -> None:
    """Positions as a policy chooses them, anywhere before what is there already, and the prompt's last token."""
    blendable = pair.plain()
    pair.forward(blendable, torch.arange(LENGTH), LENGTH)
    chosen = torch.cat([torch.arange(40, 100, 3), torch.tensor([LENGTH - 1])])
    slots = pair.sequence.slots(chosen)
    for layer in range(blendable.layers):
        for cache in blendable.cache(layer):
            cache[slots // BLOCK, slots % BLOCK] = 5.0
    torch.testing.assert_close(pair.forward(blendable, chosen, LENGTH), pair.logits[chosen], **NEAR)
    for layer, kv in enumerate(pair.kv):
        torch.testing.assert_close(pair.stored(layer), kv, **NEAR)


def test_vllms_cpu_kernels_keep_keys_in_another_order(pair: Pair) -> None:
    """Why nothing is blended on a CPU: they transpose the keys of each block, and our attention reads a plain cache."""
    pair.prefill()
    assert "CPUAttentionBackendImpl is not supported" in str(model_support.unsupported_reason(pair.config, pair.model))
    assert not torch.allclose(pair.stored(0), pair.kv[0], **NEAR), "then blends could run on a CPU"
