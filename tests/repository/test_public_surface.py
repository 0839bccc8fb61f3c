"""The public surface is what it was: exports, signatures, commands, settings, import paths, keys of `--json`.

A change that is meant: `python tests/support/public_surface.py` and
`KEEP_SURFACE=1 pytest tests/repository/test_public_surface.py`, then
look at the difference. The wire (kv_transfer_params, statistics, metrics) is pinned by test_protocol.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import public_surface
import pytest
from models import tiny_model
from openai_kit import vllm_serving
from serve_kit import FakeServer
from typer.testing import CliRunner

from lmcache_rag.cli.app import app
from lmcache_rag.cli.run import Services
from lmcache_rag.settings import Settings

QUALITY = ("--cells", "2x64", "--items", 2, "--tasks", "fact,needle", "--arms", "none", "--max-tokens", 2)


@pytest.mark.parametrize("part", ["exports", "commands", "settings"])
def test_what_programs_use_is_as_it_was(part: str) -> None:
    found = json.loads(json.dumps(public_surface.surface()[part]))
    wanted = public_surface.kept()[part]
    for name in sorted(found | wanted):
        assert found.get(name) == wanted.get(name), name


@pytest.mark.parametrize("path", public_surface.PATHS)
def test_paths_in_commands_and_configurations_exist(path: str) -> None:
    module, _, name = path.partition(":")
    file = Path(public_surface.__file__).parents[2] / f"{module.replace('.', '/')}.py"
    assert f" {name}" in file.read_text(encoding="utf-8")  # some need vLLM to be imported


def test_json_documents_have_the_keys_they_had(
    smollm2_path: Path, tokenizer: Any, embedder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = local_program(smollm2_path, embedder, monkeypatch)
    docs = tmp_path / "docs"
    docs.mkdir()
    for number in range(3):
        (docs / f"{number}.txt").write_text(f"A KV cache holds {number} keys and values of what a model has read. " * 9)
    (docs / "broken.txt").write_bytes(b"\0\1\2\3" * 100)
    store = ("--store", tmp_path / "store", "--json")
    found = {
        "ingest": call("ingest", docs, *store),
        "ingest --dry-run": call("ingest", docs, *store, "--dry-run"),
        "ask": call("ask", "What does a KV cache hold?", *store, "--max-tokens", 2),
        "status": call("status", *store),
        "warm": call("warm", *store),
        "verify": call("verify", *store, "--all"),
        "remove": call("remove", "1.txt", *store),
        "prune": call("prune", *store),
        "settings": call("settings", *store),
        "bench quality": call("bench", "quality", *QUALITY, "--out", tmp_path / "quality.jsonl", "--json"),
        "an error": call("status", "--store", tmp_path / "none", "--json"),
    }
    with FakeServer("vllm", model=str(smollm2_path)) as engine, FakeServer("lmcache") as cache:
        found["doctor"] = call("doctor", engine.url, "--lmcache-url", cache.url, "--json")
    with vllm_serving(tokenizer) as server:
        more = ("--tokens", 1300, "--repeats", 1, "--chunks", 1, "--throughput", "--rate", 0, "--ingestion", "--floor")
        found["bench speed"] = call("bench", "speed", "--engine", server.url, *more, "--requests", 2, "--json")
    documents = {name: public_surface.keys(each) for name, each in found.items()}
    if os.environ.get("KEEP_SURFACE"):
        public_surface.keep({"documents": documents})
    wanted = public_surface.kept()["documents"]
    for name in sorted(documents | wanted):
        assert documents.get(name) == wanted.get(name), name


def local_program(model: Path, embedder: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a command with a tiny model, in this process; returns the document that it prints."""
    from transformers import AutoTokenizer

    from lmcache_rag.engines.embedded import EmbeddedEngine
    from lmcache_rag.engines.hf_model import HFModel
    from lmcache_rag.workspace import Workspace

    weights = tiny_model("llama", max_position_embeddings=1024)
    wrapped = HFModel.wrap(weights, AutoTokenizer.from_pretrained(model, local_files_only=True))

    def open_workspace(settings: Settings, *, create: bool) -> Workspace:
        engine = EmbeddedEngine.from_model(wrapped, name="tiny", revision="1", kv_dir=settings.store / "kv")
        return Workspace(settings, create=create, engine=engine, embedder=embedder)

    services = Services(open_workspace=open_workspace)
    runner = CliRunner(env={name: None for name in os.environ if name.startswith("LMCACHE_RAG_")})
    return lambda *words: json.loads(runner.invoke(app, [str(word) for word in words], obj=services).stdout)
