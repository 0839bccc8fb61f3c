"""What every test may ask for. The weights come from where a user's come from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the machine; torch is not imported yet
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ("engine_fixtures", "rag_kit", "vllm_cpu_kit")

# The files that take longest, longest first: begun last, one of them would keep one process busy and the others idle.
LONGEST = ("wheel", "exact", "kill", "cli_signals", "serve", "packages", "ranks", "bench_exact", "store_damage")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; `make test` gives each process one file after another."""
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of SmolLM2-135M-Instruct."""
    from lmcache_rag.sources import find_model

    return find_model().path


@pytest.fixture(scope="session")
def embedder_path() -> Path:
    """Folder of all-MiniLM-L6-v2."""
    from lmcache_rag.sources import find_embedder

    return find_embedder().path


@pytest.fixture(scope="session")
def embedder(embedder_path: Path) -> Any:
    """all-MiniLM-L6-v2 on the CPU, loaded once for the whole run."""
    from lmcache_rag.embedding import SentenceTransformerEmbedder

    return SentenceTransformerEmbedder(embedder_path, device="cpu")
