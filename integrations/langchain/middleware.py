"""Middleware for create_agent: what the agent retrieves is answered from KV."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.callbacks import adispatch_custom_event, dispatch_custom_event

from lmcache_rag.engines.base import BlendOptions
from lmcache_rag.lazy_fill import mode_of

from ..blender import Blender
from ..kv_registry import as_workspace
from .agent_call import AgentCall
from .openai import KEY, api_of, bind_request
from .retrieved import RETRIEVED
from .reuse_watch import ReuseWatch

log = logging.getLogger("lmcache_rag")


class BlendMiddleware(AgentMiddleware[Any, Any, Any]):
    """Blends the passages in an agent's messages; messages, tools and structured output stay the agent's own.

    Passages are the Documents that a tool returned as its artifact, and those that searches of an LMCacheVectorStore or
    LMCacheRetriever returned lately, where they stand in a message word for word: in a tool's message, or in a system
    message by `@dynamic_prompt`. The system text and the tools are the prefix. KV of passages is computed for it after
    their first use, or when they are added, with ``LMCacheVectorStore(..., prompts=[AgentPrompt(system, tools)])``.

    Put it last in `middleware`, so that it sees what the others made. The model must be a ChatOpenAI of a vLLM server,
    0.32 or later; another one answers as without this middleware, and a warning says so. Statistics are in the answers'
    ``response_metadata["lmcache_rag"]``, and are sent as the custom event "lmcache_rag".

    Args:
        source: What KV is computed with: as for LMCacheVectorStore. None: the agent's model.
        options: How KV is reused; None: from the settings.
        store: Folder of the registry; None: from the settings.
        lazy_fill: See blend().
        trace: See blend().

    Raises:
        ConfigError: lazy_fill is none of its values; at the first call: the source cannot be used.
    """

    def __init__(
        self,
        source: Any = None,
        *,
        options: BlendOptions | None = None,
        store: str | Path | None = None,
        lazy_fill: str | None = None,
        trace: str | Path | None = None,
    ) -> None:
        super().__init__()
        self._source, self._options, self._folder = source, options, store
        self._lazy_fill, self._trace = lazy_fill and mode_of(lazy_fill), trace
        self._lock = threading.RLock()
        self._watch = ReuseWatch()
        RETRIEVED.expect_blends()
        self._model: Any = None

    @cached_property
    def _blender(self) -> Blender:
        workspace = as_workspace(self._model if self._source is None else self._source, store=self._folder)
        return Blender(workspace, blend=self._options, lazy_fill=self._lazy_fill, trace=self._trace)

    @property
    def blender(self) -> Blender:
        """The builder of the prompts; connects to the engine at first use."""
        with self._lock:
            return self._blender

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Answer a call of the model from KV."""
        call = self._call(request)
        if call is None:
            return handler(request)
        response = handler(request.override(model=bind_request(request.model, call, max_tokens=None)))
        if call.done is not None:
            with contextlib.suppress(RuntimeError):  # outside of a run
                dispatch_custom_event(KEY, call.metadata[KEY])
        return response

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """Async version of wrap_model_call."""
        call = await asyncio.to_thread(self._call, request)  # may connect
        if call is None:
            return await handler(request)
        response = await handler(request.override(model=bind_request(request.model, call, max_tokens=None)))
        if call.done is not None:
            with contextlib.suppress(RuntimeError):
                await adispatch_custom_event(KEY, call.metadata[KEY])
        return response

    def _call(self, request: ModelRequest[Any]) -> AgentCall | None:
        if api_of(request.model) != "chat":
            kind = type(request.model).__name__
            self._watch.cannot(f"the agent's model is a {kind}. Use ChatOpenAI with the URL of a vLLM server.")
            return None
        with self._lock:
            self._model = self._model or request.model
        blender = self.blender
        return AgentCall.of(blender, request.messages, blender.blend, self._watch)
