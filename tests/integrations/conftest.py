"""Fixtures of both frameworks' tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _some_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts here are so short that `auto` would recompute all of their chunks; test_budget.py has `auto` itself."""
    monkeypatch.setenv("LMCACHE_RAG_RATIO", "0.15")
