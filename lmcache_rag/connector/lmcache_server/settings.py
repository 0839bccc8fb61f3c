"""Settings in LMCache's --server-module, as `lmcache-rag serve` writes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lmcache_rag.errors import ConfigError
from lmcache_rag.protocol import tenant_name

MODULE = "lmcache_rag.connector.server_guard"  # what --server-module loads
SERDE = "lmcache_rag"  # type of the serde that checks a second tier's bytes, see lmcache_server.tier_check
INDEX_MODES = ("declared", "all")
STORE_MODES = ("ingest", "second", "all")
INDEX_SIZE = 1 << 20


@dataclass(frozen=True)
class ServerSettings:
    """How LMCache's server keeps KV for blending.

    Attributes:
        index: "declared": only chunks that a client ingests may be blended; "all": spans of every prompt may.
        store: "ingest": KV of ingested chunks only is stored; "all": of every prompt, and ingested KV is evicted last.
            "second": the same; vLLM's side then sends of prompts only what they begin with for the second time.
        index_size: Most chunks in the index.
        kv_ttl: Age in seconds at which KV is removed from memory and second tiers; 0: never.
        budgets: Most gigabytes (2^30 bytes) of memory by tenant; "*" is for each one that is not named.
    """

    index: str = "declared"
    store: str = "all"
    index_size: int = INDEX_SIZE
    kv_ttl: float = 0.0
    budgets: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ServerSettings:
        """Read the "config" of --server-module.

        Raises:
            ValueError: A setting is invalid; LMCache does not start then.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(config) - known):
            raise ValueError(f"unknown settings {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        found = cls(**config)
        if found.index not in INDEX_MODES:
            raise ValueError(f"index must be one of {', '.join(INDEX_MODES)}; got {found.index!r}")
        if found.store not in STORE_MODES:
            raise ValueError(f"store must be one of {', '.join(STORE_MODES)}; got {found.store!r}")
        if not isinstance(found.index_size, int) or isinstance(found.index_size, bool) or found.index_size < 1:
            raise ValueError(f"index_size must be a number of chunks; got {found.index_size!r}")
        if not isinstance(found.kv_ttl, int | float) or isinstance(found.kv_ttl, bool) or found.kv_ttl < 0:
            raise ValueError(f"kv_ttl must be a number of seconds; got {found.kv_ttl!r}")
        if not isinstance(found.budgets, Mapping) or not all(map(_is_size, found.budgets.values())):
            raise ValueError(f"budgets must be gigabytes by tenant, each above 0; got {found.budgets!r}")
        return found

    def config(self) -> dict[str, Any]:
        """The "config" of --server-module: settings that are not the defaults."""
        defaults = asdict(ServerSettings())
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}


def parse_budgets(words: Iterable[str]) -> dict[str, float]:
    """Budgets from TENANT=GB, each.

    Raises:
        ConfigError: One has another form, or names a tenant twice.
    """
    found: dict[str, float] = {}
    for word in filter(None, (word.strip() for word in words)):
        tenant, _, size = word.rpartition("=")
        try:
            value = float(size)
        except ValueError:
            value = math.nan
        if "=" not in word or not _is_size(value) or tenant in found:
            again = " names a tenant that has a budget already" if tenant in found else " is not TENANT=GB"
            raise ConfigError(
                f"--tenant-budget {word!r}{again}.",
                remedy="For example --tenant-budget acme=40 --tenant-budget '*=5', which is for each other tenant.",
            )
        found[tenant_name(tenant)] = value
    return found


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
