"""Answers as LlamaIndex expects them (a text, a generator, an async generator), with what was reused beside them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any


class Facts(dict[str, Any]):
    """What was reused; of a stream, empty until it has ended."""


class AnswerText(str):
    """An answer with its facts."""

    facts: Facts

    @classmethod
    def of(cls, text: str, facts: Facts) -> AnswerText:
        """Make one."""
        made = cls(text)
        made.facts = facts
        return made

    def __str__(self) -> str:
        return str.__str__(self)


class AnswerStream(Generator[str, None, None]):
    """The pieces of an answer, with its facts."""

    def __init__(self, pieces: Generator[str, None, None], facts: Facts) -> None:
        self._pieces, self.facts = pieces, facts

    def send(self, value: None) -> str:
        """The next piece."""
        return self._pieces.send(value)

    def throw(self, *problem: Any) -> str:
        """Raise where the pieces are made."""
        return self._pieces.throw(*problem)

    def close(self) -> None:
        """Stop the computation."""
        self._pieces.close()


class AsyncAnswerStream(AsyncGenerator[str, None]):
    """The pieces of an answer, with its facts."""

    def __init__(self, pieces: AsyncGenerator[str, None], facts: Facts) -> None:
        self._pieces, self.facts = pieces, facts

    async def asend(self, value: None) -> str:
        """The next piece."""
        return await self._pieces.asend(value)

    async def athrow(self, *problem: Any) -> str:
        """Raise where the pieces are made."""
        return await self._pieces.athrow(*problem)

    async def aclose(self) -> None:
        """Stop the computation."""
        await self._pieces.aclose()
