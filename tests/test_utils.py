"""A blocking iterator in an event loop, left early; texts that are not valid Unicode."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from lmcache_rag._utils import iterate_in_thread, well_formed


class Source:
    """Pieces of which each waits to be let go."""

    def __init__(self) -> None:
        self.begun, self.go_on, self.closed = threading.Event(), threading.Event(), threading.Event()

    def pieces(self) -> Iterator[int]:
        try:
            for number in range(3):
                self.begun.set()
                assert self.go_on.wait(60)
                yield number
        finally:
            self.closed.set()


async def read(source: Source) -> list[int]:
    return [number async for number in iterate_in_thread(source.pieces())]


async def test_all_items_come_and_the_iterator_is_closed() -> None:
    source = Source()
    source.go_on.set()
    assert await read(source) == [0, 1, 2]
    assert source.closed.is_set()


async def test_cancelled_before_an_item_it_closes_after_it() -> None:
    source = Source()
    task = asyncio.create_task(read(source))
    assert await asyncio.to_thread(source.begun.wait, 60)
    task.cancel()
    ended, _ = await asyncio.wait([task], timeout=0.3)
    assert not ended  # a generator that runs cannot be closed
    source.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.closed.is_set()


def test_halves_of_a_character_become_one_again() -> None:
    assert well_formed("a \ud83d\ude00 b") == "a \N{GRINNING FACE} b"
    assert well_formed("\ude00\ud83d \udce9") == "\ufffd\ufffd \ufffd"
    assert well_formed("日本 \N{GRINNING FACE}") == "日本 \N{GRINNING FACE}"
