"""Parts for the tests of the LangChain integration: an engine over a tiny model, embeddings, servers, a workspace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from embedded_server_kit import MODEL, EmbeddedVLLM, serving
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from models import tiny_model

from lmcache_rag import Workspace
from lmcache_rag.adapters import resolve
from lmcache_rag.engines import vllm_tokenizer
from lmcache_rag.engines.base import kv_key
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.engines.vllm_tokenizer import open_tokenizer
from lmcache_rag.sources import find_model

_models: list[Any] = []
FAKE = DeterministicFakeEmbedding(size=8)


class Real(Embeddings):
    """The sentence-transformers embedder as LangChain's embeddings."""

    model = "all-MiniLM-L6-v2"

    def __init__(self, embedder: Any) -> None:
        self._embedder = embedder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self._embedder.embed_documents(texts).tolist()  # type: ignore[no-any-return]

    def embed_query(self, text: str) -> list[float]:
        return self._embedder.embed_query(text).tolist()  # type: ignore[no-any-return]


def tiny_engine(tokenizer: Any, folder: Path, **options: Any) -> EmbeddedEngine:
    """A tiny random model."""
    if not _models:  # one for all tests: it takes longer to make than to use
        _models.append(tiny_model("llama"))
    model = HFModel.wrap(_models[0], tokenizer)
    return EmbeddedEngine.from_model(model, name="tiny", revision="0", kv_dir=folder / "kv", **options)


@contextmanager
def workspace(tokenizer: Any, folder: Path, **settings: Any) -> Iterator[Workspace]:
    """A workspace over a tiny model."""
    engine = tiny_engine(tokenizer, folder)
    with Workspace.open(folder / "store", engine=engine, **{"max_tokens": 4, **settings}) as made:
        yield made


@contextmanager
def server(tokenizer: Any, folder: Path, **options: Any) -> Iterator[EmbeddedVLLM]:
    """A vLLM-like server over a tiny model."""
    with serving(tiny_engine(tokenizer, folder), **options) as running:
        yield running


def client(kind: Any, running: EmbeddedVLLM, **options: Any) -> Any:
    """A langchain_openai object for that server."""
    facts = {"base_url": f"{running.url}/v1", "api_key": "k", "model": MODEL, "temperature": 0, "max_tokens": 4}
    return kind(**(facts | {"max_retries": 0} | options))


def passages(sentences: list[str], count: int = 6, *, long: int = 5) -> list[str]:
    """Passages of real text, each longer than a block of 64 tokens."""
    return [" ".join(sentences[i * long : (i + 1) * long]) for i in range(count)]


def fresh(monkeypatch: Any, folder: Path) -> None:
    """No workspace of an earlier test, whose server may have had the same port; a registry of its own."""
    monkeypatch.setattr(vllm_tokenizer, "open_tokenizer", _opened)  # it takes a second each time
    monkeypatch.setattr(resolve, "_by_server", {})
    monkeypatch.setenv("LMCACHE_RAG_STORE", str(folder / "registry"))


@cache
def _opened(path: Path) -> Any:
    return open_tokenizer(path)


def light_tokenizer() -> Any:
    """SmolLM2's tokenizer without its weights."""
    return _opened(find_model().path)


def registered(made: Workspace) -> set[str]:
    """Texts of all chunks that the registry says exist."""
    return {chunk.text for chunk in made.store.registry.chunks()}


def kv_texts(made: Workspace, texts: set[str]) -> set[str]:
    """Those of the texts whose KV the engine has."""
    known = sorted(texts)
    absent = made.engine.missing([made.prompts.ingest(text) for text in known])
    return {text for text, gone in zip(known, absent, strict=True) if not gone}


def kv_files(made: Workspace, folder: Path) -> set[str]:
    """Keys of the chunks' KV files in a folder, without the prefix's own."""
    return {path.stem for path in folder.rglob("*.safetensors")} - {kv_key(made.prompts.fingerprint, ())}


class Seen(BaseCallbackHandler):
    """Notes the events of a run."""

    run_inline = True

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.tokens: list[str] = []
        self.results: list[Any] = []
        self.metadata: list[dict[str, Any]] = []

    def on_custom_event(self, name: str, data: Any, **_: Any) -> None:
        self.events.append((name, data))

    def on_llm_new_token(self, token: str, **_: Any) -> None:
        self.tokens.append(token)

    def on_llm_start(self, *_: Any, metadata: dict[str, Any] | None = None, **__: Any) -> None:
        self.metadata.append(metadata or {})

    def on_chat_model_start(self, *_: Any, metadata: dict[str, Any] | None = None, **__: Any) -> None:
        self.metadata.append(metadata or {})

    def on_llm_end(self, response: Any, **_: Any) -> None:
        self.results.append(response)
