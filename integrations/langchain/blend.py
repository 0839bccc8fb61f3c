"""The step of a chain that answers from blended KV: documents and a question in, the model's answer out."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import adispatch_custom_event, dispatch_custom_event
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig
from langchain_core.runnables.config import merge_configs, patch_config

from lmcache_rag.engines.base import BlendOptions
from lmcache_rag.errors import ConfigError
from lmcache_rag.lazy_fill import mode_of

from ..blender import Blender, Prompted
from ..resolve import as_workspace
from .call import KEY, Call
from .chat_model import EngineModel
from .chat_text import chat_body
from .inputs import asked_of
from .openai import for_call, kind_of
from .prompts import ChunkedPromptValue, prompt_value

if TYPE_CHECKING:
    from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun

log = logging.getLogger("lmcache_rag")

# A run that begins without metadata cannot be given any later, when the statistics are there.
_MARK: RunnableConfig = {"metadata": {KEY: "blend"}}
_OURS = frozenset(BlendOptions.__dataclass_fields__)
_NOT_OURS = {"tools": "tools", "functions": "tools", "response_format": "structured output"}
_OTHER_IDS = (
    "This vLLM's chat completions take no token ids (0.32 and later do), and its chat template gives others than the "
    "passages were ingested with: prompts are computed in full. Use a newer vLLM, or langchain_openai's OpenAI, which "
    "asks the completions API."
)


@dataclass(frozen=True)
class _Prepared:
    call: Call
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
        self._told: set[str] = set()

    @cached_property
    def _blender(self) -> Blender:
        workspace = as_workspace(self._source, store=self._folder)
        return Blender(workspace, blend=self._options, lazy_fill=self._lazy_fill)

    @property
    def blender(self) -> Blender:
        """Makes the prompts; connects to the engine when it is first needed."""
        with self._lock:
            return self._blender

    # -- LangChain's interface --------------------------------------------------------------------------------------

    def invoke(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """The whole answer: an AIMessage, or a text from a completions model."""
        return self._call_with_config(self._invoke, input, merge_configs(_MARK, config), run_type="chain", **kwargs)

    async def ainvoke(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Async twin of invoke."""
        return await self._acall_with_config(
            self._ainvoke, input, merge_configs(_MARK, config), run_type="chain", **kwargs
        )

    def stream(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """The answer piece by piece."""
        yield from self.transform(iter([input]), config, **kwargs)

    async def astream(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """Async twin of stream."""

        async def once() -> AsyncIterator[dict[str, Any]]:
            yield input

        async for piece in self.atransform(once(), config, **kwargs):
            yield piece

    def transform(
        self, input: Iterator[dict[str, Any]], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[Any]:
        """Answer once the whole input is there."""
        config = merge_configs(_MARK, config)
        yield from self._transform_stream_with_config(input, self._transform, config, run_type="chain", **kwargs)

    async def atransform(
        self, input: AsyncIterator[dict[str, Any]], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """Async twin of transform."""
        config = merge_configs(_MARK, config)
        made = self._atransform_stream_with_config(input, self._atransform, config, run_type="chain", **kwargs)
        async for piece in made:
            yield piece

    # -- the work -----------------------------------------------------------------------------------------------------

    def _invoke(
        self, given: Any, run_manager: CallbackManagerForChainRun, config: RunnableConfig, **kwargs: Any
    ) -> Any:
        ready, inner = self._prepare(given, config, kwargs), self._inner(config, run_manager)
        output = ready.model.invoke(ready.value, inner, **ready.kwargs)
        self._tell(ready, inner, run_manager)
        return output

    async def _ainvoke(
        self, given: Any, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig, **kwargs: Any
    ) -> Any:
        ready, inner = await self._aprepare(given, config, kwargs), self._inner(config, run_manager)
        output = await ready.model.ainvoke(ready.value, inner, **ready.kwargs)
        await self._atell(ready, inner, run_manager)
        return output

    def _transform(
        self,
        given: Iterator[Any],
        run_manager: CallbackManagerForChainRun,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> Iterator[Any]:
        whole: Any = None
        for part in given:
            whole = _sum(whole, part)
        ready, inner = self._prepare(whole, config, kwargs), self._inner(config, run_manager)
        yield from ready.model.stream(ready.value, inner, **ready.kwargs)
        self._tell(ready, inner, run_manager)

    async def _atransform(
        self,
        given: AsyncIterator[Any],
        run_manager: AsyncCallbackManagerForChainRun,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        whole: Any = None
        async for part in given:
            whole = _sum(whole, part)
        ready, inner = await self._aprepare(whole, config, kwargs), self._inner(config, run_manager)
        async for piece in ready.model.astream(ready.value, inner, **ready.kwargs):
            yield piece
        await self._atell(ready, inner, run_manager)

    def _prepare(self, given: Any, config: RunnableConfig, kwargs: dict[str, Any]) -> _Prepared:
        asked, blender = asked_of(given), self.blender
        options, kwargs = self._split({**self._bound, **kwargs}, config, blender)
        kind = kind_of(self._source)
        own = kwargs.get("max_tokens", getattr(self._source, "max_tokens", None) if kind else None)
        most = own if isinstance(own, int) and own > 0 else None  # -1: as many as there is room for
        prompted = blender.prompted(
            asked.texts, asked.question, history=asked.history, scores=asked.scores, max_tokens=most
        )
        self._look(prompted)
        value = prompt_value(blender.prompts, blender.engine.tokenizer, prompted, asked.history)
        call = Call(blender, prompted, options)
        if kind is None:
            return _Prepared(call, value, EngineModel(call=call), kwargs)
        for name, what in _NOT_OURS.items():
            if kwargs.get(name):
                raise ConfigError(
                    f"The model is bound to {what}, which a blended prompt cannot carry.",
                    remedy=f"Give blend() the model without {what}, and use {what} in a step of its own.",
                )
        if kind == "completions":
            call.body = blender.request(prompted, blend=options)
        else:
            call.body, same = chat_body(call, value)
            if not same and self._first("chat"):
                log.warning(_OTHER_IDS)
        room = max(1, blender.engine.info.context_length - len(prompted.prompt))
        if own is not None:
            kwargs.pop("max_tokens", None)
        model = for_call(self._source, call, max_tokens=None if own is None else min(most or room, room))
        return _Prepared(call, value, model, kwargs)

    async def _aprepare(self, given: Any, config: RunnableConfig, kwargs: dict[str, Any]) -> _Prepared:
        return await asyncio.to_thread(self._prepare, given, config, kwargs)  # may connect, and tokenizes

    def _split(
        self, kwargs: dict[str, Any], config: RunnableConfig, blender: Blender
    ) -> tuple[BlendOptions, dict[str, Any]]:
        """How this call reuses KV, and what goes on to the model."""
        wanted = {name: kwargs.pop(name) for name in _OURS & kwargs.keys()}
        said = (config.get("configurable") or {}).get(KEY) or {}
        if not isinstance(said, Mapping) or set(said) - _OURS:
            raise ConfigError(f"configurable[{KEY!r}] is {said!r}.", remedy=f"It takes {', '.join(sorted(_OURS))}.")
        return replace(blender.blend, **{**said, **wanted}), kwargs

    def _inner(
        self, config: RunnableConfig, run_manager: CallbackManagerForChainRun | AsyncCallbackManagerForChainRun
    ) -> RunnableConfig:
        return patch_config(merge_configs(self._config, config), callbacks=run_manager.get_child())

    def _look(self, prompted: Prompted) -> None:
        """Notice texts that something changed after retrieval; say so once."""
        foreign = [text for text, known in zip(prompted.texts, prompted.registered, strict=True) if not known]
        if foreign and self._first("foreign"):
            log.warning(
                "%d of %d passages are not registered, so their KV is not computed before they are asked for. %s A "
                "step after the retriever changed their text, or they never went through LMCacheVectorStore. The first "
                "begins %r.",
                len(foreign),
                len(prompted.texts),
                self.blender.what_follows,
                foreign[0][:60],
            )

    def _first(self, what: str) -> bool:
        """Whether this is said for the first time."""
        with self._lock:
            new = what not in self._told
            self._told.add(what)
        return new

    def _tell(self, ready: _Prepared, config: RunnableConfig, run_manager: CallbackManagerForChainRun) -> None:
        if ready.call.done is not None:
            run_manager.metadata.update(ready.call.told)  # which a tracer holds until the run ends
            dispatch_custom_event(KEY, ready.call.metadata[KEY], config=config)

    async def _atell(
        self, ready: _Prepared, config: RunnableConfig, run_manager: AsyncCallbackManagerForChainRun
    ) -> None:
        if ready.call.done is not None:
            run_manager.metadata.update(ready.call.told)
            await adispatch_custom_event(KEY, ready.call.metadata[KEY], config=config)


def blend(
    llm: Any,
    *,
    options: BlendOptions | None = None,
    store: str | Path | None = None,
    lazy_fill: str | None = None,
) -> Blend:
    """A Runnable that answers from the KV of documents, through the program's own model.

    It takes ``{"documents": [...], "question": "..."}`` and perhaps ``"history"``, and gives what the model gives: an
    AIMessage, or a text from a completions model. invoke, stream, batch, their async twins and astream_events work as
    anywhere; the prompt is made here, in place of the chain's prompt template.

    Statistics of reuse stand in ``response_metadata["lmcache_rag"]`` (chat), in the generation's info, and come as
    the custom event "lmcache_rag".

    Per call: ``config={"configurable": {"lmcache_rag": {"enabled": False}}}`` computes the prompt in full; `policy` and
    `ratio` likewise. Other keywords (`stop`, `temperature`, …) go to the model.

    Args:
        llm: A langchain_openai OpenAI or ChatOpenAI (also bound to keywords), a vLLM server's URL, an engine, or a
            Workspace.
        options: How KV is reused; None: as the settings say.
        store: Folder of the registry; None: as the settings say.
        lazy_fill: At which use a passage without KV is ingested, in the background after the answer: "first",
            "second" or "never"; None: as the settings say (LMCACHE_RAG_LAZY_FILL, or "second").

    Raises:
        ConfigError: There is no such lazy_fill; at the first question, where the model cannot be used.
    """
    return Blend(llm, blend=options, store=store, lazy_fill=lazy_fill, name="LMCacheBlend")


def _sum(whole: Any, part: Any) -> Any:
    if whole is None:
        return part
    try:
        return whole + part
    except TypeError:
        return {**whole, **part} if isinstance(whole, Mapping) and isinstance(part, Mapping) else part
