"""Hostile requests among ordinary ones on a real vLLM (CPU build) and LMCache, which is paused meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_cpu_kit import Servers, needs_vllm_cpu

from lmcache_rag import VLLMEngine
from lmcache_rag.bench import soak as soak_module
from lmcache_rag.bench.exact import TracedServer
from lmcache_rag.prompt import PromptBuilder

pytestmark = [pytest.mark.slow, pytest.mark.full, needs_vllm_cpu]


@pytest.fixture
def pair(smollm2_path: Path, tmp_path: Path) -> Iterator[Servers]:
    servers = Servers(smollm2_path, tmp_path)
    yield servers
    servers.close()


def test_hostile_requests_and_pauses_harm_nothing(
    pair: Servers, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak_module, "LEAST", 150)
    engine = VLLMEngine(pair.url, tokenizer=pair.model)
    soak = soak_module.Soak(
        TracedServer(engine, PromptBuilder(engine.tokenizer, engine.info)),
        corpus,
        tokens=3,
        concurrency=4,
        limit_s=300,
        lmcache_url=f"http://127.0.0.1:{pair.http}",
        watch=[pair.vllm.pid],
        may_grow_mb=500,
        most=4,
        hostile=0.5,
        different=4,
    )
    report = soak.run(30, [lambda: soak.pause(3)])
    engine.close()
    print(json.dumps(report.as_dict(), indent=2))
    assert report.hostile_failed == report.failed == report.wrong == []
    assert report.pauses == [1, 1]
    before, after = report.engine_cores
    assert len(before) == 1
    assert before == after
    assert set(report.hostile) >= {"200", "400", "aborted"}
    assert report.sound
