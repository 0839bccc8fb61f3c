"""Look-ups at LMCache's coordinator: chunks that other servers stored, beside those that this server's index knows.

With a coordinator LMCache asks nobody else: while it is late or away nothing would be found, each request would wait
for it, and each would write a warning. Here a look-up finds what either of the two knows, the coordinator is not asked
while it does not answer, and a thread asks for its health until it does.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lmcache_rag import __version__
from lmcache_rag.connector.lmcache_server.index import ChunkIndex, as_tokens
from lmcache_rag.connector.patching import Patch, patch_object

log = logging.getLogger("lmcache_rag")

_BLEND = "lmcache.v1.multiprocess.modules.blend.module:BlendModule"
_WHY = "A look-up finds what the coordinator or this server's own index knows, and waits for none that is away."
_UNTIL = "LMCache matches locally too when it has a coordinator"
SUBMIT = Patch(f"{_BLEND}._submit_coordinator_match", _WHY, _UNTIL)
POLL = Patch(f"{_BLEND}._poll_coordinator_match", _WHY, _UNTIL)
REQUEST = Patch(
    "lmcache.v1.mp_coordinator.blend_client:BlendCoordinatorClient._request",
    "A coordinator that does not answer causes one warning, not one for each request.",
    "LMCache does not ask a coordinator that does not answer",
)

PROBE_S, LONGEST_PROBE_S = 1.0, 60.0  # between two questions whether the coordinator is back
STABLE_S = 10.0  # one that fails again sooner is asked less often, and is not warned of once more
_ASKED = 512  # look-ups in flight that are remembered
_REGISTRAR = "lmcache.v1.mp_coordinator.registrar"  # its logger: LMCache warns every 5 s


class Coordinator:
    """Whether the coordinator answers. Used by several threads.

    Args:
        request: LMCache's call, (method, path, JSON) -> JSON; raises when there is no answer within its time.
    """

    def __init__(self, request: Callable[[str, str, dict[str, Any]], dict[str, Any]]) -> None:
        self._request = request
        self._lock = threading.Lock()
        self._since: float | None = None
        self._back, self._pause, self._warned = -STABLE_S, PROBE_S, False
        self._closed = threading.Event()
        self.on_return: list[Callable[[], None]] = []

    @property
    def answers(self) -> bool:
        """False from a failed call until its health is asked for with success."""
        return self._since is None

    def call(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """LMCache's call. Without an answer: {}, which LMCache takes for a look-up that found nothing."""
        if not self.answers:
            return {}
        try:
            found = self._request(method, path, body)
        except Exception as problem:
            self.failed(problem)
            return {}
        return found if isinstance(found, dict) else {}

    def failed(self, problem: object) -> None:
        """It did not answer."""
        with self._lock:
            if self._since is not None or self._closed.is_set():
                return
            self._since = now = time.monotonic()
            again = self._warned and now - self._back < STABLE_S
            self._pause = min(2 * self._pause, LONGEST_PROBE_S) if again else PROBE_S
            self._warned = True
        log.log(
            logging.DEBUG if again else logging.WARNING,
            "The coordinator does not answer (%s): only chunks that this server knows itself are blended. "
            "It is asked again until it is back.",
            type(problem).__name__ if isinstance(problem, Exception) else problem,
        )
        threading.Thread(target=self._wait, args=(again,), name="lmcache-rag-coordinator", daemon=True).start()

    def _wait(self, again: bool) -> None:
        while not self._closed.wait(self._pause):
            try:
                self._request("GET", "/healthz", {})
            except Exception:
                log.debug("The coordinator is still away", exc_info=True)
                continue
            with self._lock:
                since, self._since, self._back = self._since, None, time.monotonic()
            away = self._back - (since or 0)
            log.log(logging.DEBUG if again else logging.INFO, "The coordinator answers again, after %.0f s", away)
            for call in self.on_return:
                call()
            return

    def quiet(self, record: logging.LogRecord) -> bool:
        """A filter for LMCache's own log: no more warnings about a coordinator that is known to be away."""
        return self.answers or record.levelno != logging.WARNING

    def close(self) -> None:
        """Ask no more."""
        self._closed.set()


class _Asked(NamedTuple):
    """A look-up in flight: its prompt, namespace, and what the index of this server found in it."""

    tokens: Any
    salt: str
    local: list[Any]


class FleetLookups:
    """Merges what the coordinator finds with what this server's index finds.

    Args:
        blend: LMCache's BlendModule, which has a coordinator.
        index: This server's index.
        match: Looks a prompt of a namespace up in it; returns LMCache's CBMatchResults.
    """

    def __init__(self, blend: Any, index: ChunkIndex, match: Callable[[Any, str], list[Any]]) -> None:
        client = blend._coordinator
        self.coordinator = Coordinator(client._request)
        self.found = 0  # chunks that only the coordinator knew
        self._index, self._match = index, match
        self._asked: OrderedDict[str, _Asked] = OrderedDict()
        self._lock = threading.Lock()
        patch_object(REQUEST, client, self.coordinator.call)
        logging.getLogger(_REGISTRAR).addFilter(self.coordinator.quiet)

    def methods(self, kind: type) -> dict[str, Any]:
        """The methods of BlendModule that are replaced."""
        fleet = self

        def submit(module: Any, key: Any) -> bool:
            fleet.ask(key)
            return fleet.coordinator.answers and bool(kind._submit_coordinator_match(module, key))  # type: ignore[attr-defined]

        def poll(module: Any, job: Any, rid: str) -> list[Any] | None:
            client = module._coordinator
            if job.coord_submitted and client.poll_match(rid) is _pending() and time.monotonic() >= job.coord_deadline:
                fleet.coordinator.failed(f"no answer within {client.match_budget_s:g} s")
                client.take_match(rid)  # for LMCache nothing is found then
            found = kind._poll_coordinator_match(module, job, rid)  # type: ignore[attr-defined]
            return None if found is None else fleet.merged(rid, found, job.num_tokens)

        return {SUBMIT.name: submit, POLL.name: poll}

    def ask(self, key: Any) -> None:
        """A look-up begins: find what this server knows."""
        tokens = as_tokens(key)
        asked = _Asked(tokens, key.cache_salt, self._match(tokens, key.cache_salt))
        with self._lock:
            self._asked[key.request_id] = asked
            while len(self._asked) > _ASKED:
                self._asked.popitem(last=False)

    def merged(self, rid: str, found: Sequence[Any], tokens: int) -> list[Any]:
        """This server's chunks, and those of the coordinator's that it does not know and that fit the prompt.

        Args:
            rid: The request.
            found: The coordinator's matches.
            tokens: Length of the prompt.
        """
        with self._lock:
            asked = self._asked.get(rid)
        local = asked.local if asked else []
        known = {each.hash for each in local}
        others = [each for each in found if each.hash not in known and fits(each, self._index.chunk, tokens)]
        return [*local, *others]

    def on_result(self, rid: str, segments: Sequence[Any]) -> None:
        """A look-up has its result: chunks that are there, and that only the coordinator knew, join the index."""
        with self._lock:
            asked = self._asked.pop(rid, None)
        if asked is None:
            return
        known = {each.hash for each in asked.local}
        for each in segments:
            if each.hash in known or each.old_st == each.cur_st == 0:
                continue
            self.found += 1
            self._index.declare(asked.salt, [each.hash], ingested=True)  # no server reports others
            self._index.register(asked.salt, asked.tokens[each.cur_st : each.cur_ed], [each.hash], each.old_st)

    def close(self) -> None:
        """The server ends."""
        self.coordinator.close()
        logging.getLogger(_REGISTRAR).removeFilter(self.coordinator.quiet)


def fits(match: Any, chunk: int, tokens: int) -> bool:
    """Whether a match that the coordinator returned is one whole chunk, within the prompt.

    One of another chunk size would place KV of other text.
    """
    numbers = (match.old_st, match.old_ed, match.cur_st, match.cur_ed)
    if not all(isinstance(each, int) and each >= 0 for each in numbers) or not isinstance(match.hash, bytes):
        return False
    sizes = match.cur_ed - match.cur_st, match.old_ed - match.old_st
    return sizes == (chunk, chunk) and bool(match.cur_ed <= tokens)


def facts(chunk: int, hashed: bytes) -> dict[str, str]:
    """What LMCache servers have to have in common to share KV, as protocol.LMCACHE_FACTS.

    Args:
        chunk: Tokens of an LMCache chunk.
        hashed: What LMCache's hash makes of a fixed chunk: by its algorithm, and its seed where it has one.
    """
    versions = {"lmcache": importlib.metadata.version("lmcache"), "lmcache_rag": __version__}
    return {"chunk": str(chunk), "hash": hashlib.sha256(hashed).hexdigest()[:16], **versions}


def _pending() -> object:
    from lmcache.v1.mp_coordinator.blend_client import PENDING

    return PENDING
