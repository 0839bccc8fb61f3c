"""The store on disk: documents, chunks, embeddings and KV records in SQLite, search with FAISS.

::

    store/
      store.db       SQLite: the source of truth, embeddings included
      index.faiss    built from it, saved to start faster; may be deleted
      kv/            the engine's files
      lock           held by the process that writes
"""

from lmcache_rag.store.index import VectorIndex, Where
from lmcache_rag.store.registry import Registry
from lmcache_rag.store.store import Store
from lmcache_rag.store.types import (
    DocumentRecord,
    DocumentRef,
    FingerprintStats,
    Hit,
    KVPurge,
    KVRow,
    NewChunk,
    NewDocument,
    PutResult,
    RemoveResult,
    StoredChunk,
    StoreStats,
    TrashRow,
    Vector,
    text_hash,
)

__all__ = [
    "DocumentRecord",
    "DocumentRef",
    "FingerprintStats",
    "Hit",
    "KVPurge",
    "KVRow",
    "NewChunk",
    "NewDocument",
    "PutResult",
    "Registry",
    "RemoveResult",
    "Store",
    "StoreStats",
    "StoredChunk",
    "TrashRow",
    "Vector",
    "VectorIndex",
    "Where",
    "text_hash",
]
