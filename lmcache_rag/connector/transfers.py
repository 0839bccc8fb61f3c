"""KV transfers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lmcache_rag.connector.plan import BlendPlan, Match


class Link(Protocol):
    """How KV is loaded; see lmcache_rag.connector.compat_lmcache.WorkerLink."""

    @property
    def is_healthy(self) -> bool:
        """Whether the server answers."""
        ...

    def submit_exact(self, plan: BlendPlan) -> Any:
        """Ask for the exact prefix behind what vLLM holds, plan.local to plan.exact."""
        ...

    def submit_matches(self, plan: BlendPlan, matches: Sequence[Match]) -> Any:
        """Ask for chunk KV at its new positions: some of the plan's matches."""
        ...

    def give_back(self, plan: BlendPlan) -> None:
        """The exact prefix is not going to be asked for: the server need not keep it in memory for this plan."""
        ...

    @property
    def deadline(self) -> float:
        """Longest wait for an answer, in seconds."""
        ...

    def lost(self, since: float) -> bool:
        """Whether what was asked then, by time.monotonic(), and is not answered yet, is surely not going to be done."""
        ...

    def answered(self, future: Any, seconds: float) -> bool:
        """Whether the server has answered, waiting for it at most that long."""
        ...

    def there(self, future: Any) -> bool:
        """Whether the KV is there, or is not going to be."""
        ...

    def arrived(self, future: Any, seconds: float) -> bool:
        """Whether it came, waiting at most that long."""
        ...


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


@dataclass
class StoresHeldBack:
    """Worker: which requests' stores may be reported as done."""

    _held: set[str] = field(default_factory=set)

    def report(self, stored: Collection[str], in_use: Collection[str]) -> set[str]:
        """What of `stored`, and of what was held back before, may be reported while blocks of `in_use` are in use."""
        everyone = self._held | set(stored)
        self._held = everyone & set(in_use)
        return everyone - self._held


@dataclass
class FreedOnce:
    """Scheduler: which requests vLLM has freed already."""

    _ended: set[str] = field(default_factory=set)  # vLLM waits for a word of them
    _freed: set[str] = field(default_factory=set)  # had it, and there is another one to come

    def ends(self, request_id: str) -> None:
        """A request ended, and vLLM keeps its blocks until it hears that they are free."""
        self._ended.add(request_id)

    def stored(self, loaded: Collection[str], stored: Collection[str]) -> set[str]:
        """What of `stored` vLLM may hear, when it hears `loaded` first."""
        freed = self._ended & set(loaded)
        self._freed |= freed
        self._ended -= freed
        known = set(stored) & self._freed
        self._freed -= known
        self._ended -= set(stored)
        return set(stored) - known

    def __len__(self) -> int:
        return len(self._ended) + len(self._freed)
