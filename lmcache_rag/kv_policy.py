"""When the KV of a store's chunks is computed, how fast, and how long it is kept."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lmcache_rag.errors import ConfigError

KVMode: TypeAlias = Literal["now", "lazy", "none"]
_MODES: tuple[KVMode, ...] = ("now", "lazy", "none")


def kv_mode(name: str) -> KVMode:
    """The mode of that name.

    Raises:
        ConfigError: There is none.
    """
    for mode in _MODES:
        if name == mode:
            return mode
    raise ConfigError(f"kv is {name!r}.", remedy=f"It is one of {', '.join(_MODES)}.")


@dataclass(frozen=True, slots=True)
class KVPolicy:
    """What to do with the KV of a store's chunks.

    Attributes:
        mode: "now": computed when a document is ingested. "lazy": after questions that used the chunk, see
            lmcache_rag.lazy_fill. "none": by `warm` only.
        ttl: Age in seconds at which KV is removed; None: never.
        rate: Most tokens of chunks that are ingested in a second; None: as fast as it goes.
        pin: Whether chunks that are ingested or warmed are pinned in a server's memory; False: `warm` ends their pins.
    """

    mode: KVMode = "now"
    ttl: float | None = None
    rate: float | None = None
    pin: bool | None = None


class RateLimit:
    """Spaces ingestions, so that they take no more than so many tokens in a second.

    Args:
        rate: Tokens in a second; None: no limit.
    """

    def __init__(self, rate: float | None) -> None:
        self._rate, self._next = rate, float("-inf")

    def wait(self, tokens: int, stop: threading.Event | None = None) -> None:
        """Wait until so many tokens may be ingested, or until `stop` is set."""
        if self._rate is None:
            return
        left = self._next - time.monotonic()
        if left > 0:
            (stop or threading.Event()).wait(left)
        self._next = max(self._next, time.monotonic()) + tokens / self._rate
