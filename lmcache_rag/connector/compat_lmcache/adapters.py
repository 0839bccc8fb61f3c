"""What is read of LMCache's adapters, and how they name what they ask for."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from lmcache_rag.connector.renumbering import renumbered


def loading(adapter: Any) -> set[str]:
    """Requests whose exact prefix LMCache's own connector is loading."""
    return set(adapter.retrieve_futures)


def keep_out(tracker: Any) -> None:
    """Have a new request of LMCache's connector neither look anything up nor store anything.

    For prompts of embeddings, whose token ids are all the same. No namespace of another request is like this one's, for
    what looks KV up all the same.
    """
    from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestState

    tracker.state = LMCacheMPRequestState.BYPASS_LMCACHE
    tracker.max_offload_tokens = 0
    tracker.cache_salt = uuid.uuid4().hex


def renumber_tokens(adapter: Any) -> None:
    """Have an adapter of LMCache's name tokens by other numbers, see lmcache_rag.connector.renumbering."""
    create = adapter._create_key

    def create_key(
        token_ids: Sequence[int],
        start: int,
        end: int,
        request_id: str,
        cache_salt: str = "",
        request_configs: dict[str, Any] | None = None,
    ) -> Any:
        return create(renumbered(token_ids, cache_salt), start, end, request_id, cache_salt, request_configs)

    adapter._create_key = create_key


class LaterReports:
    """Tells LMCache which blocks vLLM gave to which tokens a moment later than its connector does.

    It does so, for metrics, before the workers are given the step: all tokens of a new prompt would be on the wire, and
    be read and counted by the server, before the prompt's KV is asked for.

    Args:
        adapter: LMCache's scheduler adapter.
    """

    def __init__(self, adapter: Any) -> None:
        self._tell: Callable[[list[Any]], None] = adapter.report_block_allocations
        self._kept: list[Any] = []
        adapter.report_block_allocations = self._keep

    def _keep(self, records: list[Any]) -> None:
        self.tell()  # of earlier steps
        self._kept = records

    def tell(self) -> None:
        """Tell what is left; before a request's session ends, or its blocks would count as used for ever."""
        kept, self._kept = self._kept, []
        if kept:
            self._tell(kept)


def address(get: Callable[[str, Any], Any]) -> tuple[str, int] | None:
    """(host, port) of the server that LMCache's connector is told to use; None where it is one of several.

    Args:
        get: vLLM's get_from_extra_config(key, default).
    """
    if get("lmcache.mp.server_urls", None):
        return None
    host, port = str(get("lmcache.mp.host", "tcp://localhost")), str(get("lmcache.mp.port", 5555))
    return (host.rpartition("://")[2], int(port)) if port.isdigit() else None


def chunk_tokens(adapter: Any) -> int:
    """Tokens in one LMCache chunk."""
    return int(adapter.lmcache_tokens_per_chunk)
