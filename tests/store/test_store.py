"""A store: opened once, closed, written by one at a time in threads and processes."""

from __future__ import annotations

import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_kit import (
    child,
    finish,
    found,
    made,
    problems,
    put,
    texts_of,
    use_everything,
)

from lmcache_rag.errors import StoreError, StoreLockedError
from lmcache_rag.store import Store
from lmcache_rag.store import store as store_module

HOLD = """
from store_kit import *
with Store.open(sys.argv[1]) as store, store.writing():
    put(store, "theirs", "of the other process")
    print("holding", flush=True)
    input()
"""


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is writing to the store."""
    process = child(HOLD, path)
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "holding\n":
            raise AssertionError(process.communicate()[1])
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_writers_error_names_the_first(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store, holder(tmp_path) as other:
        with (
            pytest.raises(StoreLockedError, match=rf"Process {other.pid} .*is writing.*Wait"),
            store.writing(timeout=0),
        ):
            pass
        start = time.monotonic()
        with pytest.raises(StoreLockedError), store.writing(timeout=0.3):
            pass
        assert 0.2 < time.monotonic() - start < 60


def test_a_single_write_waits_for_its_turn_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "LOCK_TIMEOUT", 0.1)
    with Store.open(tmp_path) as store, holder(tmp_path), pytest.raises(StoreLockedError):
        put(store, "mine", "of this process")


def test_readers_are_not_blocked_by_a_writer(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store, holder(tmp_path):
        assert found(store, "of the other process") == ["of the other process"]


def test_a_second_writer_waits_and_nothing_is_lost(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store, holder(tmp_path) as other:
        threading.Timer(0.3, lambda: other.stdin and (other.stdin.write("\n"), other.stdin.flush())).start()
        with store.writing(timeout=60):
            put(store, "mine", "of this process")
        assert texts_of(store) == {"of the other process", "of this process"}
        assert other.wait(60) == 0


def test_many_writing_processes_lose_nothing(tmp_path: Path) -> None:
    code = """
from store_kit import *
with Store.open(sys.argv[1]) as store:
    for n in range(8):
        with store.writing(timeout=None):
            put(store, f"{sys.argv[2]}-{n}", f"own {sys.argv[2]} {n}", "shared by all")
"""
    for process in [child(code, tmp_path, str(n)) for n in range(4)]:
        finish(process)
    with Store.open(tmp_path) as store:
        assert len(texts_of(store)) == 4 * 8 + 1
        assert len(found(store, "x", k=100)) == 33
        assert problems(store.registry) == []


def test_the_lock_of_a_killed_writer_is_free(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store, holder(tmp_path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        with store.writing(timeout=5):
            put(store, "mine", "of this process")
        assert texts_of(store) == {"of the other process", "of this process"}


def test_two_stores_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    with Store.open(tmp_path) as first, Store.open(tmp_path) as second, first.writing():
        for timeout in (0, None):  # None would wait for ever for what this very thread holds
            with pytest.raises(StoreLockedError), second.writing(timeout=timeout):
                pass


def test_threads_that_share_a_store_share_its_lock(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store, store.writing(timeout=0):
        worker = threading.Thread(target=put, args=(store, "b", "of a worker"))
        worker.start()
        worker.join(10)
        assert texts_of(store) == {"of a worker"}


def test_an_unreadable_owner_file_gives_the_error_too(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store, holder(tmp_path):
        (tmp_path / "lock.owner").write_text(json.dumps([1]))
        with pytest.raises(StoreLockedError, match="Another process"), store.writing(timeout=0):
            pass


def test_an_error_inside_writing_frees_the_lock(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        with pytest.raises(ZeroDivisionError), store.writing():
            put(store, "a", "one")
            raise ZeroDivisionError
        with Store.open(tmp_path) as other, other.writing(timeout=0):
            assert texts_of(other) == {"one"}


def test_nothing_is_logged_in_ordinary_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path)
    use_everything(tmp_path)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.faiss", "lock", "store.db"]


def test_a_closed_store_says_so_and_closes_again(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="has been closed"):
        store.registry.document("a")
    with pytest.raises(StoreError, match="has been closed"):
        put(store, "a", "one")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_must_open_the_store_itself(tmp_path: Path) -> None:
    code = """
import os, sys
from lmcache_rag.errors import StoreError
from lmcache_rag.store import Store
store = Store.open(sys.argv[1])
child = os.fork()
try:
    store.registry.document("a")
    print("parent reads" if child else "child reads", flush=True)
except StoreError as error:
    print("child is told:", error, flush=True)
store.close()
if child:
    os.waitpid(child, 0)
"""
    out = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout
    assert "parent reads" in out
    assert "after the fork" in out
    assert "child reads" not in out


def test_a_missing_store_is_made_only_when_asked(tmp_path: Path) -> None:
    for options in ({"create": False}, {"read_only": True}):
        with pytest.raises(StoreError, match="There is no store"):
            Store.open(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
    Store.open(tmp_path / "deep" / "new").close()
    Store.open(tmp_path / "deep" / "new", create=False).close()


def test_a_path_that_is_a_file_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match="file"):
        Store.open(tmp_path / "file")


def test_another_programs_database_is_not_touched(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "store.db")
    with other:
        other.execute("CREATE TABLE theirs (x)")
    other.close()
    before = (tmp_path / "store.db").read_bytes()
    with pytest.raises(StoreError, match="another program's database"):
        Store.open(tmp_path)
    assert (tmp_path / "store.db").read_bytes() == before
