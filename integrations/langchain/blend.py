"""The step of a chain that answers from blended KV: documents and a question go in, the model's answer comes out."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from langchain_core.callbacks import adispatch_custom_event, dispatch_custom_event
from langchain_core.messages import BaseMessage, convert_to_messages
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig, RunnableSequence
from langchain_core.runnables.config import merge_configs, patch_config

from lmcache_rag.engines.base import BlendOptions, Completion
from lmcache_rag.errors import ConfigError
from lmcache_rag.lazy_fill import mode_of

from ..blender import Blender, BlendPrompt
from ..kv_registry import as_workspace
from .agent_call import AgentCall, is_messages, shown_tools
from .chat_model import EngineModel
from .openai import KEY, BlendCall, api_of, bind_request, chat_body, template_options
from .prompts import ChunkedPromptValue, parse_input, prompt_value, unused_inputs
from .retrieved import RETRIEVED
from .reuse_watch import ReuseWatch
from .spaces import refuse_pickling
from .templates import TemplatePrompt, default_template

if TYPE_CHECKING:
    from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun

    from lmcache_rag.kv_removal import IngestPrompts

log = logging.getLogger("lmcache_rag")

# Tracers ignore metadata that is added to a run later, unless the run began with some.
_RUN_METADATA: RunnableConfig = {"metadata": {KEY: "blend"}}
_BLEND_OPTIONS = frozenset(BlendOptions.__dataclass_fields__)
_UNSUPPORTED = {"tools": "tools", "functions": "functions", "response_format": "structured output"}
_NOT_BLENDED = (
    "This vLLM's chat completions take no token ids (0.32 and later do), and its chat template gives other ids than "
    "the passages were ingested with: prompts are computed in full. Use a newer vLLM, or langchain_openai's OpenAI, "
    "which uses the completions API."
)


@dataclass(frozen=True)
class Words:
    """A step's own words: a prompt, or texts in the place of the workspace's."""

    prompt: TemplatePrompt | None = None
    system: str | None = None
    instruction: str | None = None


@dataclass(frozen=True)
class _Prepared:
    call: BlendCall
    value: ChunkedPromptValue | list[BaseMessage]
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
        trace: str | Path | None = None,
        words: Words | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name
        self._words = words or Words()
        self._bound: dict[str, Any] = {}
        self._config: RunnableConfig | None = None
        while isinstance(source, RunnableBinding):
            self._bound = {**source.kwargs, **self._bound}
            self._config = {**source.config, **(self._config or {})}
            source = source.bound
        self._source, self._options, self._folder = source, blend, store
        self._lazy_fill, self._trace = lazy_fill and mode_of(lazy_fill), trace
        self._lock = threading.RLock()
        self._logged: set[str] = set()
        self._watch = ReuseWatch()
        RETRIEVED.expect_blends()

    @cached_property
    def _blender(self) -> Blender:
        workspace, words = as_workspace(self._source, store=self._folder), self._words
        own = words.system is not None or words.instruction is not None
        prompts = workspace.prompts_with(system=words.system, instruction=words.instruction) if own else None
        return Blender(workspace, blend=self._options, lazy_fill=self._lazy_fill, prompts=prompts, trace=self._trace)

    @property
    def blender(self) -> Blender:
        """The builder of the prompts; connects to the engine at first use."""
        with self._lock:
            return self._blender

    @property
    def prompts(self) -> IngestPrompts:
        """The prompts with which the passages' KV is computed for this step."""
        template, tools = self._template(self._bound), self._bound.get("tools")
        if template is None:
            return self.blender.prompts
        options = template_options(self._source, self._bound)
        return self.blender.composer.compose(template.prefix(), tools=shown_tools(tools), options=options).prompts

    def bind_tools(self, tools: Any, **kwargs: Any) -> Blend:
        """As bind_tools of the model; the tools stand in the prompt, and the passages stay reusable."""
        return self._over(self._source.bind_tools(tools, **kwargs))

    def with_structured_output(self, schema: Any, **kwargs: Any) -> Runnable[Any, Any]:
        """As with_structured_output of the model."""
        made = self._source.with_structured_output(schema, **kwargs)
        if not isinstance(made, RunnableSequence) or not isinstance(made.first, RunnableBinding):
            raise ConfigError(
                "This structured output is not a model and a parser.",
                remedy="Leave include_raw out.",
            )
        rest = made.steps[1:]
        return RunnableSequence(self._over(made.first), *rest)

    def _over(self, source: Any) -> Blend:
        """Return this step over its model bound to more."""
        made = Blend(
            RunnableBinding(bound=source, kwargs=self._bound, config=self._config or {}),
            blend=self._options,
            store=self._folder,
            lazy_fill=self._lazy_fill,
            trace=self._trace,
            words=self._words,
            name=self.name,
        )
        made._bound = {**self._bound, **made._bound, **getattr(source, "kwargs", {})}
        return made

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
        kwargs = {**self._bound, **kwargs}
        if is_messages(value):
            return self._prepare_messages(value, config, kwargs)
        template = self._template(kwargs)
        values: dict[str, Any] = {}
        if template is None:
            parsed = parse_input(value)
        else:
            parsed, values = template.parse(value, strict=self._words.prompt is not None)
        if self._words.prompt is None:
            self._warn_unused(value)
        options, kwargs = self._split(kwargs, config, self.blender)
        api = api_of(self._source)
        for name, what in _UNSUPPORTED.items():
            if kwargs.get(name) and (api == "completions" or (api == "chat" and name == "functions")):
                raise ConfigError(
                    f"The model is bound to {what}, which this API does not take.",
                    remedy=f"Use ChatOpenAI with tools, or use {what} in another step of the chain.",
                )
        own = kwargs.get("max_tokens", getattr(self._source, "max_tokens", None) if api else None)
        limit = own if isinstance(own, int) and own > 0 else None  # -1: up to the context's end
        if template is None:
            blender = self.blender
            prompt = blender.build_prompt(
                parsed.texts,
                parsed.question,
                history=parsed.history,
                scores=parsed.scores,
                max_tokens=limit,
                order=options.order,
            )
            messages = blender.prompts.messages(prompt.texts, prompt.question, parsed.history)
        else:
            blender, prompt, conversation = self.blender.build_message_prompt(
                parsed.texts,
                parsed.question,
                partial(template.messages, values=values),
                scores=parsed.scores,
                tools=shown_tools(kwargs.get("tools")),
                options=template_options(self._source, kwargs),
                max_tokens=limit,
                order=options.order,
            )
            messages = [{"role": message.role, "content": message.text} for message in conversation]
        self._warn_unregistered(prompt)
        shown = prompt_value(messages, blender.engine.tokenizer, prompt)
        call = BlendCall(blender, prompt, options)
        if api is None:
            return _Prepared(call, shown, EngineModel(call=call), kwargs)
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

    def _prepare_messages(self, value: Any, config: RunnableConfig, kwargs: dict[str, Any]) -> _Prepared:
        """Prepare a call with an agent's messages, in which passages may stand."""
        if api_of(self._source) != "chat":
            raise ConfigError(
                "blend() was given messages, which only a ChatOpenAI takes.",
                remedy="Give it documents and a question, or make it of a ChatOpenAI.",
            )
        blender = self.blender
        options, kwargs = self._split(kwargs, config, blender)
        messages = value.to_messages() if hasattr(value, "to_messages") else convert_to_messages(value)
        call = AgentCall.of(blender, messages, options, self._watch)
        return _Prepared(call, messages, bind_request(self._source, call, max_tokens=None), kwargs)

    def _template(self, kwargs: Mapping[str, Any]) -> TemplatePrompt | None:
        """Return the program's prompt, or one with this library's words if the model is bound to tools."""
        if self._words.prompt is not None or not kwargs.get("tools"):
            return self._words.prompt
        return default_template(self.blender.prompts.format)

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

    def _warn_unused(self, value: Any) -> None:
        """Warn once of texts in the input that the prompt does not hold."""
        unused = [name for name in unused_inputs(value) if isinstance(value[name], str)]
        if unused and self._first("unused"):
            log.warning(
                "The input has %r, which is not in the prompt: blend() without `prompt` uses its own words. Give it "
                "the chain's prompt template.",
                unused[0],
            )

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

    def _watch_answer(self, ready: _Prepared, done: Completion) -> None:
        if not isinstance(ready.call, AgentCall):  # that has done it
            self._watch.take(ready.call.blender, ready.call.prompt, done, ready.call.blend)

    def _report(self, ready: _Prepared, config: RunnableConfig, run_manager: CallbackManagerForChainRun) -> None:
        if (done := ready.call.done) is not None:
            self._watch_answer(ready, done)
            run_manager.metadata.update(ready.call.run_metadata)  # a tracer keeps this dict until the run ends
            dispatch_custom_event(KEY, ready.call.metadata[KEY], config=config)

    async def _areport(
        self, ready: _Prepared, config: RunnableConfig, run_manager: AsyncCallbackManagerForChainRun
    ) -> None:
        if (done := ready.call.done) is not None:
            self._watch_answer(ready, done)
            run_manager.metadata.update(ready.call.run_metadata)
            await adispatch_custom_event(KEY, ready.call.metadata[KEY], config=config)


def blend(
    llm: Any,
    *,
    prompt: Any = None,
    system: str | None = None,
    instruction: str | None = None,
    separator: str = "\n\n",
    options: BlendOptions | None = None,
    store: str | Path | None = None,
    lazy_fill: str | None = None,
    trace: str | Path | None = None,
) -> Blend:
    """A Runnable that answers from the KV of documents, through the program's own model.

    It takes ``{"documents": [...], "question": "..."}`` and perhaps ``"history"``, and returns what the model returns:
    an AIMessage, or a text from a completions model. invoke, stream, batch, their async versions and astream_events
    work as for any Runnable. With `prompt`, it takes that prompt's variables. The model may be bound to tools or to
    structured output: bind_tools and with_structured_output work as on the model. Given messages, as an agent's model
    is, it finds the passages in them, see BlendMiddleware.

    Reuse statistics are in ``response_metadata["lmcache_rag"]`` (chat) and in the generation's info, and are sent as
    the custom event "lmcache_rag".

    Per call: ``config={"configurable": {"lmcache_rag": {"enabled": False}}}`` computes the prompt in full; `policy` and
    `ratio` likewise. Other keywords (`stop`, `temperature`, …) go to the model.

    Args:
        llm: A langchain_openai OpenAI or ChatOpenAI (also bound to keywords), a vLLM server's URL, an engine, or a
            Workspace.
        prompt: The chain's ChatPromptTemplate or PromptTemplate, see TemplatePrompt; None: this library's own words.
            Give it to LMCacheVectorStore too (`prompts`), so that the KV is there at the first question.
        system: System text in the place of the settings', where no `prompt` is given.
        instruction: Instruction in the place of the settings', where no `prompt` is given.
        separator: Between the passages in `prompt`.
        options: How KV is reused; None: from the settings.
        store: Folder of the registry; None: from the settings.
        lazy_fill: At which use a passage without KV is ingested, in the background after the answer: "first",
            "second" or "never"; None: from the settings (LMCACHE_RAG_LAZY_FILL, or "second").
        trace: File to which is appended which passages each question used, for `lmcache-rag plan` and `warm`; None:
            from the settings (LMCACHE_RAG_TRACE, or none).

    Raises:
        ConfigError: lazy_fill is none of these, or the prompt cannot be used; at the first question: the model cannot.
    """
    if prompt is not None and (system is not None or instruction is not None):
        raise ConfigError(
            "blend() has a prompt and a system text or instruction.", remedy="Write them into the prompt."
        )
    words = Words(TemplatePrompt(prompt, separator=separator) if prompt is not None else None, system, instruction)
    return Blend(llm, blend=options, store=store, lazy_fill=lazy_fill, trace=trace, words=words, name="LMCacheBlend")


def _sum(whole: Any, part: Any) -> Any:
    if whole is None:
        return part
    try:
        return whole + part
    except TypeError:
        return {**whole, **part} if isinstance(whole, Mapping) and isinstance(part, Mapping) else part
