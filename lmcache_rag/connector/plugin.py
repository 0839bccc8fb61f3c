"""The vLLM general plugin: what a connector is not given. Loaded in every process of vLLM, so it must cost nothing."""

from __future__ import annotations

import logging

from lmcache_rag.connector.secret import draw_secret

log = logging.getLogger("lmcache_rag")


def register() -> None:
    """Remember the worker that loads the model, and have streams tell. Never keeps vLLM from starting."""
    _speak_as_vllm_does()
    draw_secret()
    try:
        from lmcache_rag.connector.vllm_patches import patch_load_model

        patch_load_model()
    except Exception as problem:
        log.warning("KV is not going to be blended: the lmcache_rag plugin failed: %s", problem)
    try:
        from lmcache_rag.connector.vllm_patches import patch_stream_kv_params

        patch_stream_kv_params()
    except Exception as problem:
        log.warning("Streams are not going to carry reuse statistics: %s", problem)


def _speak_as_vllm_does() -> None:
    """Give our logger vLLM's handlers and level, unless somebody has set it up: a warning must not go unseen."""
    vllm = logging.getLogger("vllm")
    if not log.handlers and vllm.handlers:
        for handler in vllm.handlers:
            log.addHandler(handler)
        log.setLevel(vllm.level)
        log.propagate = False
