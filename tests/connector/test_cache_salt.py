"""Which requests may share KV in LMCache: cache salts, and token ids renumbered in each namespace."""

from __future__ import annotations

import hmac
import random
from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lmcache_rag.connector import cache_salt
from lmcache_rag.connector.cache_salt import CacheSalts, Renumbering, renumbered
from lmcache_rag.errors import ConfigError
from lmcache_rag.protocol import INGEST, PREFIX

CHUNK = 64


def ids(seed: int, count: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(5, 150_000) for _ in range(count)]


def test_prompts_share_kv_behind_the_same_prefix_only() -> None:
    spaces, chunk = CacheSalts("model", CHUNK), ids(9, 200)
    # They differ behind their first LMCache chunk: a long system prompt whose end was changed.
    one, other = ids(1, 100), [*ids(1, 90), *ids(2, 10)]
    first = spaces.of([*one, *chunk], "", {PREFIX: 100})
    assert spaces.of([*one, *ids(3, 50), *chunk], "", {PREFIX: 100}) == first
    assert spaces.of([*other, *chunk], "", {PREFIX: 100}) != first
    assert len(first) <= 128
    assert not set(first) & set("@/\\\0"), "LMCache takes no such salt"


def test_tenants_and_models_share_nothing() -> None:
    prompt = [*ids(1, CHUNK), *ids(2, 100)]
    spaces = CacheSalts("model", CHUNK)
    names = {spaces.of(prompt, tenant, {PREFIX: CHUNK}) for tenant in ("", "a", "b", "a\0b", "\udcff", "x" * 999)}
    names.add(CacheSalts("another", CHUNK).of(prompt, "", {PREFIX: CHUNK}))
    assert len(names) == 7


def test_adapter_and_tenant_never_equal_another_pair() -> None:
    spaces, prompt = CacheSalts("model", CHUNK), ids(1, 100)
    pairs = [("ab", ""), ("a", "b"), ("", "ab"), ("a\0", "b"), ("a", "\0b"), ("", "1\0ab"), ("1\0a", "b")]
    assert len({spaces.of(prompt, tenant, None, adapter=adapter) for adapter, tenant in pairs}) == len(pairs)


def ingest(tokens: int) -> dict[str, Any]:
    return {PREFIX: tokens, INGEST: True}


def test_other_clients_share_kv_by_an_ingested_prefix() -> None:
    spaces, prefix = CacheSalts("model", CHUNK), ids(1, 2 * CHUNK)
    asked = [*prefix, *ids(2, 300)]
    alone = spaces.of(asked, "", None)
    assert alone == spaces.of([*prefix[:CHUNK], *ids(3, 300)], "", {}), "by the first LMCache chunk"
    named = spaces.of([*prefix, *ids(4, 200)], "", ingest(len(prefix)))
    assert spaces.of(asked, "", None) == named != alone
    longer = spaces.of([*prefix, *ids(5, CHUNK)], "", ingest(3 * CHUNK))
    assert spaces.of(asked, "", None) == named, "it does not begin with the longer one"
    assert spaces.of([*prefix, *ids(5, 200)], "", None) == longer
    assert spaces.of(asked, "tenant", None) != named, "no tenant learns of another's prefixes"
    assert spaces.of(asked, "", None, adapter="a") != named, "nor does an adapter"


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK + 1, 2 * CHUNK])
def test_a_prefix_in_a_query_is_for_that_request_only(length: int) -> None:
    """Fault D2: one request with `lmcache_rag.prefix: 1`, and all others were in another namespace, some in one."""
    spaces = CacheSalts("model", CHUNK)
    start = ids(0, 1)  # what every prompt of a model begins with
    prompts = [[*start, *ids(n, 3 * CHUNK)] for n in range(1, 4)]
    before = [spaces.of(prompt, "", None) for prompt in prompts]
    assert len(set(before)) == 3
    spaces.of(prompts[0], "", {PREFIX: length})
    assert [spaces.of(prompt, "", None) for prompt in prompts] == before


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK + 1, 0, -CHUNK])
def test_an_ingested_prefix_needs_whole_chunks(length: int) -> None:
    spaces, start = CacheSalts("model", CHUNK), ids(0, 1)
    prompts = [[*start, *ids(n, 3 * CHUNK)] for n in range(1, 4)]
    before = [spaces.of(prompt, "", None) for prompt in prompts]
    spaces.of(prompts[0], "", ingest(length))
    assert [spaces.of(prompt, "", None) for prompt in prompts] == before


def test_no_tenant_has_another_ones_prefix_forgotten() -> None:
    spaces, prefix = CacheSalts("model", CHUNK), ids(1, 2 * CHUNK)
    named = spaces.of([*prefix, *ids(2, 99)], "victim", ingest(len(prefix)))
    for n in range(1000):
        spaces.of(ids(n, (1 + n % 40) * CHUNK), "attacker", ingest((1 + n % 40) * CHUNK))
    assert spaces.of([*prefix, *ids(3, 99)], "victim", None) == named


def test_the_operator_names_the_length_of_a_prefix() -> None:
    spaces = CacheSalts("model", CHUNK, prefix_tokens=2 * CHUNK)
    prefix = ids(1, 2 * CHUNK)
    assert spaces.of([*prefix, *ids(2, 99)], "", None) == spaces.of([*prefix, *ids(3, 99)], "", {})
    other = [*prefix[:CHUNK], *ids(4, 200)]
    assert spaces.of(other, "", None) != spaces.of([*prefix, *ids(3, 99)], "", None)
    assert len({spaces.of(prefix[:CHUNK], "", None), spaces.of([*prefix[:CHUNK], 5], "", None)}) == 1, "too short"
    with pytest.raises(ConfigError, match="multiple"):
        CacheSalts("model", CHUNK, prefix_tokens=100)


def test_names_need_the_key_of_the_server() -> None:
    prompt = ids(1, 200)
    names = {CacheSalts("model", CHUNK, key=key).of(prompt, "tenant", None) for key in (b"", b"one", b"other")}
    assert len(names) == 3


@pytest.mark.parametrize("wrong", [0, -1, 10_000, True, "64", None, 6.4])
def test_a_prefix_that_cannot_be_is_taken_for_none(wrong: Any) -> None:
    spaces, prompt = CacheSalts("model", CHUNK), ids(1, 300)
    assert spaces.of(prompt, "", {PREFIX: wrong}) == spaces.of(prompt, "", None)
    assert spaces.of(prompt[:10], "", None) != spaces.of(prompt, "", None)
    spaces.of([], "", None)


@pytest.mark.parametrize("use", ["asked", "named", "ingested"])
def test_the_least_recently_used_prefix_is_forgotten(monkeypatch: pytest.MonkeyPatch, use: str) -> None:
    for limit, lengths in (("_NAMES", (2, 2, 2)), ("_LENGTHS", (2, 3, 4)), ("_TENANTS", (2, 2, 2))):
        with monkeypatch.context() as patch:
            patch.setattr(f"lmcache_rag.connector.cache_salt.{limit}", 2)
            spaces = CacheSalts("model", CHUNK)
            tenants = ["a", "b", "c"] if limit == "_TENANTS" else [""] * 3
            prefixes = [ids(n, length * CHUNK) for n, length in enumerate(lengths)]
            named = [spaces.of(prefix, tenants[n], ingest(len(prefix))) for n, prefix in enumerate(prefixes[:2])]
            size = len(prefixes[0])
            params = {"asked": None, "named": {PREFIX: size}, "ingested": ingest(size)}[use]
            assert spaces.of(prefixes[0], tenants[0], params) == named[0], "used again"
            named.append(spaces.of(prefixes[2], tenants[2], ingest(len(prefixes[2]))))
            found = [spaces.of(prefix, tenants[n], None) == named[n] for n, prefix in enumerate(prefixes)]
            assert found == [True, False, True], limit


def test_the_largest_tenant_loses_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_rag.connector.cache_salt._ALL_NAMES", 4)
    spaces, prefixes = CacheSalts("model", CHUNK), [ids(n, 2 * CHUNK) for n in range(5)]
    tenants = ["few", "many", "many", "many", "new"]
    named = [spaces.of(p, tenant, ingest(2 * CHUNK)) for p, tenant in zip(prefixes, tenants, strict=True)]
    found = [spaces.of(p, tenant, None) for p, tenant in zip(prefixes, tenants, strict=True)]
    assert [a == b for a, b in zip(found, named, strict=True)] == [True, False, True, True, True]


def test_a_prompt_is_hashed_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    spaces, hashed = CacheSalts("model", CHUNK), [0]
    prompt = ids(1, 40 * CHUNK)
    for n in range(1, 17):
        spaces.of(ids(n, n * 2 * CHUNK), "", ingest(n * 2 * CHUNK))
    new = hmac.new

    def counting(*given: Any) -> Any:
        digest = new(*given)
        update = digest.update
        return SimpleNamespace(update=lambda data: (hashed.append(len(data)), update(data)), copy=digest.copy)

    monkeypatch.setattr("lmcache_rag.connector.cache_salt.hmac.new", counting)
    spaces.of(prompt, "", None)
    assert sum(hashed) <= 4 * (32 + 1) * CHUNK


def test_ids_that_are_no_tokens_harm_no_scheduler() -> None:
    wide = [2**40 + 5, -1, 7]
    assert all(0 <= number < 2**32 for number in renumbered(wide, "one"))
    CacheSalts("model", CHUNK).of(wide * 40, "", None)


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
