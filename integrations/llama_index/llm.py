"""An engine as a LlamaIndex LLM, and LlamaIndex's chat messages as turns of a prompt."""

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
from lmcache_rag.errors import ConfigError, PromptError
from lmcache_rag.prompt import PromptBuilder, PromptFormat, Turn
from lmcache_rag.workspace import Workspace

from ..blender import Blender, BlendPrompt, counts, join_turns
from ..kv_registry import as_workspace

# No text of ours: the conversation alone, in the model's own chat template.
_PLAIN: dict[str, Any] = {"instruction": "", "context_head": "\n", "question": "{question}"}
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed")


class EngineLLM(LLM):
    """Answers through an engine, for programs without a server. A plain prompt is one user message, computed in full.

    Args:
        blender: Has the engine.
        callback_manager: Receives the events of each call.
    """

    _blender: Blender = PrivateAttr()
    _prompts: Callable[[str], PromptBuilder] = PrivateAttr()

    def __init__(self, blender: Blender, *, callback_manager: CallbackManager | None = None) -> None:
        super().__init__(callback_manager=callback_manager or CallbackManager([]))
        self._blender = blender
        info = replace(blender.engine.info, kv_block=1)  # so that nothing is padded to whole blocks
        tokenizer, tenant = blender.engine.tokenizer, blender.prompts.tenant
        # A builder takes time to make, and a program has few system texts.
        self._prompts = lru_cache(maxsize=8)(
            lambda system: PromptBuilder(tokenizer, info, format=PromptFormat(system=system, **_PLAIN), tenant=tenant)
        )

    @classmethod
    def of(cls, source: Any) -> EngineLLM:
        """Make one of anything that as_workspace takes, for example for Settings.llm."""
        return source if isinstance(source, EngineLLM) else cls(Blender(workspace_of(source)))

    @property
    def blender(self) -> Blender:
        """The Blender that answers."""
        return self._blender

    @classmethod
    def class_name(cls) -> str:
        """Class name."""
        return "LMCacheEngineLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """Properties of the model."""
        info = self._blender.engine.info
        return LLMMetadata(
            context_window=info.context_length,
            num_output=self._blender.sampling.max_tokens,
            is_chat_model=True,
            model_name=info.model,
        )

    # -- text -----------------------------------------------------------------------------------------------------

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a text; with `blend_prompt` (and `blend`), that prompt: `prompt` then only goes to callbacks."""
        request, options = self._parse([ChatMessage(content=prompt)], kwargs)
        return _response(self._blender.answer(request, **options))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer piece by piece; see complete."""
        request, options = self._parse([ChatMessage(content=prompt)], kwargs)
        return _responses(self._blender.stream(request, **options))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Async version of complete."""
        request, options = self._parse([ChatMessage(content=prompt)], kwargs)
        return _response(await self._blender.aanswer(request, **options))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Async version of stream_complete."""
        request, options = self._parse([ChatMessage(content=prompt)], kwargs)
        return _aresponses(self._blender.astream(request, **options))

    # -- messages -------------------------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation that ends with a user's message."""
        request, options = self._parse(messages, kwargs)
        return _as_chat(_response(self._blender.answer(request, **options)))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer piece by piece; see chat."""
        request, options = self._parse(messages, kwargs)

        def pieces() -> ChatResponseGen:
            for part in _responses(self._blender.stream(request, **options)):
                yield _as_chat(part)

        return pieces()

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Async version of chat."""
        request, options = self._parse(messages, kwargs)
        return _as_chat(_response(await self._blender.aanswer(request, **options)))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Async version of stream_chat."""
        request, options = self._parse(messages, kwargs)

        async def pieces() -> ChatResponseAsyncGen:
            async for part in _aresponses(self._blender.astream(request, **options)):
                yield _as_chat(part)

        return pieces()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _parse(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> tuple[BlendPrompt, dict[str, Any]]:
        """Return (prompt, options for the Blender)."""
        options = dict(kwargs)
        blend_prompt: BlendPrompt | None = options.pop("blend_prompt", None)
        blend: BlendOptions | None = options.pop("blend", None)
        if unknown := options.keys() - set(_SAMPLING):
            raise ConfigError(
                f"The engine does not know {', '.join(sorted(unknown))}.", remedy=f"It takes {', '.join(_SAMPLING)}."
            )
        if isinstance(stop := options.get("stop"), str | list):
            options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling: Sampling = replace(self._blender.sampling, **options)
        return blend_prompt or self._plain(messages), {"sampling": sampling, "blend": blend}

    def _plain(self, messages: Sequence[ChatMessage]) -> BlendPrompt:
        """Build the prompt of a conversation without passages."""
        system = "\n\n".join(str(m.content) for m in messages if m.role == MessageRole.SYSTEM and m.content)
        history, question = conversation([m for m in messages if m.role != MessageRole.SYSTEM])
        return BlendPrompt(self._prompts(system).query([], question, history), question, (), (), ())


def workspace_of(source: Any) -> Workspace:
    """Return the workspace of anything that as_workspace takes, or of an EngineLLM."""
    return source.blender.workspace if isinstance(source, EngineLLM) else as_workspace(source)


class EngineAnswer(dict[str, Any]):
    """A finished answer as a response's `raw`: a dictionary like that of OpenAI's API, for callback handlers.

    Attributes:
        completion: The engine's answer.
    """

    completion: Completion

    @classmethod
    def of(cls, done: Completion) -> EngineAnswer:
        """Make one. `usage` has the engine's own counts, so that a TokenCountingHandler need not estimate them."""
        prompt, answer = done.stats.prompt_tokens, len(done.token_ids)
        made = cls(
            usage={"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer},
            finish_reason=done.finish_reason,
            lmcache_rag={"stats": counts(done.stats), "warnings": list(done.warnings)},
        )
        made.completion = done
        return made


def _response(done: Completion) -> CompletionResponse:
    return CompletionResponse(text=done.text, raw=EngineAnswer.of(done))


def _responses(events: Iterator[StreamEvent]) -> CompletionResponseGen:
    """Convert events to LlamaIndex's stream of responses; the last one has an EngineAnswer as `raw`."""
    text = ""
    for event in events:
        if isinstance(event, TextDelta):
            text += event.text
            yield CompletionResponse(text=text, delta=event.text)
        else:
            yield CompletionResponse(text=event.text, delta="", raw=EngineAnswer.of(event))


async def _aresponses(events: AsyncIterator[StreamEvent]) -> CompletionResponseAsyncGen:
    text = ""
    async with aclosing(events):  # type: ignore[type-var] # it is a generator
        async for event in events:
            if isinstance(event, TextDelta):
                text += event.text
                yield CompletionResponse(text=text, delta=event.text)
            else:
                yield CompletionResponse(text=event.text, delta="", raw=EngineAnswer.of(event))


def _as_chat(part: CompletionResponse) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=part.text)
    return ChatResponse(message=message, delta=part.delta, raw=part.raw)


# -- conversations ----------------------------------------------------------------------------------------------------


def _turns(messages: Sequence[ChatMessage | Turn]) -> list[Turn]:
    """Convert messages to turns that begin with a user's and alternate, as chat templates require.

    Messages of other roles (system, tool) and empty ones are left out, and so is an answer at the head: a memory that
    was cut can begin with one.
    """
    turns: list[Turn] = []
    for message in messages:
        content = str(message.content or "")
        role = message.role.value if isinstance(message, ChatMessage) else message.role
        if role in ("user", "assistant") and content.strip() and (turns or role == "user"):
            turns.append(Turn("user" if role == "user" else "assistant", content))
    return join_turns(turns)


def conversation(messages: Sequence[ChatMessage | Turn], question: str = "") -> tuple[list[Turn], str]:
    """Return (earlier turns, the question at the end). An unanswered question becomes a part of the next one.

    Args:
        messages: The conversation.
        question: The new question; empty: the last message is the question.

    Raises:
        PromptError: The conversation does not end with a user's message.
    """
    if question and not question.strip():
        raise PromptError("The question is empty.", remedy="Ask something.")
    turns = _turns([*messages, Turn("user", question)])
    if not turns or turns[-1].role != "user":
        raise PromptError("The conversation does not end with a user's message.", remedy="Ask something.")
    return turns[:-1], turns[-1].content
