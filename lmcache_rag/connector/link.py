"""What a worker asks of LMCache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache_rag.connector.metadata import BlendPlan, Match


class Link(Protocol):
    """How KV is loaded; see lmcache_rag.connector.lmcache_transfers.WorkerLink."""

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
