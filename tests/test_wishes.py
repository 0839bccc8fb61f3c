"""What a request may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from lmcache_rag.connector.wishes import KEYS, OURS, wrong


@pytest.mark.parametrize(
    "params",
    [
        None,
        {},
        "not ours to judge",
        {"lmcache.x": "anything", "do_remote_prefill": 1, 3: 4},
        {"lmcache_rag.policy": "head", "lmcache_rag.ratio": 1, "lmcache_rag.blend": "off"},
        {"lmcache_rag.blend": True, "lmcache_rag.chunks": [[64, 128], [130, 200]], "lmcache_rag.prefix": 64},
        {"lmcache_rag.ingest": True, "lmcache_rag.chunks": []},
    ],
)
def test_what_may_be_asked(params: Any) -> None:
    assert wrong(params) == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy", "best"),
        ("policy", ["query"]),
        ("ratio", 1.5),
        ("ratio", True),
        ("ratio", float("nan")),
        ("blend", "perhaps"),
        ("blend", {}),
        ("blend", 1),
        ("chunks", 1),
        ("chunks", [[5, 5]]),
        ("chunks", [[1, 2, 3]]),
        ("chunks", [["a", "b"]]),
        ("prefix", -1),
        ("prefix", "64"),
        ("prefix", True),
        ("ingest", "yes"),
        ("raito", 0.1),
    ],
)
def test_what_may_not(key: str, value: Any) -> None:
    message = wrong({OURS + key: value, "lmcache_rag.policy": "query"} | {OURS + key: value})
    assert OURS + key in message
    assert "is used" not in message, "nothing is used: it is refused"


def test_every_key_is_listed_to_who_mistypes_one() -> None:
    assert all(OURS + name in wrong({"lmcache_rag.x": 1}) for name in KEYS)
