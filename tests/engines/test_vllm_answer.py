"""What a client makes of an answer's statistics; tests/engines/test_vllm.py has the rest of it."""

from __future__ import annotations

from typing import Any

import pytest

from lmcache_rag import protocol
from lmcache_rag.engines.base import BlendOptions, ChunkSpan, Completion, QueryPrompt
from lmcache_rag.engines.vllm_answer import Gathered, blend_params, completion

PROMPT = QueryPrompt(tuple(range(400)), 64, (ChunkSpan(64, 192, "a"), ChunkSpan(195, 323, "b")), 323, "f")


def answered(**reported: Any) -> Completion:
    counts = {"prefix_tokens": 0, "reused_tokens": 0, "recomputed_tokens": 0, "computed_tokens": 400, "spans": []}
    gathered = Gathered(first=1.0, text="x", ids=[1], stats={**counts, **reported})
    return completion(gathered, PROMPT, kv_block=64, blending=True, streamed=True, ids=(1,))


def test_a_prompt_computed_as_fast_misses_nothing() -> None:
    done = answered(decision="computed: not faster", predicted_blend_ms=46.7, predicted_compute_ms=32.7)
    assert (done.warnings, done.missed, done.stats.chunks_missed) == ((), (), 0), "else its chunks were ingested again"
    assert done.stats.decision == protocol.Decision.NOT_FASTER
    assert (done.stats.predicted_blend_ms, done.stats.predicted_compute_ms) == (46.7, 32.7)


@pytest.mark.parametrize("decision", [None, "blended: costs unknown"])
def test_a_prompt_without_kv_is_still_warned_of(decision: str | None) -> None:
    done = answered(decision=decision)
    assert done.missed == (0, 1)
    assert done.warnings
    assert done.stats.decision == (decision or "")


def test_a_request_says_always_only_if_asked_for() -> None:
    switches = [blend_params(each)[protocol.BLEND] for each in (BlendOptions(), BlendOptions(always=True))]
    assert switches == ["on", "always"]
    assert blend_params(BlendOptions(enabled=False, always=True)) == protocol.NO_BLEND
