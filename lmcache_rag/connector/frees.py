"""When vLLM may free the blocks of a request that ended while KV was loaded into them, or stored from them.

vLLM hears of a request whose exact prefix LMCache's connector loads, or that is blended in the background, both that
the load is done and that the stores are, in any order. It frees the blocks at the first word and fails an assertion at
the second, which ends the engine. So a worker says nothing of stores while blocks are still being written to, and the
scheduler hears the word that comes second no more.

LMCache's adapter also reports a request as stored while a later part of its prompt is still being read: a worker does
not pass that on either.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field


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
