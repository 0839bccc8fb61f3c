"""KV transfers with LMCache: the loader's Protocol, loads that timed out, and when vLLM may free a request's blocks.

Of the loader only the Protocol is here (`KVLoader`); what loads is LMCacheLoader in lmcache_transfers.py.

A worker that stops waiting for a load computes the tokens itself. The server may still carry the load out, into blocks
that vLLM may have given to another request by then. So the blocks of such a load are fenced until nothing can be
written to them any more.

vLLM receives two completion notices for a request whose exact prefix LMCache's connector loads, or that is blended in
the background: that its load is done (finished_recving) and that its stores are (finished_sending), in any order. It
frees the blocks at the first and fails an assertion at the second, which ends the engine. So a worker holds
finished_sending back while blocks are still being written to (`FinishedGate`), and the scheduler drops the second
notice (`FinishedOnce`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lmcache_rag.connector.metadata import BlendPlan, Match


# -- worker -----------------------------------------------------------------------------------------------------------


class KVLoader(Protocol):
    """Loads KV from LMCache; see lmcache_rag.connector.lmcache_transfers.LMCacheLoader."""

    @property
    def is_healthy(self) -> bool:
        """Whether the server responds."""
        ...

    def submit_exact(self, plan: BlendPlan) -> Any:
        """Request the exact prefix that vLLM does not hold, plan.local to plan.exact; returns a future."""
        ...

    def submit_matches(self, plan: BlendPlan, matches: Sequence[Match]) -> Any:
        """Request chunk KV at its new positions: some of the plan's matches; returns a future."""
        ...

    def give_back(self, plan: BlendPlan) -> None:
        """Release the read locks of an exact prefix that is not going to be requested."""
        ...

    @property
    def deadline(self) -> float:
        """Longest wait for a load, in seconds."""
        ...

    def lost(self, since: float) -> bool:
        """Whether a request sent at `since` (time.monotonic()) and not answered yet will never be carried out."""
        ...

    def answered(self, future: Any, seconds: float) -> bool:
        """Whether the server has answered, waiting at most that long."""
        ...

    def there(self, future: Any) -> bool:
        """Whether the copy of the KV is complete, or none is going to be made."""
        ...

    def arrived(self, future: Any, seconds: float) -> bool:
        """Whether the KV was loaded, waiting at most that long."""
        ...


@dataclass(frozen=True)
class TimedOutLoad:
    """Loads of one request that were not answered in time.

    Attributes:
        request_id: The request.
        blocks: Blocks that they may still write to.
        futures: Their futures.
        since: When they were requested, by time.monotonic().
    """

    request_id: str
    blocks: tuple[int, ...]
    futures: tuple[Any, ...]
    since: float


@dataclass
class TimedOutLoads:
    """Worker: loads that timed out and may still write to their blocks.

    Args:
        loader: Loads KV.
        pause: Seconds between two checks whether the server still runs.
    """

    loader: KVLoader
    pause: float = 1.0
    pending: list[TimedOutLoad] = field(default_factory=list)
    _new: list[TimedOutLoad] = field(default_factory=list)
    _checked: float = 0.0

    def add(self, load: TimedOutLoad) -> None:
        """Track a load that timed out."""
        self.pending.append(load)
        self._new.append(load)

    def take(self) -> tuple[dict[str, tuple[int, ...]], list[str]]:
        """Since the last call: (blocks of requests with a new timed-out load, requests whose loads have ended)."""
        new, self._new = {load.request_id: load.blocks for load in self._new}, []
        if not self.pending:
            return new, []
        now = time.monotonic()
        check = now - self._checked >= self.pause
        self._checked = now if check else self._checked
        ended = [load for load in self.pending if self._complete(load) or (check and self.loader.lost(load.since))]
        self.pending = [load for load in self.pending if load not in ended]
        return new, [load.request_id for load in ended]

    def _complete(self, load: TimedOutLoad) -> bool:
        return all(self.loader.answered(future, 0.0) and self.loader.there(future) for future in load.futures)

    @property
    def request_ids(self) -> set[str]:
        """Requests whose blocks may still be written to."""
        return {load.request_id for load in self.pending}


@dataclass
class FinishedGate:
    """Worker: holds finished_sending back while a request's blocks are still in use.

    LMCache's adapter reports a request as stored even while a later part of its prompt is still being read: that is
    held back too.
    """

    _held: set[str] = field(default_factory=set)

    def report(self, stored: Collection[str], in_use: Collection[str]) -> set[str]:
        """Which of `stored`, and of those held back before, to report while the blocks of `in_use` are in use."""
        known = self._held | set(stored)
        self._held = known & set(in_use)
        return known - self._held


# -- scheduler --------------------------------------------------------------------------------------------------------


class BlockPool(Protocol):
    """The part of vLLM's BlockPool that is used here."""

    blocks: Sequence[Any]

    def touch(self, blocks: Sequence[Any]) -> None:
        """Take a reference to each block."""
        ...

    def free_blocks(self, blocks: Sequence[Any]) -> None:
        """Drop a reference to each block."""
        ...


@dataclass
class FencedBlocks:
    """Scheduler: keeps the blocks of timed-out loads allocated, even after their request has ended.

    Attributes:
        pool: vLLM's block pool; None until vLLM has bound it.
    """

    pool: BlockPool | None = None
    _fenced: dict[str, list[Any]] = field(default_factory=dict)
    _ranks: Counter[str] = field(default_factory=Counter)

    def add(self, request_id: str, blocks: Sequence[int]) -> None:
        """A rank's load into these blocks timed out."""
        if self.pool is None:
            return
        self._ranks[request_id] += 1
        if request_id not in self._fenced:
            self._fenced[request_id] = [self.pool.blocks[number] for number in blocks]
            self.pool.touch(self._fenced[request_id])

    def release(self, request_id: str) -> None:
        """A rank's load has ended; after the last rank's the blocks are freed."""
        if request_id not in self._fenced:
            return
        self._ranks[request_id] -= 1
        if self._ranks[request_id] <= 0:
            del self._ranks[request_id]
            if self.pool is not None:
                self.pool.free_blocks(self._fenced.pop(request_id)[::-1])

    def __len__(self) -> int:
        return len(self._fenced)


@dataclass
class FinishedOnce:
    """Scheduler: passes on only the first of a request's completion notices, at which vLLM frees its blocks."""

    _ended: set[str] = field(default_factory=set)  # vLLM waits for a notice
    _freed: set[str] = field(default_factory=set)  # vLLM had one, and another one will come

    def ends(self, request_id: str) -> None:
        """A request ended, and vLLM keeps its blocks until a completion notice."""
        self._ended.add(request_id)

    def stored(self, loaded: Collection[str], stored: Collection[str]) -> set[str]:
        """Which of `stored` vLLM may receive as finished_sending, after `loaded` as finished_recving."""
        freed = self._ended & set(loaded)
        self._freed |= freed
        self._ended -= freed
        known = set(stored) & self._freed
        self._freed -= known
        self._ended -= set(stored)
        return set(stored) - known

    def __len__(self) -> int:
        return len(self._ended) + len(self._freed)
