"""The model in a vLLM worker: its forward passes, their memory, copies inside its KV cache."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import sub
from typing import TYPE_CHECKING, Any

from lmcache_rag.connector import kv_quant, vllm_internals, vllm_patches
from lmcache_rag.connector.attention import NoAttention, PagedSequence, keys_and_values, to_device_async
from lmcache_rag.connector.cuda_graph import ROWS, CapturedQueryPass, CudaGraph
from lmcache_rag.connector.metadata import Match
from lmcache_rag.connector.rotary import rotary_of
from lmcache_rag.policies import QueryPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from lmcache_rag.connector.attention import Attention


log = logging.getLogger("lmcache_rag")

# -- vLLM's configuration --------------------------------------------------------------------------------------------


def recomputes_reported_blocks(vllm_config: Any) -> bool:
    """Whether vLLM discards the output of blocks reported after the forward pass, and recomputes them.

    With asynchronous scheduling, its default, vLLM has scheduled the request's next step by then. It discards the token
    of the step that reports, but keeps that of the next one, which was computed on the same blocks.
    """
    policy = getattr(vllm_config.kv_transfer_config, "kv_load_failure_policy", "fail")
    return policy == "recompute" and vllm_config.scheduler_config.async_scheduling is False


def capture_unsupported_reason(vllm_config: Any) -> str:
    """Why a pass through this model cannot be captured as a CUDA graph; empty if it can."""
    if vllm_config.model_config.enforce_eager:
        return "vLLM runs eagerly"
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        return "sleep mode"  # releases what was allocated at start
    prefetch = getattr(getattr(vllm_config, "offload_config", None), "prefetch", None)
    if getattr(prefetch, "offload_group_size", 0):
        return "weights are copied to the GPU during the pass"
    if vllm_config.scheduler_config.max_num_batched_tokens < ROWS:
        return "max_num_batched_tokens is too small"
    return ""


# -- the model --------------------------------------------------------------------------------------------------------


class VLLMModel:
    """The model of a vLLM worker; see lmcache_rag.connector.blend_pass.Model.

    Args:
        vllm_config: vLLM's configuration.
        runner: vLLM's model runner; its model is loaded and its KV caches exist.
    """

    def __init__(self, vllm_config: Any, runner: Any) -> None:
        self._config, self._runner = vllm_config, runner
        layers = vllm_internals.attention_layers(vllm_config)
        self._names = list(layers)
        self._index = {name: index for index, name in enumerate(layers)}
        self._layers = list(layers.values())
        self._caches = [keys_and_values(kv_quant.as_numbers(layer.kv_cache)) for layer in self._layers]
        self._scales = [kv_quant.scales(layer) for layer in self._layers]
        self._captured: CapturedQueryPass | None = None
        has_adapters = getattr(vllm_config, "lora_config", None) is not None
        self._adapters = vllm_internals.PassAdapters(runner) if has_adapters else None
        self._adapter: Any = None  # vLLM's LoRARequest
        self._embeds = vllm_internals.takes_embeddings(vllm_config)
        self._memory: PassMemory | None = None
        for implementation in {type(layer.impl) for layer in self._layers}:
            vllm_patches.patch_attention(implementation)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._layers)

    @property
    def kv_heads(self) -> int:
        """Key and value heads of this rank."""
        return int(self._caches[0][0].shape[2])

    @property
    def max_tokens(self) -> int:
        """Most tokens of one pass: vLLM profiled memory and compiled for that many."""
        return int(self._config.scheduler_config.max_num_batched_tokens)

    @property
    def heads(self) -> int:
        """Query heads of this rank."""
        return int(self._layers[0].impl.num_heads)

    @property
    def block_size(self) -> int:
        """Tokens in a block of the cache."""
        return int(self._caches[0][0].shape[1])

    @property
    def device(self) -> Any:
        """Device of the cache."""
        return self._caches[0][0].device

    @property
    def captured(self) -> CapturedQueryPass | None:
        """The suffix's pass as one CUDA graph, if it was captured: it was without an adapter."""
        return self._captured if self._adapter is None else None

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [blocks, block, kv heads, size]."""
        return self._caches[layer]

    def kv_scales(self, layer: int) -> tuple[float, float]:
        """What the cached keys and values of a layer are to be multiplied by; not 1.0 only if they are FP8."""
        return self._scales[layer][1:]

    # -- LoRA adapters ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, adapter: Any) -> Iterator[None]:
        """A `with` block whose passes run with a LoRA adapter, vLLM's LoRARequest; None: without."""
        before, self._adapter = self._adapter, adapter
        try:
            yield
        finally:
            self._adapter = before

    def has_slot(self, adapter: Any) -> bool:
        """Whether a pass with that adapter leaves those of vLLM's step where they are. Equal on all ranks."""
        return self._adapters is None or self._adapters.has_slot(adapter)

    def step_adapters(self) -> contextlib.AbstractContextManager[None]:
        """A `with` block after which the tokens of vLLM's step have their own adapters again."""
        return contextlib.nullcontext() if self._adapters is None else self._adapters.restored()

    def trial_adapter(self) -> contextlib.AbstractContextManager[Any]:
        """A `with` block in which there is an adapter of random weights; gives it, None without LoRA. At start only."""
        return contextlib.nullcontext() if self._adapters is None else self._adapters.trial()

    # -- passes -------------------------------------------------------------------------------------------------------

    def forward(self, ids: Tensor, positions: Tensor, slots: Tensor, attention: Attention) -> Tensor:
        """Run the model's own layers over these tokens, with the given attention."""
        return self._pass(ids, positions, slots, attention, as_graphs=True)

    def _pass(self, ids: Tensor, positions: Tensor, slots: Tensor, attention: Attention, *, as_graphs: bool) -> Tensor:
        import torch

        rows = len(slots)

        def in_layer(layer: Any, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
            # vLLM pads the rows of a CUDA graph: the padding is ignored.
            query, key, value = query[:rows], key[:rows], value[:rows]
            index = self._index[layer.layer_name]
            keys, values = self._caches[index]
            attention.before_write(index, key, value, keys, values)
            vllm_internals.write_kv(layer, key, value, slots)
            own, (q_scale, k_scale, v_scale) = out[:rows].view(query.shape), self._scales[index]
            scale = layer.impl.scale * k_scale
            if query.dtype != own.dtype:  # some backends get FP8 queries
                query, scale = query.to(own.dtype), scale * q_scale
            attention.attend(index, query, keys, values, scale, own)
            if v_scale != 1.0:
                own.mul_(v_scale)

        metadata = vllm_internals.OwnMetadata(in_layer)
        if self._adapters is not None:
            self._adapters.use(self._adapter, rows)
        states: Tensor = vllm_internals.run_pass(
            self._config,
            self._runner,
            self._names,
            metadata,
            ids.to(torch.int32),
            positions,
            as_graphs=as_graphs,
            loras=0 if self._adapter is None else 1,
            embeds=self._embeds,
        )
        return states

    def prefill(self, ids: Tensor, positions: Tensor, sequence: PagedSequence) -> Tensor:
        """Run vLLM's own pass over consecutive positions of a prompt, which writes their KV; returns hidden states."""
        import torch

        if self._adapters is not None:
            self._adapters.use(self._adapter, len(ids))
        states: Tensor = vllm_internals.run_prefill(
            self._config,
            self._runner,
            ids.to(torch.int32),
            positions,
            sequence.blocks,
            sequence.slots(positions),
            embeds=self._embeds,
        )
        return states

    def logits(self, hidden: Tensor) -> Tensor | None:
        """The logits of hidden states; None on a rank that does not get them."""
        if self._adapters is not None:
            self._adapters.use(self._adapter, len(hidden), len(hidden))
        found: Tensor | None = self._runner.get_model().compute_logits(hidden)
        return found

    def copies(self, longest: int) -> dict[str, GpuCopy]:
        """Copies over distances up to that, by name: with LMCache's rotary table, and with that of resident chunks."""
        rotary = rotary_of(self._runner.get_model())
        tables = {
            "by LMCache's rotary table": rotary.cos_sin_cache,
            "by the exact rotary table": vllm_internals.exact_rotary_table(rotary),
        }
        neox = bool(rotary.is_neox_style)
        return {
            name: GpuCopy(self._caches, table[:longest].to(self.device), neox=neox) for name, table in tables.items()
        }

    def gpu_copy(self) -> GpuCopy:
        """Copies KV inside this model's cache."""
        rotary = rotary_of(self._runner.get_model())
        table = vllm_internals.exact_rotary_table(rotary).to(self.device)
        return GpuCopy(self._caches, table, neox=bool(rotary.is_neox_style))

    @property
    def ranks(self) -> int:
        """Number of tensor-parallel ranks."""
        return vllm_internals.tensor_parallel_ranks()

    @property
    def rank(self) -> int:
        """This worker's tensor-parallel rank."""
        return vllm_internals.tensor_parallel_rank()

    def sum_over_ranks(self, scores: Tensor) -> Tensor:
        """The sum over the tensor-parallel ranks."""
        result: Tensor = vllm_internals.tensor_parallel_sum(scores)
        return result

    def all_ranks(self, fine: bool) -> bool:
        """Whether this is true on every tensor-parallel rank, so that all take the same decision."""
        return vllm_internals.true_on_all_ranks(fine)

    def has_memory(self, tokens: int, length: int) -> bool:
        """Whether this rank has memory for passes of that many tokens in a sequence of that length, and reserves it.

        Always true without tensor parallelism: a single rank can abort a pass that runs out of memory.
        """
        return self._memory is None or self._memory.reserve(tokens, length)

    def warm_up(self) -> None:
        """Compile the kernels before the first request."""
        from lmcache_rag.connector import kernels

        kernels.warm_up(*self._caches[0], self.heads, self._config.model_config.dtype)

    def capture(self) -> None:
        """Capture the default policy's pass, and measure passes' memory. All tensor-parallel ranks must call it."""
        self._captured = self._capture(QueryPolicy())
        if self.ranks > 1:
            from lmcache_rag.connector.kernels import MAX_SPLITS

            run = functools.partial(self._pass, attention=NoAttention(), as_graphs=False)
            largest = self.max_tokens
            with self.trial_adapter() as adapter, self.using(adapter):  # its share of a pass is counted
                self._memory = measure_pass_memory(
                    run, largest, heads=self.heads, cache=self._caches[0], splits=MAX_SPLITS
                )

    def _capture(self, policy: QueryPolicy) -> CapturedQueryPass | None:
        """The policy's pass as a CUDA graph; None if it cannot be captured: then it is launched layer by layer."""
        if reason := capture_unsupported_reason(self._config):
            log.info("The suffix pass is not captured as a CUDA graph: %s", reason)
            return None
        ranks = self._config.parallel_config.tensor_parallel_size
        capture_context = functools.partial(vllm_internals.graph_capture_stream, self.device) if ranks > 1 else None
        captured: CapturedQueryPass | None = None
        try:
            captured = CapturedQueryPass(
                functools.partial(self._pass, as_graphs=False),
                layers=self.layers,
                kv_heads=self.kv_heads,
                block_size=self.block_size,
                longest=int(self._config.model_config.max_model_len),
                device=self.device,
                from_layer=policy.from_layer,
                reduce=policy.reduce,
                graph=CudaGraph(capture_context),
            )
            captured.capture()
        except Exception as error:  # the backend cannot do something during a capture; the pass works without a graph
            log.warning(
                "The suffix pass could not be captured as a CUDA graph: %s. It is launched layer by layer.", error
            )
            captured = None
        if ranks > 1 and not self.all_ranks(captured is not None):
            return None  # a graph's pass is padded: for the ranks' sums either all must replay it or none
        return captured


# -- memory of passes -------------------------------------------------------------------------------------------------

# A tensor-parallel rank that runs out of memory in the middle of a pass cannot leave it: the others wait for its part
# of each layer's sum. So ranks reserve the memory before a pass, and vote. A reservation is freed at once, which leaves
# the memory with PyTorch's allocator, and there is enough when the pass allocates it.

MARGIN = 1.25  # a reservation is one allocation, the pass makes many
_FEW, _MANY = 512, 2048  # sizes of the two passes that are measured: their difference is the memory per token
_SCORES = 24  # bytes per token of the prompt: the selection's int64 and float32 vectors, some alive at the same time
_FP8_COPY = 5  # bytes of an FP8 number while it is checked: itself and a float32
_DISTANCES = 5  # float32 copies of fresh and cached keys and values that a check layer compares


@dataclass(frozen=True)
class PassMemory:
    """GPU memory of a blend's pass on this rank.

    Attributes:
        fixed: Bytes of any pass.
        per_token: Bytes per token of the pass.
        per_context_token: Bytes per token of the sequence that it attends to.
        device: The GPU.
    """

    fixed: float
    per_token: float
    per_context_token: float
    device: Any

    def need(self, tokens: int, length: int) -> int:
        """Bytes for passes of that many tokens in a sequence of that length."""
        return int(MARGIN * (self.fixed + tokens * self.per_token + length * self.per_context_token))

    def reserve(self, tokens: int, length: int) -> bool:
        """Whether this rank has that much memory; PyTorch's allocator keeps it for the pass."""
        import torch

        try:
            torch.empty(self.need(tokens, length), dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            return False
        return True


def measure_pass_memory(
    run: Callable[[Tensor, Tensor, Tensor], object],
    largest: int,
    *,
    heads: int,
    cache: tuple[Tensor, Tensor],
    splits: int,
) -> PassMemory:
    """Measure the memory of passes, by a small and a large one. All tensor-parallel ranks must call it.

    Args:
        run: Runs all layers over ids and positions, int64 [m], and slots, int64 [m], none of which is written.
        largest: Most tokens of a pass.
        heads: Query heads of this rank.
        cache: Keys and values of a layer.
        splits: Most parts into which the attention of few tokens splits the keys.
    """
    keys = cache[0]
    kv_heads, size = int(keys.shape[2]), int(keys.shape[3])
    copied = _FP8_COPY if kv_quant.is_fp8(keys) else keys.element_size()
    few, many = min(_FEW, largest), min(_MANY, largest)
    small, large = _peak(run, few, keys.device), _peak(run, many, keys.device)
    token = (large - small) / (many - few) if many > few else small / few
    return PassMemory(
        fixed=max(small - few * token, 0.0) + splits * 128 * heads * (size + 1) * 4,
        per_token=token + _DISTANCES * kv_heads * size * 4,
        per_context_token=2 * kv_heads * size * copied + 4 * kv_heads + _SCORES * 8,
        device=keys.device,
    )


def _peak(run: Callable[[Tensor, Tensor, Tensor], object], tokens: int, device: Any) -> int:
    """Peak bytes that a pass of that many tokens allocates."""
    import torch

    ids = torch.zeros(tokens, dtype=torch.int64, device=device)
    slots = torch.full_like(ids, -1)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.inference_mode():
        run(ids, ids, slots)
    return torch.cuda.max_memory_allocated(device) - before


# -- copies inside the KV cache ---------------------------------------------------------------------------------------


class GpuCopy:
    """Copies resident chunks from other sequences' blocks to a request's own, keys rotated to their new positions.

    Args:
        caches: Keys and values of each layer, each [blocks, block, kv heads, size].
        table: Cosines, then sines, of each position: float32 [positions, size]; a magnitude (YaRN) is divided out.
        neox: Whether rotary pairs are halves of a head rather than neighbours.
    """

    def __init__(self, caches: Sequence[tuple[Tensor, Tensor]], table: Tensor, *, neox: bool) -> None:
        import torch

        self._caches, self._neox = list(caches), neox
        half = table.shape[1] // 2
        norm = (table[:1, :half].float() ** 2 + table[:1, half:].float() ** 2).sqrt()
        self._table = (table.float() / torch.cat([norm, norm], 1)).contiguous()
        addresses = [pair[part].data_ptr() for part in (0, 1) for pair in self._caches]
        self._pointers = torch.tensor(addresses, dtype=torch.int64, device=self._table.device)

    def warm_up(self) -> None:
        """Compile the kernel before the first request: copies vLLM's null block, which is never read, to itself."""
        block = self._caches[0][0].shape[1]
        self.run([Match(0, block, 0, block, block=0)], PagedSequence.of((0,), block, str(self._table.device)))

    def run(self, matches: Sequence[Match], sequence: PagedSequence) -> None:
        """Copy resident matches to their new positions. The work is queued on the current stream."""
        import torch

        device = self._table.device
        block = sequence.block_size
        new_starts, _, old_starts, _, _, old_blocks = zip(*matches, strict=True)
        columns = [*old_blocks, *new_starts, *map(sub, new_starts, old_starts)]
        blocks, starts, deltas = to_device_async(columns, torch.int64, device).view(3, -1)
        within = torch.arange(block, device=device)
        source = (blocks[:, None] * block + within).flatten()
        target = sequence.slots((starts[:, None] + within).flatten())
        delta = deltas.repeat_interleave(block)
        if device.type == "cuda":
            from lmcache_rag.connector import kernels

            keys, values = self._caches[0]
            kernels.move(self._pointers, keys, values, source, target, delta, self._table, neox=self._neox)
        else:
            self._plain(source, target, delta, block)

    def _plain(self, source: Tensor, target: Tensor, delta: Tensor, block: int) -> None:
        import torch

        half = self._table.shape[1] // 2
        rows = self._table[delta.abs()]
        cos = rows[:, None, :half]
        sin = rows[:, None, half:] * delta.sign()[:, None, None]
        for keys, values in self._caches:
            moved: Any = kv_quant.take(keys, source // block, source % block).float()
            x, y = (moved[..., :half], moved[..., half:]) if self._neox else (moved[..., ::2], moved[..., 1::2])
            turned = (x * cos - y * sin, y * cos + x * sin)
            moved = torch.cat(turned, -1) if self._neox else torch.stack(turned, -1).flatten(-2)
            kv_quant.put(keys, (target // block, target % block), moved)
            unmoved = kv_quant.take(values, source // block, source % block)
            kv_quant.put(values, (target // block, target % block), unmoved)
