"""The numbers of tokens: secret, no two alike, in each namespace others."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest

from lmcache_rag.connector import cache_salt
from lmcache_rag.connector.cache_salt import Renumbering, renumbered

KEY = b"k" * 32


def test_equal_tokens_alone_have_equal_numbers() -> None:
    one = Renumbering(KEY)
    tokens = [0, 1, 2**18, 151_000, 1, 0]
    numbers = one.renumbered(tokens, "one")
    assert numbers == one.renumbered(tokens, "one") == Renumbering(KEY).renumbered(tokens, "one")
    assert numbers[0] == numbers[5]
    assert numbers[1] == numbers[4]
    assert len(set(numbers)) == 4
    assert all(type(number) is int and 0 <= number < 2**32 for number in numbers), "LMCache hashes 32 bits of each"
    assert one.renumbered([], "one") == []
    assert one.renumbered((0, 1), "one") == one.renumbered(array("i", [0, 1]), "one") == numbers[:2]


def test_no_two_tokens_share_a_number() -> None:
    """Of 150,000 numbers drawn by lot from 2 ** 32 some would be drawn twice."""
    one = Renumbering(KEY)
    for namespace in ("one", "other"):
        assert len(np.unique(one.numbers(range(1 << 20), namespace))) == 1 << 20
    high = [token << 12 for token in range(1 << 20)]
    assert len(np.unique(one.numbers(high, "one"))) == 1 << 20


def test_numbers_differ_by_namespace_and_by_secret() -> None:
    tokens = list(range(10_000))
    found = [
        one.numbers(tokens, name) for one in (Renumbering(KEY), Renumbering(b"other")) for name in ("a", "b", "\udcff")
    ]
    for n, one in enumerate(found):
        for other in found[n + 1 :]:
            assert (one == other).sum() < 3
            # Nor do they differ by something that is the same for all tokens.
            assert len(np.unique(one - other)) > 9_900
            assert len(np.unique(one ^ other)) > 9_900


def test_numbers_look_drawn_by_lot() -> None:
    """Each bit of a number is set for half of the tokens, whatever the tokens are like."""
    one = Renumbering(KEY)
    for tokens in (range(50_000), range(0, 50_000 << 16, 1 << 16)):
        numbers = one.numbers(tokens, "a")
        shares = [float(((numbers >> np.uint32(bit)) & np.uint32(1)).mean()) for bit in range(32)]
        assert all(abs(share - 0.5) < 0.02 for share in shares)
        steps = np.unique(np.diff(numbers.astype(np.int64)))
        assert len(steps) > 49_000


def test_ids_that_are_no_tokens_are_cut_without_error() -> None:
    one = Renumbering(KEY)
    assert one.renumbered([-1, 2**40 + 3], "a") == one.renumbered([2**32 - 1, 3], "a")
    assert one.renumbered([2**63 + 3], "a") == one.renumbered([3], "a")
    assert one.renumbered([2**70 + 3, -(2**70) + 3], "a") == one.renumbered([3, 3], "a")
    dice = random.Random(1)
    one.renumbered([dice.randrange(-(2**80), 2**80) for _ in range(1000)], "a")


def test_the_secret_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_salt, "_process", [])
    monkeypatch.setenv("LMCACHE_RAG_SECRET", "x" * 40)
    monkeypatch.delenv("LMCACHE_RAG_SECRET_FILE", raising=False)
    by_environment = renumbered([1, 2, 3], "a")
    monkeypatch.setattr(cache_salt, "_process", [])
    monkeypatch.setenv("LMCACHE_RAG_SECRET", "y" * 40)
    assert renumbered([1, 2, 3], "a") != by_environment
    cache_salt.use_secret(KEY)
    assert renumbered([1, 2, 3], "a") == Renumbering(KEY).renumbered([1, 2, 3], "a")


def test_numbers_need_the_secret_for_the_tables_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever had a namespace's keys would still not know its numbers."""
    monkeypatch.setattr(cache_salt.hmac, "digest", lambda *_: bytes(range(32)))
    assert Renumbering(KEY).renumbered([1, 2, 3], "a") != Renumbering(b"other").renumbered([1, 2, 3], "a")
