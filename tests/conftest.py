"""What every test may ask for. The weights come from where a user's come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ("engine_fixtures", "rag_kit", "vllm_cpu_kit")


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
