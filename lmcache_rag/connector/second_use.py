"""Admission on the second use: KV of a prompt's beginning is stored once it has been asked for before.

The connector counts, in vLLM's scheduler, and not the client: clients are many and often keep nothing (a command, a
serverless function, a replica with a read-only store), and a count that each keeps by itself never reaches two. The
scheduler sees the prompts of all of them, has the hashes of their blocks at hand, and decides what is stored anyway. A
server that is started again counts from zero, which costs one use. Chunks that a client ingests are stored at once:
whoever ingests has decided.

A chunk in the middle of a prompt can only be blended once a client has ingested it, as KV after other text is not its
own. Its uses are counted here, too, where the request names its chunks, and the answer tells which had been used
before (lmcache_rag.protocol.USED_BEFORE): a client that keeps nothing ingests these. One that lives longer also counts
itself, see lmcache_rag.lazy_fill.

The counts are a count-min sketch that is halved after every so many uses (as in TinyLFU): its memory is fixed, and a
text that was asked for twice in a long time is not admitted for ever. It may count too high, never too low.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmcache_rag.protocol import named_spans

WIDTH, ROWS = 1 << 18, 4  # one byte each: 1 MB
_MOST = 255


class UseCounts:
    """How often keys were used lately, approximately.

    Args:
        width: Counters in a row, a power of two. Uses are halved after eight times as many.
    """

    def __init__(self, width: int = WIDTH) -> None:
        if width & (width - 1):
            raise ValueError(f"the width of a sketch is a power of two; got {width}")
        self._counts = np.zeros((ROWS, width), dtype=np.uint8)
        self._rows = np.arange(ROWS)
        self._left = self._period = 8 * width

    def add(self, key: bytes) -> int:
        """Count one use of a key, of at least 32 bytes of a hash; returns how often it was used before."""
        places = np.frombuffer(key, dtype="<u4", count=ROWS) & (self._counts.shape[1] - 1)
        seen = self._counts[self._rows, places]
        before = int(seen.min())
        if before < _MOST:  # only the smallest: the others are too high already
            self._counts[self._rows[seen == before], places[seen == before]] = before + 1
        self._left -= 1
        if not self._left:
            self._counts >>= 1
            self._left = self._period
        return before


class SecondUse:
    """Decides how many first tokens of a prompt are stored.

    Args:
        chunk: Tokens of an LMCache chunk.
        block: Tokens of a block whose hash vLLM makes.
        counts: The uses so far.
    """

    def __init__(self, chunk: int, block: int, counts: UseCounts | None = None) -> None:
        self._chunk, self._per = chunk, chunk // block
        self._counts = counts or UseCounts()

    def admitted(self, hashes: Sequence[Any]) -> int:
        """Count a prompt; returns how many of its first tokens were asked for before, in whole LMCache chunks.

        Args:
            hashes: Hashes of its blocks, each of all tokens up to its end, and of the request's cache_salt.
        """
        tokens, leading = 0, True
        for last in hashes[self._per - 1 :: self._per]:
            before = self._counts.add(_bytes(last))
            leading = leading and before > 0
            tokens += self._chunk if leading else 0
        return tokens

    def used_before(self, salt: str, prompt: Sequence[int], params: Mapping[str, Any]) -> list[int]:
        """Count the chunks that a request names; returns where those begin that were used before.

        Args:
            salt: The request's cache_salt.
            prompt: Its token ids.
            params: Its kv_transfer_params.
        """
        found = []
        for start, end in named_spans(params, len(prompt)):
            chunk = hashlib.sha256(f"chunk\0{salt}\0".encode() + array("q", prompt[start:end]).tobytes())
            if self._counts.add(chunk.digest()):
                found.append(start)
        return found


def _bytes(block_hash: Any) -> bytes:
    raw = bytes(block_hash) if isinstance(block_hash, bytes | bytearray) else repr(block_hash).encode()
    return raw if len(raw) >= 4 * ROWS else raw.ljust(4 * ROWS, b"\0")
