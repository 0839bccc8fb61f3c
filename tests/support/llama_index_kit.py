"""What the tests of the LlamaIndex integration share: an embed model, texts, workspaces, and ears for events."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fake_vllm import MODEL
from framework_kit import tiny_llama
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.llms.openai_like import OpenAILike
from lmcache_rag.integrations.llama_index import LMCacheVectorStore

from lmcache_rag import Workspace
from lmcache_rag.engines.base import kv_key
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.engines.hf_model import HFModel

_SIZE = 32


class WordEmbedding(BaseEmbedding):
    """Vectors of hashed words: texts with words in common are near each other. Needs no model, and can be pickled."""

    def _get_text_embedding(self, text: str) -> list[float]:
        vector = np.full(_SIZE, 0.01)
        for word in text.lower().split():
            vector[int(hashlib.md5(word.strip(".,?!:;").encode(errors="replace")).hexdigest(), 16) % _SIZE] += 1.0
        return [float(value) for value in vector / np.linalg.norm(vector)]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


EMBED = WordEmbedding(model_name="words")


def tiny_engine(folder: Path, tokenizer: Any) -> EmbeddedEngine:
    """A tiny random model; the same in all tests."""
    return EmbeddedEngine.from_model(HFModel.wrap(tiny_llama(), tokenizer), name="tiny", revision="0", kv_dir=folder)


def client(running: Any, **options: Any) -> OpenAILike:
    """A user's LLM object for a server."""
    facts = {"api_base": f"{running.url}/v1", "api_key": "k", "model": MODEL, "temperature": 0.0, "max_tokens": 4}
    return OpenAILike(**(facts | {"max_retries": 0} | options))


def tiny_workspace(folder: Path, engine: Any) -> Workspace:
    """A workspace over an engine that answers in a few tokens."""
    return Workspace.open(folder / "store", engine=engine, max_tokens=4)


def node(text: str, ref: str | None = None, *, name: str | None = None, **metadata: Any) -> TextNode:
    """A node with its embedding."""
    made = TextNode(text=text, metadata=metadata, embedding=EMBED.get_text_embedding(text))
    if name is not None:
        made.id_ = name
    if ref is not None:
        made.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=ref)
    return made


def index_over(store: LMCacheVectorStore, texts: Sequence[str] = ()) -> VectorStoreIndex:
    """An index of these texts."""
    documents = [Document(text=text, id_=f"d{i}", metadata={"number": i}) for i, text in enumerate(texts)]
    context = StorageContext.from_defaults(vector_store=store)
    return VectorStoreIndex.from_documents(documents, storage_context=context, embed_model=EMBED)


def kv_keys(folder: Path, workspace: Workspace) -> set[str]:
    """Names of the chunk KV files that an embedded engine has in its folder."""
    prefix = kv_key(workspace.prompts.fingerprint, ())
    return {path.stem for path in folder.rglob("*.safetensors")} - {prefix}


def wanted_keys(workspace: Workspace, texts: Iterable[str]) -> set[str]:
    """Names of the KV of these texts."""
    return {workspace.prompts.chunk_key(text) for text in texts}


class _Ears(BaseEventHandler):
    heard: list[Any]

    @classmethod
    def class_name(cls) -> str:
        return "Ears"

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.heard.append(event)


@contextmanager
def events() -> Iterator[list[Any]]:
    """The dispatcher's events."""
    ears, root = _Ears(heard=[]), get_dispatcher()
    root.add_event_handler(ears)
    try:
        yield ears.heard
    finally:
        root.event_handlers.remove(ears)
