"""The command line in this process over a small store: texts, the store's fixtures, and what a command wrote."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from models import tiny_model
from typer.testing import CliRunner, Result

from lmcache_rag.cli import run as cli_run
from lmcache_rag.cli.app import app
from lmcache_rag.settings import Settings

TEXTS = {
    "rope.md": """# Rotary position embedding

Rotary position embedding turns pairs of numbers in queries and keys by an angle that grows with the position.
It was proposed by Jianlin Su in 2021. A key that was computed at one place is moved to another by turning it further.
""",
    "cache.txt": """A KV cache keeps the keys and values of the tokens that a language model has read.
With it a new token costs one pass over one token; without it the whole text would have to be read again for each.
""",
    "berlin.html": """<html><head><title>Berlin</title></head><body><p>Berlin has 3.7 million inhabitants.
It lies on the river Spree. Its highest point is the Arkenberge hill, 122 metres above the sea.</p></body></html>
""",
}


QUESTION = "Who proposed rotary position embedding?"


Call = Callable[..., Result]


@dataclass
class Stocked:
    """A store that was filled through the command line. A copy for each test that changes it."""

    docs: Path
    store: Path
    first: Result


@pytest.fixture(scope="module")
def make_tiny(smollm2_path: Path) -> Any:
    """Makes an engine over one tiny random model with a context of 1024 tokens, with KV files in a given folder."""
    from transformers import AutoTokenizer

    from lmcache_rag.engines.embedded import EmbeddedEngine
    from lmcache_rag.engines.hf_model import HFModel

    weights = tiny_model("llama", max_position_embeddings=1024)
    model = HFModel.wrap(weights, AutoTokenizer.from_pretrained(smollm2_path, local_files_only=True))
    return lambda folder: EmbeddedEngine.from_model(model, name="tiny", revision="1", kv_dir=folder)


@pytest.fixture(scope="module")
def stocked(call: Call, tmp_path_factory: pytest.TempPathFactory) -> Stocked:
    """Three documents, a copy of one of them, and one that cannot be read."""
    docs = tmp_path_factory.mktemp("docs")
    for name, text in TEXTS.items():
        (docs / name).write_text(text, encoding="utf-8")
    (docs / "more").mkdir()
    shutil.copy(docs / "cache.txt", docs / "more" / "copy.txt")
    (docs / "broken.txt").write_bytes(b"\0\1\2\3" * 100)
    store = tmp_path_factory.mktemp("stores") / "store"
    return Stocked(docs, store, call("ingest", docs, "--store", store, "--json"))


@pytest.fixture
def copy(stocked: Stocked, tmp_path: Path) -> Path:
    """A copy of the filled store."""
    return Path(shutil.copytree(stocked.store, tmp_path / "copy"))


def document(result: Result) -> Any:
    """The one JSON document that stdout must be."""
    return json.loads(result.stdout)


def kv_files(store: Path) -> list[Path]:
    return sorted(store.glob("kv/*/*/*.safetensors"))


@pytest.fixture(scope="module")
def call(make_tiny: Any, embedder: Any) -> Call:
    """Runs one command line in this process, with the model and embedder that are loaded already."""
    from lmcache_rag.workspace import Workspace

    def open_workspace(settings: Settings, *, create: bool) -> Workspace:
        return Workspace(settings, create=create, engine=make_tiny(settings.store / "kv"), embedder=embedder)

    runner = CliRunner(env={n: None for n in os.environ if n.startswith("LMCACHE_RAG_")} | {"COLUMNS": "80"})

    services = cli_run.Services(open_workspace=open_workspace)

    def run(*arguments: object, stdin: str | None = None, **env: str) -> Result:
        return runner.invoke(app, [str(a) for a in arguments], input=stdin, env=env, obj=services)

    return run
