"""Folders that are made once and are never seen half-made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmcache_rag.weights.packages import cache_folder, make_once


def test_a_failed_build_leaves_nothing_and_is_retried(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        make_once(tmp_path / "it", fail)
    assert [file.name for file in tmp_path.iterdir()] == [".it.lock"]
    assert make_once(tmp_path / "it", lambda folder: (folder / "all").touch()) == tmp_path / "it"


def test_waiting_for_another_process_has_a_limit(tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".it.lock"), pytest.raises(TimeoutError):
        make_once(tmp_path / "it", lambda folder: None, wait=0.2)


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LMCACHE_RAG_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    monkeypatch.delenv("LMCACHE_RAG_CACHE")
    if sys.platform == "linux":
        assert cache_folder() == tmp_path / "xdg" / "lmcache-rag"
