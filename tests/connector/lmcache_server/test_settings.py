"""The settings of our module in LMCache's server."""

from __future__ import annotations

from typing import Any

import pytest

WRONG: list[dict[str, Any]] = [{"index": "x"}, {"store": "x"}, {"kv_ttl": -1}, {"kv_ttl": "30d"}]
WRONG += [{"index_size": True}, {"index_size": 0}, {"sise": 1}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_server_settings_are_named(wrong: dict[str, Any]) -> None:
    from lmcache_rag.connector.lmcache_server.settings import ServerSettings

    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServerSettings.read(wrong)
