"""Importing the library costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CODE = """
import json, sys, time
before = set(sys.modules)
start = time.perf_counter()
import lmcache_rag
took = time.perf_counter() - start
print(json.dumps({"took": took, "new": sorted({name.partition(".")[0] for name in set(sys.modules) - before})}))
"""
HEAVY = {"torch", "transformers", "sentence_transformers", "faiss", "langchain_core", "llama_index", "numpy", "httpx"}


def imported() -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_import_takes_less_than_three_tenths_of_a_second() -> None:
    assert min(float(str(imported()["took"])) for _ in range(3)) < 0.3


def test_import_loads_no_model_library_and_no_framework() -> None:
    new = imported()["new"]
    assert isinstance(new, list)
    assert "lmcache_rag" in new
    assert HEAVY.isdisjoint(new)
