"""The blend's pass through vLLM's own model on a CPU, against transformers and against vLLM's own attention kernels.

See test_internals.py. vLLM loads a tiny random model from its weights. Its CPU kernels serve the reference;
a blend cannot stand on the KV cache that they write, which a test shows, so the pass of ours writes a plain one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from models import OTHERS, tiny_model
    from vllm import distributed
    from vllm.config import (
        CacheConfig,
        CompilationConfig,
        CompilationMode,
        ModelConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.distributed import parallel_state
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.attention.backends.cpu_attn import (
        CPUAttentionBackend,
        CPUAttentionBackendImpl,
        CPUAttentionMetadataBuilder,
    )
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.worker.utils import AttentionGroup

    from lmcache_rag.connector import model_runner, model_support, vllm_internals
    from lmcache_rag.connector.attention import PagedAttention, PagedSequence, RecomputeAttention, keys_and_values

pytestmark = [pytest.mark.own_version, pytest.mark.filterwarnings("ignore")]
BLOCK, BLOCKS, SIZE, LENGTH = 32, 16, 32, 150  # the CPU's kernels take no smaller blocks and heads
NEAR = {"atol": 1e-4, "rtol": 1e-4}


class PlainCache(CPUAttentionBackendImpl):
    """vLLM's attention for CPUs, but that KV is written as backends for GPUs write it."""

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any) -> None:
        for cache, fresh in zip(keys_and_values(kv_cache), (key, value), strict=True):
            cache[slots // BLOCK, slots % BLOCK] = fresh


class Pair:
    """The same weights in transformers and in vLLM, float32, and what transformers makes of a prompt."""

    def __init__(self, folder: Path, family: str, scaling: str) -> None:
        reference = tiny_model(family, scaling, hidden_size=4 * SIZE, head_dim=SIZE)
        reference.save_pretrained(folder)
        self.config = VllmConfig(
            model_config=ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=512),
            cache_config=CacheConfig(block_size=BLOCK),
            compilation_config=CompilationConfig(mode=CompilationMode.NONE),
        )
        with set_current_vllm_config(self.config):
            self.model = get_model(vllm_config=self.config)
            self.layers = vllm_internals.attention_layers(self.config)
            names, heads = list(self.layers), next(iter(self.layers.values())).num_kv_heads
            spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=heads, head_size=SIZE, dtype=torch.float32)
            builder = CPUAttentionMetadataBuilder(spec, names, self.config, torch.device("cpu"))
        for layer in self.layers.values():
            layer.kv_cache = torch.zeros(BLOCKS, heads, BLOCK, 2 * SIZE)
        group = AttentionGroup(CPUAttentionBackend, names, spec, 0, metadata_builders=[builder])
        self.runner = SimpleNamespace(
            get_model=lambda: self.model,
            attn_groups=[[group]],
            kv_cache_config=KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(names, spec)]),
        )
        torch.manual_seed(4)
        self.ids = torch.randint(300, 15000, (LENGTH,))
        self.sequence = PagedSequence.of([7, 3, 11, 5, 9], BLOCK, "cpu")
        with torch.inference_mode():
            found = reference(self.ids[None], use_cache=True)
        self.logits = found.logits[0]
        self.kv = [torch.stack([at.keys[0], at.values[0]]).transpose(1, 2) for at in found.past_key_values.layers]

    def prefill(self) -> torch.Tensor:
        """Logits by vLLM's own pass and its own kernels, in two pieces."""
        states = []
        with torch.inference_mode(), set_current_vllm_config(self.config):
            for positions in torch.arange(LENGTH).split(70):
                blocks, slots = self.sequence.blocks, self.sequence.slots(positions)
                found = vllm_internals.run_prefill(
                    self.config, self.runner, self.ids[positions].int(), positions, blocks, slots
                )
                states.append(found.clone())
            logits: torch.Tensor = self.model.compute_logits(torch.cat(states))
        return logits

    def plain(self) -> model_runner.VLLMModel:
        """What blends, over an empty cache that is laid out as on a GPU."""
        for layer in self.layers.values():
            layer.impl.__class__ = PlainCache
            layer.kv_cache = torch.full_like(layer.kv_cache, float("nan"))
        return model_runner.VLLMModel(self.config, self.runner)

    def forward(self, blendable: model_runner.VLLMModel, positions: torch.Tensor, end: int) -> torch.Tensor:
        """Logits of these positions by a pass of ours."""
        attention = RecomputeAttention(PagedAttention(self.sequence, positions.int(), end))
        slots = self.sequence.slots(positions)
        with torch.inference_mode(), set_current_vllm_config(self.config):
            found = blendable.logits(blendable.forward(self.ids[positions], positions, slots, attention))
        assert found is not None
        return found.clone()

    def stored(self, layer: int) -> torch.Tensor:
        """The KV of the prompt as ours reads it, [2, tokens, heads, size]."""
        caches = keys_and_values(list(self.layers.values())[layer].kv_cache)
        return torch.stack([self.sequence.gather(cache, LENGTH) for cache in caches])


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One rank, as a worker has it."""
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    with set_current_vllm_config(VllmConfig()):
        distributed.init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        distributed.initialize_model_parallel(1)
    yield
    parallel_state.cleanup_dist_env_and_memory()


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
