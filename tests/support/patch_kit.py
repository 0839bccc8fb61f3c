"""Every patch of vLLM and LMCache that the code has."""

from __future__ import annotations

import importlib

from lmcache_rag.connector.patching import Patch

MODULES = ("vllm_patches", "lmcache_client", "lmcache_transfers", *(
    f"lmcache_server.{name}" for name in ("modules", "eviction", "forget", "http")
))  # fmt: skip


def patches() -> list[Patch]:
    """Every patch, in the order of the code."""
    found: list[Patch] = []
    for name in MODULES:
        for value in vars(importlib.import_module(f"lmcache_rag.connector.{name}")).values():
            found += [each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, Patch)]
    return list(dict.fromkeys(found))
