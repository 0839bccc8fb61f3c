"""Importing the library costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CODE = """
import json, sys
before = set(sys.modules)
import lmcache_rag
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
HEAVY = {"torch", "transformers", "sentence_transformers", "faiss", "langchain_core", "llama_index", "numpy", "httpx"}


def imported() -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    result: list[str] = json.loads(done.stdout)
    return result


def test_import_loads_no_model_library_or_framework() -> None:
    new = imported()
    assert "lmcache_rag" in new
    assert HEAVY.isdisjoint(new)
