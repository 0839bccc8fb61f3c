"""Settings in LMCache's --server-module, as `lmcache-rag serve` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

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
    """

    index: str = "declared"
    store: str = "all"
    index_size: int = INDEX_SIZE
    kv_ttl: float = 0.0

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
        return found

    def config(self) -> dict[str, Any]:
        """The "config" of --server-module: settings that are not the defaults."""
        defaults = asdict(ServerSettings())
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}
