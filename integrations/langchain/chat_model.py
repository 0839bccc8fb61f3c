"""An engine of this library as a LangChain chat model, for one question."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import ConfigDict, Field

from lmcache_rag.engines.base import Completion, Sampling, StreamEvent
from lmcache_rag.errors import ConfigError

from .openai import BlendCall

if TYPE_CHECKING:
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun

_SAMPLING = frozenset(Sampling.__dataclass_fields__) - {"stop"}


class EngineModel(BaseChatModel):
    """Answers the one prompt that it was made for; the messages in its calls are for traces only."""

    if TYPE_CHECKING:
        call: BlendCall
    else:  # pydantic does not validate it
        call: Any = Field(exclude=True)
    model_config = ConfigDict(arbitrary_types_allowed=True)

    @property
    def _llm_type(self) -> str:
        return f"lmcache_rag-{self.call.blender.engine.info.engine}"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        sampling = self.call.blender.sampling
        return {"model": self.call.blender.engine.info.model, "sampling": repr(sampling), **self.call.params}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        info, sampling = self.call.blender.engine.info, self.call.blender.sampling
        params = LangSmithParams(
            ls_provider="lmcache_rag",
            ls_model_name=info.model,
            ls_model_type="chat",
            ls_temperature=sampling.temperature,
            ls_max_tokens=sampling.max_tokens,
        )
        if stop:
            params["ls_stop"] = stop
        return {**params, **self.call.params}  # type: ignore[typeddict-item]

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self.call
        done = call.blender.answer(call.prompt, sampling=self._sampling(stop, kwargs), blend=call.blend)
        return self._result(done)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self.call
        done = await call.blender.aanswer(call.prompt, sampling=self._sampling(stop, kwargs), blend=call.blend)
        return self._result(done)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self.call
        for event in call.blender.stream(call.prompt, sampling=self._sampling(stop, kwargs), blend=call.blend):
            yield self._chunk(event)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call = self.call
        events = call.blender.astream(call.prompt, sampling=self._sampling(stop, kwargs), blend=call.blend)
        async for event in events:
            yield self._chunk(event)

    def _sampling(self, stop: list[str] | None, kwargs: dict[str, Any]) -> Sampling:
        options = {name: value for name, value in kwargs.items() if value is not None and name != "stream"}
        if unknown := set(options) - _SAMPLING:
            raise ConfigError(
                f"The engine does not support {sorted(unknown)[0]!r}.",
                remedy=f"It supports stop, {', '.join(sorted(_SAMPLING))}.",
            )
        if stop:
            options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        return replace(self.call.blender.sampling, **options)

    def _result(self, done: Completion) -> ChatResult:
        message = AIMessage(done.text, response_metadata=self._metadata(done), usage_metadata=_usage(done))
        return ChatResult(generations=[ChatGeneration(message=message, generation_info=self.call.metadata)])

    def _chunk(self, event: StreamEvent) -> ChatGenerationChunk:
        if not isinstance(event, Completion):
            return ChatGenerationChunk(message=AIMessageChunk(content=event.text))
        message = AIMessageChunk(content="", response_metadata=self._metadata(event), usage_metadata=_usage(event))
        return ChatGenerationChunk(message=message)

    def _metadata(self, done: Completion) -> dict[str, Any]:
        self.call.done = done
        model = self.call.blender.engine.info.model
        return {"finish_reason": done.finish_reason, "model_name": model, **self.call.metadata}


def _usage(done: Completion) -> UsageMetadata:
    prompt, answer = done.stats.prompt_tokens, len(done.token_ids)
    return UsageMetadata(input_tokens=prompt, output_tokens=answer, total_tokens=prompt + answer)
