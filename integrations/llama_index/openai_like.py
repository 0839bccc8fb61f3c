"""How a blended prompt gets to the model: through the user's own LLM object, or straight to the engine."""

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

from ..blender import Blender, Prompted
from .llm import EngineLLM
from .watching import Watched

_NEEDED = ("prompt_token_ids", CHUNKS, PREFIX, SPANS)
_DOWN = ("APIConnectionError", "APITimeoutError", "InternalServerError", "ConnectError", "ConnectTimeout")


class BlendClient:
    """Answers blended prompts through an LLM of LlamaIndex, so that its settings, callbacks and events stay.

    An OpenAILike object sends token ids: a completions one as the prompt; a chat one beside the messages where the
    server's chat takes them (vLLM 0.32 and later), else to the same server's completions, with the same ids. What its
    constructor put into `additional_kwargs` is kept; what the blend needs is merged into its `extra_body`.

    Args:
        llm: An OpenAILike object, or an EngineLLM.
        blender: Makes the prompts.

    Raises:
        ConfigError: The LLM would give several answers to one question.
    """

    def __init__(self, llm: LLM, blender: Blender) -> None:
        self.llm, self.blender = llm, blender
        if int(self._additional.get("n") or 1) > 1:
            raise ConfigError("The LLM asks for several answers at once (n).", remedy="Leave n out.")

    # -- answers ------------------------------------------------------------------------------------------------

    def answer(self, prompted: Prompted, *, blend: BlendOptions | None = None, **kwargs: Any) -> Completion:
        """The whole answer.

        Raises:
            LMCacheRAGError: See the engine's errors. An LLM object raises its own client's errors.
        """
        call = self._call(prompted, blend, kwargs)
        gathered = self.blender.gather()
        with _advice():
            response = (
                call.llm.chat(call.asked, **call.kwargs)
                if call.chat
                else call.llm.complete(call.asked, formatted=True, **call.kwargs)
            )
        if isinstance(response.raw, Completion):
            return response.raw
        gathered.take(response.raw)
        return self._finished(gathered, prompted, blend, call, streamed=False)

    async def aanswer(self, prompted: Prompted, *, blend: BlendOptions | None = None, **kwargs: Any) -> Completion:
        """Async twin of answer."""
        call = self._call(prompted, blend, kwargs)
        gathered = self.blender.gather()
        response: ChatResponse | CompletionResponse
        with _advice():
            if call.chat:
                response = await call.llm.achat(call.asked, **call.kwargs)
            else:
                response = await call.llm.acomplete(call.asked, formatted=True, **call.kwargs)
        if isinstance(response.raw, Completion):
            return response.raw
        gathered.take(response.raw)
        return await asyncio.to_thread(self._finished, gathered, prompted, blend, call, streamed=False)

    def stream(self, prompted: Prompted, *, blend: BlendOptions | None = None, **kwargs: Any) -> Iterator[StreamEvent]:
        """TextDelta events, then one Completion. Errors as for answer."""
        call = self._call(prompted, blend, kwargs)
        gathered = self.blender.gather()
        with _advice(), _closing(call.llm):
            parts: Iterator[Any] = (
                call.llm.stream_chat(call.asked, **call.kwargs)
                if call.chat
                else call.llm.stream_complete(call.asked, formatted=True, **call.kwargs)
            )
            for part in parts:
                if isinstance(part.raw, Completion):
                    yield part.raw
                    return
                if part.raw is not None:
                    gathered.take(part.raw)
                if part.delta:
                    yield TextDelta(part.delta)
        yield self._finished(gathered, prompted, blend, call, streamed=True)

    async def astream(
        self, prompted: Prompted, *, blend: BlendOptions | None = None, **kwargs: Any
    ) -> AsyncIterator[StreamEvent]:
        """Async twin of stream."""
        call = self._call(prompted, blend, kwargs)
        gathered = self.blender.gather()
        async with _aclosing(call.llm):
            parts: Any = (
                await call.llm.astream_chat(call.asked, **call.kwargs)
                if call.chat
                else await call.llm.astream_complete(call.asked, formatted=True, **call.kwargs)
            )
            async with aclosing(parts):
                async for part in parts:
                    if isinstance(part.raw, Completion):
                        yield part.raw
                        return
                    if part.raw is not None:
                        gathered.take(part.raw)
                    if part.delta:
                        yield TextDelta(part.delta)
        yield await asyncio.to_thread(self._finished, gathered, prompted, blend, call, streamed=True)

    # -- inside -------------------------------------------------------------------------------------------------

    @property
    def _additional(self) -> dict[str, Any]:
        """What the LLM's constructor adds to each request; it would replace ours."""
        return dict(getattr(self.llm, "additional_kwargs", None) or {})

    @property
    def max_tokens(self) -> int | None:
        """Most tokens of an answer, where the LLM object says it."""
        return self._additional.get("max_tokens") or getattr(self.llm, "max_tokens", None)

    def _call(self, prompted: Prompted, blend: BlendOptions | None, kwargs: dict[str, Any]) -> SimpleNamespace:
        """Which method of which LLM is called with what."""
        ids = prompted.prompt.token_ids
        text = str(self.blender.engine.tokenizer.decode(ids))  # for callbacks and traces; the ids are what counts
        if isinstance(self.llm, EngineLLM):
            return SimpleNamespace(
                llm=self.llm, chat=False, asked=text, kwargs={"prompted": prompted, "blend": blend, **kwargs}
            )
        chat = bool(self.llm.metadata.is_chat_model) and self.blender.chat_takes_ids
        body = self.blender.request_chat(prompted, blend=blend) if chat else self.blender.request(prompted, blend=blend)
        additional = self._additional
        theirs = [additional.pop("extra_body", None), kwargs.pop("extra_body", None)]
        given = {**kwargs, "extra_body": _merged(*theirs, body, ours=blend is not None)}
        room = self.blender.engine.info.context_length - len(ids)
        wanted = kwargs.get("max_tokens") or self.max_tokens
        if wanted or not chat:  # without a number a completions server stops after 16 tokens
            given["max_tokens"] = max(1, min(wanted or self.blender.sampling.max_tokens, room))
            additional.pop("max_tokens", None)
        for name in ("_get_client", "_get_aclient"):  # made first, so that all copies share its connections
            if getattr(self.llm, "reuse_client", False) and hasattr(self.llm, name):
                getattr(self.llm, name)()
        changes: dict[str, Any] = {"additional_kwargs": additional, "max_tokens": None, "is_chat_model": chat}
        if not chat:
            changes["tokenizer"] = None  # it would count the text's tokens to set max_tokens
        llm = self.llm.model_copy(update=changes)
        asked = [ChatMessage(role="user", content=text)] if chat else text
        return SimpleNamespace(llm=llm, chat=chat, asked=asked, kwargs=given)

    def _finished(
        self,
        gathered: Any,
        prompted: Prompted,
        blend: BlendOptions | None,
        call: SimpleNamespace,
        *,
        streamed: bool,
    ) -> Completion:
        stops = bool(call.kwargs.get("stop") or call.llm.additional_kwargs.get("stop"))
        return self.blender.finished(gathered, prompted, streamed=streamed, blend=blend, stops=stops)


def _merged(*bodies: Mapping[str, Any] | None, ours: bool) -> dict[str, Any]:
    """One body; the last, which is ours, wins.

    Of kv_transfer_params only what the prompt itself needs does, and the rest where this very answer was given its own
    BlendOptions (`ours`): what the user's constructor says about policy or ratio is meant.
    """
    found: dict[str, Any] = {}
    for body in bodies:
        old, new = found.get("kv_transfer_params", {}), (body or {}).get("kv_transfer_params") or {}
        found |= body or {}
        if old or new:
            found["kv_transfer_params"] = old | new if ours else new | old | {k: new[k] for k in _NEEDED if k in new}
    return found


@contextmanager
def _closing(llm: LLM) -> Iterator[None]:
    """Close the connection of a stream that is left."""
    if isinstance(llm, EngineLLM):
        yield
        return
    watched = Watched(llm._get_client())  # type: ignore[attr-defined]
    object.__setattr__(llm, "_get_client", lambda: watched)  # this copy's own
    try:
        yield
    finally:
        watched.close_streams()


@asynccontextmanager
async def _aclosing(llm: LLM) -> AsyncIterator[None]:
    """Async twin of _closing, with _advice."""
    if isinstance(llm, EngineLLM):
        yield
        return
    watched = Watched(llm._get_aclient())  # type: ignore[attr-defined]
    object.__setattr__(llm, "_get_aclient", lambda: watched)
    with _advice():
        try:
            yield
        finally:
            await watched.aclose_streams()


@contextmanager
def _advice() -> Iterator[None]:
    """Add to a client's error what it means here; it stays the error that the user's program knows."""
    try:
        yield
    except Exception as problem:
        if type(problem).__name__ in _DOWN:
            problem.add_note("The vLLM server gave no answer. Retrieval still works; start the server and ask again.")
        raise
