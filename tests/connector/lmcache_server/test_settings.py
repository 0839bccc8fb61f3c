"""The settings of our module in LMCache's server."""

from __future__ import annotations

from typing import Any

import pytest

from lmcache_rag.connector.lmcache_server.settings import parse_budgets
from lmcache_rag.errors import ConfigError

WRONG: list[dict[str, Any]] = [{"index": "x"}, {"store": "x"}, {"kv_ttl": -1}, {"kv_ttl": "30d"}]
WRONG += [{"budgets": 5}, {"budgets": {"acme": 0}}, {"budgets": {"acme": True}}]
WRONG += [{"index_size": True}, {"index_size": 0}, {"sise": 1}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_server_settings_are_named(wrong: dict[str, Any]) -> None:
    from lmcache_rag.connector.lmcache_server.settings import ServerSettings

    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServerSettings.read(wrong)


def test_budgets_are_read_by_tenant() -> None:
    assert parse_budgets(["acme=40", " a=b=0.5 ", "*=5", ""]) == {"acme": 40.0, "a=b": 0.5, "*": 5.0}
    assert parse_budgets([]) == {}
    assert list(parse_budgets(["x" * 100 + "=1"])) != ["x" * 100], "as requests name it"
    for wrong in ("acme", "acme=", "acme=0", "acme=nan", "acme=inf"):
        with pytest.raises(ConfigError, match="is not TENANT=GB"):
            parse_budgets([wrong])
    with pytest.raises(ConfigError, match="has a budget already"):
        parse_budgets(["acme=1", "acme=2"])
