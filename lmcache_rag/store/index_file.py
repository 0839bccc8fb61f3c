"""The FAISS index as a file: derived data, believed only when it is whole and fits the database.

The file is what faiss.write_index() makes, followed by a trailer: facts as JSON, their length in 8 bytes, a magic word.
faiss.read_index() reads it as well, because it ignores what follows. The checksum is looked at first: FAISS trusts the
sizes that it reads, so random bytes could make it ask for any amount of memory.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lmcache_rag.store.faiss_lib import import_faiss

_MAGIC = b"LMCRIDX1"


@dataclass(frozen=True, slots=True)
class Facts:
    """What an index file says about itself.

    Attributes:
        stamp: Unique name of this file; the database holds the stamp of the file that was saved last.
        generation: State of the database that it holds.
        dimension: Length of its vectors.
        count: Number of its vectors.
    """

    stamp: str
    generation: int
    dimension: int
    count: int


class DamagedIndexError(Exception):
    """The file cannot be used; the message says why. Never leaves the store: the index is made anew."""


def write(path: Path, index: Any, facts: Facts) -> None:
    """Replace the file in one step.

    Raises:
        OSError: It could not be written; the old file stands as it was.
    """
    body = memoryview(import_faiss().serialize_index(index))
    trailer = json.dumps({**asdict(facts), "checksum": xxhash.xxh3_128_hexdigest(body)}).encode()
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            for piece in (body, trailer, len(trailer).to_bytes(8, "little"), _MAGIC):
                file.write(piece)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def read(path: Path) -> tuple[Any, Facts]:
    """The index and what it says about itself.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedIndexError: It is not whole.
    """
    size = path.stat().st_size
    end = len(_MAGIC) + 8
    if size < end:
        raise DamagedIndexError("it is too short")
    data = np.memmap(path, dtype=np.uint8, mode="r")
    if data[-len(_MAGIC) :].tobytes() != _MAGIC:
        raise DamagedIndexError("its end is missing")
    length = int.from_bytes(data[size - end : size - len(_MAGIC)].tobytes(), "little")
    if length > size - end:
        raise DamagedIndexError("its trailer is damaged")
    body = data[: size - end - length]
    try:
        raw = json.loads(data[size - end - length : size - end].tobytes())
        checksum = raw.pop("checksum")
        facts = Facts(**raw)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DamagedIndexError("its trailer is damaged") from None
    if xxhash.xxh3_128_hexdigest(np.asarray(body).data) != checksum:
        raise DamagedIndexError("its checksum is wrong")
    faiss = import_faiss()
    try:
        index = faiss.deserialize_index(np.asarray(body))
    except RuntimeError as error:  # written by another version of FAISS
        raise DamagedIndexError(f"FAISS cannot read it: {error}") from None
    if not isinstance(index, faiss.IndexIDMap2) or (index.d, index.ntotal) != (facts.dimension, facts.count):
        raise DamagedIndexError("it is not an index of this store")
    return index, facts
