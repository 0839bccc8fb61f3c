"""Patches of LMCache's server modules: deadlines of transfers, the chunk index, removal of KV, and its HTTP routes.

For LMCache 0.5.6 and 0.5.7. Each patch replaces methods of one object of the server, by a subclass of its class.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmcache_rag import protocol
from lmcache_rag.connector.lmcache_server import reports, retention, tier_check
from lmcache_rag.connector.lmcache_server.fleet import FleetLookups, facts
from lmcache_rag.connector.lmcache_server.index import ChunkIndex, as_tokens, from_ids
from lmcache_rag.connector.lmcache_server.removal import Expiry, Forgetting, evict_ingested_last, held_by_tier
from lmcache_rag.connector.lmcache_server.retention import Pins, TenantBudgets
from lmcache_rag.connector.lmcache_server.settings import ServerSettings
from lmcache_rag.connector.patching import Patch, patch_methods, patch_object

log = logging.getLogger("lmcache_rag")

_MODULES = "lmcache.v1.multiprocess.modules"
_BLEND = f"{_MODULES}.blend.module:BlendModule"
_DEADLINE_WHY = "Loads and stores are refused after their deadline; a store's is checked again after the copy."
_DEADLINE_UNTIL = "LMCache refuses late transfers"
RETRIEVE = Patch(
    f"{_MODULES}.lmcache_driven_transfer:LMCacheDrivenTransferModule.retrieve", _DEADLINE_WHY, _DEADLINE_UNTIL
)
BLEND_RETRIEVE = Patch(f"{_BLEND}.cb_retrieve_pre_computed", _DEADLINE_WHY, _DEADLINE_UNTIL)
STORE = Patch(f"{_MODULES}.lmcache_driven_transfer:LMCacheDrivenTransferModule.store", _DEADLINE_WHY, _DEADLINE_UNTIL)
COMMIT_STORE = Patch(
    f"{_MODULES}.engine_driven_transfer:EngineDrivenTransferModule.commit_store", _DEADLINE_WHY, _DEADLINE_UNTIL
)
WRITE_COMPLETION = Patch(
    "lmcache.v1.distributed.storage_manager:StorageManager.prepare_write_completion", _DEADLINE_WHY, _DEADLINE_UNTIL
)
_INDEX_WHY = "Chunks are entered into, and found by, an index that forgets what is evicted and compares keyed hashes."
_INDEX_UNTIL = "LMCache's chunk index frees evicted chunks and compares keyed hashes"
BLEND_STORE = Patch(f"{_BLEND}.store", _INDEX_WHY, _INDEX_UNTIL)
MATCH = Patch(f"{_BLEND}._match_fingerprints", _INDEX_WHY, _INDEX_UNTIL)
MATCHER = Patch(f"{_BLEND}._token_range_matcher", _INDEX_WHY, _INDEX_UNTIL)
LOOKUP = Patch(
    f"{_BLEND}.cb_unified_lookup",
    "A look-up with the key `lmcache_rag.forget` removes the KV of its prompt.",
    "LMCache's protocol can remove KV",
)

PREFIX_LEG = Patch(
    f"{_BLEND}._submit_prefix_leg",
    "An exact prefix is looked for up to the first chunk that is not in memory. LMCache hashes every chunk of the "
    "prompt, which takes a fifth of a look-up's time.",
    "LMCache looks no further than an exact prefix reaches",
)

HTTP_SERVER = "lmcache.v1.multiprocess.http_server"
ROUTES = Patch(
    f"{HTTP_SERVER}:app.routes",
    "The HTTP port has only harmless routes, and /config shows no secret.",
    "LMCache's HTTP API has a key and shows no secret",
)
KEPT_ROUTES = frozenset(
    {
        "/",
        "/healthcheck",
        "/status",
        "/config",
        "/config/adapters",
        "/metrics",
        "/version",
        "/lmc_version",
        "/commit_id",
        "/cache/clear",
        "/cache/objects",
        "/cache/prefetches",
        "/cache/prefetches/{request_id}",
        "/quota",
        "/quota/{cache_salt}",
    }
)
MASK = "***"
_SECRET = re.compile(r"pass|secret|token|credential|key|auth|user|sas|dsn|connection_string", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]*@")

_REGISTER = "lmcache_rag_register"  # kind of a callback of LMCache's device stream
_LOADS = (RETRIEVE.name, BLEND_RETRIEVE.name)
_STORES = (STORE.name, COMMIT_STORE.name)
_WAIT_S = 0.2  # for a removal, before the client has to call again
_MISSED_S, _MOST_MISSED = 600.0, 1 << 16  # how long, and how many chunks that were not found are remembered
_FIRST = 8  # chunks; where all of them are in memory, LMCache looks for a longer prefix


def install(context: Any, modules: Sequence[Any], config: Mapping[str, Any]) -> Guard:
    """Patch LMCache's modules.

    Args:
        context: LMCache's MPCacheServerContext.
        modules: Its modules, as built.
        config: The "config" of --server-module.

    Raises:
        ValueError: The config is wrong.
    """
    guard = Guard(context, ServerSettings.read(config))
    for module in modules:
        guard.patch(module)
    guard.watch()
    cut_routes()
    settings = guard.settings
    log.info(
        "lmcache_rag: chunks that can be blended: %s, at most %d; KV stored: %s",
        settings.index,
        settings.index_size,
        settings.store,
    )
    return guard


class Guard:
    """State that the patched modules of one server share.

    Args:
        context: LMCache's MPCacheServerContext.
        settings: The "config" of --server-module.
    """

    def __init__(self, context: Any, settings: ServerSettings) -> None:
        self.context, self.settings = context, settings
        self.storage = context.storage_manager
        self.index = ChunkIndex(context.chunk_size, settings.index_size)
        self.pins = Pins(lambda: retention.most_pinned(self.storage))
        self.budgets: TenantBudgets | None = None
        if settings.budgets:
            self.budgets = TenantBudgets(self.storage, settings.budgets, self.pins, self.is_ingested)
        self.forgetting = Forgetting(self.storage, self.pins)
        self.fleet: FleetLookups | None = None  # with a coordinator
        self.tiers: list[Any] = []  # second tiers whose bytes are checked
        self._missed: dict[bytes, float] = {}  # chunks whose KV was not found, and when first
        self._tier_worked = float("-inf")  # when a second tier last stored or found something
        self.expiry = Expiry(self.forgetting, self.index, settings.kv_ttl) if settings.kv_ttl else None
        self._jobs: dict[int, Callable[[], None]] = {}  # registrations that wait for the device stream
        self._numbers = itertools.count()
        self._removals: dict[str, tuple[threading.Event, dict[str, int] | None]] = {}  # by request
        self._thread = threading.local()

    # -- patches ------------------------------------------------------------------------------------------------------

    def patch(self, module: Any) -> None:
        """Patch a module's loads, stores and look-ups."""
        kind = type(module)
        methods: dict[str, Any] = {}
        if hasattr(kind, "_match_fingerprints"):
            methods |= self._blend_methods(module)
        for name in _LOADS:
            if hasattr(kind, name):
                methods[name] = self._in_time(getattr(kind, name))
        for name in _STORES:
            if hasattr(kind, name):
                methods[name] = self._stores(methods.get(name, getattr(kind, name)), getattr(kind, name))
        if methods:
            patch_methods(module, methods)

    def _in_time(self, load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)  # copies LMCache's marks on a handler
        def guarded(module: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
            if _past_deadline(key):
                log.warning("request %s: load deadline passed, load skipped", key.request_id)
                try:
                    self._unlock(module, key, args[0])
                except Exception:  # the worker waits for an answer
                    log.exception("request %s: read locks were not released, and will expire", key.request_id)
                return b"", False
            return load(module, key, *args, **kwargs)

        return guarded

    def _unlock(self, module: Any, key: Any, instance_id: int) -> None:
        """Release one worker's read locks, as the rejected load of an exact prefix would have done.

        LMCache does so for workers that it no longer knows, if the load has all tokens of the look-up. Our load ends
        with the prefix. Locks that a chunk's load leaves are released when its session ends.
        """
        release = getattr(module, "_release_failed_retrieve_locks", None)
        session = self.context.session_manager.get(key.request_id)
        if release is None or session is None or (lookup := session.lookup_ipc_key) is None:
            return
        name = "token_bytes" if hasattr(key, "token_bytes") else "token_ids"  # LMCache 0.5.7's, 0.5.6's
        looked_up, loaded = getattr(lookup, name), getattr(key, name)
        if looked_up[: len(loaded)] == loaded:
            release(dataclasses.replace(key, **{name: looked_up}), instance_id)

    def _stores(self, store: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
        commit = stock.__name__ == "commit_store"
        refused: Any = False if commit else (b"", False)

        @functools.wraps(stock)
        def guarded(module: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
            if _past_deadline(key):
                log.warning("request %s: store deadline passed, store skipped", key.request_id)
                return refused
            ingested = _flag(key, protocol.INGEST)
            if self.settings.store == "ingest" and not ingested:
                # Without blocks LMCache stores nothing, and answers with an event that the worker can wait for:
                # `refused` would be taken for a worker that is not registered any more.
                return False if commit else store(module, key, args[0], [[] for _ in args[1]], *args[2:], **kwargs)
            self._note_tenant(key)
            if len(self.forgetting) or self._indexes(key):
                keys = self.context.resolve_obj_keys(key, [0])[0]
                self.forgetting.keep(keys)
            if self._indexes(key):
                self.index.declare(key.cache_salt, [each.chunk_hash for each in keys], ingested=ingested)
            self._thread.storing = key
            try:
                return store(module, key, *args, **kwargs)
            finally:
                self._thread.storing = None

        return guarded

    def _commit_in_time(self, prepare: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Check the deadline after the copy too: the server may hang during it. The error prevents the commit."""

        def guarded(objects: Any) -> Any:
            key = getattr(self._thread, "storing", None)
            if key is not None and _past_deadline(key):
                raise TimeoutError(f"request {key.request_id}: store deadline passed while its KV was copied")
            return prepare(objects)

        return guarded

    def _blend_methods(self, blend: Any) -> dict[str, Any]:
        guard, kind = self, type(blend)
        blend._transfer_module.register_host_func(_REGISTER, self._run_job, int)

        def store(module: Any, key: Any, instance_id: int, gpu_block_ids: Any, event_ipc_handle: bytes) -> Any:
            handle, stored, _ = module._transfer_module.store_with_chunk_mask(
                key, instance_id, gpu_block_ids, event_ipc_handle
            )
            if stored and guard._indexes(key) and key.worker_id in (0, None):  # one rank is enough
                guard.register_later(module, key, instance_id)
            return handle, stored

        def submit_prefix_leg(module: Any, key: Any, tp_size: int) -> Any:
            return kind._submit_prefix_leg(module, guard.up_to_first_miss(key), tp_size)

        def match(module: Any, key: Any) -> list[Any]:
            return guard.matches(as_tokens(key), key.cache_salt)

        @functools.wraps(kind.cb_unified_lookup)
        def cb_unified_lookup(module: Any, key: Any, tp_size: int) -> Any:
            if _flag(key, protocol.FORGET):
                return guard.forget(key)
            guard._note_tenant(key)
            if (pin := (key.request_configs or {}).get(protocol.PIN)) is not None:
                return guard.pin(key, pin=pin is True)
            found = kind.cb_unified_lookup(module, key, tp_size)
            if found is not None and guard.fleet is not None:
                guard.fleet.on_result(key.request_id, found.non_prefix_segments)
            return found

        matcher = _Matcher(self)
        fleet: dict[str, Any] = {}
        if getattr(blend, "_coordinator", None) is not None:
            self.index.keep_content()
            self.fleet = FleetLookups(blend, self.index, self.matches)
            reports.install(self.index, self.fleet.coordinator)
            fleet = self.fleet.methods(kind)
        return fleet | {
            BLEND_STORE.name: store,
            PREFIX_LEG.name: submit_prefix_leg,
            MATCH.name: match,
            LOOKUP.name: cb_unified_lookup,
            # 0.5.7 makes another when it negotiates the chunk size with the first worker
            MATCHER.name: property(lambda _: matcher, lambda _, made: guard.index.reset(made.chunk_size)),
        }

    def watch(self) -> None:
        """Track evictions from memory and tiers, evict ingested KV last, and publish metrics."""
        self.forgetting.guard()
        patch_object(WRITE_COMPLETION, self.storage, self._commit_in_time(self.storage.prepare_write_completion))
        listener = _Listener(self)
        for memory in self._memories:
            memory.register_listener(listener)
        self.storage.register_l2_listener(listener)
        self.tiers = tier_check.watch(tier for _, tier in self.storage.l2_adapters())
        evict_ingested_last(self.storage, self.is_ingested, self.pins, self.budgets)
        _report(self)
        if self.expiry is not None:
            self.expiry.start()
        if self.budgets is not None:
            self.budgets.start()

    # -- the index ----------------------------------------------------------------------------------------------------

    def matches(self, tokens: Any, salt: str | None) -> list[Any]:
        """Chunks of a namespace in a prompt, as LMCache's matcher returns them."""
        from lmcache.v1.multiprocess.custom_types import CBMatchResult

        chunk = self.index.chunk
        return [
            CBMatchResult(
                old_st=found.stored,
                old_ed=found.stored + chunk,
                cur_st=found.position,
                cur_ed=found.position + chunk,
                hash=found.chunk_hash,
            )
            for found in self.index.match(tokens, salt)
        ]

    def up_to_first_miss(self, key: Any) -> Any:
        """A look-up's key up to the first chunk that is not in memory: no exact prefix reaches further.

        The whole key where KV may be elsewhere, where a chunk has several groups of objects, or where the first chunks
        are all in memory.
        """
        from lmcache.v1.distributed.api import ipc_key_to_object_keys
        from lmcache.v1.mp_observability.event import EventType

        name = "token_bytes" if hasattr(key, "token_bytes") else "token_ids"  # LMCache 0.5.7's, 0.5.6's
        tokens, size = getattr(key, name), self.index.chunk * (4 if name == "token_bytes" else 1)
        groups = self.context.layout_desc_registry.find_group_layout_descs(key.model_name, key.world_size)
        if self.storage.l2_adapters() or len(groups or ()) != 1 or len(tokens) <= _FIRST * size:
            return key
        if self.context.event_bus.has_subscribers(EventType.MP_LOOKUP):
            return key  # that event has the hashes of all chunks
        hashes = self.hashes(tokens[: _FIRST * size])
        (objects,) = ipc_key_to_object_keys(key.no_worker_id_version(), hashes, sorted(groups))
        ranks = len(objects) // len(hashes)
        for at, first in enumerate(objects[::ranks]):
            if not self._in_memory(first):
                end = min(key.end, (at + 1) * self.index.chunk)
                return dataclasses.replace(key, **{name: tokens[: (at + 1) * size]}, end=end)
        return key

    def hashes(self, tokens: Any) -> list[bytes]:
        """LMCache's hashes of a prompt's whole chunks."""
        hasher = self.context.token_hasher
        packed = isinstance(tokens, bytes)
        found: list[bytes] = (
            hasher.compute_packed_chunk_hashes(tokens) if packed else hasher.compute_chunk_hashes(list(tokens))
        )
        return found

    def _indexes(self, key: Any) -> bool:
        return self.settings.index == "all" or _flag(key, protocol.INGEST)

    def register_later(self, blend: Any, key: Any, instance_id: int) -> None:
        """Enter a store's chunks into the index once the device has copied them.

        All chunks that are in memory then are entered: one that another request stored before is not stored again.
        """
        keys = self.context.resolve_obj_keys(key, [0])[0]
        tokens = as_tokens(key)[key.start : key.end]

        def register() -> None:
            first = 1 if key.start == 0 else 0  # the first chunk of a prompt is only ever an exact prefix
            new = 0
            for begin, end in _runs([at >= first and self._in_memory(each) for at, each in enumerate(keys)]):
                chunk = self.index.chunk
                new += self.index.register(
                    key.cache_salt,
                    tokens[begin * chunk : end * chunk],
                    [each.chunk_hash for each in keys[begin:end]],
                    key.start + begin * chunk,
                )
            blend._emit_fingerprints_registered(key.request_id, new)

        entry = blend._transfer_module.get_and_touch_context_entry(instance_id)
        stream = getattr(getattr(entry, "cache_context", None), "cupy_stream", None)
        if stream is None:
            register()
            return
        from lmcache.v1.multiprocess.native_completion import submit_callback_to_stream

        number = next(self._numbers)
        self._jobs[number] = register
        submit_callback_to_stream(stream, _REGISTER, number)

    def _run_job(self, number: int) -> None:
        job = self._jobs.pop(number, None)
        if job is not None:
            job()

    def left_memory(self, keys: Sequence[Any]) -> None:
        """Remove evicted objects from the index. If second tiers may hold them, LMCache's look-ups check that."""
        if self.budgets is not None:
            self.budgets.discard(keys)
        if len(self._memories) == 1 and not self.storage.l2_adapters():
            for key in keys:
                self.index.remove(key.cache_salt, (key.chunk_hash,))
            if self.expiry is not None:
                self.expiry.discard(keys)

    def in_memory_now(self, keys: Sequence[Any]) -> None:
        """Objects were stored, or loaded from a second tier."""
        if self.budgets is not None:
            self.budgets.add(keys)
        if self.expiry is not None:
            self.expiry.add(keys)

    def used(self, keys: Sequence[Any]) -> None:
        """Objects in memory were used."""
        if self.budgets is not None:
            self.budgets.touch(keys)

    def left_tier(self, keys: Sequence[Any]) -> None:
        """Remove objects from the index that were evicted from a second tier."""
        if len(self.storage.l2_adapters()) == 1:
            for key in keys:
                if not self._in_memory(key):
                    self.index.remove(key.cache_salt, (key.chunk_hash,))

    def not_found(self, hashes: Sequence[bytes]) -> None:
        """LMCache did not find these chunks' KV, twice.

        With second tiers they stay, as one may be away: they are removed when that happens again, and a tier was seen
        to work in between. Another server, or the tier itself, may have deleted them.
        """
        if not self.storage.l2_adapters():
            self.index.remove_everywhere(hashes)
            return
        now = time.monotonic()
        gone = [each for each in hashes if now - _MISSED_S < self._missed.get(each, now) < self._tier_worked]
        self.index.remove_everywhere(gone)
        for each in hashes:
            self._missed.setdefault(each, now)
            if each in gone or self._missed[each] <= now - _MISSED_S:
                self._missed[each] = now
        while len(self._missed) > _MOST_MISSED:
            del self._missed[next(iter(self._missed))]

    def tier_works(self, *_: Any) -> None:
        """A second tier has stored or found something."""
        self._tier_worked = time.monotonic()

    @property
    def _memories(self) -> list[Any]:
        return list(self.storage._l1_managers_by_id.values())

    def _in_memory(self, key: Any) -> bool:
        return any(memory.get_object_state(key) is not None for memory in self._memories)

    # -- forgetting ---------------------------------------------------------------------------------------------------

    def forget(self, key: Any) -> Any:
        """Remove a prompt's KV after its prefix, and count what there was of it if the key asks for that.

        Returns:
            The result of a look-up that found nothing; with the counts, see `_nothing`. None: call again.
        """
        done, held = self._removals.pop(key.request_id, (None, None))
        if done is None:
            keys = self._chunk_objects(key)
            if _flag(key, protocol.HELD):
                held = held_by_tier(self.storage, keys, self._layouts(key))
            if not keys:
                return _nothing(held)
            self.index.remove(key.cache_salt, {each.chunk_hash for each in keys})
            done = self.forgetting.forget(keys)
            log.info("request %s: removing %d objects", key.request_id, len(keys))
        if done.wait(_WAIT_S):
            return _nothing(held)
        self._removals = {request: each for request, each in self._removals.items() if not each[0].is_set()}
        self._removals[key.request_id] = done, held
        return None

    # -- pins and budgets ---------------------------------------------------------------------------------------------

    def is_ingested(self, key: Any) -> bool:
        """Whether an object belongs to an ingested chunk."""
        return self.index.is_ingested(key.cache_salt, key.chunk_hash)

    def _note_tenant(self, key: Any) -> None:
        if self.budgets is not None:
            self.budgets.note(key.cache_salt, _tenant(key))

    def pin(self, key: Any, *, pin: bool) -> Any:
        """Pin a prompt's KV, or end that.

        Returns:
            The result of a look-up that found nothing, with the figures of pins; see `_nothing`.
        """
        objects, layouts = self._objects(key, 0), self._layouts(key)
        return _nothing(self.pins.answer(objects, layouts, _tenant(key), self.budgets, pin=pin))

    def _layouts(self, key: Any) -> Any:
        """Layout of the objects of each group of a model."""
        return self.context.layout_desc_registry.find_group_layout_descs(key.model_name, key.world_size) or {}

    def _chunk_objects(self, key: Any) -> list[Any]:
        """All objects of a prompt, but for those of its prefix."""
        tokens = as_tokens(key)
        prefix = protocol.named_prefix(key.request_configs, len(tokens))
        if not prefix:
            log.warning("request %s has no valid %s: nothing is removed", key.request_id, protocol.PREFIX)
            return []
        return self._objects(key, prefix // self.index.chunk)

    def _objects(self, key: Any, first: int) -> list[Any]:
        """All objects of a prompt from a chunk of LMCache's on."""
        from lmcache.v1.distributed.api import ipc_key_to_object_keys

        hashes = self.hashes(key.token_bytes if hasattr(key, "token_bytes") else key.token_ids)
        rows = ipc_key_to_object_keys(
            key.no_worker_id_version(), hashes[first:], sorted(self._layouts(key) or {0: None})
        )
        return [each for row in rows for each in row]


class _Matcher:
    """Replaces LMCache's BlendTokenRangeMatcher for its other users."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    @property
    def chunk_size(self) -> int:
        return self._guard.index.chunk

    def match_sub_sequence(self, token_ids: Sequence[int]) -> list[Any]:
        return self._guard.matches(from_ids(token_ids), None)

    def on_new_token_hashes(self, *_: Any, **__: Any) -> int:
        return 0  # BlendModule.store, which would call it, is replaced

    def remove_chunks(self, token_hashes: Sequence[bytes]) -> None:
        self._guard.not_found(token_hashes)


class _Listener:
    """A listener of LMCache's memory and second tiers."""

    def __init__(self, guard: Guard) -> None:
        self.on_l1_keys_deleted_by_manager = guard.left_memory
        self.on_l2_keys_deleted = guard.left_tier
        self.on_l2_keys_stored = self.on_l2_keys_accessed = guard.tier_works
        self.on_l1_keys_accessed = guard.used
        self.on_l1_keys_write_finished = self.on_l1_keys_finish_write_and_reserve_read = guard.in_memory_now

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):
            return _ignore
        raise AttributeError(name)


def _nothing(held: Mapping[str, int] | None) -> Any:
    """The result of a look-up that found nothing. Counts of a removal, or of pins, are its one match's hash, as JSON.

    LMCache's protocol has no other field that could carry them; `lmcache_client.read_counts` reads them.
    """
    from lmcache.v1.multiprocess.custom_types import CBMatchResult, CBUnifiedLookupResult

    matches = [] if held is None else [CBMatchResult(0, 0, 0, 0, json.dumps(held).encode())]
    return CBUnifiedLookupResult(prefix_coverage_tokens=0, non_prefix_segments=matches, segmented_prefix_segments=[])


def _ignore(*_: Any) -> None:
    pass


def _past_deadline(key: Any) -> bool:
    until = (key.request_configs or {}).get(protocol.UNTIL)
    return isinstance(until, float) and time.time() > until


def _flag(key: Any, name: str) -> bool:
    return (key.request_configs or {}).get(name) is True


def _tenant(key: Any) -> str:
    return str((key.request_configs or {}).get(protocol.TENANT) or "")


def _runs(wanted: Sequence[bool]) -> list[tuple[int, int]]:
    """[begin, end) of each run of True."""
    runs, begin = [], 0
    for value, group in itertools.groupby(wanted):
        end = begin + len(list(group))
        if value:
            runs.append((begin, end))
        begin = end
    return runs


def _report(guard: Guard) -> None:
    """Publish metrics of the index, coordinator and tiers on LMCache's /metrics, by OpenTelemetry as its own."""
    try:
        from opentelemetry import metrics
    except ImportError:
        return
    meter, index = metrics.get_meter("lmcache_rag"), guard.index
    meter.create_observable_gauge(
        protocol.LMCACHE_INFO,
        [lambda _: [metrics.Observation(1, facts(index.chunk, guard.hashes(list(range(index.chunk)))[0]))]],
        description="What servers have to have in common to share KV",
    )

    def reading(value: Callable[[], int]) -> list[Callable[[Any], list[Any]]]:
        return [lambda _: [metrics.Observation(value())]]

    meter.create_observable_gauge(
        protocol.INDEX_ENTRIES, reading(lambda: len(index)), description="Chunks that can be blended"
    )
    meter.create_observable_gauge(
        protocol.INDEX_SIZE, reading(lambda: index.size), description="Most chunks that the index takes"
    )
    meter.create_observable_counter(
        protocol.INDEX_ASKED,
        reading(lambda: index.looked_up),
        description="Whole chunks in prompts that were looked up",
    )
    meter.create_observable_counter(
        protocol.INDEX_FOUND, reading(lambda: index.found), description="Chunks that the index found in them"
    )
    retention.report(meter, metrics.Observation, guard.pins, guard.budgets)
    if guard.tiers:
        meter.create_observable_counter(
            protocol.TIER_DAMAGED,
            reading(lambda: sum(tier.damaged for tier in guard.tiers)),
            description="Objects that a second tier returned otherwise than they were stored",
        )
    if (fleet := guard.fleet) is not None:
        meter.create_observable_gauge(
            protocol.COORDINATOR_ANSWERS,
            reading(lambda: int(fleet.coordinator.answers)),
            description="Whether the coordinator answers",
        )
        meter.create_observable_counter(
            protocol.FLEET_FOUND,
            reading(lambda: fleet.found),
            description="Chunks that only the coordinator knew, and whose KV was loaded",
        )


# -- the HTTP API ------------------------------------------------------------------------------------------------------


def cut_routes(app: Any = None) -> list[str]:
    """Remove every route but those in KEPT_ROUTES, and have /config mask secrets.

    By default the API needs no key, shows the environment and the second tier's password, runs scripts, and changes
    the server's settings.

    Args:
        app: A FastAPI application; default: that of LMCache's HTTP server, where this process has one.

    Returns:
        The paths that were removed.
    """
    if app is None:
        app = getattr(sys.modules.get(HTTP_SERVER), "app", None)
    if app is None:
        return []
    routes = app.router.routes
    gone = sorted(
        {str(getattr(route, "path", "")) for route in routes if getattr(route, "path", None) not in KEPT_ROUTES}
    )
    config = [route for route in routes if getattr(route, "path", None) == "/config"]
    routes[:] = [route for route in routes if getattr(route, "path", None) in KEPT_ROUTES and route not in config]
    for route in config:
        app.add_api_route("/config", _masking(route.endpoint), methods=["GET"], response_model=None)
    app.openapi_schema = None
    log.info("LMCache's HTTP API does not offer %s", ", ".join(gone))
    return gone


def _masking(endpoint: Any) -> Any:
    from fastapi import Request, Response

    async def config(request: Request) -> Response:
        """LMCache's settings, secrets masked."""
        answer: Response = await endpoint(request)
        body = json.dumps(masked(json.loads(bytes(answer.body))), indent=2)
        return Response(body, answer.status_code, media_type="application/json")

    # FastAPI reads the annotations, which are names of this function's here.
    config.__annotations__ = {"request": Request, "return": Response}
    return config


def masked(value: Any, *, secret: bool = False) -> Any:
    """A JSON document with secrets masked: strings whose key suggests a secret, and user names in URLs."""
    if isinstance(value, dict):
        return {name: masked(each, secret=secret or bool(_SECRET.search(str(name)))) for name, each in value.items()}
    if isinstance(value, list):
        return [masked(each, secret=secret) for each in value]
    if not isinstance(value, str) or not value:
        return value
    return MASK if secret else _IN_ADDRESS.sub(f"{MASK}@", value)
