"""What every test may ask for. The weights come from where a user's come from."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the machine; torch is not imported yet
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Of each example hypothesis would want to see the end within 200 ms.
hypothesis.settings.register_profile("untimed", hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("untimed")

pytest_plugins = ("engine_fixtures", "rag_kit", "vllm_cpu_kit")

# The files that take longest, longest first: begun last, one of them would keep one process busy and the others idle.
LONGEST = (
    *("repository/test_wheel.py", "invariants/test_exact.py", "invariants/test_kill.py", "cli/test_signals.py"),
    *("serving/test_supervise.py", "weights/test_packages.py", "connector/test_ranks.py", "bench/test_exact.py"),
    *("store/test_database.py", "store/test_connections.py"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """What CI asks for where everything must be there."""
    parser.addoption("--must-run", action="store_true", help="skipped tests have failed, but for a GPU's")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; `make test` gives each process one file after another. What ends servers comes last."""
    folder = Path(__file__).parent
    ranks = {folder / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (item.get_closest_marker("ends_servers") is not None, ranks.get(item.path, len(ranks))))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With --must-run no skip passes unnoticed."""
    report = yield
    if report.skipped and item.config.getoption("--must-run") and item.get_closest_marker("gpu") is None:
        report.outcome = "failed"
        report.longrepr = f"skipped, where it must run: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of SmolLM2-135M-Instruct."""
    from lmcache_rag.weights import find_model

    return find_model().path


@pytest.fixture(scope="session")
def embedder_path() -> Path:
    """Folder of all-MiniLM-L6-v2."""
    from lmcache_rag.weights import find_embedder

    return find_embedder().path


@pytest.fixture(scope="session")
def embedder(embedder_path: Path) -> Any:
    """all-MiniLM-L6-v2 on the CPU, loaded once for the whole run."""
    from lmcache_rag.embedding import SentenceTransformerEmbedder

    return SentenceTransformerEmbedder(embedder_path, device="cpu")
