"""Finds the weights of models and embedders.

In this order: a folder that the user names; the Hugging Face cache or hub; a package that contains weights. Nothing
hangs without network: the hub is probed first, for a few seconds at most. A package's weights are
verified, prepared once and then used at once, without network, as long as the Hugging Face cache has no copy.
"""

from __future__ import annotations

from lmcache_rag.weights.find import (
    DEFAULT_EMBEDDER,
    DEFAULT_MODEL,
    Source,
    choose_model,
    content_digest,
    find_embedder,
    find_model,
    find_recorded,
    find_tokenizer,
    kv_bytes_per_token,
    locate,
    revision_of,
    tokenizer_digest,
)
from lmcache_rag.weights.packages import cache_folder

__all__ = [
    "DEFAULT_EMBEDDER",
    "DEFAULT_MODEL",
    "Source",
    "cache_folder",
    "choose_model",
    "content_digest",
    "find_embedder",
    "find_model",
    "find_recorded",
    "find_tokenizer",
    "kv_bytes_per_token",
    "locate",
    "revision_of",
    "tokenizer_digest",
]
