"""Evicts the KV of ingested chunks last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmcache_rag.connector.patching import Patch, patch_object

_CONTROLLER = "lmcache.v1.distributed.storage_controllers.eviction_controller"
_LISTENERS = "lmcache.v1.distributed.eviction"
_WHY = "The KV of ingested chunks is evicted last."
_UNTIL = "LMCache's eviction knows priorities"
MEMORY_POLICY = Patch(f"{_CONTROLLER}:L1EvictionController._eviction_policy", _WHY, _UNTIL)
TIER_POLICY = Patch(f"{_CONTROLLER}:L2AdapterEvictionState.eviction_policy", _WHY, _UNTIL)
MEMORY_LISTENER_POLICY = Patch(f"{_LISTENERS}:L1EvictionPolicy._policy", _WHY, _UNTIL)
TIER_LISTENER_POLICY = Patch(f"{_LISTENERS}:L2EvictionPolicy._policy", _WHY, _UNTIL)


class IngestedLast:
    """Replaces one of LMCache's eviction policies by two: ingested keys are evicted when no others are left.

    Args:
        others: LMCache's policy, as it was made.
        ingested: Another one of the same class, for ingested keys.
        is_ingested: Whether a key belongs to an ingested chunk.
    """

    def __init__(self, others: Any, ingested: Any, is_ingested: Callable[[Any], bool]) -> None:
        self._others, self._ingested, self._is_ingested = others, ingested, is_ingested

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
        """Select keys to evict: not ingested ones as long as there are others."""

        def other(key: Any) -> bool:  # a key that was ingested after it was stored is still among the others
            return not self._is_ingested(key) and (key_eligible_filter is None or key_eligible_filter(key))

        for policy, eligible in (
            (self._others, other),
            (self._ingested, key_eligible_filter),
            (self._others, key_eligible_filter),
        ):
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


def evict_ingested_last(storage: Any, is_ingested: Callable[[Any], bool]) -> None:
    """Replace the eviction policies of LMCache's memory and of the second tiers that there are now.

    Args:
        storage: LMCache's StorageManager.
        is_ingested: Whether a key belongs to an ingested chunk.
    """
    from lmcache.v1.distributed.eviction_policy import CreateEvictionPolicy

    def wrapped(policy: Any, config: Any) -> IngestedLast:
        return IngestedLast(policy, CreateEvictionPolicy(config), is_ingested)

    for memory in storage._eviction_controllers:
        policy = wrapped(memory._eviction_policy, memory._eviction_config)
        patch_object(MEMORY_POLICY, memory, policy)
        patch_object(MEMORY_LISTENER_POLICY, memory._listener, policy)
    for tier in storage._l2_eviction_controller._adapter_states:
        policy = wrapped(tier.eviction_policy, tier.eviction_config)
        patch_object(TIER_POLICY, tier, policy)
        patch_object(TIER_LISTENER_POLICY, tier.listener, policy)
