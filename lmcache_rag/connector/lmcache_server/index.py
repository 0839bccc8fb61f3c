"""Which chunks may be blended, and where they are found in a prompt.

LMCache's own table of chunk fingerprints has one entry per slot, which later chunks overwrite, never frees a slot, and
compares chunks by a 64-bit polynomial. This index replaces it: chunks leave it when their KV is evicted or removed,
ingested ones are never evicted for others, and a match is compared by a keyed hash of all its tokens.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

log = logging.getLogger("lmcache_rag")

_CROWDED = np.uint64(1)  # mark of a slot in the table that several polynomials share
_FREE = np.uint64(0)
_LOAD = 4  # slots per chunk of a full index: 3% of the slots are crowded then


class Match(NamedTuple):
    """A chunk that was found in a prompt.

    Attributes:
        chunk_hash: LMCache's name of the chunk.
        stored: Token at which the chunk began in the prompt it was stored with.
        position: Token at which it begins in this prompt.
    """

    chunk_hash: bytes
    stored: int
    position: int


class _Entry:
    """One chunk of one namespace. Without a polynomial it cannot be found: not stored yet, or the first of a prompt."""

    __slots__ = ("chunk_hash", "digest", "ingested", "polynomial", "salt", "stored", "tokens")

    def __init__(self, salt: str, chunk_hash: bytes, ingested: bool) -> None:
        self.salt, self.chunk_hash, self.ingested = salt, chunk_hash, ingested
        self.polynomial: int | None = None
        self.digest = b""
        self.stored = 0
        self.tokens: Any = None


class ChunkIndex:
    """The chunks that were declared, by namespace and LMCache's hash, and by their tokens once they are stored.

    A prompt is searched at every token position: a rolling polynomial of each window is looked up in a table of slots,
    with NumPy; the few windows that are in it are then compared by a keyed hash. Used by several threads.

    Args:
        chunk: Tokens of a chunk.
        size: Most chunks. Beyond it chunks are evicted: first those not ingested, of these the least recently used.
    """

    def __init__(self, chunk: int, size: int) -> None:
        self._lock = threading.Lock()
        self.size = size
        self.looked_up = 0
        self.found = 0
        self._warned = False
        self._on_registered: Callable[[str, list[bytes]], None] | None = None
        self._keeps_tokens = False
        self.reset(chunk)

    def reset(self, chunk: int) -> None:
        """Empty the index, and set the number of tokens in a chunk."""
        with self._lock:
            self.chunk = chunk
            # Random: no one can prepare texts that collide.
            self._base = np.uint64(secrets.randbits(64) | 1)
            self._spread = np.uint64(secrets.randbits(64) | 1)
            self._key = secrets.token_bytes(32)
            bits = max(10, (self.size * _LOAD - 1).bit_length())
            self._shift = np.uint64(64 - bits)
            self._table = np.zeros(1 << bits, dtype=np.uint64)
            self._crowded: dict[int, set[int]] = {}
            self._series: tuple[Any, Any] = (np.ones(0, dtype=np.uint64), np.ones(0, dtype=np.uint64))
            self._entries: dict[bytes, list[_Entry]] = {}
            self._by_polynomial: dict[int, list[_Entry]] = {}
            self._ingested: OrderedDict[_Entry, None] = OrderedDict()  # in order of use
            self._others: OrderedDict[_Entry, None] = OrderedDict()
            self._count = 0

    def __len__(self) -> int:
        """Number of chunks that can be found."""
        return self._count

    # -- stored chunks ------------------------------------------------------------------------------------------------

    def declare(self, salt: str, hashes: Iterable[bytes], *, ingested: bool) -> None:
        """Add chunks that are about to be stored; they can be found after `register`.

        Args:
            salt: Their namespace.
            hashes: LMCache's hashes of them.
            ingested: Whether a client declared them; others only use space that is left.
        """
        with self._lock:
            for chunk_hash in hashes:
                entry = self._entry(salt, chunk_hash)
                if entry is None:
                    entry = _Entry(salt, chunk_hash, ingested)
                    self._entries.setdefault(chunk_hash, []).append(entry)
                elif ingested and not entry.ingested:
                    del self._others[entry]
                    entry.ingested = True
                self._use(entry)
            self._bound()

    def register(self, salt: str, tokens: Any, hashes: Sequence[bytes], start: int) -> int:
        """Make declared chunks findable. Those that left the index since they were declared are skipped.

        Args:
            salt: Their namespace.
            tokens: Their tokens, one chunk after the other; see `as_tokens`.
            hashes: LMCache's hash of each.
            start: Token at which the first begins in its prompt.

        Returns:
            Number of chunks that could not be found before.
        """
        new: list[bytes] = []
        if not hashes:
            return 0
        tokens = tokens[: len(hashes) * self.chunk]
        polynomials = self._polynomials(tokens)[:: self.chunk].tolist()
        with self._lock:
            for at, (chunk_hash, polynomial) in enumerate(zip(hashes, polynomials, strict=True)):
                entry = self._entry(salt, chunk_hash)
                if entry is None or entry.polynomial is not None:
                    continue
                entry.polynomial = polynomial
                entry.digest = self._digest(tokens[at * self.chunk : (at + 1) * self.chunk])
                entry.stored = start + at * self.chunk
                if self._keeps_tokens:
                    entry.tokens = tokens[at * self.chunk : (at + 1) * self.chunk].astype(np.uint32)
                same = self._by_polynomial.setdefault(polynomial, [])
                same.append(entry)
                if len(same) == 1:
                    self._occupy(polynomial)
                self._count += 1
                new.append(chunk_hash)
        if new and self._on_registered is not None:
            self._on_registered(salt, new)
        return len(new)

    def listen(self, listener: Callable[[str, list[bytes]], None]) -> None:
        """Have this called with namespace and hashes of chunks that can be found from now on; one listener."""
        self._on_registered = listener

    def keep_content(self) -> None:
        """Keep the tokens of chunks that are registered from now on, for `content`: 256 bytes of a chunk of 64."""
        self._keeps_tokens = True

    def content(self, salt: str, chunk_hash: bytes) -> tuple[Any, int] | None:
        """(tokens, where they began in their prompt) of a chunk that can be found, if that is kept; else None."""
        with self._lock:
            entry = self._entry(salt, chunk_hash)
            return None if entry is None or entry.tokens is None else (entry.tokens, entry.stored)

    def is_ingested(self, salt: str, chunk_hash: bytes) -> bool:
        """Whether a client declared that chunk."""
        with self._lock:
            entry = self._entry(salt, chunk_hash)
            return entry is not None and entry.ingested

    def remove(self, salt: str, hashes: Iterable[bytes]) -> None:
        """Remove chunks of a namespace: their KV was removed."""
        with self._lock:
            for chunk_hash in hashes:
                entry = self._entry(salt, chunk_hash)
                if entry is not None:
                    self._drop(entry)

    def remove_everywhere(self, hashes: Iterable[bytes]) -> None:
        """Remove chunks of every namespace: their KV was removed."""
        with self._lock:
            for chunk_hash in hashes:
                for entry in list(self._entries.get(chunk_hash, ())):
                    self._drop(entry)

    # -- look-ups -----------------------------------------------------------------------------------------------------

    def match(self, tokens: Any, salt: str | None) -> list[Match]:
        """Find chunks of a namespace in a prompt: each chunk once, at its first position.

        Args:
            tokens: The prompt; see `as_tokens`.
            salt: The namespace; None: any.
        """
        self.looked_up += len(tokens) // self.chunk
        if len(tokens) < self.chunk or not self._count:
            return []
        rolling = self._polynomials(tokens)
        with self._lock:
            slots = self._table[(rolling * self._spread) >> self._shift]
            positions = np.flatnonzero((slots == rolling) | (slots == _CROWDED))
            found: dict[_Entry, int] = {}
            for position, polynomial in zip(positions.tolist(), rolling[positions].tolist(), strict=True):
                same = self._by_polynomial.get(polynomial)
                if same is None:
                    continue
                digest = self._digest(tokens[position : position + self.chunk])
                best: _Entry | None = None
                for entry in same:  # the last stored of equal ones, but an ingested one before others
                    fits = entry.digest == digest and salt in (None, entry.salt)
                    if fits and (best is None or entry.ingested >= best.ingested):
                        best = entry
                if best is not None:
                    found.setdefault(best, position)
            for entry in found:
                self._use(entry)
            self.found += len(found)
            return [Match(entry.chunk_hash, entry.stored, position) for entry, position in found.items()]

    # -- inside, with the lock held -----------------------------------------------------------------------------------

    def _entry(self, salt: str, chunk_hash: bytes) -> _Entry | None:
        return next((each for each in self._entries.get(chunk_hash, ()) if each.salt == salt), None)

    def _use(self, entry: _Entry) -> None:
        order = self._ingested if entry.ingested else self._others
        order[entry] = None
        order.move_to_end(entry)

    def _bound(self) -> None:
        while len(self._ingested) + len(self._others) > self.size:
            if not self._others and not self._warned:
                self._warned = True
                log.warning(
                    "The index is full with %d ingested chunks: the least recently used ones leave it and are not "
                    "blended any more. Raise --index-size.",
                    self.size,
                )
            self._drop(next(iter(self._others or self._ingested)))

    def _drop(self, entry: _Entry) -> None:
        (self._ingested if entry.ingested else self._others).pop(entry, None)
        _take_out(self._entries, entry.chunk_hash, entry)
        if entry.polynomial is not None:
            self._count -= 1
            _take_out(self._by_polynomial, entry.polynomial, entry)
            if entry.polynomial not in self._by_polynomial:
                self._vacate(entry.polynomial)

    def _slot(self, polynomial: int) -> int:
        return ((polynomial * int(self._spread)) & 0xFFFFFFFFFFFFFFFF) >> int(self._shift)

    def _occupy(self, polynomial: int) -> None:
        slot = self._slot(polynomial)
        present = self._table[slot]
        if present == _FREE:
            self._table[slot] = polynomial
        elif present == _CROWDED:
            self._crowded[slot].add(polynomial)
        else:
            self._crowded[slot] = {int(present), polynomial}
            self._table[slot] = _CROWDED

    def _vacate(self, polynomial: int) -> None:
        slot = self._slot(polynomial)
        crowd = self._crowded.get(slot)
        if crowd is None:
            self._table[slot] = _FREE
            return
        crowd.discard(polynomial)
        if len(crowd) == 1:
            self._table[slot] = crowd.pop()
            del self._crowded[slot]

    def _polynomials(self, tokens: Any) -> Any:
        """The polynomial of the window that begins at each token: the sum of t[i + j] * base^-j, times base^i.

        Modulo 2^64, where an odd base has an inverse, so that a difference of prefix sums is a window's sum.
        """
        count = len(tokens)
        powers, inverses = self._series
        if count > len(powers):
            inverse = np.uint64(pow(int(self._base), -1, 1 << 64))
            powers, inverses = self._series = (_powers(self._base, count), _powers(inverse, count))
        sums = np.zeros(count + 1, dtype=np.uint64)
        np.cumsum(tokens * inverses[:count], out=sums[1:])
        rolling = (sums[self.chunk :] - sums[: -self.chunk]) * powers[: count - self.chunk + 1]
        return rolling | np.uint64(2)  # neither free nor crowded

    def _digest(self, window: Any) -> bytes:
        return hashlib.blake2b(window.tobytes(), digest_size=16, key=self._key).digest()


def _take_out(lists: dict[Any, list[_Entry]], key: Any, entry: _Entry) -> None:
    held = lists[key]
    held.remove(entry)
    if not held:
        del lists[key]


def _powers(base: Any, count: int) -> Any:
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def as_tokens(key: Any) -> Any:
    """The tokens of an LMCache key, as the index takes them."""
    packed = getattr(key, "token_bytes", None)
    if packed is not None:  # LMCache 0.5.7
        return np.frombuffer(packed, dtype=">u4").astype(np.uint64)
    return from_ids(key.token_ids)


def from_ids(token_ids: Iterable[int]) -> Any:
    """Token ids, as the index takes them."""
    ids = token_ids if isinstance(token_ids, Sequence) else list(token_ids)
    try:
        numbers: Any = np.asarray(array("I", ids))  # 32 bits: half of the time of 64, and less than NumPy itself takes
    except (OverflowError, TypeError):
        numbers = np.fromiter((int(each) & 0xFFFFFFFFFFFFFFFF for each in ids), dtype=np.uint64)
    return numbers.astype(np.uint64, copy=False)
