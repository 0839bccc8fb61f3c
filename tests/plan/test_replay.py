"""A replay against a server in this process: our connector's scheduler over a memory without an end.

tests/servers/test_plan_replay.py replays against real servers, whose memory evicts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import vllm_engine_kit as kit
from fake_vllm import FakeVLLM, is_ingest
from openai_kit import vllm_serving

from lmcache_rag.engines.vllm_client import VLLMClient
from lmcache_rag.errors import EngineError
from lmcache_rag.plan.cache import zipf_workload
from lmcache_rag.plan.geometry import from_numbers
from lmcache_rag.plan.replay import Replayed, Server, replay

smollm2_tokenizer = kit.smollm2_tokenizer
MODEL = from_numbers(32, 8, 128)
LARGE = 1 << 40  # bytes: nothing is evicted


@pytest.fixture
def server(smollm2_tokenizer: Any) -> Iterator[FakeVLLM]:
    with vllm_serving(smollm2_tokenizer) as server:
        yield server


def run(server: FakeVLLM, requests: list[tuple[list[str], list[int]]], **more: Any) -> Replayed:
    with VLLMClient(server.url) as client:
        return replay(client, Server.of(client), requests, MODEL, memory_bytes=LARGE, **more)


def drawn(requests: int = 25) -> list[tuple[list[str], list[int]]]:
    work = zipf_workload(12, requests, top_k=3, exponent=0.8, seed=5)
    return [([str(number) for number in each], [140] * len(each)) for each in work.requests]


def test_a_blending_server_finds_what_was_predicted(server: FakeVLLM) -> None:
    done: list[tuple[int, int]] = []
    found = run(server, drawn(), on_request=lambda at, total: done.append((at, total)))
    assert found.blends
    assert found.measured == pytest.approx(found.predicted)
    assert 0.5 < found.predicted < 1
    assert done[-1] == (25, 25)
    assert found.agrees
    assert not Replayed(1, 0.5, 0.54, 0, False, 1.0).agrees


def test_without_blending_only_exact_prefixes_count(server: FakeVLLM) -> None:
    server.why_not = "it runs on a CPU"
    blended, found = drawn(), run(server, drawn())
    assert not found.blends
    assert found.measured == pytest.approx(found.predicted)
    assert found.predicted < 0.5
    assert not any(is_ingest(body) for body in server.seen[1:])
    assert len(server.questions) >= len(blended)


def test_only_new_tokens_leave_the_trace_each_time(server: FakeVLLM) -> None:
    first = run(server, [(["secret name"], [128])] * 2)
    again = run(server, [(["secret name"], [128])] * 2)
    assert (first.measured, again.measured) == (0.5, 0.5)
    same = run(server, [(["secret name"], [128])], seed="s"), run(server, [(["secret name"], [128])], seed="s")
    assert [each.measured for each in same] == [0, 1]
    assert all(set(body["prompt"]) <= set(range(300, 15_000)) for body in server.seen)


def test_requests_that_are_too_long_are_left_out(server: FakeVLLM) -> None:
    found = run(server, [(["long"], [9000]), (["short"], [10]), (["right"], [128])])
    assert (found.requests, found.left_out) == (1, 2)


def test_a_server_without_our_connector_is_refused(server: FakeVLLM) -> None:
    server.connector = False
    with pytest.raises(EngineError, match="without lmcache-rag's connector"):
        run(server, drawn())
