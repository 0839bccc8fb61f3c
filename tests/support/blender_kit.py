"""A workspace with a tiny model, and servers, for what both frameworks' integrations are built on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeVLLM
from lmcache_rag.integrations import kv_registry
from lmcache_rag.integrations.kv_registry import KVRegistry
from models import tiny_model
from openai_kit import vllm_serving

from lmcache_rag import Workspace
from lmcache_rag.engines.base import Sampling
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_model import HFModel

FOUR = Sampling(max_tokens=4)


@pytest.fixture
def workspace(tmp_path: Path, tokenizer: Any) -> Iterator[Workspace]:
    """An empty store and a tiny model."""
    model = HFModel.wrap(tiny_model("llama"), tokenizer)
    engine = EmbeddedEngine.from_model(model, name="tiny", revision="0", kv_dir=tmp_path / "store" / "kv")
    with Workspace.open(tmp_path / "store", engine=engine, max_tokens=4) as opened:
        yield opened
    engine.close()


@pytest.fixture(autouse=True)
def no_connections_left() -> Iterator[None]:
    """Workspaces of servers live as long as the process: here, as long as the test."""
    yield
    while kv_registry._by_server:
        kv_registry._by_server.popitem()[1].engine.close()


@pytest.fixture
def register(workspace: Workspace) -> KVRegistry:
    return KVRegistry.of(workspace)


@pytest.fixture
def server(tokenizer: Any) -> Iterator[FakeVLLM]:
    with vllm_serving(tokenizer) as serving:
        yield serving
