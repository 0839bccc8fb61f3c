"""What the tests of the store share: documents with vectors that follow from the text alone."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache_rag.errors import StoreCorruptError, StoreError
from lmcache_rag.store import KVRow, NewChunk, NewDocument, PutResult, Registry, Store, Vector, sql

DIMENSION = 16
EMBEDDER = "model-a"
FP = "f" * 64


def vector(text: str, seed: str = "") -> Vector:
    """A unit vector of its own for every text."""
    digest = hashlib.sha256((seed + text).encode("utf-8", "surrogatepass")).digest()
    row = np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal(DIMENSION)
    return (row / np.linalg.norm(row)).astype(np.float32)


def chunks(texts: Sequence[str]) -> list[NewChunk]:
    starts = np.cumsum([0, *(len(text) for text in texts)])
    return [
        NewChunk(text, len(text.split()), int(start), vector(text)) for text, start in zip(texts, starts, strict=False)
    ]


def document(doc_id: str, *texts: str, **metadata: Any) -> NewDocument:
    """A document whose content hash follows from its texts."""
    name = hashlib.sha256(repr(texts).encode()).hexdigest()
    return NewDocument(doc_id, name, "splitter-1", f"/docs/{doc_id}", chunks(texts), metadata)


def put(store: Store, doc_id: str, *texts: str, **metadata: Any) -> PutResult:
    return store.registry.put_documents([document(doc_id, *texts, **metadata)], embedder=EMBEDDER)[0]


def texts_of(store: Store) -> set[str]:
    return {chunk.text for chunk in store.registry.chunks()}


def found(store: Store, text: str, k: int = 1) -> list[str]:
    return [hit.text for hit in store.index.search(vector(text), k)]


def kv_keys(registry: Registry, fingerprint: str) -> set[str]:
    """Keys of all KV recorded under a fingerprint."""
    return {row.key for row in registry.kv_rows(fingerprint)}


def withdraw_kv(registry: Registry, fingerprint: str, keys: Iterable[str] | None = None) -> None:
    """Delete KV records, all of the fingerprint when keys is None; a trigger moves them to the trash."""
    with registry._database.write() as connection:
        if keys is None:
            connection.execute("DELETE FROM kv WHERE fingerprint = ?", (fingerprint,))
            connection.execute("DELETE FROM fingerprints WHERE fingerprint = ?", (fingerprint,))
        else:
            wanted = ((fingerprint, key) for key in keys)
            connection.executemany("DELETE FROM kv WHERE fingerprint = ? AND key = ?", wanted)


def embed_again(registry: Registry, embeddings: Mapping[int, Vector]) -> None:
    """Replace the embeddings of chunks, as another version of the library may."""
    with registry._database.write() as connection:
        writer, generation = sql.VectorWriter(connection, EMBEDDER), sql.Generation(connection)
        for chunk_id, blob in zip(embeddings, writer.blobs(list(embeddings.values())), strict=True):
            connection.execute(
                "UPDATE chunks SET vector_generation = ?, embedding = ? WHERE chunk_id = ?",
                (generation.number, blob, chunk_id),
            )
        generation.changed = True
        generation.finish()


# Each counts rows that must not exist.
_NEVER = {
    "chunks stand in no document": """SELECT count(*) FROM chunks
        WHERE chunk_id NOT IN (SELECT chunk_id FROM doc_chunks)""",
    "records of KV belong to no chunk": "SELECT count(*) FROM kv WHERE kv_id NOT IN (SELECT kv_id FROM kv_chunks)",
    "keys are both in use and in the trash": "SELECT count(*) FROM trash JOIN kv USING (fingerprint, key)",
    "chunks have two keys under one fingerprint": """SELECT count(*) FROM (SELECT 1 FROM kv_chunks JOIN kv USING (kv_id)
        GROUP BY chunk_id, fingerprint HAVING count(*) > 1)""",
    "embeddings are of another model than the store's": """SELECT count(*) FROM chunks
        WHERE embedder <> (SELECT value FROM meta WHERE key = 'embedder')""",
}


def problems(registry: Registry) -> list[str]:
    """Read the whole database and list what is wrong with it, in words; an empty list means that it is sound."""
    database = registry._database
    try:
        with database.read() as connection:
            found = [row[0] for row in connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
            for row in connection.execute("PRAGMA foreign_key_check"):
                found.append(f"{row[0]} refers to a missing row of {row[2]}")
            for promise, query in _NEVER.items():
                if count := connection.execute(query).fetchone()[0]:
                    found.append(f"{count} {promise}")
            dimension = sql.dimension(connection)
            for (blob,) in connection.execute("SELECT embedding FROM chunks WHERE embedding IS NOT NULL"):
                sql.from_blobs([blob], dimension or 1, database.path)
        list(registry.chunks())  # compares each text with its hash
    except StoreCorruptError as error:
        return [error.message]
    except sqlite3.DatabaseError as error:
        return [str(error)]
    return found


def refuses_every_write(store: Store, error: type[StoreError], says: str) -> None:
    """Every method that writes raises error, and the store holds what it held."""
    registry, before = store.registry, store.registry.stats()
    for write in (
        lambda: put(store, "z", "new"),
        lambda: registry.remove_documents(["a"]),
        lambda: registry.record_kv(FP, {}, [KVRow(1, "k", 1, 1)]),
        lambda: registry.trash_other_kv(FP),
        lambda: registry.clear_trash([(FP, "k")]),
        lambda: registry.claim_embedder("b"),
        lambda: store.writing().__enter__(),
    ):
        with pytest.raises(error, match=says) as caught:
            write()
        assert type(caught.value) is error
        assert caught.value.remedy
    assert registry.stats() == before


def child(code: str, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Run code in a new interpreter that can import this package and this module, with pipes for its streams."""
    paths = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}\n"
    return subprocess.Popen(
        [sys.executable, "-c", paths + code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen[str], timeout: float = 60) -> str:
    """What the process wrote on stdout; its failure is ours."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out


def overwrite(file: Path, start: int, data: bytes) -> None:
    with file.open("r+b") as handle:
        handle.seek(start)
        handle.write(data)


TEXTS = [f"text number {n} " + "and more " * 300 for n in range(60)]


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


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A file system at that place; the test is skipped where mounting is not permitted."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
