"""LangChain: a vector store that computes KV, a retriever, and the step of a chain that answers from it."""

from __future__ import annotations

from lmcache_rag.errors import OptionalDependencyError

try:
    from .blend import Blend, blend
    from .doc_store import LMCacheDocStore
    from .faiss_store import FaissStore
    from .prompts import ChunkedPromptValue
    from .retriever import LMCacheRetriever
    from .vector_store import LMCacheVectorStore
except ModuleNotFoundError as problem:  # pragma: no cover - only without the framework
    if (problem.name or "").partition(".")[0] not in ("langchain_core", "langsmith"):
        raise
    raise OptionalDependencyError("langchain-core", "langchain") from problem

__all__ = [
    "Blend",
    "ChunkedPromptValue",
    "FaissStore",
    "LMCacheDocStore",
    "LMCacheRetriever",
    "LMCacheVectorStore",
    "blend",
]
