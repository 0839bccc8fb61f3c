"""The registry: documents, chunks with embeddings, and records of KV."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_kit import (
    DIMENSION,
    EMBEDDER,
    FP,
    document,
    embed_again,
    found,
    kv_keys,
    problems,
    put,
    texts_of,
    vector,
)

from lmcache_rag.errors import StoreError
from lmcache_rag.store import KVRow, NewChunk, Store, sql, text_hash


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as opened:
        yield opened


def chunk_id(store: Store, text: str) -> int:
    return store.registry.known_texts([text])[text_hash(text)].chunk_id


def record(store: Store, text: str, key: str, fingerprint: str = FP) -> int:
    row = KVRow(chunk_id(store, text), key, len(text.split()), 100)
    return store.registry.record_kv(fingerprint, {"model": "m"}, [row])


# Documents


def test_a_new_document_comes_back_as_it_was(store: Store) -> None:
    result = put(store, "a", "one", "two", lang="en", nested={"n": [1, None]})
    assert (result.status, result.added_chunks, result.kept_chunks, result.removed_chunks) == ("added", 2, 0, 0)
    back = store.registry.document("a")
    new = document("a", "one", "two")
    assert back is not None
    assert (back.content_hash, back.splitter, back.source, back.chunks) == (
        new.content_hash,
        new.splitter,
        new.source,
        2,
    )
    assert back.metadata == {"lang": "en", "nested": {"n": [1, None]}}
    assert [chunk.text for chunk in store.registry.document_chunks("a")] == ["one", "two"]


def test_the_same_document_again_writes_nothing(store: Store) -> None:
    put(store, "a", "one", "two")
    before, generation = store.registry.document("a"), store.registry.get_meta("generation")
    assert put(store, "a", "one", "two").status == "unchanged"
    assert store.registry.document("a") == before
    assert store.registry.get_meta("generation") == generation


def test_a_changed_document_replaces_changed_chunks(store: Store) -> None:
    put(store, "a", "one", "two", "three")
    kept = chunk_id(store, "one"), chunk_id(store, "three")
    result = put(store, "a", "one", "2", "three")
    assert (result.status, result.added_chunks, result.kept_chunks, result.removed_chunks) == ("updated", 1, 2, 1)
    assert (chunk_id(store, "one"), chunk_id(store, "three")) == kept
    assert texts_of(store) == {"one", "2", "three"}


@pytest.mark.parametrize("change", [{"source": "/moved"}, {"metadata": {"x": 1}}, {"splitter": "splitter-2"}])
def test_a_document_with_new_facts_keeps_its_chunks(store: Store, change: dict[str, object]) -> None:
    put(store, "a", "one", "two")
    ids = [chunk.chunk_id for chunk in store.registry.document_chunks("a")]
    (result,) = store.registry.put_documents([replace(document("a", "one", "two"), **change)], embedder=EMBEDDER)
    assert (result.status, result.added_chunks, result.kept_chunks) == ("updated", 0, 2)
    assert [chunk.chunk_id for chunk in store.registry.document_chunks("a")] == ids


def test_a_repeated_text_is_one_chunk_at_two_places(store: Store) -> None:
    assert put(store, "a", "same", "other", "same").added_chunks == 2
    assert [chunk.text for chunk in store.registry.document_chunks("a")] == ["same", "other", "same"]
    (hit,) = store.index.search(vector("same"), 1)
    assert [(ref.ordinal, ref.start) for ref in hit.documents] == [(0, 0), (2, 9)]


def test_a_shared_chunk_leaves_with_its_last_document(store: Store) -> None:
    put(store, "a", "shared", "only a")
    assert put(store, "b", "shared", "only b").kept_chunks == 1
    first = store.registry.remove_documents(["a"])
    assert (first.documents, first.removed_chunks, first.kept_chunks) == (1, 1, 1)
    assert texts_of(store) == {"shared", "only b"}
    assert store.registry.remove_documents(["b"]).removed_chunks == 2
    assert texts_of(store) == set()


def test_removing_an_unknown_document_is_reported(store: Store) -> None:
    put(store, "a", "one")
    result = store.registry.remove_documents(["nothing", "a", "a"])
    assert (result.documents, result.unknown) == (1, ("nothing",))
    assert list(store.registry.documents()) == []


def test_a_text_moved_in_a_batch_stays_the_same_chunk(store: Store) -> None:
    put(store, "a", "moves", "stays")
    before = chunk_id(store, "moves")
    left, right = store.registry.put_documents([document("a", "stays"), document("b", "moves")], embedder=EMBEDDER)
    assert (left.removed_chunks, right.added_chunks, right.kept_chunks) == (0, 0, 1)
    assert chunk_id(store, "moves") == before


def test_one_bad_document_of_a_batch_changes_nothing(store: Store) -> None:
    put(store, "a", "one")
    bad = replace(document("c", "x"), metadata={"object": object()})
    with pytest.raises(StoreError, match=r"metadata of 'c'"):
        store.registry.put_documents([document("a", "changed"), document("b", "new"), bad], embedder=EMBEDDER)
    assert texts_of(store) == {"one"}
    assert [record.doc_id for record in store.registry.documents()] == ["a"]


def test_a_document_without_chunks_is_kept(store: Store) -> None:
    assert put(store, "empty").status == "added"
    assert put(store, "empty").status == "unchanged"
    record = store.registry.document("empty")
    assert record is not None
    assert record.chunks == 0


@pytest.mark.parametrize("doc_id", ["", "line\nbreak", "emoji 🦜", "quote ' \" %", "é", "e\u0301", "/a b/c"])
def test_any_valid_text_can_be_an_id(store: Store, doc_id: str) -> None:
    put(store, doc_id, "one")
    assert [record.doc_id for record in store.registry.documents([doc_id])] == [doc_id]
    assert store.index.search(vector("one"), 1, where={"doc_id": doc_id})[0].documents[0].doc_id == doc_id
    assert store.registry.remove_documents([doc_id]).unknown == ()


def test_nul_and_every_plane_of_unicode_come_back(store: Store) -> None:
    text = "nul \0 then \u200b \uffff \U0001f9dc\u200d\u2640\ufe0f end"
    put(store, "a", text)
    assert texts_of(store) == {text}
    assert problems(store.registry) == []


@pytest.mark.parametrize("place", ["text", "doc_id", "source", "content_hash"])
def test_a_lone_surrogate_is_refused_with_a_remedy(store: Store, place: str) -> None:
    new = document("a", "one")
    if place == "text":
        new = replace(new, chunks=[NewChunk("bad \ud800", 2, 0, vector("x"))])
    else:
        new = replace(new, **{place: "bad \udcff"})
    with pytest.raises(StoreError, match=r"not valid Unicode.*Replace such characters"):
        store.registry.put_documents([new], embedder=EMBEDDER)
    assert texts_of(store) == set()
    assert put(store, "b", "fine").status == "added"


def test_a_lone_surrogate_in_metadata_comes_back(store: Store) -> None:
    put(store, "a", "one", name="bad \udcff")
    record = store.registry.document("a")
    assert record is not None
    assert record.metadata == {"name": "bad \udcff"}


def test_searching_a_lone_surrogate_is_a_store_error(store: Store) -> None:
    with pytest.raises(StoreError, match="not valid Unicode"):
        store.registry.known_texts(["\ud800"])


def test_an_id_with_nul_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="NUL"):
        put(store, "a\0b", "one")


def test_documents_come_in_id_order_over_pages(store: Store) -> None:
    store.registry.put_documents([document(f"{n:04d}") for n in reversed(range(600))], embedder=EMBEDDER)
    assert [record.doc_id for record in store.registry.documents()] == [f"{n:04d}" for n in range(600)]


def test_documents_can_be_removed_while_iterated(store: Store) -> None:
    store.registry.put_documents([document(f"{n:04d}", f"text {n}") for n in range(300)], embedder=EMBEDDER)
    for record in store.registry.documents():
        store.registry.remove_documents([record.doc_id])
    assert list(store.registry.documents()) == []
    assert texts_of(store) == set()


# Embeddings


def test_known_texts_are_those_that_need_no_embedding(store: Store) -> None:
    put(store, "a", "one", "two")
    known = store.registry.known_texts(["one", "new", "one"])
    assert {name: chunk.text for name, chunk in known.items()} == {text_hash("one"): "one"}
    assert store.registry.known_texts(["one"], embedder="another") == {}


def test_a_known_text_needs_no_embedding_again(store: Store) -> None:
    put(store, "a", "one")
    new = replace(document("b"), chunks=[NewChunk("one", 1, 0, None)])
    store.registry.put_documents([new], embedder=EMBEDDER)
    assert found(store, "one") == ["one"]


def test_a_new_text_without_embedding_is_refused(store: Store) -> None:
    new = replace(document("b"), chunks=[NewChunk("one", 1, 0, None)])
    with pytest.raises(StoreError, match=r"'b'.*has no embedding.*known_texts"):
        store.registry.put_documents([new], embedder=EMBEDDER)
    assert list(store.registry.documents()) == []


def test_another_embedder_is_refused_with_a_remedy(store: Store) -> None:
    put(store, "a", "one")
    with pytest.raises(StoreError, match=r"'model-a', not of 'model-b'.*Use the embedder 'model-a'"):
        store.registry.put_documents([document("b", "two")], embedder="model-b")
    with pytest.raises(StoreError, match="model-b"):
        store.registry.require_embedder("model-b")
    with pytest.raises(StoreError, match="model-b"):
        store.registry.claim_embedder("model-b", DIMENSION)
    store.registry.require_embedder(EMBEDDER)
    assert texts_of(store) == {"one"}


def test_a_store_without_vectors_can_change_embedder(store: Store) -> None:
    store.registry.claim_embedder("model-b", 99)
    store.registry.require_embedder("anything")
    put(store, "a", "one")
    assert (store.registry.embedder, store.registry.stats().dimension) == (EMBEDDER, DIMENSION)


def test_another_dimension_for_an_embedder_is_refused(store: Store) -> None:
    store.registry.claim_embedder(EMBEDDER, DIMENSION)
    store.registry.claim_embedder(EMBEDDER)
    with pytest.raises(StoreError, match="16 dimensions"):
        store.registry.claim_embedder(EMBEDDER, DIMENSION + 1)


def test_a_search_sees_a_replaced_embedding(store: Store) -> None:
    put(store, "a", "one", "two")
    store.index.refresh()
    embed_again(store.registry, {chunk_id(store, "one"): vector("elsewhere"), 999: vector("x")})
    assert store.index.search(vector("elsewhere"), 1)[0].score == pytest.approx(1, abs=1e-5)
    assert len(store.index) == 2


@pytest.mark.parametrize(
    ("embedding", "why"),
    [
        ([1.0] * (DIMENSION + 1), "shape"),
        ([float("nan")] * DIMENSION, "NaN"),
        ([float("inf")] * DIMENSION, "infinity"),
        ([[1.0] * DIMENSION], "shape"),
        (["a"] * DIMENSION, "numbers"),
        ([], "shape"),
    ],
)
def test_an_embedding_that_does_not_fit_is_refused(store: Store, embedding: list[float], why: str) -> None:
    put(store, "a", "one")
    new = replace(document("b"), chunks=[NewChunk("two", 1, 0, embedding)])
    with pytest.raises(StoreError, match=why):
        store.registry.put_documents([new], embedder=EMBEDDER)
    assert texts_of(store) == {"one"}


def test_embeddings_are_normalised_and_units_kept(store: Store) -> None:
    unit = vector("x")
    new = replace(document("a"), chunks=[NewChunk("long", 1, 0, unit * 7), NewChunk("unit", 1, 4, unit)])
    store.registry.put_documents([new], embedder=EMBEDDER)
    rows = store.index.vectors([chunk_id(store, "long"), chunk_id(store, "unit")])
    assert np.allclose(rows[0], unit, atol=1e-6)
    assert rows[1].tobytes() == unit.tobytes()


def test_chunks_without_embedder_are_kept_not_found(store: Store) -> None:
    store.registry.put_documents([document("a", "one")], embedder=None)
    assert store.registry.known_texts(["one"]) == {}, "it needs an embedding"
    assert set(store.registry.stored_texts(["one"])) == {text_hash("one")}
    assert texts_of(store) == {"one"}
    assert found(store, "one") == []
    assert put(store, "a", "one").status == "updated"
    assert found(store, "one") == ["one"]


def test_another_tokenizers_count_replaces_the_old_one(store: Store) -> None:
    put(store, "a", "one two")
    new = replace(document("a", "one two"), chunks=[NewChunk("one two", 7, 0, None)])
    assert store.registry.put_documents([new], embedder=EMBEDDER)[0].status == "updated"
    assert next(store.registry.chunks()).tokens == 7


# KV


def test_recorded_kv_goes_to_the_trash_with_its_chunk(store: Store) -> None:
    put(store, "a", "one", "two")
    record(store, "one", "k1")
    record(store, "two", "k2")
    assert kv_keys(store.registry, FP) == {"k1", "k2"}
    put(store, "a", "two")
    assert kv_keys(store.registry, FP) == {"k2"}
    assert store.registry.trash() == [(FP, "k1")]
    assert store.registry.clear_trash([(FP, "k1")]) == []
    assert store.registry.trash() == []


def test_kv_shared_by_two_texts_stays_for_the_second(store: Store) -> None:
    put(store, "a", "one")
    put(store, "b", "ONE")
    record(store, "one", "k")
    record(store, "ONE", "k")
    assert store.registry.stats(FP).kv[0].keys == 1
    assert len(list(store.registry.kv_rows(FP))) == 2
    store.registry.remove_documents(["a"])
    assert (kv_keys(store.registry, FP), store.registry.trash()) == ({"k"}, [])
    store.registry.remove_documents(["b"])
    assert (kv_keys(store.registry, FP), store.registry.trash()) == (set(), [(FP, "k")])


def test_recording_a_chunk_takes_its_key_from_trash(store: Store) -> None:
    put(store, "a", "one")
    record(store, "one", "k")
    store.registry.remove_documents(["a"])
    put(store, "a", "one")
    assert store.registry.trash() == [(FP, "k")]  # the engine may drop it: nothing is recorded yet
    assert [chunk.text for chunk in store.registry.chunks_without_kv(FP)] == ["one"]
    record(store, "one", "k")
    assert (kv_keys(store.registry, FP), store.registry.trash()) == ({"k"}, [])


def test_kv_recorded_while_dropped_is_not_believed(store: Store) -> None:
    put(store, "a", "one")
    record(store, "one", "k")
    store.registry.remove_documents(["a"])
    pairs = store.registry.trash()
    put(store, "a", "one")
    record(store, "one", "k")  # found in the engine, a moment before it is dropped
    assert store.registry.clear_trash(pairs) == pairs
    assert kv_keys(store.registry, FP) == set()
    assert store.registry.trash() == pairs
    assert [chunk.text for chunk in store.registry.chunks_without_kv(FP)] == ["one"]


def test_clearing_what_is_not_trash_changes_nothing(store: Store) -> None:
    assert store.registry.clear_trash([(FP, "unknown")]) == []


def test_kv_of_a_chunk_gone_meanwhile_is_trash(store: Store) -> None:
    put(store, "a", "one")
    gone = chunk_id(store, "one")
    store.registry.remove_documents(["a"])
    assert store.registry.record_kv(FP, {}, [KVRow(gone, "k", 1, 1)]) == 0
    assert (kv_keys(store.registry, FP), store.registry.trash()) == (set(), [(FP, "k")])


def test_shared_kv_stays_when_one_chunk_leaves(store: Store) -> None:
    put(store, "a", "one")
    record(store, "one", "k")
    assert store.registry.record_kv(FP, {}, [KVRow(999, "k", 1, 1)]) == 0
    assert (kv_keys(store.registry, FP), store.registry.trash()) == ({"k"}, [])


def test_a_chunk_has_one_key_under_a_fingerprint(store: Store) -> None:
    put(store, "a", "one")
    record(store, "one", "old")
    record(store, "one", "other", fingerprint="e" * 64)
    record(store, "one", "new")
    assert kv_keys(store.registry, FP) == {"new"}
    assert kv_keys(store.registry, "e" * 64) == {"other"}
    assert store.registry.trash() == [(FP, "old")]


def test_kv_of_all_other_fingerprints_can_be_trashed(store: Store) -> None:
    put(store, "a", "one")
    record(store, "one", "mine")
    record(store, "one", "old", fingerprint="e" * 64)
    assert store.registry.trash_other_kv(FP) == 1
    assert store.registry.trash() == [("e" * 64, "old")]
    assert [part.fingerprint for part in store.registry.stats().kv] == [FP]


def test_missing_kv_is_per_fingerprint_and_documents(store: Store) -> None:
    put(store, "a", "one", "two")
    put(store, "b", "three")
    record(store, "one", "k")
    record(store, "two", "k2", fingerprint="e" * 64)

    def missing(**options: object) -> set[str]:
        return {chunk.text for chunk in store.registry.chunks_without_kv(FP, **options)}  # type: ignore[arg-type]

    assert missing() == {"two", "three"}
    assert missing(doc_ids=["a"]) == {"two"}
    assert missing(doc_ids=["b", "a"]) == {"two", "three"}
    assert missing(doc_ids=[]) == set()


def test_the_trash_can_be_taken_in_pieces(store: Store) -> None:
    put(store, "a", *map(str, range(5)))
    for text in map(str, range(5)):
        record(store, text, f"k{text}")
    store.registry.remove_documents(["a"])
    assert len(store.registry.trash(limit=2)) == 2
    assert len(store.registry.trash()) == 5


# The whole store


def test_stats_count_chunks_tokens_bytes_and_stale_kv(store: Store) -> None:
    put(store, "a", "one two", "three")
    put(store, "b", "three")
    record(store, "three", "k")
    record(store, "three", "old", fingerprint="e" * 64)
    stats = store.registry.stats(FP)
    assert (stats.documents, stats.chunks, stats.tokens, stats.trash) == (2, 2, 3, 0)
    assert (stats.embedder, stats.dimension, stats.chunks_without_embedding) == (EMBEDDER, DIMENSION, 0)
    assert stats.chunks_without_kv == 1
    assert [(part.fingerprint[0], part.keys, part.nbytes, part.stale) for part in stats.kv] == [
        ("f", 1, 100, False),
        ("e", 1, 100, True),
    ]
    assert (stats.kv_bytes, stats.stale_bytes) == (200, 100)
    assert stats.kv[0].facts == {"model": "m"}
    assert not any(part.stale for part in store.registry.stats().kv)


def test_stats_of_an_empty_store_are_zero(store: Store) -> None:
    stats = store.registry.stats(FP)
    assert (stats.documents, stats.chunks, stats.tokens, stats.chunks_without_kv, stats.kv) == (0, 0, 0, 0, ())
    assert (stats.embedder, stats.dimension) == (None, None)


def test_chunks_can_be_read_by_id(store: Store) -> None:
    put(store, "a", "one", "two")
    wanted = chunk_id(store, "two")
    assert [chunk.text for chunk in store.registry.chunks([wanted, 999])] == ["two"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("DELETE FROM doc_chunks", "1 chunks stand in no document"),
        ("INSERT INTO trash SELECT fingerprint, key, NULL FROM kv", "1 keys are both in use and in the trash"),
        ("UPDATE doc_chunks SET chunk_id = 99", "doc_chunks refers to a missing row of chunks"),
        ("UPDATE chunks SET text = 'other'", "text of chunk 1 has changed"),
        ("UPDATE chunks SET embedding = x'00000000'", "embedding has the wrong length"),
        ("UPDATE chunks SET embedder = 'other'", "1 embeddings are of another model than the store's"),
    ],
)
def test_check_finds_what_must_not_be(tmp_path: Path, damage: str, says: str) -> None:
    with Store.open(tmp_path) as store:
        put(store, "a", "one")
        record(store, "one", "k")
        assert problems(store.registry) == []
    other = sqlite3.connect(tmp_path / "store.db")
    with other:
        other.execute(damage)
    other.close()
    with Store.open(tmp_path) as store:
        assert any(says in problem for problem in problems(store.registry))


def test_threads_can_write_and_search_at_once(store: Store) -> None:
    def work(worker: int) -> None:
        for n in range(15):
            put(store, f"{worker}-{n}", f"own {worker} {n}", "shared by all")
            assert f"own {worker} {n}" in found(store, f"own {worker} {n}")
            if n % 3 == 0:
                store.registry.remove_documents([f"{worker}-{n}"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(texts_of(store)) == 4 * 10 + 1
    assert store.index.ids() == {chunk.chunk_id for chunk in store.registry.chunks()}
    assert problems(store.registry) == []


def test_a_reader_sees_one_state_during_commits(store: Store) -> None:
    put(store, "a", "one")
    with store.registry._database.read() as connection:
        assert connection.execute("SELECT count(*) FROM documents").fetchone() == (1,)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(put, store, "b", "two").result()
        assert connection.execute("SELECT count(*) FROM documents").fetchone() == (1,)
    assert len(list(store.registry.documents())) == 2


def test_a_page_of_documents_reads_no_earlier_ones(store: Store) -> None:
    """Or a list of all documents takes time by the square of their number."""
    store.registry.put_documents(
        [document(f"d{number:04}", f"text {number}") for number in range(600)], embedder=EMBEDDER
    )
    for options in ({}, {"named_by_source": True}):
        steps = []
        for after in (None, "d0300", "d0580"):
            with store._database.read() as connection:
                count = itertools.count()
                connection.set_progress_handler(lambda count=count: next(count) < 0, 10)
                sql.next_documents(connection, after, 10, **options)
                connection.set_progress_handler(None, 0)
                steps.append(next(count))
        assert steps[2] <= steps[1] <= steps[0] + 5


def test_documents_of_files_are_listed_alone(store: Store) -> None:
    of_file = replace(document("/docs/a.txt", "text"), source="/docs/a.txt")
    store.registry.put_documents([of_file, document("program", "other")], embedder=EMBEDDER)
    assert [record.doc_id for record in store.registry.named_by_source()] == ["/docs/a.txt"]
    assert len(list(store.registry.documents())) == 2
