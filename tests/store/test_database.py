"""The database against what disks and kills do to it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_kit import (
    EMBEDDER,
    FP,
    TEXTS,
    child,
    crash_image,
    document,
    finish,
    found,
    kv_keys,
    made,
    mounted,
    overwrite,
    problems,
    put,
    refuses_every_write,
    texts_of,
    use_everything,
)

from lmcache_rag.errors import StoreCorruptError, StoreError, StoreFullError, StoreLockedError
from lmcache_rag.store import KVRow, Store


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


def test_a_database_held_by_another_is_a_locked_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_rag.store.connections._BUSY_SECONDS", 0.1)
    with Store.open(tmp_path) as store:
        other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreLockedError, match="Another program"):
            put(store, "a", "one")
        other.close()
        assert put(store, "a", "one").status == "added"


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
