"""Stand between a langchain_openai object and its openai client: add to requests, see raw answers.

LangChain drops what a server says beside the answer, so the statistics have to be taken here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from .call import Call


class Tap:
    """In place of `client.completions` or `client.chat.completions`.

    Args:
        real: What it stands for.
        call: The question.
        own: The `extra_body` of the model's constructor.
    """

    def __init__(self, real: Any, call: Call, own: Mapping[str, Any] | None) -> None:
        self._real, self._call, self._own = real, call, own

    def create(self, **given: Any) -> Any:
        """One request; a stream is handed on part by part."""
        response = self._real.create(**self._call.request(given, self._own))
        if given.get("stream"):
            return Parts(response, self._call)
        self._call.take(response)
        return response

    @property
    def with_raw_response(self) -> RawTap:
        """The same with headers."""
        return RawTap(self._real.with_raw_response, self._call, self._own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class RawTap(Tap):
    """In place of `….with_raw_response`."""

    def create(self, **given: Any) -> Any:
        """One request; the answer is in parse()."""
        return Raw(self._real.create(**self._call.request(given, self._own)), self._call, bool(given.get("stream")))


class AsyncTap(Tap):
    """The async twin of Tap."""

    async def create(self, **given: Any) -> Any:
        """One request; a stream is handed on part by part."""
        response = await self._real.create(**self._call.request(given, self._own))
        if given.get("stream"):
            return AsyncParts(response, self._call)
        self._call.take(response)
        return response

    @property
    def with_raw_response(self) -> AsyncRawTap:  # type: ignore[override]
        """The same with headers."""
        return AsyncRawTap(self._real.with_raw_response, self._call, self._own)


class AsyncRawTap(Tap):
    """The async twin of RawTap."""

    async def create(self, **given: Any) -> Any:
        """One request; the answer is in parse()."""
        response = await self._real.create(**self._call.request(given, self._own))
        return Raw(response, self._call, bool(given.get("stream")), AsyncParts)


class Raw:
    """A raw response whose parsed form is seen."""

    def __init__(self, real: Any, call: Call, streams: bool, parts: Any = None) -> None:
        self._real, self._call, self._streams = real, call, streams
        self._parts = parts or Parts

    def parse(self, *args: Any, **kwargs: Any) -> Any:
        """The answer."""
        parsed = self._real.parse(*args, **kwargs)
        if self._streams:
            return self._parts(parsed, self._call)
        self._call.take(parsed)
        return parsed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class Parts:
    """A stream whose parts are seen. Leaving it early closes the connection, and so stops the computation."""

    def __init__(self, real: Any, call: Call) -> None:
        self._real, self._call = real, call

    def __iter__(self) -> Iterator[Any]:
        try:
            for part in self._real:
                self._call.take(part)
                yield part
        finally:
            self._real.close()

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self._real.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class AsyncParts:
    """The async twin of Parts."""

    def __init__(self, real: Any, call: Call) -> None:
        self._real, self._call = real, call

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for part in self._real:
                self._call.take(part)
                yield part
        finally:
            await self._real.close()

    async def __aenter__(self) -> AsyncParts:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._real.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
