"""What the tests of the store share: documents with vectors that follow from the text alone."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache_rag.errors import StoreError
from lmcache_rag.store import KVRow, NewChunk, NewDocument, PutResult, Store, Vector

DIMENSION = 16
EMBEDDER = "model-a"
FP = "f" * 64


def vector(text: str, seed: str = "") -> Vector:
    """A unit vector of its own for every text."""
    digest = hashlib.sha256((seed + text).encode("utf-8", "surrogatepass")).digest()
    row = np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal(DIMENSION)
    return (row / np.linalg.norm(row)).astype(np.float32)


def chunks(texts: Sequence[str]) -> list[NewChunk]:
    starts = np.cumsum([0, *(len(text) for text in texts)])
    return [
        NewChunk(text, len(text.split()), int(start), vector(text)) for text, start in zip(texts, starts, strict=False)
    ]


def document(doc_id: str, *texts: str, **metadata: Any) -> NewDocument:
    """A document whose content hash follows from its texts."""
    name = hashlib.sha256(repr(texts).encode()).hexdigest()
    return NewDocument(doc_id, name, "splitter-1", f"/docs/{doc_id}", chunks(texts), metadata)


def put(store: Store, doc_id: str, *texts: str, **metadata: Any) -> PutResult:
    return store.registry.put_documents([document(doc_id, *texts, **metadata)], embedder=EMBEDDER)[0]


def texts_of(store: Store) -> set[str]:
    return {chunk.text for chunk in store.registry.chunks()}


def found(store: Store, text: str, k: int = 1) -> list[str]:
    return [hit.text for hit in store.index.search(vector(text), k)]


def refuses_every_write(store: Store, error: type[StoreError], says: str) -> None:
    """Every method that writes raises error, and the store holds what it held."""
    registry, before = store.registry, store.registry.stats()
    for write in (
        lambda: put(store, "z", "new"),
        lambda: registry.remove_documents(["a"]),
        lambda: registry.record_kv(FP, {}, [KVRow(1, "k", 1, 1)]),
        lambda: registry.forget_kv(FP),
        lambda: registry.trash_other_kv(FP),
        lambda: registry.clear_trash([(FP, "k")]),
        lambda: registry.set_meta("x", "y"),
        lambda: registry.claim_embedder("b"),
        lambda: registry.change_embedder("b"),
        lambda: registry.set_embeddings({}, embedder=EMBEDDER),
        lambda: store.writing().__enter__(),
    ):
        with pytest.raises(error, match=says) as caught:
            write()
        assert type(caught.value) is error
        assert caught.value.remedy
    assert registry.stats() == before


def child(code: str, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Run code in a new interpreter that can import this package and this module, with pipes for its streams."""
    paths = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
    return subprocess.Popen(
        [sys.executable, "-c", paths + code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen[str], timeout: float = 60) -> str:
    """What the process wrote on stdout; its failure is ours."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out
