"""Private parts of vLLM that are called or read; lmcache_rag.connector.vllm_patches has those that are replaced.

Written for vLLM 0.25.1 to 0.33; the tests in tests/contracts check each part against vLLM. vLLM is imported in the
functions: this module is loaded in each of vLLM's processes.
"""

from __future__ import annotations

import contextlib
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


# -- forward passes and ranks ------------------------------------------------------------------------------------------


def attention_layers(vllm_config: Any) -> dict[str, Any]:
    """Attention modules by name, in the order of the model's layers.

    vLLM keeps a model's experts in the same dictionary, which have no KV. Whatever else is in it is returned too.
    """
    compilation = vllm_config.compilation_config
    experts = set(getattr(compilation, "static_all_moe_layers", ()))
    return {name: layer for name, layer in compilation.static_forward_context.items() if name not in experts}


def takes_pictures(vllm_config: Any) -> bool:
    """Whether prompts may have pictures or the like. vLLM then gives the model embeddings in the place of token ids."""
    config = vllm_config.model_config
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

    Returns:
        Hidden states [m, width]; the next pass may overwrite them.
    """
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor, set_forward_context

    def context(tokens: int, mode: Any, descriptor: Any) -> Any:
        return set_forward_context(
            dict.fromkeys(names, metadata),
            vllm_config,
            num_tokens=tokens,
            cudagraph_runtime_mode=mode,
            batch_descriptor=descriptor,
            slot_mapping={},
        )

    def inputs(token_ids: Any, token_positions: Any) -> dict[str, Any]:
        return {
            "input_ids": token_ids,
            "positions": token_positions,
            "inputs_embeds": None,
            "intermediate_tensors": None,
        }

    padded = graph_size(runner, len(ids)) if as_graphs else 0
    if not padded:
        with context(len(ids), CUDAGraphMode.NONE, None):
            return runner.get_model()(**inputs(ids, positions))
    buffers = (runner.input_buffers.input_ids[:padded], runner.input_buffers.positions[:padded])
    saved = [buffer.clone() for buffer in buffers]
    for buffer, own in zip(buffers, (ids, positions), strict=True):
        buffer[: len(own)] = own
        buffer[len(own) :] = 0
    try:
        with context(padded, CUDAGraphMode.PIECEWISE, BatchDescriptor(num_tokens=padded)):
            return runner.cudagraph_manager.run_pw_graph(runner.get_model(), inputs(*buffers))[: len(ids)]
    finally:
        for buffer, previous in zip(buffers, saved, strict=True):
            buffer.copy_(previous)


def run_prefill(vllm_config: Any, runner: Any, ids: Any, positions: Any, blocks: Any, slots: Any) -> Any:
    """Run the model over a part of one sequence as vLLM's own step does: with its attention and its writes of KV.

    Args:
        vllm_config: vLLM's configuration.
        runner: The model runner, its KV caches made.
        ids: int32 [m].
        positions: int64 [m], consecutive; the KV of all tokens before them is in the cache.
        blocks: The sequence's blocks, int32 [blocks].
        slots: Slots that the KV is written to, int64 [m].

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
        return runner.get_model()(input_ids=ids, positions=positions, inputs_embeds=None, intermediate_tensors=None)


def graph_size(runner: Any, tokens: int) -> int:
    """Size of the piecewise CUDA graph for a number of tokens; 0 when there is none."""
    from vllm.config import CUDAGraphMode

    manager = getattr(runner, "cudagraph_manager", None)
    if manager is None or not hasattr(runner, "input_buffers"):
        return 0
    found = manager.dispatch(1, tokens, None, 0)
    return int(found.num_tokens) if found.cg_mode == CUDAGraphMode.PIECEWISE else 0


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
