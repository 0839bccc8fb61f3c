"""Values of every JSON type, for keys of kv_transfer_params that a server reads or refuses."""

from __future__ import annotations

from typing import Any

from lmcache_rag import protocol


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


KEYS = (
    *protocol.REQUEST_KEYS,
    *protocol.LMCACHE_KEYS,
    *protocol.PD_KEYS,
    "remote_host",
    "remote_block_ids",
    "lmcache_rag.signature",
    "lmcache_rag.unknown",
    "lmcache_rag.",
    "lmcache.skip_save",
    "lmcache_rag",
    "prompt_token_ids",
    "gateway.hint",
    "",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    64,
    2**31,
    2**63,
    10**300,
    0.15,
    100.5,
    -0.0,
    1e308,
    "",
    "x",
    "on",
    "all",
    "\u0000\r\n\x1b[31m",
    "x" * 100_000,
    [],
    [[0, 64]],
    [[64, 128], [0, 64]],
    [[0, 10**300]],
    [["a", "b"]],
    [[0, 1]] * 5000,
    nested(50),
    {},
    {"lmcache_rag": {"blend": "off"}},
    {str(number): number for number in range(1000)},
)
