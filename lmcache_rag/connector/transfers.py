"""Loads whose answer did not come in time: until it is known that nothing is written any more, their blocks are kept.

A worker that waits no longer computes the tokens itself. The server may still carry the load out, into blocks that by
then belong to somebody else.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lmcache_rag.connector.link import Link


@dataclass(frozen=True)
class Late:
    """Loads of one request that were not answered.

    Attributes:
        request_id: The request.
        blocks: Where they may still write.
        futures: The answers.
        since: When they were asked for, by time.monotonic().
    """

    request_id: str
    blocks: tuple[int, ...]
    futures: tuple[Any, ...]
    since: float


@dataclass
class LateLoads:
    """Worker side: what is still to come.

    Args:
        link: The server.
        pause: Seconds between two looks at whether the server is there.
    """

    link: Link
    pause: float = 1.0
    under_way: list[Late] = field(default_factory=list)
    _new: list[Late] = field(default_factory=list)
    _looked: float = 0.0

    def add(self, late: Late) -> None:
        """A load is not waited for any more."""
        self.under_way.append(late)
        self._new.append(late)

    def take(self) -> tuple[dict[str, tuple[int, ...]], list[str]]:
        """Since the last call: (blocks of requests that came to it, requests that are over)."""
        new, self._new = {late.request_id: late.blocks for late in self._new}, []
        if not self.under_way:
            return new, []
        now = time.monotonic()
        look = now - self._looked >= self.pause
        self._looked = now if look else self._looked
        over = [late for late in self.under_way if self._answered(late) or (look and self.link.lost(late.since))]
        self.under_way = [late for late in self.under_way if late not in over]
        return new, [late.request_id for late in over]

    def _answered(self, late: Late) -> bool:
        return all(self.link.answered(future, 0.0) and self.link.there(future) for future in late.futures)

    @property
    def request_ids(self) -> set[str]:
        """Whose blocks may still be written to."""
        return {late.request_id for late in self.under_way}


class Pool(Protocol):
    """What is used of vLLM's BlockPool."""

    blocks: Sequence[Any]

    def touch(self, blocks: Sequence[Any]) -> None:
        """Keep blocks from being given away."""
        ...

    def free_blocks(self, blocks: Sequence[Any]) -> None:
        """Let go of them."""
        ...


@dataclass
class HeldBlocks:
    """Scheduler side: keeps those blocks, whatever becomes of their request. Each rank says for itself when it is over.

    Args:
        pool: vLLM's blocks; None as long as they are not known.
    """

    pool: Callable[[], Pool | None]
    _held: dict[str, list[Any]] = field(default_factory=dict)
    _ranks: Counter[str] = field(default_factory=Counter)

    def add(self, request_id: str, blocks: Sequence[int]) -> None:
        """A rank's load of these blocks is late."""
        pool = self.pool()
        if pool is None:
            return
        self._ranks[request_id] += 1
        if request_id not in self._held:
            self._held[request_id] = [pool.blocks[number] for number in blocks]
            pool.touch(self._held[request_id])

    def over(self, request_id: str) -> None:
        """A rank's load is over."""
        if request_id not in self._held:
            return
        self._ranks[request_id] -= 1
        if self._ranks[request_id] <= 0:
            del self._ranks[request_id]
            pool = self.pool()
            if pool is not None:
                pool.free_blocks(self._held.pop(request_id)[::-1])

    def __len__(self) -> int:
        return len(self._held)
