"""Looking up where in a prompt cached KV lies, and the session on the server that this opens."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from lmcache_rag.connector.plan import Match

_PAUSE = 0.0002  # between two questions for a look-up


class BlendLookup:
    """Scheduler side: where in a prompt cached KV lies. Asked again until the server has it in memory.

    Args:
        adapter: LMCache's scheduler adapter.
        request_id: Name of the server's session.
        token_ids: The prompt.
        salt: The request's namespace.
        configs: Settings of the request for LMCache.
    """

    def __init__(
        self, adapter: Any, request_id: str, token_ids: list[int], salt: str, configs: dict[str, Any] | None
    ) -> None:
        self._adapter, self.request_id, self.token_ids = adapter, request_id, token_ids
        self.salt, self.configs = salt, configs
        self._key = adapter._create_key(token_ids, 0, len(token_ids), request_id, salt, configs).no_worker_id_version()
        self._client = next(iter(adapter.req_clients.values()))
        self._future = self._ask(self._key)
        # The server knows the prompt from the first question on: 30,900 tokens again and again would keep both busy.
        # Had it forgotten them, for it was restarted, it would find nothing, and all is computed.
        self._again = dataclasses.replace(self._key, token_ids=(), end=0)
        self.result: tuple[int, tuple[Match, ...]] | None = None

    def _ask(self, key: Any) -> Any:
        return self._client.cb_unified_lookup(key, self._adapter.tp_size)

    def poll(self, seconds: float) -> bool:
        """Whether the result is there, waiting for it at most that long."""
        until = time.perf_counter() + seconds
        while self.result is None:
            if not self._future.wait(max(0.0, until - time.perf_counter())):
                return False
            found = self._future.result(0.001)
            if found is not None:
                self.result = (
                    int(found.prefix_coverage_tokens),
                    tuple(Match(m.cur_st, m.cur_ed, m.old_st, m.old_ed, m) for m in found.non_prefix_segments),
                )
                return True
            self._future = self._ask(self._again)  # the server is still at it
            if time.perf_counter() >= until:
                return False
            time.sleep(_PAUSE)
        return True

    def release_prefix(self, start: int, end: int) -> None:
        """Give back the read locks of exact prefix chunks that are not going to be loaded."""
        if end > start:  # the server hashes up to there: the rest of a prompt would keep it from the load that follows
            tokens = self.token_ids[:end]
            self._adapter.free_lookup_locks(tokens, start, end, self.request_id, self.salt, self.configs)

    def end_session(self) -> None:
        """Give back what was looked up and not loaded."""
        self._adapter.end_session(self.request_id)


@contextlib.contextmanager
def session_goes_on(adapter: Any, request_id: str) -> Iterator[None]:
    """Keep LMCache's connector from ending this request's session: whoever holds its look-up is going to."""
    end = adapter.end_session
    adapter.end_session = lambda name: None if name == request_id else end(name)
    try:
        yield
    finally:
        del adapter.end_session
