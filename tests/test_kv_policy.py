"""When KV is computed, and how fast."""

from __future__ import annotations

import threading
import time

import pytest

from lmcache_rag.errors import ConfigError
from lmcache_rag.kv_policy import RateLimit, kv_mode


def test_a_rate_limit_spaces_ingestions(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waited = [100.0], []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waited.append(round(timeout, 3))
            now[0] += timeout
            return False

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limit, stop = RateLimit(100.0), Stop()
    for tokens in (50, 200, 10):
        limit.wait(tokens, stop)
    assert waited == [0.5, 2.0]
    now[0] += 60  # nothing is saved up
    limit.wait(100, stop)
    limit.wait(100, stop)
    assert waited == [0.5, 2.0, 1.0]
    RateLimit(None).wait(10**9)


def test_a_wrong_mode_is_named() -> None:
    assert [kv_mode(name) for name in ("now", "lazy", "none")] == ["now", "lazy", "none"]
    with pytest.raises(ConfigError, match=r"kv is 'later'"):
        kv_mode("later")
