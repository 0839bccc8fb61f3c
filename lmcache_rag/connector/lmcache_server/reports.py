"""What this server reports to LMCache's coordinator: which KV it has, and the tokens of the chunks that may be blended.

LMCache reports the tokens of every prompt, drops what it cannot deliver, and waits for the coordinator in the thread
that handles all its events. Here only chunks of this server's index are reported with their tokens, so that no other
server finds what a question stored; a thread of its own delivers; and a coordinator that was away, or that was started
again, gets a full report.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from lmcache_rag.connector.lmcache_server.fleet import Coordinator
from lmcache_rag.connector.lmcache_server.index import ChunkIndex
from lmcache_rag.connector.patching import Patch, patch_object

log = logging.getLogger("lmcache_rag")

EVENTS = "lmcache.v1.mp_coordinator.cache_events"
SINK = Patch(
    f"{EVENTS}:create_cache_event_sink",
    "Only chunks that may be blended are reported with their tokens, and nothing that a coordinator missed is lost.",
    "LMCache reports again what its coordinator missed",
)

MOST_PLACES = 1 << 18  # objects that are remembered, for a full report
MOST_WAITING = 4096  # batches; beyond, a full report takes their place
ENTRIES = 1000  # of a batch in a full report
BATCHES = 64  # of a delivery
INTERVAL_S = 0.2  # between two deliveries


class Place(NamedTuple):
    """Where an object is: its key, and tier, backend and `shared` of LMCache's events."""

    key: Any
    tier: Any
    backend: str
    shared: bool


class Reports:
    """Takes the place of LMCache's sink of cache events.

    Args:
        sink: LMCache's sink, which delivers; raises when it cannot.
        index: This server's index.
        coordinator: Whether the coordinator answers.
    """

    def __init__(self, sink: Any, index: ChunkIndex, coordinator: Coordinator) -> None:
        self._sink, self._index, self._coordinator = sink, index, coordinator
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._places: OrderedDict[Place, int] = OrderedDict()  # with the object's size
        self._by_hash: dict[str, set[Place]] = {}
        self._capacities: dict[tuple[Any, str, bool], Any] = {}  # the last batch of each
        self._waiting: deque[Any] = deque()
        self._deleted: dict[Place, None] = {}  # of second tiers: they outlive a full report's new incarnation
        self._full = False
        self._last: Any = None
        self._incarnation = self._seq = 0
        self._checked = False
        self._thread = threading.Thread(target=self._run, name="lmcache-rag-reports", daemon=True)
        self._thread.start()
        index.listen(self.announce)
        coordinator.on_return.append(self.report_all)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sink, name)

    # -- called by LMCache and by the index ---------------------------------------------------------------------------

    def publish(self, batches: Sequence[Any]) -> None:
        """Take batches for delivery; returns at once."""
        with self._lock:
            for batch in batches:
                self._last = batch
                self._note(batch)
                if batch.event_type.value == "config":
                    # LMCache declares its capacities when it registers: the coordinator may be a new one.
                    self._full = self._full or bool(self._places)
                if not self._full:
                    self._waiting.append(batch)
            self._incarnation = max(self._incarnation, self._last.incarnation if batches else 0)
            if len(self._waiting) > MOST_WAITING:
                self._full = True
        self._wake.set()

    def announce(self, salt: str, hashes: Iterable[bytes]) -> None:
        """Chunks can be found from now on: report them with their tokens where the coordinator has them without."""
        with self._lock:
            found = [place for each in hashes for place in self._by_hash.get(each.hex(), ())]
            places = [place for place in found if place.key.cache_salt == salt]
            if places and not self._full:
                self._waiting.extend(self._stores(places))
        self._wake.set()

    def report_all(self) -> None:
        """Report everything again."""
        with self._lock:
            self._full = True
        self._wake.set()

    def close(self) -> None:
        """Deliver what waits, and end."""
        self._closed = True
        self._wake.set()
        self._thread.join(5.0)
        self._sink.close()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _note(self, batch: Any) -> None:
        kind = batch.event_type.value
        if kind == "config":
            self._capacities[batch.tier, batch.backend, batch.shared] = batch
        elif kind == "store":
            for entry in batch.entries:
                self._remember(Place(entry.key, batch.tier, batch.backend, batch.shared), entry.size_bytes)
        elif kind == "delete":
            for entry in batch.entries:
                place = Place(entry.key, batch.tier, batch.backend, batch.shared)
                self._forget(place)
                if batch.tier.value != "l1" and len(self._deleted) < MOST_PLACES:
                    self._deleted[place] = None

    def _remember(self, place: Place, size: int) -> None:
        self._deleted.pop(place, None)
        self._places[place] = size
        self._places.move_to_end(place)
        self._by_hash.setdefault(place.key.chunk_hash_hex, set()).add(place)
        while len(self._places) > MOST_PLACES:
            self._forget(next(iter(self._places)))

    def _forget(self, place: Place) -> None:
        if self._places.pop(place, None) is not None:
            held = self._by_hash[place.key.chunk_hash_hex]
            held.discard(place)
            if not held:
                del self._by_hash[place.key.chunk_hash_hex]

    def _stores(self, places: Iterable[Place]) -> list[Any]:
        """Batches that report these places."""
        from lmcache.v1.mp_coordinator.api import CacheEventType

        return self._batches(CacheEventType.STORE, [place for place in places if place in self._places])

    def _batches(self, kind: Any, places: Sequence[Place]) -> list[Any]:
        from lmcache.v1.mp_coordinator.api import CacheEventEntry

        kinds: dict[tuple[Any, str, bool], list[Any]] = {}
        for place in places:
            entry = CacheEventEntry(key=place.key, size_bytes=self._places.get(place, 0))
            kinds.setdefault(place[1:], []).append(entry)
        return [
            dataclasses.replace(
                self._last,
                event_type=kind,
                tier=tier,
                backend=backend,
                shared=shared,
                entries=entries[at : at + ENTRIES],
                ts=time.time(),
                **dict.fromkeys(("capacity_bytes", "capacity_revision"), 0),
            )
            for (tier, backend, shared), entries in kinds.items()
            for at in range(0, len(entries), ENTRIES)
        ]

    def _report(self) -> list[Any]:
        """Everything, under a new incarnation: the coordinator then drops what it knew of this server's memory."""
        from lmcache.v1.mp_coordinator.api import CacheEventType

        self._checked = False  # the coordinator may be another one
        self._incarnation, self._seq = max(int(time.time()), self._incarnation + 1), 0
        deleted = self._batches(CacheEventType.DELETE, list(self._deleted))
        return [*self._capacities.values(), *deleted, *self._stores(list(self._places))]

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            try:
                self._deliver()
            except Exception:
                log.exception("Reports to the coordinator failed")
                self.report_all()
            if self._closed:
                return
            time.sleep(INTERVAL_S)

    def _deliver(self) -> None:
        while self._coordinator.answers:
            with self._lock:
                if self._full and self._last is not None:
                    self._full = False
                    self._waiting = deque(self._report())
                batches = [self._waiting.popleft() for _ in range(min(BATCHES, len(self._waiting)))]
                sent = [self._numbered(batch) for batch in batches]
            if not sent:
                return
            try:
                self._sink.publish(sent)
            except Exception as problem:
                self.report_all()
                self._coordinator.failed(problem.__cause__ or problem)
                return
            with self._lock:
                if not self._waiting and not self._full:
                    self._deleted.clear()
            self._check(sent)

    def _numbered(self, batch: Any) -> Any:
        """A batch with this server's own numbering, and with the tokens of chunks in the index alone."""
        self._seq += 1
        entries = batch.entries
        if batch.event_type.value == "store":
            entries = [self._with_tokens(entry) for entry in entries]
        return dataclasses.replace(batch, incarnation=self._incarnation, seq=self._seq, entries=entries)

    def _with_tokens(self, entry: Any) -> Any:
        found = self._index.content(entry.key.cache_salt, bytes.fromhex(entry.key.chunk_hash_hex))
        tokens, offset = ([], -1) if found is None else (found[0].tolist(), found[1])
        return dataclasses.replace(entry, token_ids=tokens, token_offset=offset)

    def _check(self, sent: Sequence[Any]) -> None:
        """Once: whether the coordinator finds what it was told."""
        entry = next((each for batch in sent for each in batch.entries if each.token_ids), None)
        if self._checked or entry is None:
            return
        from lmcache.v1.mp_coordinator.api import BlendNamespace
        from lmcache.v1.mp_coordinator.schemas import encode_tokens

        key = entry.key.to_object_key()
        place = BlendNamespace.from_object_key(key)
        body = {"tokens_b64": encode_tokens(entry.token_ids), **dataclasses.asdict(place)}
        found = self._coordinator.call("POST", "/directory/blend-lookup", body)
        if not self._coordinator.answers:
            return
        self._checked = True
        if not any(each.get("chunk_hash") == key.chunk_hash.hex() for each in found.get("matches", ())):
            log.warning(
                "The coordinator does not find a chunk that was just reported to it: other servers will not blend what "
                "this one stores. Start it with --enable-blend-lookup --chunk-size %d.",
                self._index.chunk,
            )


def install(index: ChunkIndex, coordinator: Coordinator) -> None:
    """Have LMCache report by a `Reports`."""
    from lmcache.v1.mp_coordinator import cache_events

    create = cache_events.create_cache_event_sink
    patch_object(SINK, cache_events, lambda config: Reports(create(config), index, coordinator))
