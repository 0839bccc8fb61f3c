"""Private parts of vLLM that are called or read; lmcache_rag.connector.vllm_patches has those that are replaced.

Written for vLLM 0.25.1 to 0.33; the tests in tests/contracts check each part against vLLM. vLLM is imported in the
functions: this module is loaded in each of vLLM's processes.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

# -- block pool --------------------------------------------------------------------------------------------------------


class CachedBlocks:
    """vLLM's block pool, by the keys of its prefix cache.

    vLLM's get_cached_block makes the key from the hash on each call, and a list for each block: it is six times slower.
    """

    def __init__(self, pool: Any) -> None:
        from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

        self._pool, self._key = pool, make_block_hash_with_group_id

    def key(self, block_hash: Any) -> Any:
        """The prefix cache's key of a block hash."""
        return self._key(block_hash, 0)

    def get(self, keys: Iterable[Any]) -> Iterator[Any]:
        """Yield the cached block of each key; None where there is none."""
        return map(self._pool.cached_block_hash_to_block.get_one_block, keys)  # a reset replaces the map

    @property
    def blocks(self) -> Sequence[Any]:
        """All blocks, by id."""
        blocks: Sequence[Any] = self._pool.blocks
        return blocks

    def touch(self, blocks: Sequence[Any]) -> None:
        """Take a reference to blocks, which keeps them from being evicted."""
        self._pool.touch(blocks)

    def free_blocks(self, blocks: Sequence[Any]) -> None:
        """Drop a reference to blocks."""
        self._pool.free_blocks(blocks)

    def remove(self, hashes: Iterable[Any]) -> int:
        """Evict every block with one of these hashes from the prefix cache; requests that use a block keep it.

        Returns:
            Number of blocks.
        """
        removed = 0
        for block_hash in hashes:
            key = self.key(block_hash)
            # One hash may have several blocks. A block that stays would be found again and again.
            while (block := self._pool.cached_block_hash_to_block.get_one_block(key)) is not None:
                self._pool.evict_blocks({block.block_id})
                if self._pool.cached_block_hash_to_block.contain(key, block.block_id):
                    break
                removed += 1
        return removed


def hide_from_prefix_cache(request: Any, first_token: int, hash_block: int) -> None:
    """Hide the block that holds `first_token`, and all later ones, decoded ones too, from other requests.

    vLLM caches blocks under the request's chained hashes. Random hashes for the blocks that are full by now make all
    later hashes random too. The pool's patch does not cache these blocks at all (vllm_patches.patch_cache_full_blocks).
    """
    first = first_token // hash_block
    if not request.block_hashes and getattr(request, "_block_hasher", None) is None:
        return  # prefix caching is off
    del request.block_hashes[first:]
    full = request.num_tokens // hash_block
    # A random hash for each, not one with the others chained to it by vLLM: at 7 us each those take 13 ms for 30,900
    # tokens.
    random = os.urandom(32 * max(full - first, 0))
    request.block_hashes.extend([random[at : at + 32] for at in range(0, len(random), 32)])


def blocks_know_adapter_path() -> bool:
    """Whether the hashes of vLLM's blocks differ between LoRA adapters of one name, if their paths do (since 0.32)."""
    from types import SimpleNamespace

    from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys

    adapter = SimpleNamespace(lora_name="name", lora_path="path")
    return "path" in str(_gen_lora_extra_hash_keys(SimpleNamespace(lora_request=adapter)))


# -- forward passes and ranks ------------------------------------------------------------------------------------------


def attention_layers(vllm_config: Any) -> dict[str, Any]:
    """Attention modules by name, in the order of the model's layers.

    vLLM keeps a model's experts in the same dictionary, which have no KV. Whatever else is in it is returned too.
    """
    compilation = vllm_config.compilation_config
    experts = set(getattr(compilation, "static_all_moe_layers", ()))
    return {name: layer for name, layer in compilation.static_forward_context.items() if name not in experts}


def takes_embeddings(vllm_config: Any) -> bool:
    """Whether vLLM gives the model embeddings in the place of token ids: prompts may have pictures, or embeddings."""
    config = vllm_config.model_config
    if getattr(config, "enable_prompt_embeds", False):
        return True
    found = getattr(config, "supports_multimodal_inputs", None)
    if found is None:  # vLLM 0.25
        from vllm.multimodal import MULTIMODAL_REGISTRY

        found = MULTIMODAL_REGISTRY.supports_multimodal_inputs(config)
    return bool(found)


class OwnMetadata:
    """Attention metadata of a blend's pass: vLLM's attention calls `attention` instead of its kernel.

    See lmcache_rag.connector.vllm_patches.patch_attention.

    Attributes:
        attention: Called as attention(layer, query, key, value, out) with the layer's name.
    """

    def __init__(self, attention: Callable[..., None]) -> None:
        self.attention = attention


def write_kv(layer: Any, key: Any, value: Any, slots: Any) -> None:
    """Write computed KV [m, kv heads, size] to slots, int64 [m], by the backend's own operation."""
    layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)


def run_pass(
    vllm_config: Any,
    runner: Any,
    names: list[str],
    metadata: OwnMetadata,
    ids: Any,
    positions: Any,
    *,
    as_graphs: bool = True,
    loras: int = 0,
    embeds: bool = False,
) -> Any:
    """Run the model over some tokens in a forward context of our own; the previous context is restored.

    No layer has a slot mapping, so vLLM writes no KV: the pass writes it itself, after it has read the old KV. Few
    tokens run as vLLM's own piecewise CUDA graphs, padded to a captured size. Those read the runner's input buffers,
    which may hold the inputs of the step that is about to run: these are restored.

    Args:
        vllm_config: vLLM's configuration.
        runner: The model runner.
        names: The attention layers.
        metadata: Our attention.
        ids: int32 [m]: vLLM compiles for that type and drops torch's guards.
        positions: int64 [m].
        as_graphs: Whether vLLM's graphs may be used; not while our own graph is captured.
        loras: Number of LoRA adapters that the tokens run with, see PassAdapters: vLLM has other graphs for each.
        embeds: Whether the model is given the tokens' embeddings, see takes_embeddings: vLLM compiles it for these.

    Returns:
        Hidden states [m, width]; the next pass may overwrite them.
    """
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import set_forward_context

    def context(tokens: int, mode: Any, descriptor: Any) -> Any:
        return set_forward_context(
            dict.fromkeys(names, metadata),
            vllm_config,
            num_tokens=tokens,
            cudagraph_runtime_mode=mode,
            batch_descriptor=descriptor,
            slot_mapping={},
        )

    tokens = runner.get_model().embed_input_ids(ids) if embeds else ids
    found = piecewise_graph(vllm_config, runner, len(ids), loras) if as_graphs else None
    if found is None:
        with context(len(ids), CUDAGraphMode.NONE, None):
            return runner.get_model()(**_inputs(tokens, positions, embeds=embeds))
    padded = int(found.num_tokens)
    buffers = (
        runner.model_state.dummy_inputs_embeds(padded) if embeds else runner.input_buffers.input_ids[:padded],
        runner.input_buffers.positions[:padded],
    )
    saved = [buffer.clone() for buffer in buffers]
    for buffer, own in zip(buffers, (tokens, positions), strict=True):
        buffer[: len(own)] = own
        buffer[len(own) :] = 0
    try:
        with context(padded, CUDAGraphMode.PIECEWISE, found):
            arguments = _inputs(*buffers, embeds=embeds)
            return runner.cudagraph_manager.run_pw_graph(runner.get_model(), arguments)[: len(ids)]
    finally:
        for buffer, previous in zip(buffers, saved, strict=True):
            buffer.copy_(previous)


def _inputs(tokens: Any, positions: Any, *, embeds: bool) -> dict[str, Any]:
    """A model's arguments, with token ids or with embeddings, as vLLM's runner gives them."""
    ids, embeddings = (None, tokens) if embeds else (tokens, None)
    return {"input_ids": ids, "positions": positions, "inputs_embeds": embeddings, "intermediate_tensors": None}


def run_prefill(
    vllm_config: Any, runner: Any, ids: Any, positions: Any, blocks: Any, slots: Any, *, embeds: bool = False
) -> Any:
    """Run the model over a part of one sequence as vLLM's own step does: with its attention and its writes of KV.

    Args:
        vllm_config: vLLM's configuration.
        runner: The model runner, its KV caches made.
        ids: int32 [m].
        positions: int64 [m], consecutive; the KV of all tokens before them is in the cache.
        blocks: The sequence's blocks, int32 [blocks].
        slots: Slots that the KV is written to, int64 [m].
        embeds: See run_pass.

    Returns:
        Hidden states [m, width]; the next pass may overwrite them.
    """
    import torch
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import set_forward_context
    from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer

    tokens, length = len(ids), int(positions[-1]) + 1
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    groups = len(runner.kv_cache_config.kv_cache_groups)
    metadata = build_attn_metadata(
        runner.attn_groups,
        1,
        tokens,
        starts.to(ids.device),
        starts,
        tokens,
        torch.tensor([length], dtype=torch.int32, device=ids.device),
        length,
        [blocks[None]] * groups,
        [slots] * groups,
        runner.kv_cache_config,
    )
    with set_forward_context(
        metadata,
        vllm_config,
        num_tokens=tokens,
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        slot_mapping=build_slot_mappings_by_layer([slots] * groups, runner.kv_cache_config),
    ):
        inputs = runner.get_model().embed_input_ids(ids) if embeds else ids
        return runner.get_model()(**_inputs(inputs, positions, embeds=embeds))


def piecewise_graph(vllm_config: Any, runner: Any, tokens: int, loras: int = 0) -> Any:
    """The description (BatchDescriptor) of vLLM's piecewise CUDA graph for some tokens; None when there is none.

    Args:
        vllm_config: vLLM's configuration.
        runner: The model runner.
        tokens: Number of tokens; the graph may be for more.
        loras: Number of LoRA adapters that they run with.
    """
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor

    manager = getattr(runner, "cudagraph_manager", None)
    if manager is None or not hasattr(runner, "input_buffers"):
        return None
    found = manager.dispatch(1, tokens, None, loras)
    if found.cg_mode != CUDAGraphMode.PIECEWISE:
        return None
    # As vLLM's runner describes a step; for any other description it would capture a new graph.
    with_loras = (
        {} if vllm_config.lora_config is None else {"has_lora": True, "num_active_loras": found.num_active_loras}
    )
    return BatchDescriptor(num_tokens=int(found.num_tokens), **with_loras)


def exact_rotary_table(rotary: Any) -> Any:
    """Cosines, then sines, of each position in float32; the table in the model may be in a type of lower precision."""
    return rotary._compute_cos_sin_cache().float()


def tensor_parallel_ranks() -> int:
    """Number of tensor-parallel ranks."""
    from vllm.distributed import get_tensor_model_parallel_world_size

    return int(get_tensor_model_parallel_world_size())


def tensor_parallel_rank() -> int:
    """Tensor-parallel rank of this process."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def tensor_parallel_sum(tensor: Any) -> Any:
    """Sum over the tensor-parallel ranks."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(tensor) if tensor_parallel_ranks() > 1 else tensor


@contextlib.contextmanager
def graph_capture_stream(device: Any) -> Iterator[Any]:
    """A stream to capture a CUDA graph on, while all tensor-parallel ranks capture theirs.

    vLLM's all-reduce has to know of the capture, and exchanges addresses between the ranks at its end: all of them have
    to take part.
    """
    from vllm.distributed.parallel_state import graph_capture

    with graph_capture(device) as found:
        yield found.stream


def true_on_all_ranks(fine: bool) -> bool:
    """Whether `fine` is true on every tensor-parallel rank. Uses the CPU process group: no GPU synchronisation."""
    import torch
    from vllm.distributed import get_tp_group

    size = tensor_parallel_ranks()
    if size == 1:
        return fine
    votes = torch.tensor([int(fine)], dtype=torch.int32)
    torch.distributed.all_reduce(votes, group=get_tp_group().cpu_group)
    return int(votes.item()) == size


def in_multi_connector() -> bool:
    """Whether the connector of this worker is vLLM's MultiConnector, with ours inside it."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    return has_kv_transfer_group() and isinstance(get_kv_transfer_group(), MultiConnector)


# -- LoRA adapters -----------------------------------------------------------------------------------------------------


_TRIAL = 1 << 30  # its number; vLLM counts those of clients from 1


class PassAdapters:
    """Which LoRA adapter the tokens of a pass run with.

    vLLM's linear layers find a token's adapter in a mapping, which the model runner sets before each of its forward
    passes. A blend's pass sets it for tokens of its own. Where that is between the runner's mapping and its forward
    pass, the runner's must be restored.

    Args:
        runner: vLLM's model runner, with LoRA enabled.
    """

    def __init__(self, runner: Any) -> None:
        self._worker_manager = runner.lora_manager
        self._manager = runner.lora_manager._adapter_manager

    def use(self, lora_request: Any, tokens: int, rows: int = 1) -> None:
        """Run the next pass with an adapter; it is loaded if it is not.

        Args:
            lora_request: vLLM's LoRARequest; None: the model without an adapter.
            tokens: Tokens of the pass.
            rows: Hidden states whose logits are computed after it.
        """
        from vllm.lora.layers import LoRAMapping

        requests = set()
        if lora_request is not None:
            if lora_request.load_inplace:  # it was loaded when the client asked for that; not in each pass again
                lora_request = copy.copy(lora_request)
                lora_request.load_inplace = False
            requests.add(lora_request)
        number = lora_request.lora_int_id if lora_request is not None else 0
        # As the runner does: vLLM's kernels for GPUs ignore is_prefill.
        mapping = LoRAMapping((number,) * tokens, (number,) * rows, is_prefill=True)
        self._worker_manager.set_active_adapters(requests, mapping)

    def has_slot(self, lora_request: Any) -> bool:
        """Whether an adapter can run beside those of the mapping that is set, without taking a slot of theirs."""
        adapters = {number for number in self._mapped() if number > 0}
        return lora_request is None or len(adapters | {lora_request.lora_int_id}) <= self._manager.lora_slots

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """A `with` block after which the mapping is what it was before; not if its adapters have left their slots.

        They do so only if vLLM does not use that mapping any more, as of a step without a forward pass.
        """
        before = self._manager._last_mapping
        yield
        mapped = {number for number in self._mapped(before) if number > 0}
        if before is not None and mapped <= set(self._manager.lora_index_to_id):
            self._manager.set_adapter_mapping(before)

    @contextlib.contextmanager
    def trial(self) -> Iterator[Any]:
        """A `with` block in which there is an adapter of random weights; gives its LoRARequest. Before any other."""
        import torch
        from vllm.lora.request import LoRARequest

        request = LoRARequest("lmcache_rag trial", _TRIAL, "/does/not/exist")
        with self._worker_manager.dummy_lora_cache():
            self._worker_manager.add_dummy_lora(request, rank=self._worker_manager.get_dummy_lora_warmup_rank(8))
        self.use(request, 1)
        slot, dice = self._manager.lora_index_to_id.index(_TRIAL), None
        for module in self._manager.modules.values():
            for stacked, size in ((module.lora_a_stacked, 1.0), (module.lora_b_stacked, 0.2)):
                for weights in stacked if isinstance(stacked, tuple) else (stacked,):
                    if dice is None:
                        dice = torch.Generator(weights.device).manual_seed(_TRIAL)
                    weights[slot].normal_(0.0, size * weights.shape[-1] ** -0.5, generator=dice)
        try:
            yield request
        finally:
            self._manager.remove_adapter(_TRIAL)  # the next adapter in its slot overwrites its weights
            self.use(None, 1)

    def _mapped(self, mapping: Any = None) -> set[int]:
        mapping = self._manager._last_mapping if mapping is None else mapping
        return set() if mapping is None else {*mapping.index_mapping, *mapping.prompt_mapping}
