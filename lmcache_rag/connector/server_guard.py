"""Runs inside LMCache's server, by its option --server-module: KV that nobody waits for any more is not written.

A worker waits for a load for some seconds; then it computes the tokens itself, into the same blocks of vLLM's cache. A
server that was busy or stopped meanwhile would still carry the load out, over what was computed since, for whomever.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from lmcache_rag.protocol import UNTIL

MODULE = "lmcache_rag.connector.server_guard"

log = logging.getLogger("lmcache_rag")


def build_server_modules(context: Any) -> None:
    """LMCache's hook: the modules that load KV into vLLM's cache look at the clock first."""
    for module in context.modules:
        for name in ("retrieve", "cb_retrieve_pre_computed"):
            kind = next((kind for kind in type(module).__mro__ if name in vars(kind)), None)
            if kind is not None and not hasattr(vars(kind)[name], "_in_time"):
                setattr(kind, name, _in_time(vars(kind)[name]))


def _in_time(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)  # LMCache's marks on a handler come along
    def guarded(self: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        until = (key.request_configs or {}).get(UNTIL)
        if isinstance(until, float) and time.time() > until:
            log.warning("request %s does not wait for its KV any more: it is not loaded", key.request_id)
            return b"", False
        return load(self, key, *args, **kwargs)

    guarded._in_time = True  # type: ignore[attr-defined]
    return guarded
