"""Search, and the index file that is only ever a copy of what the database knows."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from store_kit import DIMENSION, EMBEDDER, child, chunks, finish, found, put, vector

from lmcache_rag.errors import ConfigError, StoreError
from lmcache_rag.store import NewDocument, Store, sql
from lmcache_rag.store import index as index_module

TEXTS = [f"text number {n}" for n in range(50)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as opened:
        yield opened


def in_step(store: Store) -> bool:
    """Whether a search can find exactly the chunks of the store, each by its own vector."""
    stored = list(store.registry.chunks())
    rows = store.index.vectors([chunk.chunk_id for chunk in stored])
    wanted = np.array([vector(chunk.text) for chunk in stored]).reshape(-1, DIMENSION)
    once = len(store.index) == len(stored)
    return once and store.index.ids() == {chunk.chunk_id for chunk in stored} and np.array_equal(rows, wanted)


# Search


def test_search_equals_a_search_by_hand(store: Store) -> None:
    put(store, "a", *TEXTS)
    query = vector("a question")
    scores = {text: float(vector(text) @ query) for text in TEXTS}
    hits = store.index.search(query, 7)
    assert [hit.text for hit in hits] == sorted(TEXTS, key=lambda text: -scores[text])[:7]
    assert [hit.score for hit in hits] == pytest.approx([scores[hit.text] for hit in hits], abs=1e-6)
    assert all(hit.tokens == 3 for hit in hits)


def test_a_query_of_any_length_gives_cosine_similarity(store: Store) -> None:
    put(store, "a", "one")
    (hit,) = store.index.search(list(vector("one") * 25), 1)
    assert hit.score == pytest.approx(1, abs=1e-6)


def test_a_hit_names_every_document_with_the_chunk(store: Store) -> None:
    put(store, "b", "other", "shared", lang="de")
    put(store, "a", "shared", lang="en")
    (hit,) = store.index.search(vector("shared"), 1)
    assert [(ref.doc_id, ref.source, ref.ordinal, ref.metadata) for ref in hit.documents] == [
        ("a", "/docs/a", 0, {"lang": "en"}),
        ("b", "/docs/b", 1, {"lang": "de"}),
    ]


def test_more_than_the_store_holds_gives_all_of_it(store: Store) -> None:
    put(store, "a", "one", "two")
    assert sorted(found(store, "one", k=1000)) == ["one", "two"]


def test_an_empty_store_finds_nothing(store: Store) -> None:
    assert store.index.search(vector("x"), 5) == []
    assert store.index.search_batch([vector("x"), vector("y")], 5) == [[], []]
    assert store.index.search_batch([], 5) == []
    assert store.index.vectors([]).shape[0] == 0
    assert (len(store.index), store.index.ids()) == (0, set())


def test_a_store_that_became_empty_finds_nothing(store: Store) -> None:
    put(store, "a", "one")
    assert found(store, "one") == ["one"]
    store.registry.remove_documents(["a"])
    assert found(store, "one") == []


def test_chunks_of_equal_score_are_ordered_by_id(store: Store) -> None:
    same = [chunk.__class__(chunk.text, 1, 0, vector("same")) for chunk in chunks(["x", "y", "z"])]
    new = NewDocument("a", "h", "s", "src", same)
    store.registry.put_documents([new], embedder=EMBEDDER)
    assert [hit.text for hit in store.index.search(vector("same"), 3)] == ["x", "y", "z"]


@pytest.mark.parametrize("k", [0, -1])
def test_asking_for_no_chunk_is_a_mistake(store: Store, k: int) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        store.index.search(vector("x"), k)


@pytest.mark.parametrize("query", [[1.0] * 3, [float("nan")] * DIMENSION, [[1.0] * DIMENSION]])
def test_a_query_unfit_for_the_store_is_refused(store: Store, query: list[float]) -> None:
    put(store, "a", "one")
    with pytest.raises(StoreError, match="mbedding"):
        store.index.search(query, 1)


def test_a_batch_gives_what_single_searches_give(store: Store) -> None:
    put(store, "a", *TEXTS)
    queries = [vector(f"question {n}") for n in range(5)]
    assert store.index.search_batch(np.array(queries), 4) == [store.index.search(query, 4) for query in queries]


def test_vectors_of_unknown_chunks_are_refused(store: Store) -> None:
    put(store, "a", "one")
    with pytest.raises(StoreError, match="999"):
        store.index.vectors([1, 999])


# Filters


@pytest.fixture
def library(store: Store) -> Store:
    for n, text in enumerate(TEXTS):
        put(store, f"doc {n}", text, lang="en" if n % 2 else "de", year=2000 + n, draft=n == 3, tags=["a"], score=0.5)
    put(store, "twice", TEXTS[0], lang="en", **{'odd "key" $.x': "yes"})
    return store


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ({"doc_id": "doc 7"}, {7}),
        ({"doc_id": ["doc 7", "doc 8", "none"]}, {7, 8}),
        ({"source": "/docs/doc 9"}, {9}),
        ({"lang": "de"}, set(range(0, 50, 2))),
        ({"lang": "en"}, {0, *range(1, 50, 2)}),
        ({"lang": ("de", "en")}, set(range(50))),
        ({"year": {2001, 2002}}, {1, 2}),
        ({"year": "2001"}, set()),
        ({"draft": True}, {3}),
        ({"score": 0.5, "year": 2004}, {4}),
        ({"lang": "de", "year": 2001}, set()),
        ({"tags": '["a"]'}, set()),
        ({"absent": "x"}, set()),
        ({"lang": []}, set()),
        ({'odd "key" $.x': "yes"}, {0}),
        ({}, set(range(50))),
        (None, set(range(50))),
    ],
)
def test_a_filter_by_values_finds_exactly_its_matches(library: Store, where: dict, wanted: set[int]) -> None:
    hits = library.index.search(vector("q"), 100, where=where)
    assert {hit.text for hit in hits} == {TEXTS[n] for n in wanted}
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_a_filter_gives_k_chunks_beyond_the_best(library: Store) -> None:
    best = library.index.search(vector("q"), 1)[0].documents[0]
    other = "en" if best.metadata["lang"] == "de" else "de"
    assert len(library.index.search(vector("q"), 20, where={"lang": other})) == 20


def test_filtered_hits_name_matching_documents_only(library: Store) -> None:
    (hit,) = library.index.search(vector(TEXTS[0]), 1, where={"lang": "en"})
    assert [ref.doc_id for ref in hit.documents] == ["twice"]


@pytest.mark.parametrize("value", [None, {"$gt": 3}, [None], [["a"]], object()])
def test_a_filter_that_is_no_plain_value_is_refused(library: Store, value: object) -> None:
    with pytest.raises(ConfigError, match="year"):
        library.index.search(vector("q"), 1, where={"year": value})


def test_a_filter_function_gets_hits_until_enough(library: Store) -> None:
    last = library.index.search(vector("q"), 50)[-2:]
    kept = library.index.search(vector("q"), 2, where=lambda hit: hit.text in {last[0].text, last[1].text})
    assert kept == last
    assert library.index.search(vector("q"), 2, where=lambda _: False) == []


def test_a_filter_function_is_not_called_for_all(library: Store) -> None:
    asked = []
    library.index.search(vector("q"), 2, where=lambda hit: asked.append(hit) or True)
    assert len(asked) <= 8


# Following the database


def test_the_index_follows_commits_of_other_processes(store: Store) -> None:
    put(store, "a", "one", "two")
    assert found(store, "two") == ["two"]
    code = """
from store_kit import *
with Store.open(sys.argv[1]) as store:
    put(store, "b", "three")
    put(store, "a", "one")
    embed_again(store.registry, {1: vector("one", "turned")})
"""
    finish(child(code, store.path))
    assert found(store, "three") == ["three"]
    assert sorted(found(store, "two", k=9)) == ["one", "three"]
    assert len(store.index) == 2, "each once"
    assert store.index.search(vector("one", "turned"), 1)[0].score == pytest.approx(1, abs=1e-5)


def test_only_what_changed_is_read_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, "a", *TEXTS)
    store.index.refresh()
    read: list[int] = []
    real = sql.from_blobs
    monkeypatch.setattr(sql, "from_blobs", lambda blobs, *rest: read.append(1) or real(blobs, *rest))
    store.index.refresh()
    assert read == []
    monkeypatch.setattr(store.index, "_fresh", None)  # making it anew would call this
    put(store, "b", "new")
    store.registry.remove_documents(["b"])
    put(store, "c", "newer")
    assert found(store, "newer") == ["newer"]
    assert read == [1]
    assert in_step(store)


def test_the_next_search_completes_a_failed_update(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, "a", *TEXTS)
    store.index.refresh()
    put(store, "a", *TEXTS[:20], "new")
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "import_faiss", lambda: (_ for _ in ()).throw(MemoryError("injected")))
        with pytest.raises(MemoryError):
            store.index.refresh()
    assert in_step(store)


# The file


def logged(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


def made(path: Path) -> Path:
    """A store of fifty chunks whose index is saved."""
    with Store.open(path) as store, store.writing():
        put(store, "a", *TEXTS)
    return path / "index.faiss"


def test_the_index_file_is_written_after_writing(store: Store) -> None:
    file = store.path / "index.faiss"
    with store.writing():
        put(store, "a", "one")
        with store.writing():
            put(store, "b", "two")
        assert not file.exists()
    assert file.exists()
    before = file.stat().st_mtime_ns
    with store.writing():
        pass
    assert file.stat().st_mtime_ns == before
    assert [path.name for path in store.path.iterdir() if path.name.endswith(".tmp")] == []


def test_closing_saves_what_was_put_without_writing(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        put(store, "a", "one")
    assert index_module.read_index(tmp_path / "index.faiss")[0].ntotal == 1


def test_a_saved_index_is_used_and_not_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path)
    with Store.open(tmp_path) as store:
        monkeypatch.setattr(store.index, "_fresh", None)
        assert found(store, TEXTS[5]) == [TEXTS[5]]
        assert in_step(store)
    assert logged(caplog) == ""


def test_a_large_file_waits_for_more_than_few_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each small change of a large store would write gigabytes."""
    file = made(tmp_path)
    monkeypatch.setattr(index_module, "_SMALL_INDEX", 40)
    before = file.read_bytes()
    for name in ("new", "newer"):
        with Store.open(tmp_path) as store, store.writing():
            put(store, name, name)
        assert file.read_bytes() == before
        with Store.open(tmp_path) as store:
            assert found(store, name) == [name]
            assert in_step(store), "by the database"
    with Store.open(tmp_path) as store, store.writing():
        store.registry.remove_documents(["new"])
        put(store, "more", "one", "two", "three")
    assert index_module.read_index(file)[1].count == 54, "now it is more than a twentieth"


def test_faiss_itself_reads_the_file(tmp_path: Path) -> None:
    file = made(tmp_path)
    faiss = index_module.import_faiss()
    assert faiss.read_index(str(file)).ntotal == len(TEXTS)


def test_a_file_that_lags_is_brought_up_to_date(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = made(tmp_path)
    old = file.read_bytes()
    code = """
from store_kit import *
import os
store = Store.open(sys.argv[1])
put(store, "a", "text number 1", "new")
os._exit(0)  # killed before the index was saved
"""
    finish(child(code, tmp_path))
    assert file.read_bytes() == old
    with Store.open(tmp_path) as store:
        assert found(store, "new") == ["new"]
        assert in_step(store)
    assert logged(caplog) == ""


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "a few bytes": lambda data: data[:10],
    "first half": lambda data: data[: len(data) // 2],
    "last byte missing": lambda data: data[:-1],
    "second half": lambda data: data[len(data) // 2 :],
    "random bytes": lambda data: np.random.default_rng(0).bytes(len(data)),
    "one bit in a vector": lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:],
    "header": lambda data: b"XXXX" + data[4:],
    "facts": lambda data: data.replace(b'"generation"', b'"generatiom"'),
    "facts are a list": lambda data: data.replace(data[data.rindex(b"{") : data.rindex(b"}") + 1], b"[]"),
    "length of the facts": lambda data: data[:-16] + b"\xff" * 8 + data[-8:],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_warned_about_and_rebuilt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    file = made(tmp_path)
    file.write_bytes(DAMAGE[name](file.read_bytes()))
    with Store.open(tmp_path) as store:
        assert found(store, TEXTS[5]) == [TEXTS[5]]
        assert in_step(store)
        assert "rebuilt" in logged(caplog)
    caplog.clear()
    with Store.open(tmp_path) as store:
        assert found(store, TEXTS[5]) == [TEXTS[5]]
    assert logged(caplog) == "", "closing must have repaired the file"


def test_a_missing_file_is_warned_about_and_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path).unlink()
    with Store.open(tmp_path) as store:
        assert in_step(store)
    assert "it is missing" in logged(caplog)
    assert (tmp_path / "index.faiss").exists()


def test_an_index_file_of_another_kind_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = made(tmp_path)
    _, facts = index_module.read_index(file)
    faiss = index_module.import_faiss()
    flat = faiss.IndexFlatIP(DIMENSION)
    flat.add(np.zeros((len(TEXTS), DIMENSION), dtype=np.float32))
    index_module.write_index(file, flat, facts)
    with Store.open(tmp_path) as store:
        assert in_step(store)
    assert "not an index of this store" in logged(caplog)


def test_an_index_unreadable_by_faiss_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = made(tmp_path)
    index, facts = index_module.read_index(file)
    faiss = index_module.import_faiss()
    with monkeypatch.context() as patch:
        patch.setattr(faiss, "PyCallbackIOWriter", lambda write, _: write)
        patch.setattr(faiss, "write_index", lambda _, write: write(b"from a later FAISS"))
        index_module.write_index(file, index, facts)
    with Store.open(tmp_path) as store:
        assert in_step(store)
    assert "FAISS cannot read it" in logged(caplog)


def test_the_file_of_another_store_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = made(tmp_path / "mine")
    with Store.open(tmp_path / "other") as store:
        put(store, "x", *(f"other {text}" for text in TEXTS))
    shutil.copy(tmp_path / "other" / "index.faiss", file)
    with Store.open(tmp_path / "mine") as store:
        assert in_step(store)
    assert "another state" in logged(caplog)


def test_a_restored_backup_ignores_a_newer_index_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path)
    backup = (tmp_path / "store.db").read_bytes()
    with Store.open(tmp_path) as store:
        put(store, "b", "forgotten by the backup")
    (tmp_path / "store.db").write_bytes(backup)
    with Store.open(tmp_path) as store:
        put(store, "c", "same id, another text")
        assert in_step(store)
    assert "another state" in logged(caplog)


def test_a_moved_database_leaves_an_empty_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path)
    (tmp_path / "store.db").rename(tmp_path / "damaged.db")
    with Store.open(tmp_path) as store:
        assert found(store, TEXTS[0]) == []
        put(store, "a", *TEXTS)
        assert in_step(store)
    assert "another state" in logged(caplog)


def test_an_unsaved_index_warns_and_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "index.faiss").mkdir()
    with Store.open(tmp_path) as store:
        with store.writing():
            put(store, "a", *TEXTS)
        assert in_step(store)
    assert "could not be saved" in logged(caplog)
    assert not (tmp_path / "index.faiss.tmp").exists()
    with Store.open(tmp_path) as store:
        assert found(store, TEXTS[3]) == [TEXTS[3]]


def test_importing_the_store_does_not_import_faiss() -> None:
    code = "import sys, lmcache_rag.store; assert 'faiss' not in sys.modules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_faiss_imports_with_warnings_as_errors() -> None:
    code = "from lmcache_rag.store.index import import_faiss; import_faiss().IndexFlatIP(3)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_small_search_keeps_the_number_of_threads(store: Store) -> None:
    put(store, "a", "one")
    faiss = index_module.import_faiss()
    before = faiss.omp_get_max_threads()
    with index_module.few_threads(1):
        assert faiss.omp_get_max_threads() == 1
    with index_module.few_threads(1 << 40):
        assert faiss.omp_get_max_threads() == before
    assert faiss.omp_get_max_threads() == before
