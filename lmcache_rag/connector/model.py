"""A model inside a vLLM worker: what of it can be blended, and its forward pass over chosen positions."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from lmcache_rag.connector import compat_vllm
from lmcache_rag.connector.captured import ROWS, CapturedWatch, CudaGraph
from lmcache_rag.connector.in_layers import Nothing
from lmcache_rag.connector.memory import PassMemory, measured
from lmcache_rag.connector.paged import keys_and_values
from lmcache_rag.policies import QueryPolicy
from lmcache_rag.protocol import MODEL_CLASSES, CannotBlend, Unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from lmcache_rag.connector.hot_copy import HotCopy
    from lmcache_rag.connector.in_layers import Attention
    from lmcache_rag.connector.paged import PagedSequence

log = logging.getLogger("lmcache_rag")

BACKENDS = ("FlashAttentionImpl", "FlashInferImpl", "TritonAttentionImpl")
# An angle is a matter of the position alone, and a table holds it for each: moving a key is turning it.
ROTARIES = (
    "RotaryEmbedding",
    "LinearScalingRotaryEmbedding",
    "DynamicNTKScalingRotaryEmbedding",
    "DynamicNTKAlphaRotaryEmbedding",
    "NTKScalingRotaryEmbedding",
    "Llama3RotaryEmbedding",
    "YaRNScalingRotaryEmbedding",
)


def why_not(vllm_config: Any, model: Any) -> Unsupported | None:
    """Why this model cannot be blended in vLLM; None when it can. Its KV caches are made."""
    name = type(model).__name__
    if reason := _why_not_machine(vllm_config) or _why_not_parallel(vllm_config.parallel_config):
        return reason
    if name not in MODEL_CLASSES:
        return Unsupported(CannotBlend.MODEL, f"{name} is not supported (supported: {', '.join(MODEL_CLASSES)})")
    if getattr(vllm_config, "speculative_config", None) is not None:
        return Unsupported(CannotBlend.SPECULATIVE, "speculative decoding is not supported")
    if getattr(vllm_config, "lora_config", None) is not None:
        return Unsupported(CannotBlend.LORA, "LoRA adapters change the KV of the same text")
    if getattr(vllm_config.compilation_config.pass_config, "fuse_attn_quant", False):
        detail = "attention that is fused with a quantisation of its output is not supported"
        return Unsupported(CannotBlend.ATTENTION, detail)
    layers = compat_vllm.attention_layers(vllm_config)
    for key, layer in layers.items():
        if detail := _why_not_layer(key, layer):
            return Unsupported(CannotBlend.ATTENTION, detail)
        if detail := _why_not_cache(layer, vllm_config.cache_config.block_size):
            return Unsupported(CannotBlend.KV_CACHE, detail)
    if len(layers) != vllm_config.model_config.hf_text_config.num_hidden_layers:
        return Unsupported(CannotBlend.MODEL, "the model has other layers with KV than its decoder's")
    first = next(iter(layers.values())).kv_cache
    if any((x.kv_cache.shape, x.kv_cache.stride()) != (first.shape, first.stride()) for x in layers.values()):
        return Unsupported(CannotBlend.KV_CACHE, "layers whose KV caches differ are not supported")
    rotaries = [layer.self_attn.rotary_emb for layer in model.model.layers]
    details = (_why_not_rotary(rotary, rotaries[0], first) for rotary in rotaries)
    return next((Unsupported(CannotBlend.ROTARY, detail) for detail in details if detail), None)


def _why_not_machine(vllm_config: Any) -> Unsupported | None:
    import torch

    if torch.version.hip is not None:
        return Unsupported(CannotBlend.ROCM, "AMD GPUs (ROCm) are not supported")
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        detail = "sleep mode takes away GPU memory that a blend needs, and LMCache has mapped"
        return Unsupported(CannotBlend.SLEEP_MODE, detail)
    if compat_vllm.in_multi_connector():
        detail = "beside other connectors (MultiConnector) KV that is approximate would be stored as exact"
        return Unsupported(CannotBlend.MULTI_CONNECTOR, detail)
    return None


def _why_not_parallel(parallel: Any) -> Unsupported | None:
    detail = ""
    if parallel.pipeline_parallel_size > 1:
        detail = "pipeline parallelism is not supported"
    elif parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        detail = "context parallelism is not supported: each rank would hold a part of the tokens"
    elif getattr(parallel, "enable_expert_parallel", False):
        detail = "expert parallelism is not supported: each pass needs the other ranks"
    elif getattr(parallel, "data_parallel_size", 1) > 1 and getattr(parallel, "is_moe_model", None) is not False:
        detail = "data parallelism of a model with experts is not supported: each pass needs the other ranks"
    return Unsupported(CannotBlend.PARALLELISM, detail) if detail else None


def _why_not_layer(name: str, layer: Any) -> str:
    impl = getattr(layer, "impl", None)
    if impl is None:
        return f"{name} is no attention layer"
    if type(layer).__name__ != "Attention" or layer.attn_type != "decoder":
        return f"{name} is no causal attention ({type(layer).__name__}, {layer.attn_type})"
    if layer.sliding_window is not None:
        return "sliding window attention is not supported"
    if getattr(impl, "logits_soft_cap", None) not in (None, 0, 0.0):
        return "soft caps on attention scores are not supported"
    if getattr(impl, "alibi_slopes", None) is not None or getattr(impl, "sinks", None) is not None:
        return "ALiBi and attention sinks are not supported"
    if layer.kv_sharing_target_layer_name is not None:
        return "layers that share their KV are not supported"
    if type(impl).__name__ not in BACKENDS:
        return f"attention backend {type(impl).__name__} is not supported"
    return ""


def _why_not_cache(layer: Any, block: int) -> str:
    if layer.kv_cache_dtype not in ("auto", "bfloat16", "float16"):
        return f"a KV cache of type {layer.kv_cache_dtype} is not supported"
    try:
        keys, values = keys_and_values(layer.kv_cache)
    except ValueError as problem:
        return str(problem)
    if keys.shape[1] != block:  # plans name vLLM's blocks, and the cache would be read by those of the backend
        return f"blocks of {block} tokens that the attention backend divides into blocks of {keys.shape[1]}"
    if {keys.shape[3], values.shape[3]} != {layer.head_size}:
        return f"a KV cache of heads of {keys.shape[3]} where the model's are of {layer.head_size} is not supported"
    return ""


def _why_not_rotary(rotary: Any, first: Any, cache: Any) -> str:
    import torch

    name, size = type(rotary).__name__, keys_and_values(cache)[0].shape[3]
    if name not in ROTARIES:
        return f"{name} is not supported"
    if (rotary.rotary_dim, rotary.head_size) != (size, size):
        return "a rotary embedding that turns a part of each head is not supported"
    same = rotary.is_neox_style == first.is_neox_style and torch.equal(rotary.cos_sin_cache, first.cos_sin_cache)
    return "" if rotary is first or same else "layers with rotary embeddings of their own are not supported"


def takes_reports(vllm_config: Any) -> bool:
    """Whether vLLM takes back what came of blocks that are reported behind the forward pass, and computes them again.

    Scheduling asynchronously, as it does unless told otherwise, vLLM has scheduled the request's next step by then. It
    drops the token of the step that reports, and keeps that of the next one, which was computed on the same blocks.
    """
    policy = getattr(vllm_config.kv_transfer_config, "kv_load_failure_policy", "fail")
    return policy == "recompute" and vllm_config.scheduler_config.async_scheduling is False


def why_not_captured(vllm_config: Any) -> str:
    """Why a pass through this model cannot be one CUDA graph; empty when it can."""
    if vllm_config.model_config.enforce_eager:
        return "vLLM runs eagerly"
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        return "sleep mode"  # takes away what was allocated at start
    prefetch = getattr(getattr(vllm_config, "offload_config", None), "prefetch", None)
    if getattr(prefetch, "offload_group_size", 0):
        return "weights are copied in during the pass"
    if vllm_config.scheduler_config.max_num_batched_tokens < ROWS:
        return "max_num_batched_tokens is too small"
    return ""


def rotary_of(model: Any) -> Any:
    """The rotary embedding that all layers share."""
    return model.model.layers[0].self_attn.rotary_emb


class VLLMModel:
    """See lmcache_rag.connector.blend_pass.Model.

    Args:
        vllm_config: vLLM's configuration.
        runner: The model runner, its model loaded and its KV caches made.
    """

    def __init__(self, vllm_config: Any, runner: Any) -> None:
        self._config, self._runner = vllm_config, runner
        layers = compat_vllm.attention_layers(vllm_config)
        self._names = list(layers)
        self._index = {name: index for index, name in enumerate(layers)}
        self._layers = list(layers.values())
        self._caches = [keys_and_values(layer.kv_cache) for layer in self._layers]
        self.captured: CapturedWatch | None = None
        self._memory: PassMemory | None = None
        for implementation in {type(layer.impl) for layer in self._layers}:
            compat_vllm.patch_attention(implementation)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._layers)

    @property
    def kv_heads(self) -> int:
        """Key and value heads of this rank."""
        return int(self._caches[0][0].shape[2])

    @property
    def most_tokens(self) -> int:
        """Memory was profiled and code compiled for so many tokens."""
        return int(self._config.scheduler_config.max_num_batched_tokens)

    @property
    def heads(self) -> int:
        """Query heads of this rank."""
        return int(self._layers[0].impl.num_heads)

    @property
    def block(self) -> int:
        """Tokens in a block of the cache."""
        return int(self._caches[0][0].shape[1])

    @property
    def device(self) -> Any:
        """Where the cache lies."""
        return self._caches[0][0].device

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [blocks, block, kv heads, size]."""
        return self._caches[layer]

    def forward(self, ids: Tensor, positions: Tensor, slots: Tensor, attention: Attention) -> Tensor:
        """Run the model's own layers over these tokens, with our attention."""
        return self._pass(ids, positions, slots, attention, as_graphs=True)

    def _pass(self, ids: Tensor, positions: Tensor, slots: Tensor, attention: Attention, *, as_graphs: bool) -> Tensor:
        import torch

        rows = len(slots)

        def each(layer: Any, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
            # A CUDA graph has rows to spare: what is in them is nobody's.
            query, key, value = query[:rows], key[:rows], value[:rows]
            index = self._index[layer.layer_name]
            keys, values = self._caches[index]
            attention.before_write(index, key, value, keys, values)
            compat_vllm.write_kv(layer, key, value, slots)
            attention.attend(index, query, keys, values, layer.impl.scale, out[:rows].view(query.shape))

        metadata = compat_vllm.OwnMetadata(each)
        states: Tensor = compat_vllm.run_pass(
            self._config, self._runner, self._names, metadata, ids.to(torch.int32), positions, as_graphs=as_graphs
        )
        return states

    def prefill(self, ids: Tensor, positions: Tensor, sequence: PagedSequence) -> Tensor:
        """Run vLLM's own pass over consecutive positions of a prompt, which writes their KV; returns hidden states."""
        import torch

        states: Tensor = compat_vllm.run_prefill(
            self._config, self._runner, ids.to(torch.int32), positions, sequence.blocks, sequence.slots(positions)
        )
        return states

    def logits(self, hidden: Tensor) -> Tensor | None:
        """The logits of hidden states; None on a rank that is not given them."""
        found: Tensor | None = self._runner.get_model().compute_logits(hidden)
        return found

    def moves(self, longest: int) -> dict[str, HotCopy]:
        """What moves chunk KV over distances up to that: by the table that LMCache gets, and by that of hot chunks."""
        from lmcache_rag.connector.hot_copy import HotCopy

        rotary = rotary_of(self._runner.get_model())
        tables = {
            "by LMCache's rotary table": rotary.cos_sin_cache,
            "by the exact rotary table": compat_vllm.exact_rotary_table(rotary),
        }
        neox = bool(rotary.is_neox_style)
        return {
            name: HotCopy(self._caches, table[:longest].to(self.device), neox=neox) for name, table in tables.items()
        }

    def hot_copy(self) -> HotCopy:
        """What moves KV inside this model's cache."""
        from lmcache_rag.connector.hot_copy import HotCopy

        rotary = rotary_of(self._runner.get_model())
        table = compat_vllm.exact_rotary_table(rotary).to(self.device)
        return HotCopy(self._caches, table, neox=bool(rotary.is_neox_style))

    @property
    def ranks(self) -> int:
        """Number of tensor-parallel ranks."""
        return compat_vllm.tensor_parallel_ranks()

    @property
    def rank(self) -> int:
        """Which of them this is."""
        return compat_vllm.tensor_parallel_rank()

    def sum_over_ranks(self, scores: Tensor) -> Tensor:
        """Sum over the tensor-parallel ranks."""
        result: Tensor = compat_vllm.tensor_parallel_sum(scores)
        return result

    def all_ranks(self, fine: bool) -> bool:
        """Whether this is true on every tensor-parallel rank: all take the same decision."""
        return compat_vllm.true_on_all_ranks(fine)

    def has_memory(self, tokens: int, length: int) -> bool:
        """Whether this rank has memory for passes of so many tokens in a sequence of that length, and keeps it.

        One rank alone need not ask: it can leave a pass for which there is none.
        """
        return self._memory is None or self._memory.room(tokens, length)

    def warm_up(self) -> None:
        """Compile the kernels before the first request."""
        from lmcache_rag.connector import kernels

        kernels.warm_up(*self._caches[0], self.heads)

    def capture(self) -> None:
        """Capture the default policy's pass, and see what memory passes take. Tensor-parallel ranks do so together."""
        self.captured = self._capture(QueryPolicy())
        if self.ranks > 1:
            from lmcache_rag.connector.kernels import MOST_SPLITS

            run = functools.partial(self._pass, attention=Nothing(), as_graphs=False)
            most = self.most_tokens
            self._memory = measured(run, most, heads=self.heads, cache=self._caches[0], splits=MOST_SPLITS)

    def _capture(self, policy: QueryPolicy) -> CapturedWatch | None:
        """The policy's pass as a CUDA graph; None where that cannot be: then it is launched layer by layer."""
        if reason := why_not_captured(self._config):
            log.info("The query pass is not captured as a CUDA graph: %s", reason)
            return None
        ranks = self._config.parallel_config.tensor_parallel_size
        surroundings = functools.partial(compat_vllm.recording, self.device) if ranks > 1 else None
        watch: CapturedWatch | None = None
        try:
            watch = CapturedWatch(
                functools.partial(self._pass, as_graphs=False),
                layers=self.layers,
                kv_heads=self.kv_heads,
                block=self.block,
                longest=int(self._config.model_config.max_model_len),
                device=self.device,
                from_layer=policy.from_layer,
                reduce=policy.reduce,
                graph=CudaGraph(surroundings),
            )
            watch.capture()
        except Exception as error:  # whatever a backend cannot do while it is recorded: the other way works
            log.warning("The query pass could not be captured as a CUDA graph (%s); it is launched instead", error)
            watch = None
        if ranks > 1 and not self.all_ranks(watch is not None):
            return None  # a graph's pass is padded: ranks that add up their parts must all replay it, or none
        return watch
