"""LlamaIndex: a vector store that keeps KV, and engines that answer from it.

::

    vector_store = LMCacheVectorStore(None, llm)  # or around any other vector store
    index = VectorStoreIndex.from_documents(documents, StorageContext.from_defaults(vector_store=vector_store))
    query_engine = as_blend_query_engine(index, llm)

`llm` is an OpenAILike object with a vLLM server, the server's URL, an engine or a Workspace.
"""

from __future__ import annotations

from lmcache_rag.errors import OptionalDependencyError

try:
    import llama_index.core  # noqa: F401 - first: an error in our own modules is not a missing package
except ModuleNotFoundError as problem:  # pragma: no cover - only without the framework
    raise OptionalDependencyError("llama-index-core", "llama-index") from problem

from .engines import (
    BlendChatEngine,
    BlendQueryEngine,
    LMCacheRetriever,
    as_blend_chat_engine,
    as_blend_query_engine,
)
from .faiss_store import EmbedderEmbedding, FaissVectorStore
from .llm import EngineLLM
from .prompts import node_text
from .synthesizer import BlendEvent, BlendSynthesizer
from .vector_store import LMCacheVectorStore, blend_storage_context

__all__ = [
    "BlendChatEngine",
    "BlendEvent",
    "BlendQueryEngine",
    "BlendSynthesizer",
    "EmbedderEmbedding",
    "EngineLLM",
    "FaissVectorStore",
    "LMCacheRetriever",
    "LMCacheVectorStore",
    "as_blend_chat_engine",
    "as_blend_query_engine",
    "blend_storage_context",
    "node_text",
]
