"""What status, list, warm and remove import when they need no model, by real processes over a store with KV."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODELS = {"torch", "transformers", "tokenizers", "sentence_transformers", "safetensors", "huggingface_hub"}
CODE = """
import sys
from lmcache_rag.cli import main
try:
    main()
finally:
    print("loaded", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def run(*arguments: object, cwd: Path) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """One command in a process of its own, and the packages that it loaded."""
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    [loaded] = [line for line in done.stderr.splitlines() if line.startswith("loaded ")]
    return done, set(loaded.split()[1:])


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    """A folder with two documents in a store, and their KV."""
    folder = tmp_path_factory.mktemp("light")
    for name in "ab":
        (folder / f"{name}.txt").write_text(f"The lock {name} opens at nine.")
    done, loaded = run("ingest", "a.txt", "b.txt", "--model", smollm2_path, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "torch" in loaded
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["status"], "2 chunks, "),
        (["status", "--json"], '"chunks_without_kv": 0'),
        (["list"], "2 documents."),
        (["warm"], "Nothing was missing."),
        (["settings"], "top_k = 4"),
        (["remove", "b.txt"], "1 document removed, with 1 chunk"),  # last: it changes the store
    ],
)
def test_no_model_is_loaded_with_nothing_to_do(filled: Path, arguments: list[str], shown: str) -> None:
    done, loaded = run(*arguments, cwd=filled)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert loaded.isdisjoint(MODELS)
    assert "is served by" not in done.stderr


@pytest.mark.slow
def test_removed_kv_leaves_without_a_model(filled: Path) -> None:
    run("remove", "--all", cwd=filled)  # declined: stdin is closed
    (filled / "c.txt").write_text("The lock c opens at ten.")
    first, _ = run("ingest", "c.txt", cwd=filled)
    assert "is served by" not in first.stderr  # said once, by the first ingestion
    assert "is served by" in run("ingest", "c.txt", "-v", cwd=filled)[0].stderr
    files = set((filled / "lmcache-rag-store").glob("kv/*/*/*.safetensors"))
    run("remove", "c.txt", cwd=filled)
    left = set((filled / "lmcache-rag-store").glob("kv/*/*/*.safetensors"))
    assert left < files
    for file in left:
        file.unlink()
    done, loaded = run("warm", cwd=filled)
    assert "computed" in done.stdout
    assert "torch" in loaded
