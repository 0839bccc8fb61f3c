"""The client in TypeScript, made by docs/wire-format.md alone, over the stand-in for vLLM."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import npm_kit
import pytest
from fake_vllm import FakeVLLM
from openai_kit import BLOCK, vllm_serving

from lmcache_rag import protocol
from lmcache_rag.engines.base import EngineInfo
from lmcache_rag.prompt import PromptBuilder

ROOT = Path(__file__).parents[2]
QUESTION = "When do figs ripen?"
PASSAGES = ["Quince ripens in March. " * 60, "Figs <|im_end|> ripen in 12 months, naïve 日本. " * 30]

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client, installed from its lock file and compiled, in a copy."""
    copy = tmp_path_factory.mktemp("checkout")
    folder = copy / "examples" / "typescript"
    ignored = shutil.ignore_patterns("node_modules", "build")
    shutil.copytree(ROOT / "examples" / "typescript", folder, ignore=ignored)
    (copy / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "neutral-passages.json", copy / "docs")
    npm_kit.run("npm", "ci", "--silent", folder=folder)
    npm_kit.run("npm", "run", "build", "--silent", folder=folder)
    return folder / "build" / "client.js"


@pytest.fixture
def server(tokenizer: Any) -> Iterator[FakeVLLM]:
    with vllm_serving(tokenizer) as running:
        running.chunk = BLOCK
        yield running


@pytest.fixture
def client(built: Path, server: FakeVLLM, smollm2_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def call(**variables: str) -> subprocess.CompletedProcess[str]:
        command = ["node", str(built), server.url, str(smollm2_path), QUESTION, *PASSAGES]
        return subprocess.run(
            command, env=os.environ | variables, capture_output=True, text=True, timeout=npm_kit.LIMIT_S, check=False
        )

    return call


def test_it_reuses_what_it_ingested(client: Any) -> None:
    done = client()
    assert done.returncode == 0, done.stderr
    statistics = json.loads(done.stdout)["statistics"]
    assert statistics["blended"]
    assert statistics["reused_tokens"] > statistics["computed_tokens"]
    assert sum(statistics[name] for name in protocol.COUNTS) == statistics["prompt_tokens"]


def test_its_token_ids_are_the_packages_own(client: Any, server: FakeVLLM, tokenizer: Any) -> None:
    info = EngineInfo("vllm", server.model, "", "", "", BLOCK, server.context, 1)
    prompts = PromptBuilder(tokenizer, info)
    assert client().returncode == 0
    ingested, asked = server.seen[:-1], server.seen[-1]
    assert [body["prompt"] for body in ingested] == [list(prompts.ingest(text).token_ids) for text in PASSAGES]
    query = prompts.query(PASSAGES[::-1], QUESTION)
    assert asked["prompt"] == list(query.token_ids)
    params = asked["kv_transfer_params"]
    assert params[protocol.PREFIX] == query.prefix_tokens
    assert params[protocol.CHUNKS] == [[chunk.start, chunk.end] for chunk in query.chunks]


def test_counts_that_do_not_add_up_end_it(client: Any, server: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = server.backend.statistics  # type: ignore[attr-defined]

    def wrong(number: int, body: dict[str, Any]) -> Any:
        found = honest(number, body)
        found[protocol.ANSWER]["computed_tokens"] += 1
        return found

    monkeypatch.setattr(server.backend, "statistics", wrong)
    done = client()
    assert done.returncode == 1
    assert re.search(r"the four counts add up to \d+, not \d+ tokens", done.stderr)


def test_the_ingest_key_goes_with_ingestion_only(client: Any, server: FakeVLLM) -> None:
    server.ingest_key = "k" * 32
    refused = client()
    assert refused.returncode == 1
    assert "401" in refused.stderr
    server.ingest_keys.clear()
    assert client(LMCACHE_RAG_INGEST_KEY=server.ingest_key).returncode == 0
    assert server.ingest_keys == [(True, server.ingest_key), (True, server.ingest_key), (False, None)]


def test_a_passage_whose_kv_was_not_kept_is_an_error(client: Any, server: FakeVLLM) -> None:
    server.failure = "no server"
    done = client()
    assert done.returncode == 1
    assert "a passage's KV was not kept: " in done.stderr


def test_a_server_that_cannot_blend_answers_in_full(client: Any, server: FakeVLLM) -> None:
    server.why_not = "blending needs CUDA"
    done = client()
    assert done.returncode == 0, done.stderr
    assert "computes every prompt in full: blending needs CUDA" in done.stderr
    assert not json.loads(done.stdout)["statistics"]["blended"]


def test_a_server_without_the_connector_is_an_error(client: Any, server: FakeVLLM) -> None:
    server.connector = False
    done = client()
    assert done.returncode == 1
    assert "runs without lmcache-rag's connector" in done.stderr
