"""Our client on a real vLLM (CPU build, blocks of 32) with a real LMCache server: what it learns from the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_cpu_kit import BLOCK, CHUNK, Servers, needs_vllm_cpu, until

from lmcache_rag import VLLMEngine
from lmcache_rag.engines.base import BlendOptions, Sampling
from lmcache_rag.prompt import PromptBuilder

pytestmark = [pytest.mark.slow, needs_vllm_cpu]

STORED = "lmcache_mp_l1_write_chunks_total"


@pytest.fixture
def engine(servers: Servers, smollm2_path: Path) -> Iterator[VLLMEngine]:
    made = VLLMEngine(servers.url, tokenizer=smollm2_path, kv_block=CHUNK)
    yield made
    made.close()


@pytest.mark.parametrize("over", [0, 1, 17, 33])
def test_kv_is_recognised_with_blocks_of_32(engine: VLLMEngine, servers: Servers, sentences: Any, over: int) -> None:
    builder = PromptBuilder(engine.tokenizer, engine.info)
    ids = builder.encode(" ".join(sentences[10 + over : 40 + over]))[: 2 * CHUNK + over]
    prompt = builder.ingest(engine.tokenizer.decode(ids))
    assert BLOCK == 32
    before = servers.lmcache_counter(STORED)
    assert engine.verify(prompt).status == "missing"
    servers.forget()
    assert [result.computed for result in engine.precompute([prompt])] == [True]
    assert until(lambda: servers.lmcache_counter(STORED) > before)
    assert engine.verify(prompt).status == "ok", "by vLLM's own prefix cache"
    assert [result.computed for result in engine.precompute([prompt])] == [False]
    servers.forget()
    assert engine.verify(prompt).status == "ok", "by LMCache"


def test_answers_are_streamed_only_with_our_connector(engine: VLLMEngine) -> None:
    """So the timeout is for each part of an answer, on vLLM 0.32 too, and the statistics come all the same."""
    builder = PromptBuilder(engine.tokenizer, engine.info)
    prompt = builder.query([], "What is it?")
    done = engine.generate(prompt, Sampling(max_tokens=16), BlendOptions())
    assert len(done.token_ids) > 1
    assert not any("in one piece" in warning or "does not report" in warning for warning in done.warnings)
