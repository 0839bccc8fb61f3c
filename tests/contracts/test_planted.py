"""Fault B4, with LMCache's real index: a chunk made to have another one's fingerprint is not taken for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
from contract_kit import CHUNK

from lmcache_rag.connector.cache_salt import Renumbering

pytestmark = [pytest.mark.filterwarnings("ignore")]

MODULUS, VOCABULARY = 2**64, 150_000
FILLER = (59, 60, 61, 62, 63)  # places of the tokens that make the fingerprint right


def reduced(basis: list[list[int]]) -> list[list[int]]:
    """The lattice's basis in short vectors, by Lenstra, Lenstra and Lovász."""
    basis = [list(row) for row in basis]

    def dot(one: Sequence[Fraction | int], other: Sequence[Fraction | int]) -> Fraction:
        return Fraction(sum(a * b for a, b in zip(one, other, strict=True)))

    def orthogonal() -> tuple[list[list[Fraction]], list[list[Fraction]]]:
        rows: list[list[Fraction]] = []
        shares = [[Fraction(0)] * len(basis) for _ in basis]
        for i, row in enumerate(basis):
            rest = [Fraction(x) for x in row]
            for j, other in enumerate(rows):
                shares[i][j] = dot(row, other) / dot(other, other)
                rest = [a - shares[i][j] * b for a, b in zip(rest, other, strict=True)]
            rows.append(rest)
        return rows, shares

    rows, shares = orthogonal()
    k = 1
    while k < len(basis):
        for j in range(k - 1, -1, -1):
            if times := round(shares[k][j]):
                basis[k] = [a - times * b for a, b in zip(basis[k], basis[j], strict=True)]
                rows, shares = orthogonal()
        if dot(rows[k], rows[k]) >= (Fraction(3, 4) - shares[k][k - 1] ** 2) * dot(rows[k - 1], rows[k - 1]):
            k += 1
        else:
            basis[k], basis[k - 1] = basis[k - 1], basis[k]
            rows, shares = orthogonal()
            k = max(k - 1, 1)
    return basis


def near(basis: list[list[int]], wanted: list[int]) -> list[int]:
    """A vector of the lattice that is near, by Babai's rounding."""
    size = len(basis)
    # Solve wanted = sum(x[i] * basis[i]).
    rows = [[Fraction(basis[j][i]) for j in range(size)] + [Fraction(wanted[i])] for i in range(size)]
    for i in range(size):
        pivot = next(j for j in range(i, size) if rows[j][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for j in range(size):
            if j != i:
                rows[j] = [a - rows[j][i] * b for a, b in zip(rows[j], rows[i], strict=True)]
    times = [round(row[size]) for row in rows]
    return [sum(times[j] * basis[j][i] for j in range(size)) for i in range(size)]


def planted(victim: list[int], chosen: list[int], base: int) -> list[int]:
    """A chunk of the chosen tokens and five more that has the victim's fingerprint."""
    powers = [pow(base, CHUNK - 1 - at, MODULUS) for at in range(CHUNK)]
    missing = sum((a - b) * power for a, b, power in zip(victim, [*chosen, 0, 0, 0, 0, 0], powers, strict=True))
    last = [powers[at] for at in FILLER]  # the very last is 1
    lattice = [[0, 0, 0, 0, MODULUS]] + [
        [1 if i == j else 0 for i in range(4)] + [-last[j] % MODULUS] for j in range(4)
    ]
    middle = [VOCABULARY // 2] * 4 + [VOCABULARY // 2 - missing % MODULUS]
    found = near(reduced(lattice), middle)
    return [*chosen, *found[:4], found[4] + missing % MODULUS]


@pytest.fixture
def chunks() -> tuple[list[int], list[int]]:
    """A victim's chunk, and one with its fingerprint of which all but five tokens are the attacker's choice."""
    from lmcache.v1.multiprocess.modules.blend.matcher import BlendTokenRangeMatcher

    dice = random.Random(7)
    victim, chosen = ([dice.randrange(VOCABULARY) for _ in range(n)] for n in (CHUNK, CHUNK - len(FILLER)))
    other = planted(victim, chosen, int(BlendTokenRangeMatcher._BASE))
    assert other[: len(chosen)] == chosen
    assert all(0 <= token < VOCABULARY for token in other), "each is a token of the vocabulary"
    assert other != victim
    return victim, other


def served(victim: list[int], other: list[int], renumber: Callable[[list[int], str], list[int]]) -> bytes:
    """What LMCache's index says a prompt with the victim's chunk holds, after the other one was stored too."""
    from lmcache.v1.multiprocess.modules.blend.matcher import BlendTokenRangeMatcher

    index = BlendTokenRangeMatcher(CHUNK)
    prefix = [5] * CHUNK
    for name, chunk in ((b"the true chunk", victim), (b"PLANTED", other)):
        index.on_new_token_hashes(renumber([*prefix, *chunk], "a"), [b"prefix", name], start_chunk_idx=1)
    (found,) = index.match_sub_sequence(renumber([*prefix, 1, 2, 3, *victim, 9], "a"))
    return bytes(found.hash)


@pytest.mark.parametrize("constant", [0, 1, 123_456_789])
def test_an_added_constant_keeps_a_planted_collision(chunks: tuple[list[int], list[int]], constant: int) -> None:
    """What was done before; it shows that the collision is one in LMCache's own index."""
    assert served(*chunks, lambda tokens, _: [token + constant for token in tokens]) == b"PLANTED"


@pytest.mark.parametrize("secret", [b"", b"one", b"other"])
def test_secret_numbers_keep_a_planted_chunk_apart(chunks: tuple[list[int], list[int]], secret: bytes) -> None:
    assert served(*chunks, Renumbering(secret).renumbered) == b"the true chunk"


def test_renumbered_ids_keep_a_planted_chunk_apart(chunks: tuple[list[int], list[int]]) -> None:
    from lmcache_rag.connector import lmcache_client

    assert served(*chunks, lmcache_client.renumbering().renumbered) == b"the true chunk"
