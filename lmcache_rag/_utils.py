"""Helpers that several modules share: imports, async from sync, text that a screen can show."""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, get_args

from lmcache_rag.errors import ConfigError, OptionalDependencyError

if TYPE_CHECKING:
    from lmcache_rag.engines.base import BlendOptions, Completion, QueryPrompt, Sampling, StreamEvent


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Import without garbage collection: the many objects that torch and transformers make on import stay alive.

    Later collections skip them too (gc.freeze). Measured with torch 2.13 and transformers 5.24: the imports take
    about a sixth less time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.freeze()
            gc.enable()


def common_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many first elements two sequences have in common."""
    both = min(len(one), len(other))
    if one[:both] == other[:both]:
        return both
    return next(at for at in range(both) if one[at] != other[at])


def one_of(kind: Any, setting: str, name: str) -> Any:
    """A setting's value, which is one of the words of a Literal.

    Raises:
        ConfigError: It is none of them.
    """
    if name not in get_args(kind):
        raise ConfigError(f"{setting} is {name!r}.", remedy=f"It is one of {', '.join(get_args(kind))}.")
    return name


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import what an extra installs: a package that is missing is reported with the command that installs it.

    Raises:
        OptionalDependencyError: It is missing.
    """
    try:
        yield
    except ModuleNotFoundError as problem:
        package = (problem.name or "").partition(".")[0]
        if package in ("", "lmcache_rag"):
            raise
        raise OptionalDependencyError(package, extra) from problem


T = TypeVar("T")


async def iterate_in_thread(iterator: Iterator[T]) -> AsyncIterator[T]:
    """Drive a blocking iterator from an event loop. Leaving early closes it, after the step that is under way."""
    done = object()
    step: asyncio.Future[object] | None = None
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, iterator, done))
            # Not cancelled with us: its thread continues, and a generator that runs cannot be closed.
            item = await asyncio.shield(step)
            if item is done:
                return
            yield item  # type: ignore[misc]
    finally:
        if step is not None and not step.done():
            with suppress(Exception):
                await asyncio.shield(step)
        if close := getattr(iterator, "close", None):
            await asyncio.shield(asyncio.to_thread(close))


class Streams(Protocol):
    """A class that AsyncFromStream can be mixed into: it answers piece by piece, blocking."""

    def stream(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> Iterator[StreamEvent]:
        """Answer one prompt piece by piece; the last piece is a Completion."""
        ...


class AsyncFromStream:
    """Mixin: agenerate and astream from stream."""

    async def agenerate(self: Streams, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> Completion:
        """Async version of generate. Cancelling it stops the computation."""
        last: StreamEvent | None = None
        async for event in iterate_in_thread(self.stream(prompt, sampling, blend)):
            last = event
        return last  # type: ignore[return-value]

    async def astream(
        self: Streams, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions
    ) -> AsyncIterator[StreamEvent]:
        """Async version of stream."""
        async for event in iterate_in_thread(self.stream(prompt, sampling, blend)):
            yield event


_SURROGATE = re.compile("[\ud800-\udfff]")


def well_formed(text: str) -> str:
    """The text as valid Unicode, which tokenizers and databases need: two halves of a character become one again.

    A half without the other, and a byte of another encoding from a terminal, become U+FFFD, as in documents.
    """
    if _SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# A document or an answer may contain terminal control sequences; they are shown, not executed.
_CONTROLS = {n: chr(0x2400 + n) for n in range(0x20) if chr(n) not in "\n\t"}
_CONTROLS |= dict.fromkeys(range(0x7F, 0xA0), "\N{REPLACEMENT CHARACTER}")


def clean(text: str) -> str:
    """Text that can be written to any terminal."""
    return text.translate(_CONTROLS).encode("utf-8", "backslashreplace").decode()
