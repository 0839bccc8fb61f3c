"""The store against what disks, kills, other processes and other versions do to it."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_kit import (
    EMBEDDER,
    FP,
    TEXTS,
    child,
    document,
    finish,
    found,
    kv_keys,
    overwrite,
    problems,
    put,
    refuses_every_write,
    texts_of,
)

from lmcache_rag.errors import (
    StoreCorruptError,
    StoreError,
    StoreFullError,
    StoreLockedError,
    StoreReadOnlyError,
    StoreVersionError,
)
from lmcache_rag.store import KVRow, Store, connections
from lmcache_rag.store import store as store_module


def made(path: Path) -> Path:
    """A closed store; returns its database."""
    with Store.open(path) as store, store.writing():
        put(store, "a", *TEXTS)
    return path / "store.db"


def use_everything(path: Path) -> None:
    """Read all of a store."""
    with Store.open(path) as store:
        store.index.refresh()
        assert len(texts_of(store)) == len(TEXTS)
        assert [record.doc_id for record in store.registry.documents()] == ["a"]
        store.registry.stats(FP)


# Damaged database


def test_a_destroyed_header_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    overwrite(made(tmp_path), 0, random.Random(0).randbytes(100))
    with pytest.raises(StoreCorruptError, match=r"store\.db is damaged.*Move store\.db.*ingest again"):
        Store.open(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_an_overwritten_page_is_noticed(tmp_path: Path, share: float) -> None:
    file = made(tmp_path)
    page = int(file.stat().st_size * share) // 4096
    overwrite(file, page * 4096, random.Random(0).randbytes(4096))
    with pytest.raises(StoreCorruptError, match="is damaged"):
        use_everything(tmp_path)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_a_truncated_database_is_noticed(tmp_path: Path, share: float) -> None:
    file = made(tmp_path)
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(StoreCorruptError, match="is damaged"):
        use_everything(tmp_path)


def test_a_changed_letter_is_noticed_by_its_search(tmp_path: Path) -> None:
    file = made(tmp_path)
    place = file.read_bytes().index(TEXTS[7].encode())
    overwrite(file, place, b"T")
    with Store.open(tmp_path) as store:
        assert found(store, TEXTS[8]) == [TEXTS[8]]
        with pytest.raises(StoreCorruptError, match="text of chunk 8 has changed"):
            found(store, TEXTS[7])


def test_text_that_is_no_longer_utf8_is_corruption(tmp_path: Path) -> None:
    file = made(tmp_path)
    overwrite(file, file.read_bytes().index(TEXTS[7].encode()), b"\xff\xfe")
    with Store.open(tmp_path) as store, pytest.raises(StoreCorruptError):
        texts_of(store)


def test_a_damaged_embedding_is_noticed_by_the_index(tmp_path: Path) -> None:
    made(tmp_path)
    with Store.open(tmp_path) as store:
        row = store.index.vectors([5])[0]
    file = tmp_path / "store.db"
    overwrite(file, file.read_bytes().index(row.tobytes()), random.Random(0).randbytes(64))
    (tmp_path / "index.faiss").unlink()
    with Store.open(tmp_path) as store, pytest.raises(StoreCorruptError, match="not a unit vector"):
        store.index.refresh()


def test_the_remedy_for_a_damaged_database_works(tmp_path: Path) -> None:
    file = made(tmp_path)
    overwrite(file, 0, b"\0" * 4096)
    with pytest.raises(StoreCorruptError):
        Store.open(tmp_path)
    file.rename(tmp_path / "damaged.db")
    with Store.open(tmp_path) as store:
        put(store, "a", *TEXTS)
    use_everything(tmp_path)


def test_a_damaged_database_is_left_as_it_is(tmp_path: Path) -> None:
    file = made(tmp_path)
    overwrite(file, 0, random.Random(0).randbytes(100))
    before = file.read_bytes()
    with pytest.raises(StoreCorruptError):
        Store.open(tmp_path)
    assert file.read_bytes() == before


# Versions


def test_a_newer_versions_store_is_refused_unchanged(tmp_path: Path) -> None:
    file = made(tmp_path)
    raw = sqlite3.connect(file)
    raw.execute("PRAGMA user_version = 99")
    raw.close()
    before = file.read_bytes()
    for read_only in (False, True):
        with pytest.raises(StoreVersionError, match=r"version 99.*Upgrade"):
            Store.open(tmp_path, read_only=read_only)
    assert file.read_bytes() == before


def test_an_older_store_is_migrated_with_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path)
    later = ("ALTER TABLE documents ADD COLUMN language TEXT", "UPDATE documents SET language = 'en'")
    monkeypatch.setattr(connections, "MIGRATIONS", (*connections.MIGRATIONS, later))
    use_everything(tmp_path)
    raw = sqlite3.connect(tmp_path / "store.db")
    assert raw.execute("SELECT language FROM documents").fetchall() == [("en",)]
    assert raw.execute("PRAGMA user_version").fetchone() == (2,)
    raw.close()


def test_a_failed_migration_leaves_the_store_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path)
    with monkeypatch.context() as patch:
        bad = ("ALTER TABLE documents ADD COLUMN language TEXT", "UPDATE no_such_table SET x = 1")
        patch.setattr(connections, "MIGRATIONS", (*connections.MIGRATIONS, bad))
        with pytest.raises(StoreError, match="no_such_table"):
            Store.open(tmp_path)
    raw = sqlite3.connect(tmp_path / "store.db")
    assert "language" not in [row[1] for row in raw.execute("PRAGMA table_info(documents)")]
    raw.close()
    use_everything(tmp_path)


def test_an_older_store_cannot_be_opened_only_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path)
    monkeypatch.setattr(connections, "MIGRATIONS", (*connections.MIGRATIONS, ("CREATE TABLE later (x)",)))
    with pytest.raises(StoreReadOnlyError, match="older version"):
        Store.open(tmp_path, read_only=True)


def test_a_half_made_database_is_made(tmp_path: Path) -> None:
    (tmp_path / "store.db").touch()
    with pytest.raises(StoreError, match="no store"):
        Store.open(tmp_path, read_only=True)
    with Store.open(tmp_path) as store:
        assert put(store, "a", "one").status == "added"


# Read-only

AS_NOBODY = """
from store_kit import *
from lmcache_rag.errors import StoreReadOnlyError
import logging, os, tempfile
with tempfile.TemporaryDirectory() as folder:
    for _ in range(2):  # loads everything that the other user cannot load
        with Store.open(folder) as store:
            put(store, "a", "x")
            found(store, "x")
tempfile.tempdir = sys.argv[2]
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
logging.basicConfig(stream=sys.stdout)
with Store.open(sys.argv[1]) as store:
    print("read only:", store.read_only)
    print("found:", found(store, TEXTS[3]) == [TEXTS[3]], [text[:4] for text in found(store, "late")])
    print("texts:", len(texts_of(store)))
    refuses_every_write(store, StoreReadOnlyError, 'cannot be written')
    if len(sys.argv) > 3:
        print("ready", flush=True)
        input()
        print("later:", found(store, "later"), flush=True)
        print("check:", problems(store.registry))
print("left behind:", os.listdir(tempfile.gettempdir()))
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can read; "store" in it is written by us alone, "tmp" by everybody."""
    folder = Path(tempfile.mkdtemp(prefix="public-"))
    folder.chmod(0o755)
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o777)
    yield folder
    (folder / "store").chmod(0o755)
    shutil.rmtree(folder)


@contextmanager
def as_nobody(folder: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """A process that cannot write to the store in folder: another user's, or ours where we cannot become another."""
    if os.geteuid() != 0:
        (folder / "store").chmod(0o555)
    process = child(AS_NOBODY, folder / "store", folder / "tmp", *more)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def crash_image(path: Path, *, keep_shm: bool) -> None:
    """Leave at path what a killed process leaves: committed work that is only in the write-ahead log."""
    store = Store.open(path / "work")
    put(store, "a", *TEXTS)
    with store.writing():
        pass
    put(store, "late", "late")
    (path / "store").mkdir(exist_ok=True)
    for file in (path / "work").iterdir():
        if keep_shm or not file.name.endswith("-shm"):
            shutil.copy(file, path / "store" / file.name)
    store.close()
    assert (path / "store" / "store.db-wal").stat().st_size > 0


def test_an_unwritable_store_can_be_searched(public: Path) -> None:
    made(public / "store")
    before = sorted(path.name for path in (public / "store").iterdir())
    with as_nobody(public) as process:
        out = finish(process)
    assert "read only: True" in out
    assert "found: True ['text']" in out
    assert f"texts: {len(TEXTS)}" in out
    assert sorted(path.name for path in (public / "store").iterdir()) == before


@pytest.mark.parametrize("keep_shm", [True, False])
def test_a_killed_writers_data_needs_no_write_access(public: Path, keep_shm: bool) -> None:
    crash_image(public, keep_shm=keep_shm)
    with as_nobody(public) as process:
        out = finish(process)
    assert "found: True ['late']" in out
    assert f"texts: {len(TEXTS) + 1}" in out
    assert ("reading a temporary copy" in out) == (not keep_shm)
    assert "left behind: []" in out


@needs_root
@pytest.mark.parametrize("open_before", [True, False])
def test_a_read_only_users_reader_follows_a_writer(public: Path, open_before: bool) -> None:
    made(public / "store")
    writer = Store.open(public / "store") if open_before else None
    with as_nobody(public, "stay") as reader:
        assert reader.stdout is not None
        assert reader.stdin is not None
        while (line := reader.stdout.readline()) != "ready\n":
            assert line, reader.communicate()[1]
        writer = writer or Store.open(public / "store")
        put(writer, "b", "later")
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "later: ['later']\n"
        assert "check: []" in reader.stdout.read()
        assert reader.wait() == 0
    writer.close()


def test_a_store_opened_to_read_leaves_no_file(tmp_path: Path) -> None:
    made(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with Store.open(tmp_path, read_only=True) as store:
        refuses_every_write(store, StoreReadOnlyError, "cannot be written")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def seen(tmp_path: Path) -> Iterator[Path]:
    """The folder tmp_path / "store" as a read-only file system."""
    (tmp_path / "store").mkdir()
    with mounted(tmp_path / "seen", "--bind", "-o", "ro", str(tmp_path / "store")) as folder:
        yield folder


def test_a_read_only_file_system_can_be_searched(tmp_path: Path, seen: Path) -> None:
    made(tmp_path / "store")
    with Store.open(seen) as store:
        assert store.read_only
        assert found(store, TEXTS[3]) == [TEXTS[3]]
        refuses_every_write(store, StoreReadOnlyError, "cannot be written")
    with pytest.raises(StoreReadOnlyError):
        Store.open(seen / "new")


def test_a_read_only_reader_follows_a_writer(tmp_path: Path, seen: Path) -> None:
    made(tmp_path / "store")
    with Store.open(seen) as reader:
        assert len(texts_of(reader)) == len(TEXTS)
        with Store.open(tmp_path / "store") as writer:
            put(writer, "b", "later")
            assert found(reader, "later") == ["later"]
        assert found(reader, "later") == ["later"]
        with Store.open(tmp_path / "store") as writer:
            writer.registry.remove_documents(["b"])
        assert found(reader, "later") != ["later"]
        assert len(texts_of(reader)) == len(TEXTS)


@pytest.mark.parametrize("keep_shm", [True, False])
def test_a_read_only_disk_shows_a_killed_writers_data(
    tmp_path: Path, seen: Path, keep_shm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_image(tmp_path, keep_shm=keep_shm)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with Store.open(seen) as store:
        assert found(store, "late") == ["late"]
        assert problems(store.registry) == []
        assert len(list((tmp_path / "tmp").iterdir())) == (0 if keep_shm else 1)
    assert list((tmp_path / "tmp").iterdir()) == []


# Full disk


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=2m", "tmpfs") as folder:
        yield folder


def fill(store: Store) -> int:
    """Add documents until the disk is full; returns how many were added."""
    for n in range(10_000):
        try:
            put(store, f"{n:05d}", f"text {n} " + "x" * 20_000)
        except StoreFullError as error:
            assert "No space is left" in str(error)
            assert "Free some space" in error.remedy
            return n
    raise AssertionError("the disk was never full")


def test_a_full_disk_is_an_error_and_loses_nothing(small: Path) -> None:
    with Store.open(small / "store") as store:
        stored = fill(store)
        assert stored > 5
        assert len(list(store.registry.documents())) == stored
        assert len(found(store, "text 1", k=1000)) == stored
        assert problems(store.registry) == []
    with Store.open(small / "store") as store:
        assert len(texts_of(store)) == stored
        assert problems(store.registry) == []


def test_work_goes_on_when_a_full_disk_has_room_again(small: Path) -> None:
    ballast = small / "ballast"
    ballast.write_bytes(b"x" * 1_000_000)
    with Store.open(small / "store") as store:
        stored = fill(store)
        ballast.unlink()
        assert put(store, f"{stored:05d}", "it fits now").status == "added"
        assert found(store, "it fits now") == ["it fits now"]
        assert problems(store.registry) == []


def test_an_index_without_room_is_a_warning(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Store.open(small / "store") as store:
        with store.writing():
            put(store, "a", *(f"text {n}" for n in range(3000)))
            room = shutil.disk_usage(small).free - 20_000
            (small / "ballast").write_bytes(b"x" * room)
        assert "could not be saved" in caplog.text
        assert not (small / "store" / "index.faiss.tmp").exists()
        (small / "ballast").unlink()
    with Store.open(small / "store") as store:
        assert found(store, "text 77") == ["text 77"]


def leave_no_room(folder: Path) -> Path:
    """Fill a file system to the last byte; returns the file to delete."""
    with pytest.raises(OSError, match="No space"), (folder / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    return folder / "ballast"


def test_a_full_disk_is_an_error_for_a_new_store(small: Path) -> None:
    (small / "store").mkdir()
    ballast = leave_no_room(small)
    with pytest.raises(StoreFullError, match="Free some space"):
        Store.open(small / "store")
    ballast.unlink()
    with Store.open(small / "store") as store:
        assert put(store, "a", "one").status == "added"


@pytest.mark.parametrize("killed", [True, False])
def test_a_store_on_a_full_disk_can_be_searched(small: Path, killed: bool, caplog: pytest.LogCaptureFixture) -> None:
    if killed:
        crash_image(small, keep_shm=False)
        shutil.rmtree(small / "work")
    else:
        with Store.open(small / "store") as store:
            put(store, "late", "late")
    ballast = leave_no_room(small)
    with Store.open(small / "store") as store:
        assert "opened only to read" in caplog.text
        assert found(store, "late") == ["late"]
        refuses_every_write(store, StoreFullError, "No space is left")
    ballast.unlink()
    with Store.open(small / "store") as store:
        assert put(store, "a", "one").status in ("added", "updated")


# Writers

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


def test_a_database_held_by_another_is_a_locked_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_rag.store.connections._BUSY_SECONDS", 0.1)
    with Store.open(tmp_path) as store:
        other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreLockedError, match="Another program"):
            put(store, "a", "one")
        other.close()
        assert put(store, "a", "one").status == "added"


# Kills

VICTIM = """
from store_kit import *
from lmcache_rag.store import KVRow
store = Store.open(sys.argv[1])
print("ready", flush=True)
n = 0
with store.writing():
    while True:
        batch = [document(f"{n}-{m}", f"{n} {m}", f"shared {n}") for m in range(40)]
        store.registry.put_documents(batch, embedder=EMBEDDER)
        ids = [chunk.chunk_id for chunk in store.registry.chunks_without_kv(FP)]
        store.registry.record_kv(FP, {}, [KVRow(i, f"key {i}", 1, 1) for i in ids])
        print(n, flush=True)
        if n % 3 == 2:
            store.registry.remove_documents([f"{n - 1}-{m}" for m in range(40)])
        n += 1
"""


def test_a_killed_writer_leaves_all_that_it_committed(tmp_path: Path) -> None:
    moments = random.Random(7)
    for _ in range(8):
        folder = tmp_path / str(moments.random())
        process = child(VICTIM, folder)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0.01, 0.4))
        process.send_signal(signal.SIGKILL)
        out, _ = process.communicate()
        done = [int(line) for line in out.split() if line.isdigit()]
        with Store.open(folder) as store:
            assert problems(store.registry) == []
            documents = {record.doc_id for record in store.registry.documents()}
            batches = {int(doc_id.split("-")[0]) for doc_id in documents}
            assert len(documents) == 40 * len(batches), "a batch is there wholly or not at all"
            removed = {n for n in range(1, max(done, default=0) + 2) if n % 3 == 1}
            assert set(done) - removed <= batches
            stats = store.registry.stats(FP)
            assert stats.chunks == 41 * len(batches)
            live, dead = kv_keys(store.registry, FP), {key for _, key in store.registry.trash()}
            assert not live & dead
            assert store.index.ids() == {chunk.chunk_id for chunk in store.registry.chunks()}
            with store.writing(timeout=0):
                put(store, "after", "after the kill")


def test_a_kill_in_a_transaction_undoes_it(tmp_path: Path) -> None:
    made(tmp_path)
    code = """
from store_kit import *
import os, signal
store = Store.open(sys.argv[1])
database = store.registry._database
steps = 0
def kill():
    global steps
    steps += 1
    if steps == 200:
        os.kill(os.getpid(), signal.SIGKILL)
with database.write() as connection:
    connection.set_progress_handler(kill, 100)
new = [document(str(n), "x" * 9000 + str(n)) for n in range(900)]
store.registry.put_documents([document("a", "replaced"), *new], embedder=EMBEDDER)
"""
    process = child(code, tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    use_everything(tmp_path)
    with Store.open(tmp_path) as store:
        assert problems(store.registry) == []


def test_a_failed_statement_undoes_its_transaction(tmp_path: Path) -> None:
    made(tmp_path)
    with Store.open(tmp_path) as store:
        put(store, "b", "before")
        writer = store.registry._database._writer
        assert writer is not None
        writer.set_progress_handler(lambda: 1, 500)
        with pytest.raises(StoreError, match="interrupted"):
            store.registry.put_documents([document("b", *TEXTS[:30], "x"), document("c", "y")], embedder=EMBEDDER)
        writer.set_progress_handler(None, 0)
        assert "before" in texts_of(store)
        assert store.registry.document("c") is None
        assert put(store, "c", "y").status == "added"
        assert problems(store.registry) == []


def test_kv_records_survive_a_kill_before_the_drop(tmp_path: Path) -> None:
    code = """
from store_kit import *
from lmcache_rag.store import KVRow
import os
store = Store.open(sys.argv[1])
put(store, "a", "one")
store.registry.record_kv(FP, {}, [KVRow(1, "k", 1, 1)])
store.registry.remove_documents(["a"])
os._exit(0)
"""
    finish(child(code, tmp_path))
    with Store.open(tmp_path) as store:
        assert store.registry.trash() == [(FP, "k")]
        store.registry.clear_trash(store.registry.trash())
        put(store, "a", "one")
        ids = [chunk.chunk_id for chunk in store.registry.chunks()]
        assert store.registry.record_kv(FP, {}, [KVRow(ids[0], "k", 1, 1)]) == 1


def test_nothing_is_logged_in_ordinary_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path)
    use_everything(tmp_path)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.faiss", "lock", "store.db"]
