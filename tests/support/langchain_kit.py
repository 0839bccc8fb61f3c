"""Parts for the tests of the LangChain integration: an engine over a tiny model, embeddings, servers, a workspace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedded_server_kit import serving
from fake_vllm import MODEL, FakeVLLM
from framework_kit import tiny_llama
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from lmcache_rag.integrations import kv_registry

from lmcache_rag import Workspace
from lmcache_rag.engines.base import kv_key
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_model import HFModel
from lmcache_rag.lazy_fill import cancel

FAKE = DeterministicFakeEmbedding(size=8)
# As of models that call tools: they stand after the system text, answers of tools in a turn of their own.
TEMPLATE = """{%- for m in messages %}{%- if loop.first and m.role != 'system' %}<|im_start|>system
{% if tools %}# Tools
{% for t in tools %}{{ t | tojson }}
{% endfor %}{% endif %}<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} \
{{ c.function.arguments | tojson }}</tool_call>{% endfor %}{% if loop.first and m.role == 'system' and tools %}

# Tools
{% for t in tools %}{{ t | tojson }}
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


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
    model = HFModel.wrap(tiny_llama(), tokenizer)
    return EmbeddedEngine.from_model(model, name="tiny", revision="0", kv_dir=folder / "kv", **options)


@contextmanager
def workspace(tokenizer: Any, folder: Path, **settings: Any) -> Iterator[Workspace]:
    """A workspace over a tiny model."""
    engine = tiny_engine(tokenizer, folder)
    with Workspace.open(folder / "store", engine=engine, **{"max_tokens": 4, **settings}) as made:
        yield made


@contextmanager
def server(tokenizer: Any, folder: Path, **options: Any) -> Iterator[FakeVLLM]:
    """A vLLM-like server over a tiny model."""
    with serving(tiny_engine(tokenizer, folder), **options) as running:
        try:
            yield running
        finally:
            for made in kv_registry._by_server.values():
                cancel(made.engine)  # or its ingestion in the background would look for a server that is gone


def client(kind: Any, running: FakeVLLM, **options: Any) -> Any:
    """A langchain_openai object for that server."""
    facts = {"base_url": f"{running.url}/v1", "api_key": "k", "model": MODEL, "temperature": 0, "max_tokens": 4}
    return kind(**(facts | {"max_retries": 0} | options))


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
