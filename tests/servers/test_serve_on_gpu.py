"""`lmcache-rag serve` on a GPU: answers over HTTP beside a full prefill's, with real weights. Skipped without CUDA.

In float32 with whole products, so that near ties decide nothing; torch.compile and CUDA graphs on, as users have them.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gpu_serve_kit import ALL, LACKING, PREFIX, TOKENS, Served, parted
from vllm_cpu_kit import answers, until

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(LACKING, reason="no CUDA device, vLLM and LMCache")]


@pytest.fixture(scope="module")
def served(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(smollm2_path, tmp_path_factory.mktemp("served"))
    try:
        served.ingest()
        assert until(served.reused), "LMCache stores behind the answer"
        yield served
    finally:
        served.close()


@pytest.mark.parametrize("named", [False, True])
def test_everything_computed_again_is_a_full_prefill(served: Served, named: bool) -> None:
    for _ in range(10):
        prompt, spans = served.prompt()
        got, told = served.ask(prompt, **ALL, **({"lmcache_rag.chunks": spans} if named else {}))
        assert got == served.full(prompt)
        assert parted(told, prompt)
        assert told["recomputed_tokens"] > len(prompt) / 2
        assert bool(told["hot_tokens"]) == named


def test_reused_kv_would_be_noticed(served: Served) -> None:
    prompts = [served.prompt()[0] for _ in range(5)]
    none = {"lmcache_rag.policy": "none", "lmcache_rag.ratio": 0.0}
    assert any(served.ask(prompt, **none)[0] != served.full(prompt) for prompt in prompts)


def test_another_prefix_and_another_tenant_get_nothing(served: Served) -> None:
    other = served.chunks[0][:PREFIX]
    longer = served.chunks[0][: 2 * PREFIX]
    for prefix, salt, named in ((other, "", PREFIX), (longer, "", 2 * PREFIX), (None, "another tenant", PREFIX)):
        prompt, _ = served.prompt(prefix)
        told = served.ask(prompt, 1, salt=salt, **{"lmcache_rag.prefix": named})[1]
        assert (told["reused_tokens"], told["recomputed_tokens"], told["failure"]) == (0, 0, "")
        assert parted(told, prompt)
    for named in ({}, {"lmcache_rag.prefix": PREFIX}):  # a client that knows nothing of prefixes gets it all the same
        assert served.ask(served.prompt()[0], 1, **named)[1]["reused_tokens"]


def test_requests_in_parallel_answer_as_each_alone(served: Served) -> None:
    prompts = [served.prompt()[0] for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda prompt: served.ask(prompt, **ALL), prompts))
    assert [tokens for tokens, _ in got] == [served.full(prompt) for prompt in prompts]
    assert all(
        told["recomputed_tokens"] and parted(told, prompt) for (_, told), prompt in zip(got, prompts, strict=True)
    )


def test_a_server_that_hangs_costs_one_deadline(served: Served) -> None:
    prompts = [served.prompt()[0] for _ in range(8)]
    wanted = [served.full(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(served.ask, prompt, 200, **ALL) for prompt in prompts]
        time.sleep(0.05)
        served.signal(signal.SIGSTOP)  # while some are looked up and some are loaded
        try:
            _, told = served.ask(served.prompt()[0], **ALL)
            assert told["reused_tokens"] + told["recomputed_tokens"] == 0
            assert told["failure"]
        finally:
            served.signal(signal.SIGCONT)
        assert [task.result()[0][:TOKENS] for task in running] == wanted
    assert until(served.reused, 60), "it blends again"
    for _ in range(5):
        prompt, _ = served.prompt()
        assert served.ask(prompt, **ALL)[0] == served.full(prompt)


def test_kv_gone_between_lookup_and_load_is_computed(served: Served) -> None:
    failures: set[str] = set()
    for attempt in range(30):
        prompts = [served.prompt(served._prefix + served._gap)[0] for _ in range(8)]
        wanted = [served.full(prompt) for prompt in prompts]
        time.sleep(1)  # LMCache stores behind the answer, and is not to be disturbed there
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(served.ask, prompt, **ALL) for prompt in prompts]
            for _ in range(10):
                time.sleep(0.005 + 0.001 * attempt)
                served.forget(force=True)
            got = [task.result() for task in running]
        assert [tokens for tokens, _ in got] == wanted
        assert all(parted(told, prompt) for (_, told), prompt in zip(got, prompts, strict=True))
        failures |= {told["failure"] for _, told in got}
        if "load failed" in failures:
            break
    assert "load failed" in failures
    served.forget()
    assert until(served.reused, 60), "it blends again, from the second tier"


def test_kv_that_is_damaged_on_disk_changes_no_answer(served: Served) -> None:
    files = [path for path in served.tier.rglob("*") if path.is_file()]
    sound = {path: path.read_bytes() for path in files}
    assert len(files) > 20
    try:
        for path, content in sound.items():
            path.write_bytes(b"\xff" * len(content))  # each number of it is NaN
        served.forget()
        for _ in range(3):
            prompt, _ = served.prompt()
            got, told = served.ask(prompt)
            assert got == served.full(prompt)
            assert told["failure"] == "damaged KV"
            assert told["reused_tokens"] == told["recomputed_tokens"] == 0
            assert parted(told, prompt)
    finally:
        for path, content in sound.items():
            path.write_bytes(content)
        served.forget()
    assert until(served.reused, 60), "it blends again, with what is sound"
    prompt, _ = served.prompt()
    assert served.ask(prompt, **ALL)[0] == served.full(prompt)


def test_without_lmcache_answers_equal_a_full_prefill(served: Served) -> None:
    served.signal(signal.SIGKILL)
    for _ in range(3):
        prompt, _ = served.prompt()
        got, told = served.ask(prompt, **ALL)
        assert got == served.full(prompt)
        assert told["reused_tokens"] + told["recomputed_tokens"] == 0
    assert until(lambda: answers(f"http://127.0.0.1:{served.health}/healthcheck"), 90), "serve starts it again"

    def blends() -> bool:
        nonlocal there
        there = served.ingest()
        return served.reused()

    there = 0
    assert until(blends, 60), "its index is empty, and is filled again with what the second tier has"
    assert there > sum(map(len, served.chunks)) / 2


def test_a_forgotten_chunk_leaves_memory_and_tier(served: Served) -> None:
    gone, first, second, last = served.chunks[:4]

    def found() -> list[bool]:  # never after exact KV alone: vLLM keeps what it computes itself there
        prompt, at = list(served._prefix), []
        for chunk in [first, second, *served._rng.sample([gone, last], 2)]:
            at.append((served.chunks.index(chunk), len(prompt), len(prompt) + len(chunk)))
            prompt += chunk + served._gap
        told = served.ask(prompt + served._question, 1, **{"lmcache_rag.spans": True})[1]
        held = {token for start, end in [(0, told["prefix_tokens"]), *told["spans"]] for token in range(start, end)}
        return [len(held & set(range(start, end))) > 100 for _, start, end in sorted(at)]

    served.ingest()
    assert until(lambda: all(found()), 60)
    files = len([path for path in served.tier.rglob("*") if path.is_file()])
    params = {"lmcache_rag.forget": True, "lmcache_rag.prefix": PREFIX, "lmcache.max_offload_tokens": 0}
    assert served.ask(served._prefix + gone, 1, **params)[1]["forgotten"]
    for _ in range(5):
        assert found() == [False, True, True, True]
    assert len([path for path in served.tier.rglob("*") if path.is_file()]) < files
    served.forget()
    assert until(lambda: any(found()), 60), "the others come from the second tier"
    assert not found()[0]
    served.ingest()
    assert until(lambda: all(found()), 60), "and it can be ingested again"


def test_missing_passages_are_blended_after_second_use(
    served: Served, smollm2_path: Path, tmp_path: Path, sentences: list[str]
) -> None:
    from lmcache_rag.integrations.blender import Blender

    from lmcache_rag import VLLMEngine, Workspace

    engine = VLLMEngine(str(served._client.base_url).rstrip("/"), tokenizer=smollm2_path)
    texts = [" ".join(sentences[start::7][:12]) for start in range(3)]
    with Workspace.open(tmp_path / "store", engine=engine, max_tokens=4) as workspace:
        blender = Blender(workspace)
        for missed in (3, 3):
            assert blender.answer(blender.build_prompt(texts, "What?")).stats.chunks_missed == missed
            texts = texts[::-1]
            assert blender.drain(120)
        counts = blender.fill_counts
        assert counts.ingested + counts.held == 3, "what began a question is in vLLM's own cache already"
        assert until(lambda: blender.answer(blender.build_prompt(texts, "What?")).stats.chunks_missed == 0)
    engine.close()
