"""Looking up where in a prompt cached KV lies, and the session on the server that this opens."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

from lmcache_rag.connector.compat_lmcache.server import said
from lmcache_rag.connector.compat_lmcache.tokens import to_lmcache, without_tokens
from lmcache_rag.connector.metadata import Match

log = logging.getLogger("lmcache_rag")

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
        self._adapter, self.request_id, self._prefix = adapter, request_id, token_ids
        self.salt, self.configs = salt, configs
        self.result: tuple[int, tuple[Match, ...]] | None = None
        self._client = next(iter(adapter.req_clients.values()))
        tokens = to_lmcache(token_ids)
        key = adapter._create_key(tokens, 0, len(token_ids), request_id, salt, configs).no_worker_id_version()
        # The server knows the prompt from the first question on: 30,900 tokens again and again would keep both busy.
        # Had it forgotten them, for it was restarted, it would find nothing, and all is computed.
        self._again = without_tokens(key)
        self._future: Any = None
        self._ask(key)

    def _ask(self, key: Any) -> None:
        try:
            self._future = self._client.cb_unified_lookup(key, self._adapter.tp_size)
        except Exception as problem:
            self._fails(problem)

    def _fails(self, problem: Exception) -> None:
        """An error of LMCache's client: nothing is found. Over gRPC that is how a server that has ended answers."""
        log.warning("LMCache did not look up request %s: %s", self.request_id, said(problem))
        self._found(0, ())

    def _found(self, prefix: int, matches: tuple[Match, ...]) -> None:
        self.result = (prefix, matches)
        self._prefix, self._future = self._prefix[:prefix], None  # the rest of the prompt is not needed any more

    def poll(self, seconds: float) -> bool:
        """Whether the result is there, waiting for it at most that long."""
        until = time.perf_counter() + seconds
        while self.result is None:
            try:
                if not self._future.wait(max(0.0, until - time.perf_counter())):
                    return False
                found = self._future.result(0.001)
            except Exception as problem:
                self._fails(problem)
                return True
            if found is not None:
                matches = (Match(m.cur_st, m.cur_ed, m.old_st, m.old_ed, m) for m in found.non_prefix_segments)
                self._found(int(found.prefix_coverage_tokens), tuple(matches))
                return True
            self._ask(self._again)  # the server is still at it
            if time.perf_counter() >= until:
                return self.result is not None
            time.sleep(_PAUSE)
        return True

    def release_prefix(self, start: int, end: int) -> None:
        """Give back the read locks of exact prefix chunks that are not going to be loaded."""
        if end > start:  # the server hashes up to there: the rest of a prompt would keep it from the load that follows
            tokens = to_lmcache(self._prefix[:end])
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
        adapter.end_session = end
