"""LangChain: a vector store that computes KV, a retriever, and the step of a chain that answers from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmcache_rag.errors import OptionalDependencyError

try:
    from .blend import Blend, blend
    from .doc_store import LMCacheDocStore
    from .faiss_store import FaissStore
    from .prompts import ChunkedPromptValue
    from .retriever import LMCacheRetriever
    from .templates import AgentPrompt
    from .vector_store import LMCacheVectorStore
except ModuleNotFoundError as problem:  # pragma: no cover - only without the framework
    if (problem.name or "").partition(".")[0] not in ("langchain_core", "langsmith"):
        raise
    raise OptionalDependencyError("langchain-core", "langchain") from problem

if TYPE_CHECKING:
    from .middleware import BlendMiddleware

__all__ = [
    "AgentPrompt",
    "Blend",
    "BlendMiddleware",
    "ChunkedPromptValue",
    "FaissStore",
    "LMCacheDocStore",
    "LMCacheRetriever",
    "LMCacheVectorStore",
    "blend",
]


def __getattr__(name: str) -> Any:
    """Import BlendMiddleware when it is first used: it needs the package langchain, which takes a while to import."""
    if name != "BlendMiddleware":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .middleware import BlendMiddleware
    except ModuleNotFoundError as problem:
        if (problem.name or "").partition(".")[0] not in ("langchain", "langgraph"):
            raise
        raise OptionalDependencyError("langchain", "langchain") from problem
    return BlendMiddleware
