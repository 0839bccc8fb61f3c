"""LangChain: the store's chunks as a retriever."""

from __future__ import annotations

from lmcache_rag.errors import OptionalDependencyError

try:
    from .retriever import LMCacheRetriever
except ModuleNotFoundError as problem:  # pragma: no cover - only without the framework
    raise OptionalDependencyError("langchain-core", "langchain") from problem

__all__ = ["LMCacheRetriever"]
