"""Which KV is stored on the second use, and that the counts take a fixed memory."""

from __future__ import annotations

import hashlib

import pytest

from lmcache_rag.connector.second_use import SecondUse, UseCounts
from lmcache_rag.protocol import CHUNKS


def hashes(*texts: str) -> list[bytes]:
    """Of blocks, each of all texts up to its own."""
    return [hashlib.sha256("|".join(texts[: at + 1]).encode()).digest() for at in range(len(texts))]


def test_a_beginning_is_admitted_on_its_second_use() -> None:
    policy = SecondUse(64, 32)
    first = hashes("a", "b", "c", "d", "e", "f", "g")
    assert policy.admitted(first) == 0
    assert policy.admitted(hashes("a", "b", "c", "d", "other", "question")) == 128, "only what was asked for before"
    assert policy.admitted(first) == 192
    assert policy.admitted(hashes("x", "b", "c", "d")) == 0, "after other tokens it is another KV"
    assert policy.admitted(first[:1]) == policy.admitted([]) == 0


def test_counts_take_a_fixed_memory_and_fade() -> None:
    counts = UseCounts(1 << 10)
    size = counts._counts.nbytes
    key = hashlib.sha256(b"often").digest()
    assert [counts.add(key) for _ in range(300)][-1] == 255
    for number in range(20_000):
        counts.add(hashlib.sha256(b"%d" % number).digest())
    assert counts._counts.nbytes == size
    assert counts.add(key) < 255
    with pytest.raises(ValueError, match="power of two"):
        UseCounts(1000)


def test_few_texts_are_taken_for_used_ones() -> None:
    counts = UseCounts(1 << 14)
    wrong = sum(counts.add(hashlib.sha256(b"%d" % number).digest()) > 0 for number in range(8000))
    assert wrong < 80


def test_named_chunks_are_counted_for_all_clients() -> None:
    policy = SecondUse(64, 32)
    first, second, third = list(range(100, 150)), list(range(200, 250)), list(range(300, 350))

    def ask(salt: str, *chunks: list[int]) -> list[int]:
        prompt, spans = list(range(32)), []
        for chunk in chunks:
            spans.append([len(prompt), len(prompt) + len(chunk)])
            prompt += chunk
        return policy.used_before(salt, [*prompt, 1, 2, 3], {CHUNKS: spans})

    assert ask("one", first, second) == []
    assert ask("one", third, first) == [82], "wherever it is"
    assert ask("other", first) == [], "a tenant's uses count for itself"
    assert ask("one", first, second, third) == [32, 82, 132]
    assert policy.used_before("one", list(range(100)), {}) == []
    assert policy.used_before("one", list(range(100)), {CHUNKS: [[90, 200]]}) == []
