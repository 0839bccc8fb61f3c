"""Which KV leaves LMCache's memory and second tiers: what a client removes, at once; ingested chunks, last."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Container, Iterable
from typing import Any

from lmcache_rag.connector.lmcache_server.index import ChunkIndex
from lmcache_rag.connector.lmcache_server.retention import Pins, TenantBudgets
from lmcache_rag.connector.patching import Patch, patch_object

log = logging.getLogger("lmcache_rag")

_MEMORY = "lmcache.v1.distributed.l1_manager:L1Manager"
_WHY = "KV that is being removed is not read, nor loaded from a second tier again."
_UNTIL = "LMCache's protocol can remove KV"
RESERVE_READ = Patch(f"{_MEMORY}.reserve_read", _WHY, _UNTIL)
RESERVE_WRITE = Patch(f"{_MEMORY}.reserve_write", _WHY, _UNTIL)

_CONTROLLER = "lmcache.v1.distributed.storage_controllers.eviction_controller"
_LISTENERS = "lmcache.v1.distributed.eviction"
_EVICTION_WHY = "The KV of ingested chunks is evicted last."
_EVICTION_UNTIL = "LMCache's eviction knows priorities"
MEMORY_POLICY = Patch(f"{_CONTROLLER}:L1EvictionController._eviction_policy", _EVICTION_WHY, _EVICTION_UNTIL)
TIER_POLICY = Patch(f"{_CONTROLLER}:L2AdapterEvictionState.eviction_policy", _EVICTION_WHY, _EVICTION_UNTIL)
MEMORY_LISTENER_POLICY = Patch(f"{_LISTENERS}:L1EvictionPolicy._policy", _EVICTION_WHY, _EVICTION_UNTIL)
TIER_LISTENER_POLICY = Patch(f"{_LISTENERS}:L2EvictionPolicy._policy", _EVICTION_WHY, _EVICTION_UNTIL)

MEMORY = "memory"  # name of LMCache's memory among the tiers
COUNT_S = 1.0  # longest wait for what a second tier holds
UNKNOWN = -1  # count of a tier that did not answer
PASSES_S = (0.0, 1.0, 5.0, 30.0)  # after an object has left memory: a second tier may still have been writing it
PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0  # between two attempts to remove an object that is being read


class Forgetting:
    """Removes objects, at once or when their locks end, and keeps them from being read until then.

    A thread removes them. A key is blocked until the last of the PASSES_S is over: an object that was on the way from
    or to a second tier when its removal was requested is removed by a later pass. Storing it again stops the removal.

    Args:
        storage: LMCache's StorageManager.
        pins: End for what is removed.
    """

    def __init__(self, storage: Any, pins: Pins | None = None) -> None:
        self._storage, self._pins, self._passes = storage, pins, PASSES_S
        self._lock = threading.Lock()
        self._held: dict[Any, _Removal] = {}  # by object key
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def forget(self, keys: Iterable[Any]) -> threading.Event:
        """Remove objects.

        Returns:
            Set when all of them are removed, but for those that a request is reading at present.
        """
        keys = list(dict.fromkeys(keys))
        done = threading.Event()
        if self._pins is not None:
            self._pins.unpin(keys)
        with self._lock:
            removal = _Removal(done)
            for key in keys:
                self._held[key] = removal
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="lmcache-rag-forget", daemon=True)
                self._thread.start()
        self._wake.set()
        return done

    def keep(self, keys: Iterable[Any]) -> None:
        """Stop removing these objects: they are stored again."""
        if self._held:
            with self._lock:
                for key in keys:
                    if removal := self._held.pop(key, None):
                        removal.done.set()

    def holds(self, key: Any) -> bool:
        """Whether an object must not be read any more."""
        return key in self._held

    def __len__(self) -> int:
        """Number of objects that are being removed."""
        return len(self._held)

    def _run(self) -> None:
        while True:
            self._wake.wait(PAUSE_S if self._held else None)
            self._wake.clear()
            try:
                self.step(time.monotonic())
            except Exception:
                log.exception("KV could not be removed; trying again")

    def step(self, now: float) -> None:
        """Remove the objects that are due."""
        with self._lock:
            due = [key for key, removal in self._held.items() if removal.next <= now]
            removals = {self._held[key] for key in due}
        if not due:
            return
        self._storage.delete_l1_keys(due)
        gone = {key for key in due if not self._in_memory(key)}
        for _, tier in self._storage.l2_adapters():
            try:
                tier.delete(due)
            except Exception:  # later passes try again
                log.warning("A second tier did not delete KV; trying again", exc_info=True)
        with self._lock:
            for removal in removals:
                keys = {key for key in due if self._held.get(key) is removal}
                removal.done.set()
                if not keys <= gone:  # some are being read
                    removal.next = now + removal.pause
                    removal.pause = min(2 * removal.pause, LONGEST_PAUSE_S)
                    continue
                removal.passed += 1
                if removal.passed == len(self._passes):
                    for key in keys:
                        del self._held[key]
                else:
                    removal.next = now + self._passes[removal.passed] - self._passes[removal.passed - 1]

    def _in_memory(self, key: Any) -> bool:
        return any(memory.get_object_state(key) is not None for memory in self._storage._l1_managers_by_id.values())

    def guard(self) -> None:
        """Keep LMCache's memory from returning objects that are being removed, or loading them from a second tier."""
        from lmcache.v1.distributed.error import L1Error

        for memory in self._storage._l1_managers_by_id.values():
            _without(memory, RESERVE_READ, self.holds, (L1Error.KEY_NOT_EXIST, None), ())
            _without(memory, RESERVE_WRITE, self.holds, (L1Error.KEY_NOT_WRITABLE, None), ("is_temporary",))


def held_by_tier(storage: Any, keys: list[Any], layouts: Any) -> dict[str, int]:
    """How many of these objects memory and each second tier hold; UNKNOWN where a tier does not answer.

    A second tier is asked as for a load, so that this holds for every kind of adapter: few of them list their keys.

    Args:
        storage: LMCache's StorageManager.
        keys: Names of objects.
        layouts: Layout of the objects of each group.
    """
    memories = storage._l1_managers_by_id.values()
    held = {MEMORY: sum(any(memory.get_object_state(key) is not None for memory in memories) for key in keys)}
    for number, (_, tier) in enumerate(storage.l2_adapters(), start=2):
        try:
            held[f"tier {number}"] = _count(tier, keys, layouts)
        except Exception:
            log.warning("A second tier did not report which KV it holds", exc_info=True)
            held[f"tier {number}"] = UNKNOWN
    return held


def _count(tier: Any, keys: list[Any], layouts: Any) -> int:
    task, end = tier.submit_lookup_and_lock_task(keys, layouts), time.monotonic() + COUNT_S
    while (found := tier.query_lookup_and_lock_result(task)) is None:
        if time.monotonic() > end:
            return UNKNOWN
        time.sleep(0.005)
    there = [key for at, key in enumerate(keys) if found.test(at)]
    if there:
        tier.submit_unlock(there)
    return len(there)


class Expiry:
    """Removes objects a certain time after they were stored, or first loaded by this process from a second tier.

    How old KV in a second tier is is not known after a restart of LMCache: its age counts from its first load.

    Args:
        forgetting: Removes them.
        index: Their chunks leave it at once.
        ttl: Seconds.
    """

    def __init__(self, forgetting: Forgetting, index: ChunkIndex, ttl: float) -> None:
        self._forgetting, self._index, self.ttl = forgetting, index, ttl
        self._lock = threading.Lock()
        self._since: dict[Any, float] = {}  # by object key, the oldest first

    def start(self) -> None:
        """Remove what is due from now on, in a thread."""
        threading.Thread(target=self._run, name="lmcache-rag-expiry", daemon=True).start()

    def add(self, keys: Iterable[Any], now: float | None = None) -> None:
        """Objects are in memory now; those that are known keep their age."""
        now = time.monotonic() if now is None else now
        with self._lock:
            for key in keys:
                self._since.setdefault(key, now)

    def discard(self, keys: Iterable[Any]) -> None:
        """Objects are nowhere any more."""
        with self._lock:
            for key in keys:
                self._since.pop(key, None)

    def step(self, now: float) -> int:
        """Remove the objects that are due; returns how many."""
        with self._lock:
            due = list(itertools.takewhile(lambda key: self._since[key] <= now - self.ttl, self._since))
            for key in due:
                del self._since[key]
        for key in due:
            self._index.remove(key.cache_salt, (key.chunk_hash,))
        if due:
            self._forgetting.forget(due)
        return len(due)

    def _run(self) -> None:
        while True:
            time.sleep(min(60.0, max(0.1, self.ttl / 10)))
            try:
                if count := self.step(time.monotonic()):
                    log.info("%d objects were older than %.0f s and are removed", count, self.ttl)
            except Exception:
                log.exception("KV that is too old could not be removed; trying again")


class _Removal:
    """Objects whose removal was requested together."""

    def __init__(self, done: threading.Event) -> None:
        self.done, self.passed, self.next, self.pause = done, 0, 0.0, PAUSE_S


def _without(memory: Any, patch: Patch, holds: Callable[[Any], bool], answer: Any, parallel: tuple[str, ...]) -> None:
    """Have a method of `memory` called without the keys that are being removed, for which it returns `answer`.

    Args:
        memory: LMCache's L1Manager.
        patch: The method; it takes `keys`, and returns a dictionary by key.
        holds: Whether a key is being removed.
        answer: The method's result for such a key.
        parallel: Arguments that are lists as long as `keys`.
    """
    call = getattr(memory, patch.name)

    def guarded(keys: list[Any], *args: Any, **kwargs: Any) -> dict[Any, Any]:
        held = [key for key in keys if holds(key)]
        if not held:
            result: dict[Any, Any] = call(keys, *args, **kwargs)
            return result
        free = [at for at, key in enumerate(keys) if not holds(key)]
        args = tuple([arg[at] for at in free] if place < len(parallel) else arg for place, arg in enumerate(args))
        kwargs |= {one: [kwargs[one][at] for at in free] for one in parallel if one in kwargs}
        return {**call([keys[at] for at in free], *args, **kwargs), **dict.fromkeys(held, answer)}

    patch_object(patch, memory, guarded)


# -- eviction: ingested chunks last ------------------------------------------------------------------------------------


class IngestedLast:
    """Replaces one of LMCache's eviction policies by two: ingested keys are evicted when no others are left.

    Args:
        others: LMCache's policy, as it was made.
        ingested: Another one of the same class, for ingested keys.
        is_ingested: Whether a key belongs to an ingested chunk.
        pins: Keys that are not evicted.
        budgets: Keys of tenants beyond their budgets are evicted before all others; None: there are no budgets.
    """

    def __init__(
        self,
        others: Any,
        ingested: Any,
        is_ingested: Callable[[Any], bool],
        pins: Container[Any] = (),
        budgets: TenantBudgets | None = None,
    ) -> None:
        self._others, self._ingested, self._is_ingested = others, ingested, is_ingested
        self._pins, self._budgets = pins, budgets

    def __getattr__(self, name: str) -> Any:
        return getattr(self._others, name)

    def register_eviction_destination(self, destination: Any) -> None:
        """Register it with both policies."""
        self._others.register_eviction_destination(destination)
        self._ingested.register_eviction_destination(destination)

    def on_keys_created(self, keys: list[Any]) -> None:
        """Add stored keys."""
        self._route("on_keys_created", keys)

    def on_keys_reserved(self, keys: list[Any]) -> None:
        """Add keys that are about to be stored."""
        self._route("on_keys_reserved", keys)

    def on_keys_touched(self, keys: list[Any]) -> None:
        """Mark keys as used."""
        self._others.on_keys_touched(keys)
        self._ingested.on_keys_touched(keys)

    def on_keys_removed(self, keys: list[Any]) -> None:
        """Remove keys."""
        self._others.on_keys_removed(keys)
        self._ingested.on_keys_removed(keys)

    def get_eviction_actions(
        self,
        expected_ratio: float,
        key_eligible_filter: Callable[[Any], bool] | None = None,
        cache_salt: str | None = None,
    ) -> list[Any]:
        """Select keys to evict: those of tenants beyond their budgets, or else ingested ones only if no others."""

        def free(key: Any) -> bool:
            return key not in self._pins and (key_eligible_filter is None or key_eligible_filter(key))

        def other(key: Any) -> bool:  # a key that was ingested after it was stored is still among the others
            return not self._is_ingested(key) and free(key)

        if self._budgets is not None and (beyond := [key for key in self._budgets.excess() if free(key)]):
            from lmcache.v1.distributed.internal_api import EvictionAction, EvictionDestination

            self._budgets.count(beyond)
            return [EvictionAction(EvictionDestination.DISCARD, beyond)]
        for policy, eligible in ((self._others, other), (self._ingested, free), (self._others, free)):
            actions: list[Any] = policy.get_eviction_actions(expected_ratio, eligible, cache_salt)
            if any(action.keys for action in actions):
                return actions
        return []

    def _route(self, method: str, keys: list[Any]) -> None:
        ingested = [key for key in keys if self._is_ingested(key)]
        if not ingested:
            getattr(self._others, method)(keys)
            return
        self._others.on_keys_removed(ingested)
        getattr(self._ingested, method)(ingested)
        found = set(ingested)
        getattr(self._others, method)([key for key in keys if key not in found])


def evict_ingested_last(
    storage: Any, is_ingested: Callable[[Any], bool], pins: Container[Any] = (), budgets: TenantBudgets | None = None
) -> None:
    """Replace the eviction policies of LMCache's memory and of the second tiers that there are now.

    Args:
        storage: LMCache's StorageManager.
        is_ingested: Whether a key belongs to an ingested chunk.
        pins: Keys that stay in memory. A tier may evict them: memory has them.
        budgets: Of memory.
    """
    from lmcache.v1.distributed.eviction_policy import CreateEvictionPolicy

    def wrapped(policy: Any, config: Any, *limits: Any) -> IngestedLast:
        return IngestedLast(policy, CreateEvictionPolicy(config), is_ingested, *limits)

    for memory in storage._eviction_controllers:
        policy = wrapped(memory._eviction_policy, memory._eviction_config, pins, budgets)
        patch_object(MEMORY_POLICY, memory, policy)
        patch_object(MEMORY_LISTENER_POLICY, memory._listener, policy)
    for tier in storage._l2_eviction_controller._adapter_states:
        policy = wrapped(tier.eviction_policy, tier.eviction_config)
        patch_object(TIER_POLICY, tier, policy)
        patch_object(TIER_LISTENER_POLICY, tier.listener, policy)
