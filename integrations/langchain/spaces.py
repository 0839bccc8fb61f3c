"""The names under which the registry keeps the texts of several stores of one workspace apart."""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from pathlib import Path
from typing import Any

from lmcache_rag.errors import ConfigError
from lmcache_rag.settings import Settings
from lmcache_rag.workspace import Workspace

log = logging.getLogger("lmcache_rag")

_COLLECTIONS = ("_collection_name", "collection_name", "index_name", "_index_name", "table_name")
_lock = threading.Lock()
# By (registry's folder, name): the store that has the name, as long as its wrapper is there.
_taken: weakref.WeakValueDictionary[tuple[str, str], Any] = weakref.WeakValueDictionary()


def space_of(wrapper: Any, inner: Any, source: Any, folder: str | Path | None, kind: str = "") -> str:
    """Return a name for a store that is the same after a restart: its kind and its collection.

    A store without a collection's name shares it with others of its kind. While the first of them is in use, the second
    gets another name, and a warning says that `space` should be given: after a restart the order could be different.

    Args:
        wrapper: What keeps the store's KV. Has the wrapped store as `inner`.
        inner: The wrapped store.
        source: A workspace, or what has one.
        folder: Folder of the registry; None: the workspace's, or from the settings.
        kind: Stands before the name.
    """
    for attribute in _COLLECTIONS:
        value = getattr(getattr(inner, "_PGVectorStore__vs", inner), attribute, None)  # pgvector's tables, made async
        if isinstance(value, str) and value:
            return f"{kind}{type(inner).__name__}:{value}"
    settings = source.settings if isinstance(source, Workspace) else Settings.load(folder)
    place, base = str(settings.store.resolve()), f"{kind}{type(inner).__name__}"
    with _lock:
        for number in itertools.count(1):
            name = base if number == 1 else f"{base}#{number}"
            holder = _taken.get((place, name))
            if holder is None or _same(holder.inner, inner):
                _taken[place, name] = wrapper
                break
    if number > 1:
        log.warning(
            "There are %d stores of the kind %s without a name in one workspace; this one is registered as %r. Give "
            "each a name, space=..., so that it is the same after a restart.",
            number,
            type(inner).__name__,
            name,
        )
    return name


def _same(one: Any, other: Any) -> bool:
    """Return whether two objects are one store: the same object, or the same folder of our own."""
    if one is other:
        return True
    paths = [getattr(getattr(each, "store", None), "path", None) for each in (one, other)]
    return paths[0] is not None and paths[0] == paths[1]


def refuse_pickling(what: Any) -> ConfigError:
    """Return the error for an object that was to be pickled or copied to another process."""
    return ConfigError(
        f"{type(what).__name__} cannot be pickled: it holds the engine and the registry.",
        remedy="Make one in each process.",
    )
