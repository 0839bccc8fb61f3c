"""FAISS, imported when it is first needed and kept from waking threads for nothing."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SMALL = 1 << 28  # multiplications, about 50 ms of one core
_import_lock = threading.Lock()


def import_faiss() -> Any:
    """The module faiss."""
    # Its SWIG wrapper warns about itself on import with some versions of Python; nothing here can change that.
    with _import_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import faiss
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
