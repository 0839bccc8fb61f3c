"""Everything over one store, with a tiny model and the real embedder; conftest.py takes the fixtures in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models import tiny_model

from lmcache_rag.documents import Document, Splitter
from lmcache_rag.engines.base import BlendOptions, Sampling
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.ingest import Ingestor
from lmcache_rag.kv_manager import Maintainer
from lmcache_rag.prompt import PromptBuilder
from lmcache_rag.rag import RAG
from lmcache_rag.store import Store


class Parts:
    """A store with all that works on it. `seed` makes another model."""

    def __init__(self, folder: Path, tokenizer: Any, embedder: Any, *, seed: int = 0, chunk_tokens: int = 64) -> None:
        self.store = Store.open(folder)
        self.model = HFModel.wrap(tiny_model("llama", seed=seed), tokenizer)
        self.engine = EmbeddedEngine.from_model(self.model, name="tiny", revision=str(seed), kv_dir=self.store.kv_dir)
        self.prompts = PromptBuilder(tokenizer, self.engine.info)
        splitter = Splitter(self.prompts.encode, chunk_tokens=chunk_tokens)
        self.ingestor = Ingestor(self.store, self.engine, embedder, self.prompts, splitter)
        blend = BlendOptions(ratio=0.15)  # of prompts as short as these `auto` recomputes everything
        options: Any = {"top_k": 3, "sampling": Sampling(max_tokens=4), "blend": blend}
        self.rag = RAG(self.store, self.engine, embedder, self.prompts, **options)
        self.maintainer = Maintainer(self.store, self.engine, self.prompts)

    def kv_file(self, text: str) -> Path:
        """Where the chunk's KV is."""
        return kv_file(self.store.kv_dir, self.prompts.chunk_key(text))


def kv_file(folder: Path, key: str) -> Path:
    """The one KV file of that name."""
    (path,) = folder.rglob(f"{key}.safetensors")
    return path


def document(name: str, text: str) -> Document:
    """A document of that text."""
    return Document(doc_id=name, text=text, content_hash=hashlib.sha256(text.encode()).hexdigest(), source=name)


@pytest.fixture
def parts(tmp_path: Path, tokenizer: Any, embedder: Any) -> Iterator[Parts]:
    """An empty store and all that works on it."""
    made = Parts(tmp_path / "store", tokenizer, embedder)
    yield made
    made.store.close()


@pytest.fixture
def documents(sentences: list[str]) -> list[Document]:
    """Four documents of three paragraphs."""
    return [
        document(f"d{i}", "\n\n".join(" ".join(sentences[6 * i + 2 * j :][:2]) for j in range(3))) for i in range(4)
    ]
