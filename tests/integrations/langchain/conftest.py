"""Fixtures of LangChain's tests: a tokenizer, a workspace, a server like vLLM, passages of real text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeVLLM
from framework_kit import fresh, light_tokenizer, passages
from langchain_kit import server, workspace

from lmcache_rag import Workspace


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return light_tokenizer()


@pytest.fixture
def made(tokenizer: Any, tmp_path: Path) -> Iterator[Workspace]:
    with workspace(tokenizer, tmp_path) as opened:
        yield opened


@pytest.fixture
def running(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVLLM]:
    fresh(monkeypatch, tmp_path)
    with server(tokenizer, tmp_path / "server") as opened:
        yield opened


@pytest.fixture
def texts(sentences: list[str]) -> list[str]:
    return passages(sentences)
