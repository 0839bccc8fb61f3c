"""Streams of the user's own openai client, so that leaving an answer early stops its computation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class Watched:
    """An openai client that remembers the streams which it gives.

    LlamaIndex drops a stream that nobody reads any more, and the connection then stays open until Python collects it:
    the server would go on computing.

    Args:
        client: The user's client, sync or async.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._streams: list[Any] = []
        self.completions = _Watching(client.completions, self._streams)
        self.chat = SimpleNamespace(completions=_Watching(client.chat.completions, self._streams))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def close_streams(self) -> None:
        """Close the connections of a sync client's streams. Safe after their end."""
        while self._streams:
            self._streams.pop().close()

    async def aclose_streams(self) -> None:
        """Async twin of close_streams, for an async client."""
        while self._streams:
            await self._streams.pop().close()


class _Watching:
    def __init__(self, real: Any, streams: list[Any]) -> None:
        self._real, self._streams = real, streams

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create(self, **request: Any) -> Any:
        response = self._real.create(**request)
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
