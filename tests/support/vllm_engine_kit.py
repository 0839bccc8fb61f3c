"""Engines over a vLLM server on this machine (openai_kit.py); the statistics come from the connector's own code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeVLLM
from openai_kit import vllm_serving
from typer.testing import CliRunner

from lmcache_rag import VLLMEngine
from lmcache_rag.cli.app import app
from lmcache_rag.engines.base import BlendOptions, Completion, Sampling
from lmcache_rag.prompt import PromptBuilder

SHORT, LONG = Sampling(max_tokens=4), Sampling(max_tokens=100)
OFF = BlendOptions(enabled=False)
QUICK = {"backoff": 0.01, "timeout": 5.0}


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_path, local_files_only=True)


@pytest.fixture
def server(smollm2_tokenizer: Any) -> Iterator[FakeVLLM]:
    with vllm_serving(smollm2_tokenizer) as running:
        yield running


@pytest.fixture
def connect(smollm2_tokenizer: Any) -> Iterator[Any]:
    """Makes engines, with the tokenizer that is loaded already unless told otherwise, and closes them."""
    made: list[VLLMEngine] = []

    def engine(urls: Any, model: str | None = None, **options: Any) -> VLLMEngine:
        made.append(VLLMEngine(urls, model, **{"tokenizer": smollm2_tokenizer, **QUICK, **options}))
        return made[-1]

    yield engine
    for each in made:
        each.close()


@pytest.fixture
def engine(server: FakeVLLM, connect: Any) -> VLLMEngine:
    made: VLLMEngine = connect(server.url)
    return made


@pytest.fixture(scope="module")
def builder(smollm2_tokenizer: Any) -> PromptBuilder:
    """The prompts of every engine here that serves SmolLM2. It takes most of a second to make."""
    with vllm_serving(smollm2_tokenizer) as server:
        engine = VLLMEngine(server.url, tokenizer=smollm2_tokenizer, **QUICK)
        engine.close()
        return PromptBuilder(smollm2_tokenizer, engine.info)


@pytest.fixture
def chunks(sentences: list[str]) -> list[str]:
    """Six chunks of more than two blocks each."""
    return [" ".join(sentences[i : i + 8]) for i in range(0, 48, 8)]


def add_up(completion: Completion) -> bool:
    stats = completion.stats
    parts = (stats.prefix_tokens, stats.reused_tokens, stats.recomputed_tokens, stats.computed_tokens)
    return sum(parts) == stats.prompt_tokens


@pytest.fixture
def call(server: FakeVLLM, tmp_path: Path) -> Any:
    """Runs a command line against the server, as a user would."""
    runner = CliRunner(env={n: None for n in os.environ if n.startswith("LMCACHE_RAG_")} | {"COLUMNS": "120"})

    def run(*arguments: object, **env: str) -> Any:
        options = [] if env else ["--engine", server.url]
        return runner.invoke(app, [str(a) for a in (*arguments, *options, "--store", tmp_path / "store")], env=env)

    return run
