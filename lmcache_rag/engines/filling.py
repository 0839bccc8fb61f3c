"""From a prompt to its KV cache, filled from chunk KV as far as there is any, and what that did."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lmcache_rag.blend.policies import get_policy
from lmcache_rag.engines.base import ChunkReuse
from lmcache_rag.engines.chunk_kv import require_blendable
from lmcache_rag.errors import ContextLengthError

if TYPE_CHECKING:
    from torch import Tensor

    from lmcache_rag.engines.base import BlendOptions, ChunkSpan, EngineInfo, QueryPrompt
    from lmcache_rag.engines.chunk_kv import ChunkCache
    from lmcache_rag.engines.hf_model import HFModel
    from lmcache_rag.engines.kv_buffer import KVBuffer
    from lmcache_rag.engines.prefill import Prefilled


def check_request(info: EngineInfo, prompt: QueryPrompt, blend: BlendOptions) -> None:
    """See that a request can be answered, before any work.

    Raises:
        ConfigError: There is no such policy.
        UnsupportedModelError: Blending is asked for and this model cannot be blended.
        ContextLengthError: The prompt is longer than the context.
    """
    if blend.enabled:
        get_policy(blend.policy)
        require_blendable(info)
    if len(prompt) >= info.context_length:
        raise ContextLengthError(
            f"The prompt has {len(prompt)} tokens, the model's context holds {info.context_length} with the answer.",
            remedy="Retrieve fewer chunks or ask a shorter question.",
        )


def filled_cache(
    model: HFModel, chunks: ChunkCache, prompt: QueryPrompt, ids: Tensor, blend: BlendOptions, *, room: int
) -> tuple[KVBuffer | None, dict[str, Any], dict[str, float]]:
    """A cache with room for the prompt and `room` more tokens; what it does not hold is left to the caller.

    The caller holds the model's lock and is in inference mode.

    Args:
        model: The model.
        chunks: Its chunk KV.
        prompt: The prompt.
        ids: Its token ids, int64 [n], on the model's device.
        blend: How KV is reused.
        room: How many tokens may follow.

    Returns:
        The cache, None where the model makes its own; those fields of ReuseStats that say what was done; and where the
        time went, in milliseconds by step.
    """
    if model.why_not:
        return None, {}, {}
    cache = model.buffer(min(len(prompt) + room, model.context_length))
    if not blend.enabled:
        return cache, {}, {}
    return cache, *_blend(model, chunks, prompt, ids, cache, blend)


def _blend(
    model: HFModel, chunks: ChunkCache, prompt: QueryPrompt, ids: Tensor, cache: KVBuffer, blend: BlendOptions
) -> tuple[dict[str, Any], dict[str, float]]:
    from lmcache_rag.engines.prefill import blended_prefill

    begin = time.perf_counter()
    prefix, prefix_was_there = chunks.prefix(prompt.fingerprint, prompt.token_ids[: prompt.prefix_tokens])
    hits = chunks.find(prompt)
    lookup_ms = (time.perf_counter() - begin) * 1e3
    found = {span for span, _ in hits}
    done = blended_prefill(model, prompt, ids, cache, prefix, hits, get_policy(blend.policy), blend.ratio)
    exact = done.exact_tokens - (0 if prefix_was_there else prompt.prefix_tokens)
    stats = {
        "prefix_tokens": exact,
        "reused_tokens": done.reused_tokens,
        "recomputed_tokens": done.recomputed_tokens,
        "computed_tokens": len(prompt) - exact - done.reused_tokens - done.recomputed_tokens,
        "chunks_hit": len(hits),
        "chunks_missed": len(prompt.chunks) - len(hits),
        "absent": tuple(index for index, span in enumerate(prompt.chunks) if span not in found),
        "chunks": tuple(_reuse(span, span in found, done) for span in prompt.chunks),
        "lookup_ms": lookup_ms,
        "load_ms": done.load_ms + done.shift_ms,
        "blend_ms": done.select_ms + done.redo_ms,
    }
    spent = {
        "look-up": lookup_ms,
        "load": done.load_ms,
        "key shift": done.shift_ms,
        "selection": done.select_ms,
        "selected layers": done.redo_ms,
    }
    return stats, spent


def _reuse(span: ChunkSpan, found: bool, done: Prefilled) -> ChunkReuse:
    tokens = span.end - span.start
    if not found:
        return ChunkReuse(computed_tokens=tokens)
    if span.end <= done.exact_tokens:
        return ChunkReuse(prefix_tokens=tokens)
    again = sum(span.start <= position < span.end for position in done.selected)
    return ChunkReuse(reused_tokens=tokens - again, recomputed_tokens=again)
