"""The index of chunks: what is found, what leaves, and what never does."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_rag.connector.lmcache_server.index import ChunkIndex, Match, as_tokens, from_ids

CHUNK = 8


def text(draw: random.Random, chunks: int) -> list[int]:
    return [draw.randrange(1 << 32) for _ in range(chunks * CHUNK)]


def names(draw: random.Random, count: int) -> list[bytes]:
    return [draw.randbytes(32) for _ in range(count)]


def store(
    index: ChunkIndex, tokens: list[int], hashes: list[bytes], salt: str = "", *, ingested: bool = True, start: int = 0
) -> int:
    index.declare(salt, hashes, ingested=ingested)
    return index.register(salt, from_ids(tokens), hashes, start)


def test_chunks_are_found_at_any_place() -> None:
    draw = random.Random(0)
    index = ChunkIndex(CHUNK, 100)
    tokens, hashes = text(draw, 3), names(draw, 3)
    assert store(index, tokens, hashes, start=16) == 3
    assert store(index, tokens, hashes, start=16) == 0, "they are known"
    between = text(draw, 1)[:5]
    prompt = between + tokens[CHUNK:] + between + tokens[:CHUNK] + tokens[:CHUNK]
    assert index.match(from_ids(prompt), "") == [
        Match(hashes[1], 24, 5),
        Match(hashes[2], 32, 13),
        Match(hashes[0], 16, 26),
    ]
    assert (index.looked_up, index.found) == (len(prompt) // CHUNK, 3)
    assert index.match(from_ids(tokens[: CHUNK - 1]), "") == []


def test_other_namespaces_find_nothing() -> None:
    draw = random.Random(1)
    index = ChunkIndex(CHUNK, 100)
    tokens, hashes = text(draw, 1), names(draw, 1)
    store(index, tokens, hashes, "a")
    assert not index.match(from_ids(tokens), "b")
    store(index, tokens, hashes, "b")
    index.remove("a", hashes)
    assert not index.match(from_ids(tokens), "a")
    assert len(index.match(from_ids(tokens), "b")) == 1
    assert len(index.match(from_ids(tokens), None)) == 1
    index.remove_everywhere(hashes)
    assert len(index) == 0


def test_a_polynomial_alone_is_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a planted chunk would have it: other tokens of the same polynomial."""
    draw = random.Random(2)
    index = ChunkIndex(CHUNK, 100)
    true, planted = text(draw, 1), text(draw, 1)
    a, b = names(draw, 2)
    monkeypatch.setattr(ChunkIndex, "_polynomials", lambda self, tokens: np.full(len(tokens) - CHUNK + 1, 7, np.uint64))
    store(index, true, [a])
    store(index, planted, [b])
    assert index.match(from_ids(true), "") == [Match(a, 0, 0)]
    assert index.match(from_ids(planted), "") == [Match(b, 0, 0)]
    assert index.match(from_ids(text(draw, 1)), "") == []
    index.remove("", [b])
    assert index.match(from_ids(true), "") == [Match(a, 0, 0)]


def test_of_equal_chunks_an_ingested_one_is_taken() -> None:
    draw = random.Random(3)
    index = ChunkIndex(CHUNK, 100)
    tokens = text(draw, 1)
    first, ingested, last, newest = names(draw, 4)
    store(index, tokens, [first], ingested=False)
    store(index, tokens, [ingested])
    store(index, tokens, [last], ingested=False)
    assert index.match(from_ids(tokens), "")[0].chunk_hash == ingested
    store(index, tokens, [newest])
    assert index.match(from_ids(tokens), "")[0].chunk_hash == newest
    index.remove("", [ingested, newest])
    assert index.match(from_ids(tokens), "")[0].chunk_hash == last


def test_ten_tables_of_other_traffic_change_nothing() -> None:
    draw = random.Random(4)
    size = 1000
    index = ChunkIndex(CHUNK, size)
    documents = [(text(draw, 4), names(draw, 4)) for _ in range(50)]
    for tokens, hashes in documents:
        store(index, tokens, hashes)
    for _ in range(size):
        store(index, text(draw, 10), names(draw, 10), ingested=False)
    assert len(index) == size
    for tokens, hashes in documents:
        assert [found.chunk_hash for found in index.match(from_ids(tokens), "")] == hashes
    fresh, hashes = text(draw, 4), names(draw, 4)
    store(index, fresh, hashes)
    assert len(index.match(from_ids(fresh), "")) == 4, "and there is room for more"


def test_a_full_index_says_so_and_keeps_what_is_used(caplog: pytest.LogCaptureFixture) -> None:
    draw = random.Random(5)
    index = ChunkIndex(CHUNK, 10)
    used, hashes = text(draw, 1), names(draw, 1)
    store(index, used, hashes)
    for _ in range(30):
        store(index, text(draw, 1), names(draw, 1))
        assert index.match(from_ids(used), "")
    assert len(index) == 10
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "--index-size" in caplog.text


def test_a_chunk_gone_before_registration_stays_out() -> None:
    draw = random.Random(6)
    index = ChunkIndex(CHUNK, 10)
    tokens, hashes = text(draw, 2), names(draw, 2)
    index.declare("", hashes, ingested=True)
    assert index.is_ingested("", hashes[0])
    index.remove("", hashes[:1])
    assert index.register("", from_ids(tokens), hashes, 0) == 1
    assert [found.chunk_hash for found in index.match(from_ids(tokens), "")] == hashes[1:]


def test_ingestion_makes_a_known_chunk_an_ingested_one() -> None:
    draw = random.Random(7)
    index = ChunkIndex(CHUNK, 4)
    tokens, hashes = text(draw, 1), names(draw, 1)
    store(index, tokens, hashes, ingested=False)
    assert not index.is_ingested("", hashes[0])
    store(index, tokens, hashes)
    store(index, tokens, hashes, ingested=False)
    assert index.is_ingested("", hashes[0])
    for _ in range(9):
        store(index, text(draw, 1), names(draw, 1), ingested=False)
    assert index.match(from_ids(tokens), "")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 11), st.booleans(), st.sampled_from(["store", "remove"])), max_size=60))
def test_it_holds_what_a_dictionary_would(steps: list[tuple[int, bool, str]]) -> None:
    draw = random.Random(8)
    index = ChunkIndex(CHUNK, 100)
    index._shift = np.uint64(64 - 2)  # four slots: all are crowded
    index._table = np.zeros(4, dtype=np.uint64)
    texts = [(text(draw, 1), names(draw, 1)[0]) for _ in range(12)]
    held: set[int] = set()
    for which, ingested, step in steps:
        tokens, chunk_hash = texts[which]
        if step == "store":
            store(index, tokens, [chunk_hash], ingested=ingested)
            held.add(which)
        else:
            index.remove("", [chunk_hash])
            held.discard(which)
        assert len(index) == len(held)
        found: Any = index.match(from_ids([token for tokens, _ in texts for token in tokens]), "")
        assert {each.position // CHUNK for each in found} == held
    if not held:
        assert not index._table.any()
        assert not index._crowded
        assert not index._by_polynomial
        assert not index._entries


def test_tokens_of_both_versions_of_lmcache() -> None:
    ids = [1, 2**32 - 1, 70000]
    packed = np.array(ids, dtype=">u4").tobytes()
    assert as_tokens(SimpleNamespace(token_bytes=packed)).tolist() == ids
    assert as_tokens(SimpleNamespace(token_ids=tuple(ids))).tolist() == ids
    assert from_ids([-1]).tolist() == [2**64 - 1]


def test_another_size_of_chunks_begins_anew() -> None:
    draw = random.Random(9)
    index = ChunkIndex(CHUNK, 10)
    tokens, hashes = text(draw, 2), names(draw, 2)
    store(index, tokens, hashes)
    index.reset(2 * CHUNK)
    assert len(index) == 0
    store(index, tokens, hashes[:1])
    assert index.match(from_ids(tokens), "") == [Match(hashes[0], 0, 0)]


def test_tokens_are_kept_only_where_asked() -> None:
    index = ChunkIndex(4, 100)
    heard: list[tuple[str, list[bytes]]] = []
    index.listen(lambda salt, hashes: heard.append((salt, hashes)))
    index.declare("s", [b"a"], ingested=True)
    index.register("s", from_ids([1, 2, 3, 4]), [b"a"], 4)
    assert index.content("s", b"a") is None
    index.keep_content()
    index.declare("s", [b"a", b"b"], ingested=True)
    index.register("s", from_ids([1, 2, 3, 4, 5, 6, 7, 8]), [b"a", b"b"], 4)
    content = index.content("s", b"b")
    assert content is not None
    assert (content[0].tolist(), content[1]) == ([5, 6, 7, 8], 8)
    assert index.content("other", b"b") is None
    assert heard == [("s", [b"a"]), ("s", [b"b"])], "only those that are new"
