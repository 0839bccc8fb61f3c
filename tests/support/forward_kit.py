"""A tiny random model in transformers and, with the same weights, in vLLM for CPUs; the blend's passes through it.

Imported only where vLLM is installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from models import tiny_model
    from vllm.config import (
        CacheConfig,
        CompilationConfig,
        CompilationMode,
        ModelConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.attention.backends.cpu_attn import (
        CPUAttentionBackend,
        CPUAttentionBackendImpl,
        CPUAttentionMetadataBuilder,
    )
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
    from vllm.v1.worker.utils import AttentionGroup

    from lmcache_rag.connector import model_runner, vllm_internals
    from lmcache_rag.connector.attention import PagedAttention, PagedSequence, RecomputeAttention, keys_and_values

BLOCK, BLOCKS, SIZE, LENGTH = 32, 16, 32, 150  # the CPU's kernels take no smaller blocks and heads
NEAR = {"atol": 1e-4, "rtol": 1e-4}


class PlainCache(CPUAttentionBackendImpl):
    """vLLM's attention for CPUs, but that KV is written as backends for GPUs write it."""

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any) -> None:
        for cache, fresh in zip(keys_and_values(kv_cache), (key, value), strict=True):
            cache[slots // BLOCK, slots % BLOCK] = fresh


class Runner(LoRAModelRunnerMixin):
    """What a model runner has that passes need, and its own LoRA."""

    def __init__(self, model: Any, attn_groups: Any, kv_cache_config: Any) -> None:
        self.get_model = lambda: model
        self.attn_groups, self.kv_cache_config = attn_groups, kv_cache_config
        self.lora_config = None


class Pair:
    """The same weights in transformers and in vLLM, float32, and what transformers makes of a prompt."""

    def __init__(
        self,
        folder: Path,
        family: str,
        scaling: str,
        lora: Any = None,
        *,
        options: Mapping[str, Any] = MappingProxyType({}),
        cache_dtype: str = "auto",
        **changes: Any,
    ) -> None:
        self.reference = reference = tiny_model(family, scaling, hidden_size=4 * SIZE, head_dim=SIZE, **changes)
        reference.save_pretrained(folder)
        torch.manual_seed(4)
        self.ids = torch.randint(300, 15000, (LENGTH,))
        self.logits, self.kv = self.expected(reference)  # vLLM's Transformers backend changes the reference's class
        self.config = VllmConfig(
            model_config=ModelConfig(
                model=str(folder),
                skip_tokenizer_init=True,
                dtype="float32",
                max_model_len=512,
                **options,
            ),
            cache_config=CacheConfig(block_size=BLOCK, cache_dtype=cache_dtype),
            compilation_config=CompilationConfig(mode=CompilationMode.NONE),
            lora_config=lora,
        )
        self.embeds = vllm_internals.takes_embeddings(self.config)
        rotary_embedding._ROPE_DICT.clear()  # vLLM shares them between models of one process
        with set_current_vllm_config(self.config):
            self.model = get_model(vllm_config=self.config)
            self.layers = vllm_internals.attention_layers(self.config)
            names, heads = list(self.layers), next(iter(self.layers.values())).num_kv_heads
            dtype = torch.float32 if cache_dtype == "auto" else torch.uint8
            spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=heads, head_size=SIZE, dtype=dtype)
            builder = CPUAttentionMetadataBuilder(spec, names, self.config, torch.device("cpu"))
        for layer in self.layers.values():
            layer.kv_cache = torch.zeros(BLOCKS, heads, BLOCK, 2 * SIZE, dtype=dtype)
        group = AttentionGroup(CPUAttentionBackend, names, spec, 0, metadata_builders=[builder])
        self.runner = Runner(self.model, [[group]], KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(names, spec)]))
        if lora is not None:
            with set_current_vllm_config(self.config):
                self.runner.load_lora_model(self.model, self.config, torch.device("cpu"))
        self.sequence = PagedSequence.of([7, 3, 11, 5, 9], BLOCK, "cpu")

    def expected(self, reference: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits [tokens, vocabulary] and each layer's KV [2, tokens, heads, size] by transformers."""
        with torch.inference_mode():
            found = reference(self.ids[None], use_cache=True)
        kv = [torch.stack([at.keys[0], at.values[0]]).transpose(1, 2) for at in found.past_key_values.layers]
        return found.logits[0], kv

    def prefill(self, adapter: Any = None) -> torch.Tensor:
        """Logits by vLLM's own pass and its own kernels, in two pieces; with an adapter (LoRARequest) of vLLM's own."""
        pieces, rows = torch.arange(LENGTH).split(70), LENGTH
        states = []
        with torch.inference_mode(), set_current_vllm_config(self.config):
            for positions in pieces:
                self._map(adapter, len(positions))
                blocks, slots = self.sequence.blocks, self.sequence.slots(positions)
                found = vllm_internals.run_prefill(
                    self.config, self.runner, self.ids[positions].int(), positions, blocks, slots, embeds=self.embeds
                )
                states.append(found.clone())
            self._map(adapter, rows, rows)
            logits: torch.Tensor = self.model.compute_logits(torch.cat(states))
        return logits

    def _map(self, adapter: Any, tokens: int, rows: int = 1) -> None:
        """As vLLM's runner does before a step."""
        if self.config.lora_config is not None:
            number = adapter.lora_int_id if adapter is not None else 0
            self.runner._set_active_loras((number,) * rows, (number,) * tokens, {adapter} - {None})

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
