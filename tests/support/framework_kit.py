"""What the tests of both integrations share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lmcache_rag.integrations import kv_registry
from models import tiny_model

from lmcache_rag import tokenizer
from lmcache_rag.weights import find_model


@cache
def tiny_llama() -> Any:
    """A tiny random model, one for all tests: it takes longer to make than to use."""
    return tiny_model("llama")


@cache
def _opened(path: Path) -> Any:
    return tokenizer.auto_tokenizer(path)


def light_tokenizer() -> Any:
    """SmolLM2's tokenizer without its weights."""
    return _opened(find_model().path)


def fresh(monkeypatch: Any, folder: Path) -> None:
    """No workspace of an earlier test, whose server may have had the same port; a registry of its own."""
    monkeypatch.setattr(tokenizer, "open_tokenizer", _opened)  # it takes a second each time
    monkeypatch.setattr(kv_registry, "_by_server", {})
    monkeypatch.setenv("LMCACHE_RAG_STORE", str(folder / "registry"))


def passages(sentences: Sequence[str], count: int = 6, *, long: int = 5) -> list[str]:
    """Passages of real text, each longer than a block of 64 tokens."""
    return [" ".join(sentences[i * long : (i + 1) * long]) for i in range(count)]
