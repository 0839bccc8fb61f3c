"""The user's own langchain_openai object, copied for one question so that token ids go out and statistics come back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from langchain_core.messages import AIMessageChunk
from langchain_core.outputs import ChatGenerationChunk, GenerationChunk
from pydantic import PrivateAttr

from .call import Call
from .taps import AsyncTap, Tap

_classes: dict[type[Any], type[Any]] = {}  # made once each: pydantic takes its time

Kind: TypeAlias = Literal["chat", "completions"]


def kind_of(model: Any) -> Kind | None:
    """Which API a langchain_openai object asks, or None where it is none.

    By name: the package need not be installed, and what derives from its classes counts too.
    """
    names = {cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("langchain_openai.")}
    return "chat" if "BaseChatOpenAI" in names else "completions" if "BaseOpenAI" in names else None


def for_call(model: Any, call: Call, *, max_tokens: int | None) -> Any:
    """A copy of the model for one question. Callbacks, tags, sampling, retries and clients stay the model's own.

    Args:
        model: The user's.
        call: The question.
        max_tokens: In place of the model's own; None leaves it.
    """
    changed: dict[str, Any] = {
        "client": Tap(model.client, call, model.extra_body),
        "async_client": AsyncTap(model.async_client, call, model.extra_body),
    }
    if max_tokens is not None:
        changed["max_tokens"] = max_tokens
    if kind_of(model) == "chat":
        changed["use_responses_api"] = False  # some models' names alone would route to the other API
    copy = model.model_copy(update=changed)
    private = {**(copy.__pydantic_private__ or {}), "_call": call}
    object.__setattr__(copy, "__class__", _blended(type(model)))
    object.__setattr__(copy, "__pydantic_private__", private)
    return copy


def _blended(model: type[Any]) -> type[Any]:
    """The model's class with statistics added; it keeps its name, by which traces know it."""
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
    return _classes.setdefault(
        model, type(model.__name__, (_BlendedChat if is_chat else _BlendedText, _Blended, model), facts)
    )


class _Blended:
    """What both kinds have in common."""

    _call: Call
    if TYPE_CHECKING:

        def _last(self) -> Any: ...

    # LangChain looks for `run_manager` in these signatures: without it a call's keywords would be dropped.
    def _generate(self, asked: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
        return self._told(super()._generate(asked, stop, run_manager, **kwargs))  # type: ignore[misc]

    async def _agenerate(self, asked: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
        return self._told(await super()._agenerate(asked, stop, run_manager, **kwargs))  # type: ignore[misc]

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        yield from super()._stream(*args, **kwargs)  # type: ignore[misc]
        self._call.finish()
        yield self._last()

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for chunk in super()._astream(*args, **kwargs):  # type: ignore[misc]
            yield chunk
        self._call.finish()
        yield self._last()

    def _get_ls_params(self, *args: Any, **kwargs: Any) -> Any:
        return {**super()._get_ls_params(*args, **kwargs), **self._call.params}  # type: ignore[misc]

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**super()._identifying_params, **self._call.params}  # type: ignore[misc]

    def _told(self, result: Any) -> Any:
        self._call.finish()
        for generation in _flat(result.generations):
            generation.generation_info = {**(generation.generation_info or {}), **self._call.metadata}
            if (message := getattr(generation, "message", None)) is not None:
                message.response_metadata = {**message.response_metadata, **self._call.metadata}
        return result


class _BlendedText:
    _call: Call

    def _last(self) -> GenerationChunk:
        return GenerationChunk(text="", generation_info=self._call.metadata)


class _BlendedChat:
    _call: Call

    def _last(self) -> ChatGenerationChunk:
        facts = self._call.metadata
        return ChatGenerationChunk(
            message=AIMessageChunk(content="", response_metadata=facts), generation_info=facts or None
        )

    def _get_llm_string(self, *args: Any, **kwargs: Any) -> str:
        return f"{super()._get_llm_string(*args, **kwargs)}---{sorted(self._call.params.items())}"  # type: ignore[misc]


def _flat(generations: list[Any]) -> list[Any]:
    return [one for each in generations for one in (each if isinstance(each, list) else [each])]
