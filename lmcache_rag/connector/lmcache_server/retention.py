"""What stays in LMCache's memory: pinned chunks, and no more of a tenant's KV than its budget.

LMCache's server has neither. Its quotas are of second tiers with the eviction policy IsolatedLRU, and of a cache_salt,
which names one prefix of a tenant here; `TenantBudgets` sets them, too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

from lmcache_rag import protocol

log = logging.getLogger("lmcache_rag")

PIN_SHARE = 0.5  # of memory that pins may take: LMCache evicts from 80% on, and the rest must be of use to questions
EVERY, GIB = "*", 1 << 30
INTERVAL_S = 1.0  # as LMCache's own eviction
_NO_LIMIT = 1 << 60  # LMCache's quota of a namespace that has none: without an entry it would be 0


class Refusal(Enum):
    """Why a chunk is not pinned: which limit it exceeds."""

    MEMORY = "memory"
    TENANT = "tenant"


class Pins:
    """Chunks whose objects are not evicted from memory. They are named: a chunk may be pinned before it is stored.

    Args:
        most: Most bytes of memory that they may take.
    """

    def __init__(self, most: Callable[[], int]) -> None:
        self._most = most
        self.used = 0  # bytes
        self._lock = threading.Lock()
        self._chunks: dict[Any, tuple[Any, ...]] = {}  # all objects of a chunk's prompt, by the last one
        self._uses: Counter[Any] = Counter()  # chunks that pin an object: they share their prefix
        self._sizes: dict[Any, int] = {}

    @property
    def limit(self) -> int:
        """Most bytes of memory that they may take."""
        return self._most()

    def pin(self, objects: Mapping[Any, int], room: int | None = None) -> Refusal | None:
        """Pin a chunk's objects, and those before it in its prompt.

        Args:
            objects: Bytes by object, in the prompt's order.
            room: Bytes that the tenant's budget leaves for more pins; None: any number.

        Returns:
            Why they are not pinned; None if they are.
        """
        with self._lock:
            name = next(reversed(objects), None)
            if name is None or name in self._chunks:
                return None
            more = sum(size for key, size in objects.items() if key not in self._sizes)
            if room is not None and more > room:
                return Refusal.TENANT
            if self.used + more > self.limit:
                return Refusal.MEMORY
            self._chunks[name] = tuple(objects)
            self._uses.update(self._chunks[name])
            self._sizes.update(objects)
            self.used += more
            return None

    def unpin(self, objects: Iterable[Any]) -> None:
        """End the pins of the chunks whose last object is among these."""
        with self._lock:
            for name in objects:
                for key in self._chunks.pop(name, ()):
                    self._uses[key] -= 1
                    if not self._uses[key]:
                        del self._uses[key]
                        self.used -= self._sizes.pop(key)

    def answer(
        self,
        objects: Sequence[Any],
        layouts: Mapping[int, Any],
        tenant: str,
        budgets: TenantBudgets | None,
        *,
        pin: bool,
    ) -> dict[str, int]:
        """Pin a chunk for a tenant, or end that: what the client is told.

        Args:
            objects: Of the chunk and of what is before it in its prompt, in order.
            layouts: Layout of the objects of each group; none: no worker is registered, and their sizes are not known.
            tenant: Whose they are.
            budgets: Of the tenants.
            pin: Whether to pin it.
        """
        limit = None if budgets is None else budgets.budget(tenant)
        refused: Refusal | None = None
        if pin:
            room = None if budgets is None or limit is None else limit - budgets.pinned(tenant)
            sizes = {each: object_bytes(layouts.get(each.object_group_id)) for each in objects}
            refused = self.pin(sizes, room) if layouts else Refusal.MEMORY
            if refused:
                log.warning("A chunk is not pinned: the limit of its %s does not allow it", refused.value)
        else:
            self.unpin(objects[-1:])
        used, most = self.used, self.limit
        if refused is Refusal.TENANT and budgets is not None and limit is not None:
            used, most = budgets.pinned(tenant), limit
        beyond = int(refused is Refusal.TENANT)
        return {protocol.PINNED: int(pin and not refused), "used": used, "limit": most, "tenant": beyond}

    def size(self, wanted: Callable[[Any], bool]) -> int:
        """Bytes of those objects that are wanted."""
        with self._lock:
            return sum(size for key, size in self._sizes.items() if wanted(key))

    def __contains__(self, key: Any) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._chunks)


class TenantBudgets:
    """How much of memory each tenant's KV takes; evicts that of tenants that are beyond their budgets.

    Objects are named by namespace, of which a tenant has one for each prefix. Requests name the tenant.

    Args:
        storage: LMCache's StorageManager.
        budgets: Gigabytes (2^30 bytes) by tenant; EVERY: of each that is not named.
        pins: Are not evicted.
        is_ingested: Whether an object belongs to an ingested chunk: these are evicted last.
    """

    def __init__(
        self, storage: Any, budgets: Mapping[str, float], pins: Pins, is_ingested: Callable[[Any], bool]
    ) -> None:
        self._storage, self._pins, self._is_ingested = storage, pins, is_ingested
        self._budgets = {tenant: int(size * GIB) for tenant, size in budgets.items()}
        self._lock = threading.Lock()
        self._tenants: dict[str, str] = {}  # by namespace
        self._objects: dict[str, OrderedDict[Any, int]] = {}  # by namespace, with their bytes, the latest used last
        self.used: Counter[str] = Counter()  # bytes by tenant
        self.evicted: Counter[str] = Counter()  # objects by tenant

    def start(self) -> None:
        """Evict what is beyond a budget from now on, in a thread."""
        threading.Thread(target=self._run, name="lmcache-rag-budgets", daemon=True).start()

    def budget(self, tenant: str) -> int | None:
        """Bytes that a tenant may use; None: any number. KV without a tenant has no budget, unless "" is named."""
        return self._budgets.get(tenant, self._budgets.get(EVERY) if tenant else None)

    def note(self, salt: str, tenant: str) -> None:
        """A namespace is this tenant's: the first that a request names for it; "": of no tenant, so far."""
        if self._tenants.get(salt, None if tenant else tenant):
            return
        with self._lock:
            if self._tenants.get(salt) == tenant:
                return
            self._tenants[salt] = tenant
            held = sum(self._objects.get(salt, {}).values())
            self.used[""] -= held
            self.used[tenant] += held
        limit = self.budget(tenant)
        self._storage.quota_manager.set_quota(salt, _NO_LIMIT if limit is None else limit)

    def pinned(self, tenant: str) -> int:
        """Bytes of a tenant's pins."""
        return self._pins.size(lambda key: self._tenants.get(key.cache_salt, "") == tenant)

    # -- what is in memory --------------------------------------------------------------------------------------------

    def add(self, keys: Iterable[Any]) -> None:
        """Objects are in memory now."""
        with self._lock:
            for key in keys:
                size = _size_in_memory(self._storage, key)
                held = self._objects.setdefault(key.cache_salt, OrderedDict())
                self.used[self._tenants.get(key.cache_salt, "")] += size - held.pop(key, 0)
                held[key] = size

    def touch(self, keys: Iterable[Any]) -> None:
        """Objects were used."""
        with self._lock:
            for key in keys:
                if key in (held := self._objects.get(key.cache_salt, OrderedDict())):
                    held.move_to_end(key)

    def discard(self, keys: Iterable[Any]) -> None:
        """Objects left memory."""
        with self._lock:
            for key in keys:
                held = self._objects.get(key.cache_salt, OrderedDict())
                self.used[self._tenants.get(key.cache_salt, "")] -= held.pop(key, 0)
                if not held:
                    self._objects.pop(key.cache_salt, None)

    # -- eviction -----------------------------------------------------------------------------------------------------

    def excess(self) -> list[Any]:
        """The least recently used objects of tenants beyond their budgets, as many as are too many."""
        found: list[Any] = []
        with self._lock:
            for tenant, used in self.used.items():
                limit = self.budget(tenant)
                if limit is None or used <= limit:
                    continue
                for key, size in self._candidates(tenant):
                    if used <= limit:
                        break
                    found.append(key)
                    used -= size
        return found

    def _candidates(self, tenant: str) -> list[tuple[Any, int]]:
        """A tenant's objects that may be evicted, in the order in which they are: ingested ones last."""
        held = [
            (key, size)
            for salt, objects in self._objects.items()
            if self._tenants.get(salt, "") == tenant
            for key, size in objects.items()
            if key not in self._pins
        ]
        return sorted(held, key=lambda each: self._is_ingested(each[0]))

    def step(self) -> int:
        """Evict what is beyond a budget; returns how many objects."""
        keys = self.excess()
        for memory in self._storage._l1_managers_by_id.values() if keys else ():
            memory.delete([key for key in keys if memory.is_key_evictable(key)])
        gone = [key for key in keys if not _in_memory(self._storage, key)]
        self.count(gone)
        return len(gone)

    def count(self, keys: Iterable[Any]) -> None:
        """Objects were evicted as their tenants were beyond their budgets."""
        self.evicted.update(self._tenants.get(key.cache_salt, "") for key in keys)

    def figures(self) -> dict[str, tuple[int, int]]:
        """(bytes in memory, budget) of each tenant that has a budget."""
        limits = {tenant: self.budget(tenant) for tenant in {*self._budgets, *self.used} - {EVERY}}
        return {tenant: (self.used[tenant], limit) for tenant, limit in limits.items() if limit is not None}

    def _run(self) -> None:
        while True:
            time.sleep(INTERVAL_S)
            try:
                if count := self.step():
                    log.info("%d objects of tenants beyond their budgets are evicted", count)
            except Exception:
                log.exception("KV beyond a budget could not be evicted; trying again")


def most_pinned(storage: Any) -> int:
    """Most bytes of LMCache's memory that pins may take."""
    return int(PIN_SHARE * sum(memory.get_memory_usage()[1] for memory in storage._l1_managers_by_id.values()))


def object_bytes(layout: Any) -> int:
    """Bytes of an object by LMCache's layout; 0 where no worker has registered one."""
    if layout is None:
        return 0
    return sum(shape.numel() * dtype.itemsize for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True))


def _in_memory(storage: Any, key: Any) -> bool:
    return any(memory.get_object_state(key) is not None for memory in storage._l1_managers_by_id.values())


def _size_in_memory(storage: Any, key: Any) -> int:
    """Bytes of an object; for LMCache's listeners, which are called with the memory's lock held."""
    for memory in storage._l1_managers_by_id.values():
        if (state := memory._objects.get(key)) is not None:
            return int(state.memory_obj.get_size())
    return 0


def report(meter: Any, observation: Any, pins: Pins, budgets: TenantBudgets | None) -> None:
    """Publish metrics of pins and budgets.

    Args:
        meter: OpenTelemetry's meter.
        observation: OpenTelemetry's Observation.
        pins: The pins.
        budgets: The budgets; None: there are none.
    """

    def total(name: str, value: Callable[[], int], description: str) -> None:
        meter.create_observable_gauge(name, [lambda _: [observation(value())]], description=description)

    def by_tenant(value: Callable[[], Mapping[str, int]]) -> list[Callable[[Any], list[Any]]]:
        return [lambda _: [observation(each, {"tenant": name}) for name, each in value().items()]]

    total(protocol.PINNED_BYTES, lambda: pins.used, "Bytes of memory that are pinned")
    total(protocol.PIN_LIMIT, lambda: pins.limit, "Most bytes of memory that may be pinned")
    if budgets is None:
        return
    meter.create_observable_gauge(
        protocol.TENANT_BYTES,
        by_tenant(lambda: {tenant: used for tenant, (used, _) in budgets.figures().items()}),
        description="Bytes of memory that a tenant's KV takes",
    )
    meter.create_observable_gauge(
        protocol.TENANT_BUDGET,
        by_tenant(lambda: {tenant: budget for tenant, (_, budget) in budgets.figures().items()}),
        description="Most bytes of memory that a tenant's KV may take",
    )
    meter.create_observable_counter(
        protocol.TENANT_EVICTED,
        by_tenant(lambda: dict(budgets.evicted)),
        description="Objects that were evicted, as their tenant was beyond its budget",
    )
