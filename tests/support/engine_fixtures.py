"""Fixtures around the embedded engine and the real model; conftest.py takes them in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[2] / "examples" / "data"


@pytest.fixture(scope="session")
def hf_model(smollm2_path: Path) -> Any:
    """SmolLM2-135M in float32, loaded once for the whole run."""
    from lmcache_rag.engines.hf_model import HFModel

    model = HFModel.open(smollm2_path, device="cpu", dtype="float32")
    assert model.model is not None
    return model


@pytest.fixture(scope="session")
def tokenizer(hf_model: Any) -> Any:
    """SmolLM2's tokenizer."""
    return hf_model.tokenizer


@pytest.fixture(scope="session")
def make_engine(hf_model: Any, smollm2_path: Path) -> Any:
    """Makes an engine over the one loaded model, with KV files in a given folder."""
    from lmcache_rag.engines.embedded import EmbeddedEngine
    from lmcache_rag.weights import revision_of

    def make(folder: Path, **options: Any) -> EmbeddedEngine:
        facts = {"name": "smollm2", "revision": revision_of(smollm2_path)} | options
        return EmbeddedEngine.from_model(hf_model, kv_dir=folder, **facts)

    return make


@pytest.fixture(scope="session")
def smollm2_engine(make_engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One engine for tests that only add KV."""
    engine = make_engine(tmp_path_factory.mktemp("kv"))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def smollm2_plain(smollm2_path: Path) -> Any:
    """The same weights as transformers loads them, untouched by us: what is right."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """Real English sentences from the sample documents, always the same."""
    text = " ".join(path.read_text() for path in sorted(DATA.rglob("*.txt")))
    return [s for s in re.split(r"(?<=[.!?])\s+", text) if 30 < len(s) < 300]


@pytest.fixture
def corpus(sentences: list[str]) -> list[str]:
    """Six chunks of real text."""
    return [" ".join(sentences[i : i + 2]) for i in range(0, 12, 2)]


@pytest.fixture
def tiny(tokenizer: Any, tmp_path: Path) -> Any:
    """An engine over a tiny random model, with its KV files in tmp_path."""
    from models import tiny_model

    from lmcache_rag.engines.embedded import EmbeddedEngine
    from lmcache_rag.engines.hf_model import HFModel

    model = HFModel.wrap(tiny_model("llama"), tokenizer)
    return EmbeddedEngine.from_model(model, name="tiny", revision="0", kv_dir=tmp_path)
