"""The vLLM general plugin: what a connector is not given. Loaded in every process of vLLM, so it must cost nothing."""

from __future__ import annotations

import logging

log = logging.getLogger("lmcache_rag")


def register() -> None:
    """Remember the worker that loads the model. Never keeps vLLM from starting."""
    try:
        from lmcache_rag.connector.compat_vllm import remember_workers

        remember_workers()
    except Exception as problem:
        log.warning("KV is not going to be blended: the lmcache_rag plugin failed: %s", problem)
