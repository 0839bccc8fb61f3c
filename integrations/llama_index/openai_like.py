"""Sends a blended prompt through the user's own LLM object (OpenAILike), or to the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse
from llama_index.core.llms.llm import LLM

from lmcache_rag.engines.base import BlendOptions, Completion, StreamEvent, TextDelta
from lmcache_rag.errors import ConfigError
from lmcache_rag.protocol import CHUNKS, PREFIX, SPANS

from ..blender import Blender, BlendPrompt
from ..kv_registry import server_url_of
from .llm import EngineAnswer, EngineLLM

_PROMPT_KEYS = (  # keys of kv_transfer_params that belong to the prompt itself
    "prompt_token_ids",
    CHUNKS,
    PREFIX,
    SPANS,
)
_CONNECTION_ERRORS = ("APIConnectionError", "APITimeoutError", "InternalServerError", "ConnectError", "ConnectTimeout")


class BlendClient:
    """Answers blended prompts through an LLM of LlamaIndex, so that its settings, callbacks and events stay.

    An OpenAILike object sends token ids: with is_chat_model=False as the prompt; else along with the messages if the
    server's chat takes them (vLLM 0.32 and later), or to the same server's completions. Its `additional_kwargs` are
    kept; the blend's parameters are merged into its `extra_body`.

    Args:
        llm: An OpenAILike object, or an EngineLLM.
        blender: Builds the prompts.

    Raises:
        ConfigError: The LLM requests several answers to one question, or is no client of a vLLM server.
    """

    def __init__(self, llm: LLM, blender: Blender) -> None:
        if not isinstance(llm, EngineLLM):
            server_url_of(llm)  # refuses what is no client of a vLLM server
        self.llm, self.blender = llm, blender
        if int(self._additional.get("n") or 1) > 1:
            raise ConfigError("The LLM requests several answers at once (n).", remedy="Leave n out.")

    # -- answers --------------------------------------------------------------------------------------------------

    def answer(self, prompt: BlendPrompt, *, blend: BlendOptions | None = None, **kwargs: Any) -> Completion:
        """Return the whole answer.

        Raises:
            LMCacheRAGError: See the engine's errors. An LLM object raises its own client's errors.
        """
        call = self._call(prompt, blend, kwargs)
        gathered = self.blender.gather()
        with _connection_advice():
            response = (
                call.llm.chat(call.input, **call.kwargs)
                if call.chat
                else call.llm.complete(call.input, formatted=True, **call.kwargs)
            )
        if isinstance(response.raw, EngineAnswer):
            return response.raw.completion
        gathered.take(response.raw)
        return self._finished(gathered, prompt, blend, call, streamed=False)

    async def aanswer(self, prompt: BlendPrompt, *, blend: BlendOptions | None = None, **kwargs: Any) -> Completion:
        """Async version of answer."""
        call = self._call(prompt, blend, kwargs)
        gathered = self.blender.gather()
        response: ChatResponse | CompletionResponse
        with _connection_advice():
            if call.chat:
                response = await call.llm.achat(call.input, **call.kwargs)
            else:
                response = await call.llm.acomplete(call.input, formatted=True, **call.kwargs)
        if isinstance(response.raw, EngineAnswer):
            return response.raw.completion
        gathered.take(response.raw)
        return await asyncio.to_thread(self._finished, gathered, prompt, blend, call, streamed=False)

    def stream(self, prompt: BlendPrompt, *, blend: BlendOptions | None = None, **kwargs: Any) -> Iterator[StreamEvent]:
        """TextDelta events, then one Completion. Errors as for answer."""
        call = self._call(prompt, blend, kwargs)
        gathered = self.blender.gather()
        done: Completion | None = None
        with _connection_advice(), _closing(call.llm):
            parts: Iterator[Any] = (
                call.llm.stream_chat(call.input, **call.kwargs)
                if call.chat
                else call.llm.stream_complete(call.input, formatted=True, **call.kwargs)
            )
            for part in parts:
                if isinstance(part.raw, EngineAnswer):
                    done = part.raw.completion  # and go on to the end: LlamaIndex then reports the LLM's answer
                elif part.raw is not None:
                    gathered.take(part.raw)
                if part.delta:
                    yield TextDelta(part.delta)
        yield done or self._finished(gathered, prompt, blend, call, streamed=True)

    async def astream(
        self, prompt: BlendPrompt, *, blend: BlendOptions | None = None, **kwargs: Any
    ) -> AsyncIterator[StreamEvent]:
        """Async version of stream."""
        call = self._call(prompt, blend, kwargs)
        gathered = self.blender.gather()
        done: Completion | None = None
        async with _aclosing(call.llm):
            parts: Any = (
                await call.llm.astream_chat(call.input, **call.kwargs)
                if call.chat
                else await call.llm.astream_complete(call.input, formatted=True, **call.kwargs)
            )
            async with aclosing(parts):
                async for part in parts:
                    if isinstance(part.raw, EngineAnswer):
                        done = part.raw.completion
                    elif part.raw is not None:
                        gathered.take(part.raw)
                    if part.delta:
                        yield TextDelta(part.delta)
        if done is None:
            done = await asyncio.to_thread(self._finished, gathered, prompt, blend, call, streamed=True)
        yield done

    # -- inside ---------------------------------------------------------------------------------------------------

    @property
    def _additional(self) -> dict[str, Any]:
        """What the LLM's constructor adds to each request."""
        return dict(getattr(self.llm, "additional_kwargs", None) or {})

    @property
    def max_tokens(self) -> int | None:
        """Limit of an answer, if the LLM object sets one."""
        return self._additional.get("max_tokens") or getattr(self.llm, "max_tokens", None)

    def _call(self, prompt: BlendPrompt, blend: BlendOptions | None, kwargs: dict[str, Any]) -> SimpleNamespace:
        """Return the LLM to call, its API, the input and the keywords."""
        ids = prompt.prompt.token_ids
        text = str(self.blender.engine.tokenizer.decode(ids))  # for callbacks and traces; the ids are what is sent
        if isinstance(self.llm, EngineLLM):
            return SimpleNamespace(
                llm=self.llm, chat=False, input=text, kwargs={"blend_prompt": prompt, "blend": blend, **kwargs}
            )
        chat = bool(self.llm.metadata.is_chat_model) and self.blender.chat_takes_ids
        body = self.blender.request_chat(prompt, blend=blend) if chat else self.blender.request(prompt, blend=blend)
        additional = self._additional
        theirs = [additional.pop("extra_body", None), kwargs.pop("extra_body", None)]
        options = {**kwargs, "extra_body": _merged(*theirs, body, ours=blend is not None)}
        left = self.blender.engine.info.context_length - len(ids)
        wanted = kwargs.get("max_tokens") or self.max_tokens
        if wanted or not chat:  # the default of completions servers is 16
            options["max_tokens"] = max(1, min(wanted or self.blender.sampling.max_tokens, left))
            additional.pop("max_tokens", None)
        for name in ("_get_client", "_get_aclient"):  # created first, so that all copies share its connections
            if getattr(self.llm, "reuse_client", False) and hasattr(self.llm, name):
                getattr(self.llm, name)()
        changes: dict[str, Any] = {"additional_kwargs": additional, "max_tokens": None, "is_chat_model": chat}
        if not chat:
            changes["tokenizer"] = None  # LlamaIndex would count the text's tokens to set max_tokens
        llm = self.llm.model_copy(update=changes)
        input = [ChatMessage(role="user", content=text)] if chat else text
        return SimpleNamespace(llm=llm, chat=chat, input=input, kwargs=options)

    def _finished(
        self,
        gathered: Any,
        prompt: BlendPrompt,
        blend: BlendOptions | None,
        call: SimpleNamespace,
        *,
        streamed: bool,
    ) -> Completion:
        stops = bool(call.kwargs.get("stop") or call.llm.additional_kwargs.get("stop"))
        return self.blender.finished(gathered, prompt, streamed=streamed, blend=blend, stops=stops)


def _merged(*bodies: Mapping[str, Any] | None, ours: bool) -> dict[str, Any]:
    """Merge request bodies; the last, which is ours, overrides the others.

    Of kv_transfer_params, ours override only those that belong to the prompt, so that the policy and ratio of the
    user's constructor stay; with `ours` (this answer has its own BlendOptions) they override all.
    """
    merged: dict[str, Any] = {}
    for body in bodies:
        old, new = merged.get("kv_transfer_params", {}), (body or {}).get("kv_transfer_params") or {}
        merged |= body or {}
        if old or new:
            merged["kv_transfer_params"] = (
                old | new if ours else new | old | {k: new[k] for k in _PROMPT_KEYS if k in new}
            )
    return merged


@contextmanager
def _closing(llm: LLM) -> Iterator[None]:
    """Close the connection of a stream that is left early."""
    if isinstance(llm, EngineLLM):
        yield
        return
    client = StreamTrackingClient(llm._get_client())  # type: ignore[attr-defined]
    object.__setattr__(llm, "_get_client", lambda: client)  # of this copy only
    try:
        yield
    finally:
        client.close_streams()


@asynccontextmanager
async def _aclosing(llm: LLM) -> AsyncIterator[None]:
    """Async version of _closing, with _connection_advice."""
    if isinstance(llm, EngineLLM):
        yield
        return
    client = StreamTrackingClient(llm._get_aclient())  # type: ignore[attr-defined]
    object.__setattr__(llm, "_get_aclient", lambda: client)
    with _connection_advice():
        try:
            yield
        finally:
            await client.aclose_streams()


@contextmanager
def _connection_advice() -> Iterator[None]:
    """Add a note to a client's connection error; its type, which the user's program may catch, stays."""
    try:
        yield
    except Exception as problem:
        if type(problem).__name__ in _CONNECTION_ERRORS:
            problem.add_note("The vLLM server did not answer. Retrieval still works; start the server and ask again.")
        raise


# -- streams that are left early --------------------------------------------------------------------------------------


class StreamTrackingClient:
    """An openai client that records its streams, so that they can be closed.

    LlamaIndex drops a stream that is left early without closing it. The connection then stays open until Python
    collects it, and the server keeps computing.

    Args:
        client: The user's client, sync or async.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._streams: list[Any] = []
        self.completions = _TrackedCompletions(client.completions, self._streams)
        self.chat = SimpleNamespace(completions=_TrackedCompletions(client.chat.completions, self._streams))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def close_streams(self) -> None:
        """Close the connections of a sync client's streams, also of finished ones."""
        while self._streams:
            self._streams.pop().close()

    async def aclose_streams(self) -> None:
        """Async version of close_streams, for an async client."""
        while self._streams:
            await self._streams.pop().close()


class _TrackedCompletions:
    def __init__(self, completions: Any, streams: list[Any]) -> None:
        self._completions, self._streams = completions, streams

    def __getattr__(self, name: str) -> Any:
        return getattr(self._completions, name)

    def create(self, **request: Any) -> Any:
        response = self._completions.create(**request)
        if not request.get("stream"):
            return response
        if hasattr(response, "__await__"):
            return self._awaited(response)
        self._streams.append(response)
        return response

    async def _awaited(self, response: Any) -> Any:
        stream = await response
        self._streams.append(stream)
        return stream
