"""Every private part of vLLM that we touch stands here; tests/test_connector_contract*.py check each against vLLM.

Written for vLLM 0.25.1 and 0.33. vLLM is imported in the functions: this is loaded in each of vLLM's processes.
"""

from lmcache_rag.connector.compat_vllm.blocks import (
    CachedBlocks,
    hide_from_prefix_cache,
    watch_filed_blocks,
)
from lmcache_rag.connector.compat_vllm.last_token import offer_hidden_state, take_hidden_states
from lmcache_rag.connector.compat_vllm.passes import (
    OwnMetadata,
    attention_layers,
    exact_rotary_table,
    graph_size,
    patch_attention,
    recording,
    run_pass,
    run_prefill,
    tensor_parallel_rank,
    tensor_parallel_ranks,
    tensor_parallel_sum,
    true_on_all_ranks,
    write_kv,
)
from lmcache_rag.connector.compat_vllm.process import (
    begin_before_the_step,
    deliver_worker_meta_first,
    in_multi_connector,
    remember_workers,
    worker,
)
from lmcache_rag.connector.compat_vllm.request_validation import validate_requests
from lmcache_rag.connector.compat_vllm.streams import begin_texts_quickly, tell_in_streams

__all__ = [
    "CachedBlocks",
    "OwnMetadata",
    "attention_layers",
    "begin_before_the_step",
    "begin_texts_quickly",
    "deliver_worker_meta_first",
    "exact_rotary_table",
    "graph_size",
    "hide_from_prefix_cache",
    "in_multi_connector",
    "offer_hidden_state",
    "patch_attention",
    "recording",
    "remember_workers",
    "run_pass",
    "run_prefill",
    "take_hidden_states",
    "tell_in_streams",
    "tensor_parallel_rank",
    "tensor_parallel_ranks",
    "tensor_parallel_sum",
    "true_on_all_ranks",
    "validate_requests",
    "watch_filed_blocks",
    "worker",
    "write_kv",
]
