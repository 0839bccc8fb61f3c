"""How a store's database is opened: versions, and stores that only can be read."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_kit import (
    TEXTS,
    child,
    crash_image,
    finish,
    found,
    made,
    mounted,
    problems,
    put,
    refuses_every_write,
    texts_of,
    use_everything,
)

from lmcache_rag.errors import StoreError, StoreReadOnlyError, StoreVersionError
from lmcache_rag.store import Store, connections, text_hash


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
    assert raw.execute("PRAGMA user_version").fetchone() == (len(connections.MIGRATIONS),)
    raw.close()


@pytest.fixture
def first_version(tmp_path: Path) -> Path:
    """A store of the first version, with two documents."""
    with monkeypatched_migrations(connections.MIGRATIONS[:1]):
        raw = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        connections.migrate(raw, tmp_path / "store.db")
    raw.execute(
        "INSERT INTO chunks (chunk_id, text_hash, tokens, text) VALUES (1, ?, 2, 'one text')", (text_hash("one text"),)
    )
    for name, kind in (("a.pdf", "application/pdf"), ("b.txt", "text/plain")):
        facts = json.dumps({"name": name, "media_type": kind})
        raw.execute(
            "INSERT INTO documents VALUES (?, 'hash', 'splitter', ?, ?, 7)", (f"/docs/{name}", f"/docs/{name}", facts)
        )
        raw.execute("INSERT INTO doc_chunks VALUES (?, 0, 1, 0)", (f"/docs/{name}",))
    assert raw.execute("PRAGMA user_version").fetchone() == (1,)
    raw.close()
    return tmp_path


@contextmanager
def monkeypatched_migrations(migrations: tuple[tuple[str, ...], ...]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "MIGRATIONS", migrations)
        yield


@pytest.mark.parametrize("read_only", [False, True])
def test_a_store_of_the_first_version_opens(first_version: Path, read_only: bool) -> None:
    with Store.open(first_version, read_only=read_only) as store:
        records = list(store.registry.documents())
        assert [(Path(record.doc_id).name, record.parser, record.chunks) for record in records] == [
            ("a.pdf", "", 1),
            ("b.txt", "", 1),
        ]
        assert [chunk.text for chunk in store.registry.document_chunks("/docs/a.pdf")] == ["one text"]
        assert store.registry.stats().documents == 2
    raw = sqlite3.connect(first_version / "store.db")
    assert raw.execute("PRAGMA user_version").fetchone() == (1 if read_only else len(connections.MIGRATIONS),)
    raw.close()


def test_many_threads_read_a_first_versions_store(first_version: Path) -> None:
    with Store.open(first_version, read_only=True) as store, ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(lambda _: store.registry.stats().documents, range(40)))
    assert counts == [2] * 40


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
