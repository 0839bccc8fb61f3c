"""RAG with a several times lower TTFT: the KV caches of chunks are computed once and blended in any order.

The usual start::

    from lmcache_rag import Workspace

    with Workspace.open("my-store") as ws:
        ws.ingestor.ingest(["docs/"])
        print(ws.rag.ask("What is a KV cache?").text)

Everything listed here is loaded when it is first used, so that importing the package takes no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "lmcache_rag.documents": ("Chunk", "Document", "Splitter"),
    "lmcache_rag.engines.base": (
        "BlendOptions",
        "Completion",
        "Engine",
        "EngineInfo",
        "ReuseStats",
        "Sampling",
        "TextDelta",
    ),
    "lmcache_rag.engines.embedded": ("EmbeddedEngine",),
    "lmcache_rag.engines.vllm": ("VLLMEngine",),
    "lmcache_rag.errors": ("LMCacheRAGError",),
    "lmcache_rag.ingest": ("Ingestor", "IngestReport"),
    "lmcache_rag.prompt": ("PromptBuilder", "PromptFormat", "Turn"),
    "lmcache_rag.rag": ("RAG", "Answer"),
    "lmcache_rag.settings": ("Settings",),
    "lmcache_rag.workspace": ("Workspace",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from lmcache_rag.documents import Chunk, Document, Splitter
    from lmcache_rag.engines.base import (
        BlendOptions,
        Completion,
        Engine,
        EngineInfo,
        ReuseStats,
        Sampling,
        TextDelta,
    )
    from lmcache_rag.engines.embedded import EmbeddedEngine
    from lmcache_rag.engines.vllm import VLLMEngine
    from lmcache_rag.errors import LMCacheRAGError
    from lmcache_rag.ingest import Ingestor, IngestReport
    from lmcache_rag.prompt import PromptBuilder, PromptFormat, Turn
    from lmcache_rag.rag import RAG, Answer
    from lmcache_rag.settings import Settings
    from lmcache_rag.workspace import Workspace

__all__ = [
    "RAG",
    "Answer",
    "BlendOptions",
    "Chunk",
    "Completion",
    "Document",
    "EmbeddedEngine",
    "Engine",
    "EngineInfo",
    "IngestReport",
    "Ingestor",
    "LMCacheRAGError",
    "PromptBuilder",
    "PromptFormat",
    "ReuseStats",
    "Sampling",
    "Settings",
    "Splitter",
    "TextDelta",
    "Turn",
    "VLLMEngine",
    "Workspace",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if home := _HOME_OF.get(name):
        from importlib import import_module

        return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
