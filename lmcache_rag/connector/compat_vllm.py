"""Every private part of vLLM that we touch stands here; tests/test_connector_contract.py checks each against vLLM.

Written for vLLM 0.25.1 and 0.33. Imports happen in the functions: this module is loaded in each of vLLM's processes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

_workers: dict[int, Any] = {}  # the worker of this process, by its process id: forked processes have their own


def remember_workers() -> None:
    """Wrap Worker.load_model so that `worker` finds the worker that loaded the model. Safe to call twice."""
    from vllm.v1.worker.gpu_worker import Worker

    load = Worker.load_model
    if getattr(load, "_lmcache_rag", False):
        return

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        _workers[os.getpid()] = self
        return result

    load_model._lmcache_rag = True  # type: ignore[attr-defined]
    Worker.load_model = load_model


def worker() -> Any:
    """The worker of this process, or None when none has loaded a model."""
    return _workers.get(os.getpid())


def deliver_worker_meta_first() -> None:
    """Wrap Scheduler.update_from_output: the connector gets what its workers measured before requests are finished.

    vLLM hands it over after that, so that a request whose only step was its blend would be answered without it. A
    connector takes part by having `take_worker_meta(meta)`. Safe to call twice.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    update = Scheduler.update_from_output
    if getattr(update, "_lmcache_rag", False):
        return

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        take = getattr(getattr(self, "connector", None), "take_worker_meta", None)
        if take is not None:
            output = getattr(model_runner_output, "kv_connector_output", None)
            meta = getattr(output, "kv_connector_worker_meta", None)
            if meta is not None:
                take(meta)
        return update(self, scheduler_output, model_runner_output)

    update_from_output._lmcache_rag = True  # type: ignore[attr-defined]
    Scheduler.update_from_output = update_from_output


def tell_in_streams() -> None:
    """Have streams of completions and of chats carry kv_transfer_params in the chunk that ends them.

    vLLM 0.33 does that by itself; before, it was said in whole answers only. Safe to call twice. Does nothing in a
    process that is no API server, where these modules would cost their import.
    """
    if "vllm.entrypoints.serve.utils.api_utils" not in sys.modules:
        return
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionStreamResponse
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    for owner, name, chunk in (
        (OpenAIServingCompletion, "completion_stream_generator", CompletionStreamResponse),
        (OpenAIServingChat, "chat_completion_stream_generator", ChatCompletionStreamResponse),
    ):
        stream = getattr(owner, name)
        if "kv_transfer_params" not in chunk.model_fields and not getattr(stream, "_lmcache_rag", False):
            setattr(owner, name, _telling(stream))


def _telling(stream: Callable[..., AsyncIterator[str]]) -> Callable[..., AsyncIterator[str]]:
    """A stream of server-sent events that says the kv_transfer_params of the results it is made from."""
    signature = inspect.signature(stream)
    if "result_generator" not in signature.parameters:
        raise AttributeError(f"{stream.__qualname__} has no result_generator")

    @functools.wraps(stream)
    async def telling(*args: Any, **kwargs: Any) -> AsyncIterator[str]:
        params: Any = None

        async def listening(results: AsyncIterator[Any]) -> AsyncIterator[Any]:
            nonlocal params
            async for result in results:
                output = result[1] if isinstance(result, tuple) else result
                params = getattr(output, "kv_transfer_params", None)
                yield result

        given = signature.bind(*args, **kwargs)
        given.arguments["result_generator"] = listening(given.arguments["result_generator"])
        # Closed with ours: a client that leaves ends its request.
        async with contextlib.aclosing(stream(*given.args, **given.kwargs)) as events:  # type: ignore[type-var]
            async for event in events:
                yield _with_params(event, params) if params else event

    telling._lmcache_rag = True  # type: ignore[attr-defined]
    return telling


def _with_params(event: str, params: Any) -> str:
    """A server-sent event; kv_transfer_params are added to the one that ends a choice."""
    if not event.startswith("data: {"):
        return event
    chunk = json.loads(event.removeprefix("data: "))
    if not any(choice.get("finish_reason") for choice in chunk.get("choices", ())):
        return event
    return f"data: {json.dumps(chunk | {'kv_transfer_params': params}, ensure_ascii=False, separators=(',', ':'))}\n\n"


def attention_layers(vllm_config: Any) -> dict[str, Any]:
    """Attention modules by name, in the order of the model's layers."""
    return dict(vllm_config.compilation_config.static_forward_context)


class OwnMetadata:
    """Attention metadata of a pass of ours: vLLM's attention then calls `attention` instead of its kernel.

    Attributes:
        attention: Called as attention(layer, query, key, value, out) with the layer's name.
    """

    def __init__(self, attention: Callable[..., None]) -> None:
        self.attention = attention


def patch_attention(implementation: type) -> None:
    """Let this attention implementation answer a pass of ours (OwnMetadata) through it; anything else is untouched."""
    if getattr(implementation.forward, "_lmcache_rag", False):  # type: ignore[attr-defined]
        return
    forward = implementation.forward  # type: ignore[attr-defined]

    def patched(
        self: Any,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(attn_metadata, OwnMetadata):
            return forward(self, layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
        out = kwargs["output"] if "output" in kwargs else args[0]
        attn_metadata.attention(layer, query, key, value, out)
        return out

    patched._lmcache_rag = True  # type: ignore[attr-defined]
    implementation.forward = patched  # type: ignore[attr-defined]


def write_kv(layer: Any, key: Any, value: Any, slots: Any) -> None:
    """Write fresh KV [m, kv heads, size] to slots, int64 [m], by the backend's own operation."""
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
) -> None:
    """Run the model over some tokens in a forward context of our own; the one that was there is restored.

    No layer has a slot mapping, so vLLM writes no KV: the pass writes it itself, when it has looked at the old one.
    Few tokens run as vLLM's own piecewise CUDA graphs, padded to a captured size. Those read the runner's input
    buffers, which may hold the inputs of the step that is about to run: they are put back.

    Args:
        vllm_config: vLLM's configuration.
        runner: The model runner.
        names: The attention layers.
        metadata: Our attention.
        ids: int32 [m]: vLLM compiles for that type and drops torch's guards.
        positions: int64 [m].
        as_graphs: Whether vLLM's graphs may be used; not while a graph of ours is captured.
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

    def inputs(token_ids: Any, places: Any) -> dict[str, Any]:
        return {
            "input_ids": token_ids,
            "positions": places,
            "inputs_embeds": None,
            "intermediate_tensors": None,
        }

    padded = graph_size(runner, len(ids)) if as_graphs else 0
    if not padded:
        with context(len(ids), CUDAGraphMode.NONE, None):
            runner.get_model()(**inputs(ids, positions))
        return
    buffers = (runner.input_buffers.input_ids[:padded], runner.input_buffers.positions[:padded])
    before = [buffer.clone() for buffer in buffers]
    for buffer, own in zip(buffers, (ids, positions), strict=True):
        buffer[: len(own)] = own
        buffer[len(own) :] = 0
    try:
        with context(padded, CUDAGraphMode.PIECEWISE, BatchDescriptor(num_tokens=padded)):
            runner.cudagraph_manager.run_pw_graph(runner.get_model(), inputs(*buffers))
    finally:
        for buffer, was in zip(buffers, before, strict=True):
            buffer.copy_(was)


def graph_size(runner: Any, tokens: int) -> int:
    """Size of the piecewise CUDA graph that takes so many tokens; 0 when there is none."""
    from vllm.config import CUDAGraphMode

    manager = getattr(runner, "cudagraph_manager", None)
    if manager is None or not hasattr(runner, "input_buffers"):
        return 0
    found = manager.dispatch(1, tokens, None, 0)
    return int(found.num_tokens) if found.cg_mode == CUDAGraphMode.PIECEWISE else 0


def exact_rotary_table(rotary: Any) -> Any:
    """Cosines, then sines, of each position in float32: the model's own table may be in its own, coarser type."""
    return rotary._compute_cos_sin_cache().float()


def block_hash(vllm_config: Any) -> Callable[[Any, tuple[int, ...]], Any]:
    """How vLLM hashes a block of tokens behind another block; not for a sequence's first, which holds the salt."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import hash_block_tokens

    function = get_hash_fn_by_name(vllm_config.cache_config.prefix_caching_hash_algo)
    return lambda parent, tokens: hash_block_tokens(function, parent, tokens, None)


def tensor_parallel_ranks() -> int:
    """Number of tensor-parallel ranks."""
    from vllm.distributed import get_tensor_model_parallel_world_size

    return int(get_tensor_model_parallel_world_size())


def tensor_parallel_sum(tensor: Any) -> Any:
    """Sum over the tensor-parallel ranks."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(tensor) if tensor_parallel_ranks() > 1 else tensor


def true_on_all_ranks(fine: bool, device: Any) -> bool:
    """Whether `fine` holds on every tensor-parallel rank."""
    import torch
    from vllm.distributed import tensor_model_parallel_all_reduce

    size = tensor_parallel_ranks()
    if size == 1:
        return fine
    votes = tensor_model_parallel_all_reduce(torch.tensor([float(fine)], device=device))
    return bool(int(votes.item()) == size)


def hide_from_prefix_cache(request: Any, first_token: int, hash_block: int) -> None:
    """Make every block from the one that holds `first_token` on unreachable for other requests, decoded ones too.

    vLLM files blocks under the request's chained hashes. Random ones in the place of those of the blocks that are full
    by now make all later hashes random too; a preempted request still finds its own blocks.
    """
    first = first_token // hash_block
    if not request.block_hashes and getattr(request, "_block_hasher", None) is None:
        return  # prefix caching is off
    del request.block_hashes[first:]
    full = request.num_tokens // hash_block
    # Not one and the others chained to it by vLLM: at 7 us each that is 13 ms in a prompt of 30,900 tokens.
    request.block_hashes.extend(type_of_hash()(os.urandom(32)) for _ in range(first, full))


def watch_filed_blocks(pool: Any, filed: Callable[[int], None]) -> None:
    """Tell of each block, by its id, that vLLM files under a hash. It does so before the block's KV is computed."""
    file = pool.cache_full_blocks
    signature = inspect.signature(file)

    def cache_full_blocks(*args: Any, **kwargs: Any) -> None:
        file(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        for block in given["blocks"][given["num_cached_blocks"] : given["num_full_blocks"]]:
            filed(block.block_id)

    pool.cache_full_blocks = cache_full_blocks


def type_of_hash() -> Any:
    """The type of a block hash in vLLM (bytes)."""
    from vllm.v1.core.kv_cache_utils import BlockHash

    return BlockHash
