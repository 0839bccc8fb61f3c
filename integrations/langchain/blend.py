"""The step of a chain that answers from blended KV: documents and a question go in, the model's answer comes out."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from langchain_core.callbacks import adispatch_custom_event, dispatch_custom_event
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig
from langchain_core.runnables.config import merge_configs, patch_config

from lmcache_rag.engines.base import BlendOptions
from lmcache_rag.errors import ConfigError
from lmcache_rag.lazy_fill import mode_of

from ..blender import Blender, BlendPrompt
from ..kv_registry import as_workspace
from .chat_model import EngineModel
from .openai import KEY, BlendCall, api_of, bind_request, chat_body
from .prompts import ChunkedPromptValue, parse_input, prompt_value
from .spaces import refuse_pickling

if TYPE_CHECKING:
    from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun

log = logging.getLogger("lmcache_rag")

# Tracers ignore metadata that is added to a run later, unless the run began with some.
_RUN_METADATA: RunnableConfig = {"metadata": {KEY: "blend"}}
_BLEND_OPTIONS = frozenset(BlendOptions.__dataclass_fields__)
_UNSUPPORTED = {"tools": "tools", "functions": "tools", "response_format": "structured output"}
_NOT_BLENDED = (
    "This vLLM's chat completions take no token ids (0.32 and later do), and its chat template gives other ids than "
    "the passages were ingested with: prompts are computed in full. Use a newer vLLM, or langchain_openai's OpenAI, "
    "which uses the completions API."
)


@dataclass(frozen=True)
class _Prepared:
    call: BlendCall
    value: ChunkedPromptValue
    model: Runnable[Any, Any]
    kwargs: dict[str, Any]


class Blend(Runnable[dict[str, Any], Any]):
    """See blend(). Safe to use from several threads and event loops."""

    def __init__(
        self,
        source: Any,
        *,
        blend: BlendOptions | None,
        store: str | Path | None,
        lazy_fill: str | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name
        self._bound: dict[str, Any] = {}
        self._config: RunnableConfig | None = None
        while isinstance(source, RunnableBinding):
            self._bound = {**source.kwargs, **self._bound}
            self._config = {**source.config, **(self._config or {})}
            source = source.bound
        self._source, self._options, self._folder = source, blend, store
        self._lazy_fill = lazy_fill and mode_of(lazy_fill)
        self._lock = threading.RLock()
        self._logged: set[str] = set()

    @cached_property
    def _blender(self) -> Blender:
        workspace = as_workspace(self._source, store=self._folder)
        return Blender(workspace, blend=self._options, lazy_fill=self._lazy_fill)

    @property
    def blender(self) -> Blender:
        """The builder of the prompts; connects to the engine at first use."""
        with self._lock:
            return self._blender

    def __getstate__(self) -> NoReturn:
        raise refuse_pickling(self)

    # -- LangChain's interface ------------------------------------------------------------------------------------

    def invoke(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Return the whole answer: an AIMessage, or a text from a completions model."""
        return self._call_with_config(
            self._invoke, input, merge_configs(_RUN_METADATA, config), run_type="chain", **kwargs
        )

    async def ainvoke(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Async version of invoke."""
        return await self._acall_with_config(
            self._ainvoke, input, merge_configs(_RUN_METADATA, config), run_type="chain", **kwargs
        )

    def stream(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """The answer piece by piece."""
        yield from self.transform(iter([input]), config, **kwargs)

    async def astream(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """Async version of stream."""

        async def once() -> AsyncIterator[dict[str, Any]]:
            yield input

        async for piece in self.atransform(once(), config, **kwargs):
            yield piece

    def transform(
        self, input: Iterator[dict[str, Any]], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[Any]:
        """Answer after the whole input has come."""
        config = merge_configs(_RUN_METADATA, config)
        yield from self._transform_stream_with_config(input, self._transform, config, run_type="chain", **kwargs)

    async def atransform(
        self, input: AsyncIterator[dict[str, Any]], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """Async version of transform."""
        config = merge_configs(_RUN_METADATA, config)
        pieces = self._atransform_stream_with_config(input, self._atransform, config, run_type="chain", **kwargs)
        async for piece in pieces:
            yield piece

    # -- the work -------------------------------------------------------------------------------------------------

    def _invoke(
        self, value: Any, run_manager: CallbackManagerForChainRun, config: RunnableConfig, **kwargs: Any
    ) -> Any:
        ready, inner = self._prepare(value, config, kwargs), self._inner(config, run_manager)
        output = ready.model.invoke(ready.value, inner, **ready.kwargs)
        self._report(ready, inner, run_manager)
        return output

    async def _ainvoke(
        self, value: Any, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig, **kwargs: Any
    ) -> Any:
        ready, inner = await self._aprepare(value, config, kwargs), self._inner(config, run_manager)
        output = await ready.model.ainvoke(ready.value, inner, **ready.kwargs)
        await self._areport(ready, inner, run_manager)
        return output

    def _transform(
        self,
        parts: Iterator[Any],
        run_manager: CallbackManagerForChainRun,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> Iterator[Any]:
        whole: Any = None
        for part in parts:
            whole = _sum(whole, part)
        ready, inner = self._prepare(whole, config, kwargs), self._inner(config, run_manager)
        yield from ready.model.stream(ready.value, inner, **ready.kwargs)
        self._report(ready, inner, run_manager)

    async def _atransform(
        self,
        parts: AsyncIterator[Any],
        run_manager: AsyncCallbackManagerForChainRun,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        whole: Any = None
        async for part in parts:
            whole = _sum(whole, part)
        ready, inner = await self._aprepare(whole, config, kwargs), self._inner(config, run_manager)
        async for piece in ready.model.astream(ready.value, inner, **ready.kwargs):
            yield piece
        await self._areport(ready, inner, run_manager)

    def _prepare(self, value: Any, config: RunnableConfig, kwargs: dict[str, Any]) -> _Prepared:
        parsed, blender = parse_input(value), self.blender
        options, kwargs = self._split({**self._bound, **kwargs}, config, blender)
        api = api_of(self._source)
        own = kwargs.get("max_tokens", getattr(self._source, "max_tokens", None) if api else None)
        limit = own if isinstance(own, int) and own > 0 else None  # -1: up to the context's end
        prompt = blender.build_prompt(
            parsed.texts, parsed.question, history=parsed.history, scores=parsed.scores, max_tokens=limit
        )
        self._warn_unregistered(prompt)
        shown = prompt_value(blender.prompts, blender.engine.tokenizer, prompt, parsed.history)
        call = BlendCall(blender, prompt, options)
        if api is None:
            return _Prepared(call, shown, EngineModel(call=call), kwargs)
        for name, what in _UNSUPPORTED.items():
            if kwargs.get(name):
                raise ConfigError(
                    f"The model is bound to {what}, which a blended prompt cannot carry.",
                    remedy=f"Give blend() the model without {what}, and use {what} in another step of the chain.",
                )
        if api == "completions":
            call.body = blender.request(prompt, blend=options)
        else:
            call.body, same = chat_body(call, shown)
            if not same and self._first("chat"):
                log.warning(_NOT_BLENDED)
        left = max(1, blender.engine.info.context_length - len(prompt.prompt))
        if own is not None:
            kwargs.pop("max_tokens", None)
        model = bind_request(self._source, call, max_tokens=None if own is None else min(limit or left, left))
        return _Prepared(call, shown, model, kwargs)

    async def _aprepare(self, value: Any, config: RunnableConfig, kwargs: dict[str, Any]) -> _Prepared:
        return await asyncio.to_thread(self._prepare, value, config, kwargs)  # may connect, and tokenizes

    def _split(
        self, kwargs: dict[str, Any], config: RunnableConfig, blender: Blender
    ) -> tuple[BlendOptions, dict[str, Any]]:
        """Return how this call reuses KV, and the keywords that the model gets."""
        wanted = {name: kwargs.pop(name) for name in _BLEND_OPTIONS & kwargs.keys()}
        options = (config.get("configurable") or {}).get(KEY) or {}
        if not isinstance(options, Mapping) or set(options) - _BLEND_OPTIONS:
            raise ConfigError(
                f"configurable[{KEY!r}] is {options!r}.", remedy=f"It takes {', '.join(sorted(_BLEND_OPTIONS))}."
            )
        return replace(blender.blend, **{**options, **wanted}), kwargs

    def _inner(
        self, config: RunnableConfig, run_manager: CallbackManagerForChainRun | AsyncCallbackManagerForChainRun
    ) -> RunnableConfig:
        return patch_config(merge_configs(self._config, config), callbacks=run_manager.get_child())

    def _warn_unregistered(self, prompt: BlendPrompt) -> None:
        """Warn once of texts that were changed after retrieval."""
        unregistered = [text for text, known in zip(prompt.texts, prompt.registered, strict=True) if not known]
        if unregistered and self._first("unregistered"):
            log.warning(
                "%d of %d passages are not registered, so they have no KV before the first question about them. %s A "
                "step after the retriever changed their text, or they never went through LMCacheVectorStore (texts of "
                "a docstore, as ParentDocumentRetriever returns them: LMCacheDocStore). The first begins %r.",
                len(unregistered),
                len(prompt.texts),
                self.blender.unregistered_note,
                unregistered[0][:60],
            )

    def _first(self, message: str) -> bool:
        """Return whether this message has not been logged before."""
        with self._lock:
            new = message not in self._logged
            self._logged.add(message)
        return new

    def _report(self, ready: _Prepared, config: RunnableConfig, run_manager: CallbackManagerForChainRun) -> None:
        if ready.call.done is not None:
            run_manager.metadata.update(ready.call.run_metadata)  # a tracer keeps this dict until the run ends
            dispatch_custom_event(KEY, ready.call.metadata[KEY], config=config)

    async def _areport(
        self, ready: _Prepared, config: RunnableConfig, run_manager: AsyncCallbackManagerForChainRun
    ) -> None:
        if ready.call.done is not None:
            run_manager.metadata.update(ready.call.run_metadata)
            await adispatch_custom_event(KEY, ready.call.metadata[KEY], config=config)


def blend(
    llm: Any,
    *,
    options: BlendOptions | None = None,
    store: str | Path | None = None,
    lazy_fill: str | None = None,
) -> Blend:
    """A Runnable that answers from the KV of documents, through the program's own model.

    It takes ``{"documents": [...], "question": "..."}`` and perhaps ``"history"``, and returns what the model returns:
    an AIMessage, or a text from a completions model. invoke, stream, batch, their async versions and astream_events
    work as for any Runnable; the prompt is built here, and replaces the chain's prompt template.

    Reuse statistics are in ``response_metadata["lmcache_rag"]`` (chat) and in the generation's info, and are sent as
    the custom event "lmcache_rag".

    Per call: ``config={"configurable": {"lmcache_rag": {"enabled": False}}}`` computes the prompt in full; `policy` and
    `ratio` likewise. Other keywords (`stop`, `temperature`, …) go to the model.

    Args:
        llm: A langchain_openai OpenAI or ChatOpenAI (also bound to keywords), a vLLM server's URL, an engine, or a
            Workspace.
        options: How KV is reused; None: from the settings.
        store: Folder of the registry; None: from the settings.
        lazy_fill: At which use a passage without KV is ingested, in the background after the answer: "first",
            "second" or "never"; None: from the settings (LMCACHE_RAG_LAZY_FILL, or "second").

    Raises:
        ConfigError: lazy_fill is none of these; at the first question: the model cannot be used.
    """
    return Blend(llm, blend=options, store=store, lazy_fill=lazy_fill, name="LMCacheBlend")


def _sum(whole: Any, part: Any) -> Any:
    if whole is None:
        return part
    try:
        return whole + part
    except TypeError:
        return {**whole, **part} if isinstance(whole, Mapping) and isinstance(part, Mapping) else part
