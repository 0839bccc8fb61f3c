"""Look-ups that nobody waits for any more. They must be heard to their end all the same, or their locks stay."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from typing import Protocol

from lmcache_rag.connector.plan import Match

log = logging.getLogger("lmcache_rag")

# A server that was restarted never answers an old look-up. LMCache's read locks end by themselves after so long.
ABANDONED_SECONDS = 300.0


class Lookup(Protocol):
    """A look-up under way; see lmcache_rag.connector.lmcache_client.BlendLookup."""

    request_id: str
    result: tuple[int, tuple[Match, ...]] | None

    def poll(self, seconds: float) -> bool:
        """Whether the result is there."""
        ...

    def release_prefix(self, start: int, end: int) -> None:
        """Give back read locks of exact prefix chunks."""
        ...

    def end_session(self) -> None:
        """Give back everything that was not loaded."""
        ...


@dataclass
class Abandoned:
    """Abandoned look-ups; times are in seconds, of any one clock."""

    _lookups: list[tuple[float, Lookup]] = field(default_factory=list)  # since when

    def add(self, lookup: Lookup, now: float, wait: float) -> None:
        """Nobody waits for this one any more. If it has its result within `wait`, it is closed at once."""
        self._lookups.append((now, lookup))
        if _closed(lookup, wait):
            self._lookups.pop()

    def hear(self, now: float) -> None:
        """Close those that have their result by now, and those that never will."""
        left = [(at, lookup) for at, lookup in self._lookups if not _closed(lookup, 0)]
        for at, lookup in left:
            if at <= now - ABANDONED_SECONDS:
                with contextlib.suppress(Exception):  # its server may be gone
                    lookup.end_session()
        self._lookups = [(at, lookup) for at, lookup in left if at > now - ABANDONED_SECONDS]

    def has(self, request_id: str) -> bool:
        """Whether one of this request is still to be heard."""
        return any(lookup.request_id == request_id for _, lookup in self._lookups)

    def since(self, when: float) -> int:
        """How many were abandoned after `when` and are still to be heard."""
        return sum(at > when for at, _ in self._lookups)

    def __len__(self) -> int:
        return len(self._lookups)


def _closed(lookup: Lookup, wait: float) -> bool:
    try:
        if not lookup.poll(wait):
            return False
        assert lookup.result is not None  # noqa: S101 - poll said so
        lookup.release_prefix(0, lookup.result[0])
        lookup.end_session()
    except Exception:  # the connection's: it is tried again, until locks end by themselves
        log.debug("A look-up could not be closed", exc_info=True)
        return False
    return True
