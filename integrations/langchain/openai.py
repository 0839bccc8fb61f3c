"""The user's own langchain_openai object, copied for one question: token ids go out, statistics come back.

LangChain drops what a server reports besides the answer. For chat, langchain_openai's own hooks see the request and the
raw answer (`_get_request_payload`, `_create_chat_result`, `_convert_chunk_to_generation_chunk`). Its completions model
has no such hooks, so the copy's client is wrapped there.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from langchain_core.messages import AIMessageChunk
from langchain_core.outputs import ChatGenerationChunk, GenerationChunk
from pydantic import PrivateAttr

from lmcache_rag.engines.base import BlendOptions, Completion
from lmcache_rag.protocol import CHUNKS, PREFIX, SPANS

from ..blender import counts
from .prompts import ChunkedPromptValue

if TYPE_CHECKING:
    from lmcache_rag.engines.vllm_answer import Gathered

    from ..blender import Blender, BlendPrompt

KEY = "lmcache_rag"  # of the statistics in metadata and events

_SPANS = (CHUNKS, PREFIX, SPANS)  # request keys that depend on the prompt's token ids
_ROLES = {"system": "system", "human": "user", "ai": "assistant"}
_classes: dict[type[Any], type[Any]] = {}  # one for each model class: pydantic takes a while to make them

API: TypeAlias = Literal["chat", "completions"]


# -- one question -----------------------------------------------------------------------------------------------------


@dataclass
class BlendCall:
    """State of one question: its request and its answer. Never shared by two calls of the model.

    Attributes:
        blender: The builder of the prompt.
        prompt: The prompt.
        blend: How KV is reused.
        body: Additions to the request's body.
        done: The finished answer; None before, and for an answer from LangChain's cache.
    """

    blender: Blender
    prompt: BlendPrompt
    blend: BlendOptions
    body: Mapping[str, Any] = field(default_factory=dict)
    done: Completion | None = None
    _gathered: Gathered | None = None
    _streamed: bool = False
    _stops: bool = False
    _lock: Any = field(default_factory=threading.Lock)

    def request(self, payload: dict[str, Any], model_body: Mapping[str, Any] | None) -> dict[str, Any]:
        """Add the blend's parameters to a request; TTFT counts from now.

        LangChain lets the `extra_body` of a call replace the constructor's; here all of them are merged. KV transfer
        parameters that the program sets itself stay.

        Args:
            payload: The arguments of create().
            model_body: The `extra_body` of the model's constructor.
        """
        theirs = {**(model_body or {}), **(payload.get("extra_body") or {})}
        ours = self.body.get("kv_transfer_params", {})
        params = {**ours, **(theirs.get("kv_transfer_params") or {})}
        if "prompt_token_ids" in ours:
            params["prompt_token_ids"] = ours["prompt_token_ids"]
        self._gathered, self._streamed = self.blender.gather(), bool(payload.get("stream"))
        self._stops = bool(payload.get("stop"))
        self.done = None
        return payload | {"extra_body": {**theirs, **self.body, "kv_transfer_params": params}}

    def take(self, part: Any) -> None:
        """Take a raw part of the answer, as the openai client gives it."""
        if self._gathered is not None and not isinstance(part, str):
            self._gathered.take(part)

    def finish(self) -> Completion | None:
        """Return the answer with its statistics; None if no request was made.

        Raises:
            EngineUnavailableError: The server closed the connection before the answer's end.
        """
        with self._lock:
            if self.done is None and self._gathered is not None:
                self.done = self.blender.finished(
                    self._gathered, self.prompt, streamed=self._streamed, blend=self.blend, stops=self._stops
                )
            return self.done

    @property
    def metadata(self) -> dict[str, Any]:
        """Statistics and warnings for response_metadata and generation_info; empty if there are none.

        In a stable order also `passages`: indices of the given documents, in the order of the prompt.
        """
        if self.done is None:
            return {}
        facts = {**counts(self.done.stats), "warnings": list(self.done.warnings)}
        if self.prompt.prompt.order == "stable":
            facts["passages"] = list(self.prompt.kept)
        return {KEY: facts}

    @property
    def run_metadata(self) -> dict[str, Any]:
        """The statistics as flat metadata of a run; empty if there are none."""
        return {f"{KEY}_{name}": value for name, value in counts(self.done.stats).items()} if self.done else {}

    @property
    def params(self) -> dict[str, Any]:
        """Parameters that are known before the answer: for traces, and for the key of LangChain's cache."""
        blend, prompt = self.blend, self.prompt.prompt
        return {
            f"{KEY}_blend": blend.enabled,
            f"{KEY}_policy": blend.policy,
            f"{KEY}_ratio": blend.budget.wire,
            f"{KEY}_chunks": len(prompt.chunks),
            f"{KEY}_prompt_tokens": len(prompt),
        }


def chat_body(call: BlendCall, value: ChunkedPromptValue) -> tuple[dict[str, Any], bool]:
    """Return the additions to a chat request, and whether the server will compute the prompt's own token ids.

    vLLM before 0.32 takes no token ids for chat. The messages are then rendered here as the server does it; if this
    gives other ids than the chunks were ingested with, the request names no chunk spans.
    """
    blender = call.blender
    if blender.chat_takes_ids:
        return blender.request_chat(call.prompt, blend=call.blend), True
    body = blender.request(call.prompt, blend=call.blend)
    del body["prompt"]
    if _rendered_ids(blender.engine.tokenizer, value) == value.token_ids:
        return body, True
    params = body["kv_transfer_params"]
    body["kv_transfer_params"] = {name: params[name] for name in params if name not in _SPANS}
    return body, False


def _rendered_ids(tokenizer: Any, value: ChunkedPromptValue) -> list[int]:
    """Render the messages as a server does; return the token ids."""
    messages = [{"role": _ROLES[message.type], "content": message.text} for message in value.messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def template_options(model: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model or its keywords give the chat template (`chat_template_kwargs` of vLLM)."""
    found: dict[str, Any] = {}
    for body in (getattr(model, "extra_body", None), kwargs.get("extra_body")):
        found |= (body or {}).get("chat_template_kwargs") or {}
    return found


# -- the model --------------------------------------------------------------------------------------------------------


def api_of(model: Any) -> API | None:
    """Return which API a langchain_openai object calls, or None for any other object.

    By class name: the package need not be installed, and subclasses count too.
    """
    names = {cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("langchain_openai.")}
    return "chat" if "BaseChatOpenAI" in names else "completions" if "BaseOpenAI" in names else None


def bind_request(model: Any, call: BlendCall, *, max_tokens: int | None) -> Any:
    """Copy the model for one question. Callbacks, tags, sampling, retries and clients stay the model's own.

    Args:
        model: The user's.
        call: The question.
        max_tokens: Replaces the model's own; None keeps it.
    """
    changed: dict[str, Any] = {}
    if api_of(model) == "chat":
        changed["use_responses_api"] = False  # some models' names alone would route to the other API
    else:
        changed["client"] = _Completions(model.client, call, model.extra_body)
        changed["async_client"] = _AsyncCompletions(model.async_client, call, model.extra_body)
    if max_tokens is not None:
        changed["max_tokens"] = max_tokens
    copy = model.model_copy(update=changed)
    private = {**(copy.__pydantic_private__ or {}), "_call": call}
    object.__setattr__(copy, "__class__", _blended_class(type(model)))
    object.__setattr__(copy, "__pydantic_private__", private)
    return copy


def _blended_class(model: type[Any]) -> type[Any]:
    """Return a subclass of the model's class that adds the statistics; it keeps the name, which traces show."""
    if model in _classes:
        return _classes[model]
    is_chat = any(cls.__name__ == "BaseChatOpenAI" for cls in model.__mro__)
    facts = {
        "__module__": model.__module__,
        "__qualname__": model.__qualname__,
        "__doc__": model.__doc__,
        "__annotations__": {"_call": Any},
        "_call": PrivateAttr(None),
    }
    bases = (_BlendedChat if is_chat else _BlendedCompletions, _Blended, model)
    return _classes.setdefault(model, type(model.__name__, bases, facts))


class _Blended:
    """Shared by both APIs. `super()` is the user's model class."""

    _call: BlendCall
    if TYPE_CHECKING:

        def _last_chunk(self) -> Any: ...

    # LangChain looks for `run_manager` in these signatures: without it a call's keywords would be dropped.
    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
        return self._with_statistics(super()._generate(messages, stop, run_manager, **kwargs))  # type: ignore[misc]

    async def _agenerate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
        result = await super()._agenerate(messages, stop, run_manager, **kwargs)  # type: ignore[misc]
        return self._with_statistics(result)

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        yield from super()._stream(*args, **kwargs)  # type: ignore[misc]
        self._call.finish()
        yield self._last_chunk()

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for chunk in super()._astream(*args, **kwargs):  # type: ignore[misc]
            yield chunk
        self._call.finish()
        yield self._last_chunk()

    def _get_ls_params(self, *args: Any, **kwargs: Any) -> Any:
        return {**super()._get_ls_params(*args, **kwargs), **self._call.params}  # type: ignore[misc]

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**super()._identifying_params, **self._call.params}  # type: ignore[misc]

    def _with_statistics(self, result: Any) -> Any:
        self._call.finish()
        for generation in _flat(result.generations):
            generation.generation_info = {**(generation.generation_info or {}), **self._call.metadata}
            if (message := getattr(generation, "message", None)) is not None:
                message.response_metadata = {**message.response_metadata, **self._call.metadata}
        return result


class _BlendedChat:
    _call: BlendCall
    extra_body: Mapping[str, Any] | None

    def _get_request_payload(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        payload = super()._get_request_payload(*args, **kwargs)  # type: ignore[misc]
        return self._call.request(payload, self.extra_body)

    def _create_chat_result(self, response: Any, *args: Any, **kwargs: Any) -> Any:
        self._call.take(response)
        return super()._create_chat_result(response, *args, **kwargs)  # type: ignore[misc]

    def _convert_chunk_to_generation_chunk(self, chunk: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        from openai.types.chat import ChatCompletionChunk

        self._call.take(ChatCompletionChunk.construct(**chunk))  # LangChain converted it to a dict
        return super()._convert_chunk_to_generation_chunk(chunk, *args, **kwargs)  # type: ignore[misc]

    def _last_chunk(self) -> ChatGenerationChunk:
        metadata = self._call.metadata
        return ChatGenerationChunk(
            message=AIMessageChunk(content="", response_metadata=metadata), generation_info=metadata or None
        )

    def _get_llm_string(self, *args: Any, **kwargs: Any) -> str:
        return f"{super()._get_llm_string(*args, **kwargs)}---{sorted(self._call.params.items())}"  # type: ignore[misc]


class _BlendedCompletions:
    _call: BlendCall

    def _last_chunk(self) -> GenerationChunk:
        return GenerationChunk(text="", generation_info=self._call.metadata)


def _flat(generations: list[Any]) -> list[Any]:
    return [one for each in generations for one in (each if isinstance(each, list) else [each])]


# -- the completions client -------------------------------------------------------------------------------------------


class _Completions:
    """Wraps `client.completions`: adds to the request, and passes the raw answer to the call.

    Args:
        client: The user's.
        call: The question.
        model_body: The `extra_body` of the model's constructor.
    """

    def __init__(self, client: Any, call: BlendCall, model_body: Mapping[str, Any] | None) -> None:
        self._client, self._call, self._model_body = client, call, model_body

    def create(self, **payload: Any) -> Any:
        response = self._client.create(**self._call.request(payload, self._model_body))
        if payload.get("stream"):
            return self._parts(response)
        self._call.take(response)
        return response

    def _parts(self, stream: Any) -> Iterator[Any]:
        try:
            for part in stream:
                self._call.take(part)
                yield part
        finally:
            stream.close()  # also when the reader leaves early: closing the connection stops the computation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


class _AsyncCompletions(_Completions):
    """As _Completions, for an async client."""

    async def create(self, **payload: Any) -> Any:
        response = await self._client.create(**self._call.request(payload, self._model_body))
        if payload.get("stream"):
            return self._aparts(response)
        self._call.take(response)
        return response

    async def _aparts(self, stream: Any) -> AsyncIterator[Any]:
        try:
            async for part in stream:
                self._call.take(part)
                yield part
        finally:
            await stream.close()
