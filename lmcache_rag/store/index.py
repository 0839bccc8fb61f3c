"""Search: a FAISS index in memory that is kept in step with the database, and a file that avoids rebuilding it.

The file is derived data, used only when it is whole and fits the database. It is what faiss.write_index() makes,
followed by a trailer: facts as JSON, their length in 8 bytes, a magic word. faiss.read_index() can read it too, since
it ignores what follows. The checksum is compared first: FAISS trusts the sizes that it reads, so random bytes could
make it allocate any amount of memory.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import xxhash

from lmcache_rag._utils import needs
from lmcache_rag.errors import ConfigError, StoreError
from lmcache_rag.store import sql
from lmcache_rag.store.database import Database
from lmcache_rag.store.types import Hit, Vector

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger("lmcache_rag.store")

Where: TypeAlias = sql.Filter | Callable[[Hit], bool]
_ROWS = 4096  # vectors that are read at a time
_SMALL_INDEX = 10_000  # vectors: its file is written at each change
_FEW = 0.05  # share of the vectors of a larger one that may have changed before that
_MAGIC = b"LMCRIDX1"
_PIECE = 1 << 20  # bytes that are written at once
_SMALL = 1 << 28  # multiplications, about 50 ms of one core
_import_lock = threading.Lock()


class VectorIndex:
    """Finds the chunks whose embeddings have the largest inner product with a query's.

    The database is the source of truth. Before each search the index takes in what any process has committed since; a
    missing, damaged or foreign file only means that the index is rebuilt, with a warning. Safe to use from several
    threads.

    Args:
        path: The index file.
        database: The store's database.
    """

    def __init__(self, path: Path, database: Database) -> None:
        self._path = path
        self._database = database
        # Guards the fields below. Snapshots of the database are taken under it, so they are never older than the index.
        self._lock = threading.RLock()
        self._index: Any = None
        self._generation = 0
        self._saved_generation = -1
        self._unsaved = 0  # vectors that were added and removed since the file was written
        self._looked_at_file = False

    def __len__(self) -> int:
        with self._lock:
            return 0 if self._index is None else int(self._index.ntotal)

    def refresh(self) -> None:
        """Take in what has been committed; search() does so itself.

        Raises:
            StoreCorruptError: The database is damaged.
        """
        with self._lock, self._database.read() as connection:
            self._refresh(connection)

    def ids(self) -> set[int]:
        """The chunks that a search can find."""
        with self._lock:
            self.refresh()
            return set(self._ids().tolist())

    def vectors(self, chunk_ids: Sequence[int]) -> Vector:
        """Embeddings of chunks, of unit length, shape [n, dimension].

        Raises:
            StoreError: A chunk is not in the index.
        """
        import numpy as np

        with self._lock:
            self.refresh()
            unknown = set(chunk_ids) - set(self._ids().tolist())
            if unknown:
                raise StoreError(f"Chunks {sorted(unknown)[:5]} have no embedding in this store.")
            if not chunk_ids:
                return np.empty((0, 0 if self._index is None else self._index.d), dtype=np.float32)
            return np.stack([self._index.reconstruct(int(chunk_id)) for chunk_id in chunk_ids])

    def search(self, vector: Vector | Sequence[float], k: int, *, where: Where | None = None) -> list[Hit]:
        """The k best chunks for one query vector, best first; fewer when the store holds fewer.

        Args:
            vector: Shape [dimension], made by the store's embedder.
            k: How many.
            where: Only chunks that match it: values by name (see sql.Condition; hits then name only the documents
                that match it), or a function that gets each hit.

        Raises:
            ConfigError: k is below 1, or the filter is not valid.
            StoreError: The vector does not fit the store.
        """
        return self.search_batch([vector], k, where=where)[0]

    def search_batch(
        self, vectors: Sequence[Vector | Sequence[float]] | Vector, k: int, *, where: Where | None = None
    ) -> list[list[Hit]]:
        """search() for several query vectors at once."""
        if k < 1:
            raise ConfigError(f"A search needs to ask for at least one chunk; got {k}.")
        if len(vectors) == 0:
            return []
        if where is None or isinstance(where, Mapping):
            condition = sql.Condition(where) if where else None
            return self._ranked(vectors, k, condition)[0]
        wanted = 4 * k
        while True:
            # The function gets the best hits first; more are searched only while it rejects too many.
            found, exhausted = self._ranked(vectors, wanted, None)
            kept = [[hit for hit in hits if where(hit)][:k] for hits in found]
            if exhausted or all(len(hits) == k for hits in kept):
                return kept
            wanted *= 4

    def save(self) -> None:
        """Write the index file if it is out of date. The caller holds the writer lock.

        A large file is left as it is while few vectors have changed: the next start then takes these from the database,
        and each small change of a large store does not write gigabytes.

        A file that cannot be written is not an error: the index is then rebuilt at the next start.
        """
        try:
            with self._lock:
                self.refresh()
                if self._index is None or self._generation == self._saved_generation:
                    return
                if self._saved_generation >= 0 and self._is_nearly_saved():
                    return
                facts = IndexFacts(uuid.uuid4().hex, self._generation, self._index.d, self._index.ntotal)
                write_index(self._path, self._index, facts)
                # Only a file whose stamp is in the database is used, so that a restored backup of either is detected.
                with self._database.write() as connection:
                    sql.write_meta(connection, sql.INDEX_STAMP, facts.stamp)
                self._saved_generation, self._unsaved = self._generation, 0
        except (OSError, StoreError) as error:
            logger.warning("%s could not be saved and will be rebuilt when it is next needed: %s", self._path, error)

    def _is_nearly_saved(self) -> bool:
        """Whether the file has nearly all of the index, and the index is large."""
        size = self._index.ntotal
        return bool(size > _SMALL_INDEX and self._unsaved < size * _FEW)

    def _ranked(
        self, vectors: Sequence[Vector | Sequence[float]] | Vector, k: int, condition: sql.Condition | None
    ) -> tuple[list[list[Hit]], bool]:
        """Hits for each vector, and whether they are all that any k could find."""
        faiss = import_faiss()
        import numpy as np

        with ExitStack() as snapshot:
            with self._lock:
                connection = snapshot.enter_context(self._database.read())
                self._refresh(connection)
                size = len(self)
                if size == 0:
                    return [[] for _ in vectors], True
                queries = sql.normalised(vectors, self._index.d)
                parameters = None
                if condition is not None:
                    allowed = np.asarray(condition.chunk_ids(connection), dtype=np.int64)
                    size = min(size, len(allowed))
                    if size == 0:
                        return [[] for _ in vectors], True
                    parameters = faiss.SearchParameters(sel=faiss.IDSelectorBatch(allowed))
                with few_threads(queries.size * self._index.ntotal):
                    scores, ids = self._index.search(queries, min(k, size), params=parameters)
            found = [
                {int(chunk_id): float(score) for chunk_id, score in zip(*row, strict=True) if chunk_id >= 0}
                for row in zip(ids, scores, strict=True)
            ]
            hits = [sql.hits(connection, self._database.path, best, condition) for best in found]
        return hits, k >= size

    def _refresh(self, connection: sqlite3.Connection) -> None:
        generation, dimension = sql.read_meta_int(connection, sql.GENERATION), sql.dimension(connection)
        if not self._looked_at_file:
            self._looked_at_file = True
            self._load(connection, generation)
        if dimension is None:
            self._index = None
        elif self._index is None or self._index.d != dimension or generation < self._generation:
            self._index = self._fresh(connection, dimension)
        elif generation > self._generation:
            self._update(connection, dimension)
        self._generation = generation

    def _load(self, connection: sqlite3.Connection, generation: int) -> None:
        stamp = sql.read_meta(connection, sql.INDEX_STAMP)
        if stamp is None and not self._path.exists():
            return  # never saved so far
        try:
            index, facts = read_index(self._path)
            if facts.stamp != stamp or facts.generation > generation:
                raise DamagedIndexError("it belongs to another state of the store")
        except (OSError, DamagedIndexError) as error:
            why = "it is missing" if isinstance(error, FileNotFoundError) else str(error)
            logger.warning("The index %s is rebuilt from the database: %s.", self._path, why)
            return
        self._index, self._generation, self._saved_generation = index, facts.generation, facts.generation

    def _fresh(self, connection: sqlite3.Connection, dimension: int) -> Any:
        faiss = import_faiss()
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))
        self._saved_generation = -1
        for ids, rows in self._vectors_after(connection, 0, dimension):
            index.add_with_ids(rows, ids)
        return index

    def _update(self, connection: sqlite3.Connection, dimension: int) -> None:
        """Take in vectors that were added and removed since the index's generation."""
        import numpy as np

        present = np.sort(self._ids())
        try:
            if sql.read_meta_int(connection, sql.REMOVALS) > self._generation:
                live = connection.execute("SELECT chunk_id FROM chunks WHERE vector_generation IS NOT NULL")
                self._remove(np.setdiff1d(present, np.fromiter((row[0] for row in live), dtype=np.int64)))
            for ids, rows in self._vectors_after(connection, self._generation, dimension):
                places = np.searchsorted(present, ids)
                known = places < len(present)
                known[known] = present[places[known]] == ids[known]
                self._remove(ids[known])  # embedded again
                self._index.add_with_ids(rows, ids)
                self._unsaved += len(ids)
        except BaseException:
            self._index = None  # half done: rebuild it next time
            raise

    def _remove(self, ids: NDArray[np.int64]) -> None:
        if len(ids):
            self._index.remove_ids(import_faiss().IDSelectorBatch(ids))
            self._unsaved += len(ids)

    def _vectors_after(
        self, connection: sqlite3.Connection, generation: int, dimension: int
    ) -> Iterator[tuple[NDArray[np.int64], Vector]]:
        import numpy as np

        cursor = connection.execute(
            "SELECT chunk_id, embedding FROM chunks WHERE vector_generation > ? ORDER BY chunk_id", (generation,)
        )
        while rows := cursor.fetchmany(_ROWS):
            yield (
                np.array([row[0] for row in rows], dtype=np.int64),
                sql.from_blobs((row[1] for row in rows), dimension, self._database.path),
            )

    def _ids(self) -> NDArray[np.int64]:
        import numpy as np

        if self._index is None:
            return np.empty(0, dtype=np.int64)
        ids: NDArray[np.int64] = import_faiss().vector_to_array(self._index.id_map)
        return ids


@dataclass(frozen=True, slots=True)
class IndexFacts:
    """The facts in an index file's trailer.

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
    """The file cannot be used, for the reason in the message. Always caught in the store: the index is rebuilt."""


def write_index(path: Path, index: Any, facts: IndexFacts) -> None:
    """Replace the file in one step.

    Raises:
        OSError: It could not be written; the old file is unchanged.
    """
    faiss = import_faiss()
    checksum, temporary = xxhash.xxh3_128(), path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:

            def write(piece: bytes) -> None:
                checksum.update(piece)
                file.write(piece)

            # In pieces: serialize_index() would copy the whole index in memory.
            faiss.write_index(index, faiss.PyCallbackIOWriter(write, _PIECE))
            trailer = json.dumps({**asdict(facts), "checksum": checksum.hexdigest()}).encode()
            for piece in (trailer, len(trailer).to_bytes(8, "little"), _MAGIC):
                file.write(piece)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def read_index(path: Path) -> tuple[Any, IndexFacts]:
    """The index and the facts in its trailer.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedIndexError: It is damaged or incomplete.
    """
    with path.open("rb") as file:
        size, end = path.stat().st_size, len(_MAGIC) + 8
        if size < end:
            raise DamagedIndexError("it is too short")
        file.seek(size - end)
        length, magic = int.from_bytes(file.read(8), "little"), file.read()
        if magic != _MAGIC:
            raise DamagedIndexError("its end is missing")
        if length > size - end:
            raise DamagedIndexError("its trailer is damaged")
        file.seek(size - end - length)
        try:
            raw = json.loads(file.read(length))
            checksum = raw.pop("checksum")
            facts = IndexFacts(**raw)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DamagedIndexError("its trailer is damaged") from None
        if _checksum(file, size - end - length) != checksum:
            raise DamagedIndexError("its checksum is wrong")
        faiss = import_faiss()
        file.seek(0)
        try:  # in pieces: deserialize_index() would copy the whole index in memory
            index = faiss.read_index(faiss.PyCallbackIOReader(file.read, _PIECE))
        except RuntimeError as error:  # written by another version of FAISS
            raise DamagedIndexError(f"FAISS cannot read it: {error}") from None
    if not isinstance(index, faiss.IndexIDMap2) or (index.d, index.ntotal) != (facts.dimension, facts.count):
        raise DamagedIndexError("it is not an index of this store")
    return index, facts


def _checksum(file: BinaryIO, size: int) -> str:
    """Of the first `size` bytes."""
    file.seek(0)
    checksum = xxhash.xxh3_128()
    while piece := file.read(min(_PIECE, size)):
        checksum.update(piece)
        size -= len(piece)
    return checksum.hexdigest()


def import_faiss() -> Any:
    """The module faiss, which needs numpy.

    Raises:
        OptionalDependencyError: One of them is not installed.
    """
    # Its SWIG wrapper warns about itself on import with some versions of Python; nothing here can change that.
    with _import_lock, warnings.catch_warnings(), needs("store"):
        warnings.simplefilter("ignore", DeprecationWarning)
        import faiss
        import numpy as np  # noqa: F401
    return faiss


@contextmanager
def few_threads(work: int) -> Iterator[None]:
    """Run a small search on one thread.

    OpenMP's threads wait for each other by spinning. On a machine whose cores are busy that makes a search of 0.7 ms
    last 36 ms.

    Args:
        work: Multiplications of the search: queries by vectors by dimension.
    """
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    if work >= _SMALL or before == 1:
        yield
        return
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
