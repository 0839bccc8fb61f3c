"""Which models of vLLM are blended: a real one on a CPU, and what must not be, one change at a time.

See test_internals.py. The weights are random; the attention implementation is FlashAttention's, never run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from contract_kit import vllm_folder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from forward_kit import Runner
    from models import CASES, tiny_config
    from vllm.config import (
        CacheConfig,
        CompilationConfig,
        CompilationMode,
        KVTransferConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.config.lora import LoRAConfig
    from vllm.distributed.kv_transfer import kv_transfer_state
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.layers.attention import attention
    from vllm.model_executor.models import registry
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.worker.utils import AttentionGroup

    from lmcache_rag.connector import model_runner, model_support, vllm_internals
    from lmcache_rag.connector.attention import PagedSequence, keys_and_values
    from lmcache_rag.connector.self_check import compare_with_prefill
    from lmcache_rag.families import ARCHITECTURES, MODEL_CLASSES, RECURRENT, REFUSED
    from lmcache_rag.protocol import CannotBlend

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("group")]
BLOCK = 16
TELECHAT = {"n_layer": 4, "n_head": 4, "ffn_hidden_size": 96, "layer_norm_epsilon": 1e-5}


class World:
    """A model as vLLM loads it, with KV caches."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, family: str = "llama", **changes: Any) -> None:
        tiny_config(family, changes.pop("scaling", "default"), **changes).save_pretrained(folder)
        monkeypatch.setattr(attention, "get_attn_backend", lambda *given, **more: FlashAttentionBackend)
        self.config = VllmConfig(
            model_config=ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=512),
            cache_config=CacheConfig(block_size=BLOCK),
            compilation_config=CompilationConfig(mode=CompilationMode.NONE),
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
        self.layers = list(vllm_internals.attention_layers(self.config).values())
        for layer in self.layers:
            layer.kv_cache = torch.zeros(4, 2, BLOCK, layer.num_kv_heads, layer.head_size)

    @property
    def why_not(self) -> str:
        return str(model_support.unsupported_reason(self.config, self.model) or "")

    @property
    def code(self) -> str:
        found = model_support.unsupported_reason(self.config, self.model)
        return "" if found is None else str(found.code)


@pytest.mark.parametrize(("family", "scaling"), CASES)
def test_what_we_know_is_blended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, scaling: str) -> None:
    assert World(tmp_path, monkeypatch, family, scaling=scaling).why_not == ""


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"], "sliding_window": 64}, "sliding"),
        ("mistral", {"sliding_window": 64}, "sliding window"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "only part of each head"),
        ("llama", {"rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128,
            "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        }}, "Phi3LongRoPEScaledRotaryEmbedding is not supported"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64}, "sliding window"),
        ("mixtral", {"sliding_window": 64}, "sliding window"),
        ("phi3", {"sliding_window": 64}, "sliding window"),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "only part of each head"),
        # Windows and layers without RoPE came to vLLM's Granite after 0.25.
        pytest.param("granite", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"], "sliding_window": 64,
                                 "attention_sinks": False}, "sliding window", marks=pytest.mark.own_version),
        pytest.param("granite", {"layer_rope_theta": [1e4, 1e4, 1e4, 0]}, "NoPE", marks=pytest.mark.own_version),
        pytest.param("granite", {"layer_rope_theta": [1e4, 1e4, 1e4, 1e6]}, "different rotary embeddings",
                     marks=pytest.mark.own_version),
        ("cohere2", {"layer_types": ["full_attention"] * 4, "sliding_window": None}, "NoPE"),
        ("cohere2", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "sliding window"),
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
    "sleep mode": lambda world: setattr(world.config.model_config, "enable_sleep_mode", True),
    "expert parallelism": lambda world: setattr(world.config.parallel_config, "enable_expert_parallel", True),
    "data parallelism of a model with experts": lambda world: (
        setattr(world.config.parallel_config, "data_parallel_size", 2),
        setattr(world.config.parallel_config, "is_moe_model", None),
    ),
    "OddForCausalLM is not supported": lambda world: setattr(
        world.model, "__class__", type("OddForCausalLM", (type(world.model),), {})
    ),
    "pipeline": lambda world: setattr(world.config.parallel_config, "pipeline_parallel_size", 2),
    "context parallelism": lambda world: setattr(world.config.parallel_config, "decode_context_parallel_size", 2),
    "context parallelism ": lambda world: setattr(world.config.parallel_config, "prefill_context_parallel_size", 2),
    "speculative": lambda world: setattr(world.config, "speculative_config", object()),
    "LoRA adapters of a model with experts": lambda world: (
        setattr(world.config, "lora_config", object()),
        world.config.compilation_config.static_all_moe_layers.append("model.layers.0.mlp.experts"),
    ),
    "LoRA layers on a second stream": lambda world: (
        setattr(world.config, "lora_config", object()),
        world.config.compilation_config.static_forward_context.update(
            {"model.layers.0.self_attn.qkv_proj.lora_linear_async": object()}
        ),
    ),
    "fused": lambda world: setattr(world.config.compilation_config.pass_config, "fuse_attn_quant", True),
    "not an attention layer": last(lambda layer: delattr(layer, "impl")),
    "not causal attention": last(lambda layer: setattr(layer, "attn_type", "encoder_only")),
    "not causal attention ": last(
        lambda layer: setattr(layer, "__class__", type("CrossAttention", (type(layer),), {}))
    ),
    "soft caps": last(lambda layer: setattr(layer.impl, "logits_soft_cap", 30.0)),
    "ALiBi": last(lambda layer: setattr(layer.impl, "alibi_slopes", torch.ones(4))),
    "sinks": last(lambda layer: setattr(layer.impl, "sinks", torch.ones(4))),
    "share their KV": last(
        lambda layer: setattr(layer, "kv_sharing_target_layer_name", "model.layers.0.self_attn.attn")
    ),
    "backend Odd": last(lambda layer: setattr(layer, "impl", type("Odd", (), {})())),
    "an FP8 KV cache was not measured": last(lambda layer: setattr(layer, "kv_cache_dtype", "fp8_e4m3")),
    "a KV cache of type fp8_e5m2": last(lambda layer: setattr(layer, "kv_cache_dtype", "fp8_e5m2")),
    "a KV cache of shape": last(lambda layer: setattr(layer, "kv_cache", torch.zeros(2, 4, BLOCK, 2, 16))),
    "heads of 32": last(lambda layer: setattr(layer, "kv_cache", torch.zeros(4, 2, BLOCK, 2, 32))),
    "differ": last(lambda layer: setattr(layer, "kv_cache", torch.zeros(4, 2, BLOCK, 1, 16))),
    "divides into blocks of 16": lambda world: setattr(world.config.cache_config, "block_size", 64),
    "different rotary embeddings": table,
    "other layers with KV": lambda world: setattr(world.config.model_config.hf_text_config, "num_hidden_layers", 3),
}


@pytest.mark.parametrize("reason", ONE_CHANGE)
def test_each_of_these_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    world = World(tmp_path, monkeypatch)
    assert world.why_not == ""
    ONE_CHANGE[reason](world)
    assert reason.strip() in world.why_not
    assert world.code in set(CannotBlend) - {CannotBlend.ERROR}


def test_data_parallelism_of_dense_models_is_blended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, monkeypatch)
    world.config.parallel_config.data_parallel_size = 2
    world.config.parallel_config.is_moe_model = False
    assert world.why_not == ""


def test_amd_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert (world.code, "ROCm" in world.why_not) == ("ROCm", True)


def test_inside_multi_connector_nothing_is_blended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's worker makes the outermost connector before it makes the KV caches."""
    world = World(tmp_path, monkeypatch)
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", object())
    assert world.why_not == ""
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", object.__new__(MultiConnector))
    assert (world.code, "MultiConnector" in world.why_not) == ("MultiConnector", True)


@pytest.mark.own_version
def test_the_table_of_architectures_is_vllms_registry() -> None:
    known = (
        registry._TEXT_GENERATION_MODELS
        | registry._MULTIMODAL_MODELS
        | registry._TRANSFORMERS_SUPPORTED_MODELS
        | registry._TRANSFORMERS_BACKEND_MODELS
    )
    classes = {name: found[1] for name, found in known.items()}
    blended = {name for name, kind in classes.items() if kind in MODEL_CLASSES}
    assert blended == set(ARCHITECTURES) | set(REFUSED)
    assert all(classes.get(name, MODEL_CLASSES[0]) in MODEL_CLASSES for name in ARCHITECTURES)
    assert set(MODEL_CLASSES) <= blended


def test_recurrent_models_say_so_in_vllms_classes() -> None:
    from vllm.model_executor.models import interfaces

    assert interfaces.IsHybrid.is_hybrid is interfaces.HasInnerState.has_inner_state is True


@pytest.mark.own_version
def test_recurrent_models_are_named_as_vllm_does() -> None:
    known = registry._TEXT_GENERATION_MODELS | registry._MULTIMODAL_MODELS
    assert set(RECURRENT) <= set(known)
    for name in ("Qwen3NextForCausalLM", "GraniteMoeHybridForCausalLM", "NemotronHForCausalLM"):
        module, kind = known[name]
        text = (vllm_folder() / f"model_executor/models/{module}.py").read_text()
        assert "IsHybrid" in text[text.index(f"class {kind}(") :].split("):")[0]


# -- the self-check, on vLLM's own model, forward context and attention metadata -----------------------------------


class TorchAttention:
    """An attention backend in plain torch: what vLLM's own does on a GPU, by the metadata that vLLM makes."""

    def __init__(self, scale: float, num_heads: int) -> None:
        self.scale, self.num_heads = scale, num_heads

    def forward(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, output: Any, **given: Any
    ) -> Any:
        keys, values = keys_and_values(kv_cache)
        end = int(metadata.seq_lens[0])
        sequence = PagedSequence(metadata.block_table_tensor[0], BLOCK)
        own = [sequence.gather(cache, end).transpose(0, 1)[None] for cache in (keys, values)]
        positions = torch.arange(end - len(query), end)
        mask = torch.arange(end)[None] <= positions[:, None]
        rows = query.transpose(0, 1)[None]
        found = torch.nn.functional.scaled_dot_product_attention(
            rows, *own, attn_mask=mask, scale=self.scale, enable_gqa=True
        )
        output.view(query.shape).copy_(found[0].transpose(0, 1))
        return output

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any) -> None:
        for cache, fresh in zip(keys_and_values(kv_cache), (key, value), strict=True):
            cache[slots // BLOCK, slots % BLOCK] = fresh


class Loaded(World):
    """A model that runs: random weights, attention in torch, and a runner as far as a pass asks for one."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        family: str = "llama",
        *,
        lora: Any = None,
        **changes: Any,
    ) -> None:
        super().__init__(folder, monkeypatch, family, **changes)
        torch.manual_seed(1)
        for name, weight in self.model.named_parameters():
            weight.data = torch.ones_like(weight) if "norm" in name else torch.randn_like(weight) * 0.2
        for module in self.model.modules():  # as vLLM does when it has loaded them
            if hasattr(module, "quant_method"):
                module.quant_method.process_weights_after_loading(module)
        for layer in self.layers:
            layer.kv_cache = torch.zeros(64, 2, BLOCK, layer.num_kv_heads, layer.head_size, dtype=torch.bfloat16)
            layer.impl = TorchAttention(layer.impl.scale, layer.impl.num_heads)
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=self.layers[0].num_kv_heads, head_size=16, dtype=torch.bfloat16
        )
        names = [layer.layer_name for layer in self.layers]

        def build(common_prefix_len: int, common_attn_metadata: Any, **given: Any) -> Any:
            return common_attn_metadata

        builder = SimpleNamespace(build=build, supports_update_block_table=False)
        group = AttentionGroup(FlashAttentionBackend, names, spec, 0, metadata_builders=[builder])
        runner = Runner(self.model, [[group]], KVCacheConfig(64, [], [KVCacheGroupSpec(names, spec)]))
        if lora is not None:
            self.config.lora_config = lora
            with set_current_vllm_config(self.config):
                runner.load_lora_model(self.model, self.config, torch.device("cpu"))
        self.runner = runner
        self.blendable = model_runner.VLLMModel(self.config, runner)

    def check(self) -> list[Any]:
        with set_current_vllm_config(self.config):
            return compare_with_prefill(self.blendable, vocabulary=49152, longest=512)


@pytest.mark.own_version
@pytest.mark.parametrize(
    ("family", "scaling", "changes"),
    [
        ("llama", "llama3", {}),
        ("mistral", "yarn", {}),
        ("qwen2", "linear", {}),
        ("qwen3", "default", {}),
        ("cohere", "linear", {}),
        ("ernie4_5", "yarn", {}),
        ("granite", "llama3", {}),
        # Classes that transformers does not have.
        ("qwen2", "default", {"architectures": ["MiMoForCausalLM"]}),
        ("llama", "default", {"architectures": ["TeleChat2ForCausalLM"], **TELECHAT}),
    ],
)
def test_vllms_own_model_passes_the_self_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, scaling: str, changes: dict[str, Any]
) -> None:
    world = Loaded(tmp_path, monkeypatch, family, scaling=scaling, **changes)
    if changes:
        assert type(world.model).__name__ == changes["architectures"][0]
    findings = world.check()
    assert {finding.name for finding in findings} >= {
        "KV moved by LMCache's rotary table",
        "KV moved by the exact rotary table",
        "hidden states of a blend",
        "logits of a blend",
    }
    assert [str(finding) for finding in findings if not finding.holds] == []


@pytest.fixture
def with_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    lora = LoRAConfig(max_lora_rank=8, max_loras=1, max_cpu_loras=1, lora_dtype=torch.bfloat16)
    return Loaded(tmp_path, monkeypatch, lora=lora)


@pytest.mark.own_version
def test_the_self_check_compares_with_an_adapter_too(with_lora: Loaded) -> None:
    findings = with_lora.check()
    assert [str(finding) for finding in findings if not finding.holds] == []
    names = [finding.name for finding in findings]
    assert sum("with a LoRA adapter" in name for name in names) * 2 == len(names) - 2
    assert with_lora.runner.list_loras() == set(), "the server's own adapters find their slots empty"


@pytest.mark.own_version
@pytest.mark.parametrize("fault", ["ignored by all", "ignored by a blend"])
def test_an_adapter_that_is_ignored_fails_self_check(
    with_lora: Loaded, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    use = vllm_internals.PassAdapters.use
    if fault == "ignored by all":

        def ignored(self: Any, adapter: Any, tokens: int, rows: int = 1) -> None:
            use(self, adapter if tokens == 1 else None, tokens, rows)

        monkeypatch.setattr(vllm_internals.PassAdapters, "use", ignored)
        with pytest.raises(ValueError, match="changes no hidden state"):
            with_lora.check()
        return
    run = vllm_internals.run_pass

    def alone(*given: Any, **more: Any) -> Any:
        with_lora.blendable._adapters.use(None, len(given[4]))
        return run(*given, **more)

    monkeypatch.setattr(vllm_internals, "run_pass", alone)
    wrong = {finding.name for finding in with_lora.check() if not finding.holds}
    assert "hidden states of its last token with a LoRA adapter" in wrong
    assert all(name.endswith("with a LoRA adapter") for name in wrong)


@pytest.mark.own_version
def test_a_model_with_wrong_passes_fails_self_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a fused kernel leaves out the keys of a pass that has no slot mapping."""
    world = Loaded(tmp_path, monkeypatch)
    write = vllm_internals.write_kv
    monkeypatch.setattr(
        vllm_internals, "write_kv", lambda layer, key, value, slots: write(layer, key * 0, value, slots)
    )
    assert {finding.name for finding in world.check() if not finding.holds} >= {"logits of a blend"}


@pytest.mark.own_version
def test_a_wrong_rotary_table_fails_the_self_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = Loaded(tmp_path, monkeypatch)
    right = vllm_internals.exact_rotary_table
    monkeypatch.setattr(vllm_internals, "exact_rotary_table", lambda rotary: right(rotary).roll(1, 0))
    assert [finding.name for finding in world.check() if not finding.holds] == ["KV moved by the exact rotary table"]


def test_what_is_looked_at_is_there() -> None:
    assert {"decode_context_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size"} <= set(
        ParallelConfig.__dataclass_fields__
    )
    config = VllmConfig()
    assert hasattr(config.compilation_config.pass_config, "fuse_attn_quant")
    for name in model_support.ROTARIES:
        assert name == "RotaryEmbedding" or hasattr(rotary_embedding, name), f"{name} is named"
    inside = (vllm_folder() / "model_executor/models/mistral3.py").read_text()
    assert "self.language_model.model(" in inside
    assert "self.language_model.compute_logits(" in inside
    files = ("config/model.py", "multimodal/registry.py")
    assert any("def supports_multimodal_inputs(" in (vllm_folder() / file).read_text() for file in files)
    assert "language_model_only" in (vllm_folder() / "config/model.py").read_text()
    backends = "".join(path.read_text() for path in (vllm_folder() / "v1/attention/backends").glob("*.py"))
    for name in model_support.BACKENDS:
        assert f"class {name}(" in backends


def test_vllm_schedules_async_and_says_so_to_workers() -> None:
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
        assert (
            model_runner.recomputes_reported_blocks(
                SimpleNamespace(kv_transfer_config=transfer, scheduler_config=scheduler)
            )
            == takes
        )
    transfer.kv_load_failure_policy = "fail"
    assert not model_runner.recomputes_reported_blocks(
        SimpleNamespace(kv_transfer_config=transfer, scheduler_config=scheduler)
    )
