"""Evicts the KV of ingested chunks last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class IngestedLast:
    """In the place of one of LMCache's eviction policies: two of them, and ingested keys go when nothing else is left.

    Args:
        others: LMCache's policy, as it was made.
        ingested: Another one of the same kind, for ingested keys.
        is_ingested: Whether a key is one of an ingested chunk.
    """

    def __init__(self, others: Any, ingested: Any, is_ingested: Callable[[Any], bool]) -> None:
        self._others, self._ingested, self._is_ingested = others, ingested, is_ingested

    def __getattr__(self, name: str) -> Any:
        return getattr(self._others, name)

    def register_eviction_destination(self, destination: Any) -> None:
        """Both policies evict to there."""
        self._others.register_eviction_destination(destination)
        self._ingested.register_eviction_destination(destination)

    def on_keys_created(self, keys: list[Any]) -> None:
        """Keys are stored."""
        self._route("on_keys_created", keys)

    def on_keys_reserved(self, keys: list[Any]) -> None:
        """Keys are about to be stored."""
        self._route("on_keys_reserved", keys)

    def on_keys_touched(self, keys: list[Any]) -> None:
        """Keys were used."""
        self._others.on_keys_touched(keys)
        self._ingested.on_keys_touched(keys)

    def on_keys_removed(self, keys: list[Any]) -> None:
        """Keys are gone."""
        self._others.on_keys_removed(keys)
        self._ingested.on_keys_removed(keys)

    def get_eviction_actions(
        self,
        expected_ratio: float,
        key_eligible_filter: Callable[[Any], bool] | None = None,
        cache_salt: str | None = None,
    ) -> list[Any]:
        """What to evict: of the others as long as any of them may go."""

        def other(key: Any) -> bool:  # one that was ingested since it was stored is still among the others
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
    """Patch: the policies of LMCache's memory and of the second tiers that there are now.

    Args:
        storage: LMCache's StorageManager.
        is_ingested: Whether a key is one of an ingested chunk.
    """
    from lmcache.v1.distributed.eviction_policy import CreateEvictionPolicy

    def wrapped(policy: Any, config: Any) -> IngestedLast:
        return IngestedLast(policy, CreateEvictionPolicy(config), is_ingested)

    for memory in storage._eviction_controllers:
        memory._listener._policy = memory._eviction_policy = wrapped(memory._eviction_policy, memory._eviction_config)
    for tier in storage._l2_eviction_controller._adapter_states:
        tier.listener._policy = tier.eviction_policy = wrapped(tier.eviction_policy, tier.eviction_config)
