"""The settings of our module in LMCache's server."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize(
    "wrong", [{"index": "x"}, {"store": "x"}, {"index_size": True}, {"index_size": 0}, {"sise": 1}], ids=str
)
def test_wrong_server_settings_are_named(wrong: dict[str, Any]) -> None:
    from lmcache_rag.connector.lmcache_server.settings import ServerSettings

    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServerSettings.read(wrong)
