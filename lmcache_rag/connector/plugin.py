"""The vLLM general plugin: hooks that a connector does not get. Loaded in every process of vLLM: it must be fast."""

from __future__ import annotations

import logging

from lmcache_rag.connector.secret import draw_secret

log = logging.getLogger("lmcache_rag")


def register() -> None:
    """Remember the worker that loads the model, and add statistics to streams. Never keeps vLLM from starting."""
    _use_vllm_log_handlers()
    draw_secret()
    try:
        from lmcache_rag.connector.vllm_patches import patch_load_model

        patch_load_model()
    except Exception as problem:
        log.warning("KV will not be blended: the lmcache_rag plugin failed: %s", problem)
    try:
        from lmcache_rag.connector.vllm_patches import patch_stream_kv_params

        patch_stream_kv_params()
    except Exception as problem:
        log.warning("Streams will not carry reuse statistics: %s", problem)


def _use_vllm_log_handlers() -> None:
    """Give our logger vLLM's handlers and level, unless it is configured already: warnings must be visible."""
    vllm = logging.getLogger("vllm")
    if not log.handlers and vllm.handlers:
        for handler in vllm.handlers:
            log.addHandler(handler)
        log.setLevel(vllm.level)
        log.propagate = False
