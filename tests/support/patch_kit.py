"""Every patch of vLLM and LMCache that the code has."""

from __future__ import annotations

import importlib
import warnings

from lmcache_rag.connector.patching import Patch

MODULES = ("vllm_patches", "lmcache_client", "lmcache_transfers", *(
    f"lmcache_server.{name}" for name in ("fleet", "modules", "removal", "reports", "tier_check")
))  # fmt: skip


def patches() -> list[Patch]:
    """Every patch, in the order of the code."""
    found: list[Patch] = []
    for name in MODULES:
        with warnings.catch_warnings():  # of vLLM's and LMCache's own imports
            warnings.simplefilter("ignore")
            module = importlib.import_module(f"lmcache_rag.connector.{name}")
        for value in vars(module).values():
            found += [each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, Patch)]
    return list(dict.fromkeys(found))
