"""An engine as a LlamaIndex LLM, for programs that have no server, and for the parts that ask without passages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import lru_cache
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM

from lmcache_rag.engines.base import BlendOptions, Completion, Sampling, StreamEvent, TextDelta
from lmcache_rag.errors import ConfigError
from lmcache_rag.prompt import PromptBuilder, PromptFormat
from lmcache_rag.workspace import Workspace

from ..blender import Blender, Prompted
from ..resolve import as_workspace
from .history import conversation

# No words of ours: the conversation alone, in the model's own chat template.
_PLAIN: dict[str, Any] = {"instruction": "", "context_head": "\n", "question": "{question}"}
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed")


class EngineLLM(LLM):
    """Answers through an engine of ours. A plain prompt is one user's message, computed in full.

    Args:
        blender: Over the engine.
        callback_manager: Hears of each call.
    """

    _blender: Blender = PrivateAttr()
    _prompts: Callable[[str], PromptBuilder] = PrivateAttr()

    def __init__(self, blender: Blender, *, callback_manager: CallbackManager | None = None) -> None:
        super().__init__(callback_manager=callback_manager or CallbackManager([]))
        self._blender = blender
        info = replace(blender.engine.info, kv_block=1)  # so nothing is filled up to whole blocks
        tokenizer, tenant = blender.engine.tokenizer, blender.prompts.tenant
        # Making one takes time, and a program has few system texts.
        self._prompts = lru_cache(maxsize=8)(
            lambda system: PromptBuilder(tokenizer, info, format=PromptFormat(system=system, **_PLAIN), tenant=tenant)
        )

    @classmethod
    def of(cls, source: Any) -> EngineLLM:
        """Over whatever lmcache_rag.integrations.resolve.as_workspace takes; for Settings.llm, say."""
        return source if isinstance(source, EngineLLM) else cls(Blender(workspace_of(source)))

    @property
    def blender(self) -> Blender:
        """What answers."""
        return self._blender

    @classmethod
    def class_name(cls) -> str:
        """Class name."""
        return "LMCacheEngineLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """Facts of the model."""
        info = self._blender.engine.info
        return LLMMetadata(
            context_window=info.context_length,
            num_output=self._blender.sampling.max_tokens,
            is_chat_model=True,
            model_name=info.model,
        )

    # -- text ---------------------------------------------------------------------------------------------------

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer. `prompted` and `blend` answer a prompt with passages; then `prompt` only shows it to callbacks."""
        made, options = self._asked([ChatMessage(content=prompt)], kwargs)
        return _response(self._blender.answer(made, **options))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer piece by piece; see complete."""
        made, options = self._asked([ChatMessage(content=prompt)], kwargs)
        return _responses(self._blender.stream(made, **options))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Async twin of complete."""
        made, options = self._asked([ChatMessage(content=prompt)], kwargs)
        return _response(await self._blender.aanswer(made, **options))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Async twin of stream_complete."""
        made, options = self._asked([ChatMessage(content=prompt)], kwargs)
        return _aresponses(self._blender.astream(made, **options))

    # -- messages -----------------------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation that ends with a user's message."""
        made, options = self._asked(messages, kwargs)
        return _as_chat(_response(self._blender.answer(made, **options)))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer piece by piece; see chat."""
        made, options = self._asked(messages, kwargs)

        def pieces() -> ChatResponseGen:
            for part in _responses(self._blender.stream(made, **options)):
                yield _as_chat(part)

        return pieces()

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Async twin of chat."""
        made, options = self._asked(messages, kwargs)
        return _as_chat(_response(await self._blender.aanswer(made, **options)))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Async twin of stream_chat."""
        made, options = self._asked(messages, kwargs)

        async def pieces() -> ChatResponseAsyncGen:
            async for part in _aresponses(self._blender.astream(made, **options)):
                yield _as_chat(part)

        return pieces()

    # -- inside -------------------------------------------------------------------------------------------------

    def _asked(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> tuple[Prompted, dict[str, Any]]:
        """(prompt, options of the Blender)."""
        given = dict(kwargs)
        made: Prompted | None = given.pop("prompted", None)
        blend: BlendOptions | None = given.pop("blend", None)
        if unknown := given.keys() - set(_SAMPLING):
            raise ConfigError(
                f"The engine does not know {', '.join(sorted(unknown))}.", remedy=f"It takes {', '.join(_SAMPLING)}."
            )
        if isinstance(stop := given.get("stop"), str | list):
            given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling: Sampling = replace(self._blender.sampling, **given)
        return made or self._plain(messages), {"sampling": sampling, "blend": blend}

    def _plain(self, messages: Sequence[ChatMessage]) -> Prompted:
        """The conversation as it stands."""
        system = "\n\n".join(str(m.content) for m in messages if m.role == MessageRole.SYSTEM and m.content)
        history, question = conversation([m for m in messages if m.role != MessageRole.SYSTEM])
        return Prompted(self._prompts(system).query([], question, history), question, (), (), ())


def workspace_of(source: Any) -> Workspace:
    """The workspace of anything that names one; see as_workspace. Of an EngineLLM, its own."""
    return source.blender.workspace if isinstance(source, EngineLLM) else as_workspace(source)


def _response(done: Completion) -> CompletionResponse:
    return CompletionResponse(text=done.text, raw=done)


def _responses(events: Iterator[StreamEvent]) -> CompletionResponseGen:
    """What LlamaIndex calls a stream of completions; the last one carries our Completion as `raw`."""
    text = ""
    for event in events:
        if isinstance(event, TextDelta):
            text += event.text
            yield CompletionResponse(text=text, delta=event.text)
        else:
            yield CompletionResponse(text=event.text, delta="", raw=event)


async def _aresponses(events: AsyncIterator[StreamEvent]) -> CompletionResponseAsyncGen:
    text = ""
    async with aclosing(events):  # type: ignore[type-var] # it is a generator
        async for event in events:
            if isinstance(event, TextDelta):
                text += event.text
                yield CompletionResponse(text=text, delta=event.text)
            else:
                yield CompletionResponse(text=event.text, delta="", raw=event)


def _as_chat(part: CompletionResponse) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=part.text)
    return ChatResponse(message=message, delta=part.delta, raw=part.raw)
