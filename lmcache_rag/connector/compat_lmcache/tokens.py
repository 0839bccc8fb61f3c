"""How LMCache's calls take token ids: a list until 0.5.6, packed in bytes (big-endian, 32 bits each) from 0.5.7 on."""

from __future__ import annotations

import dataclasses
import functools
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmcache_rag.connector.cache_salt import as_numbers

# Of LMCache's keys: the second name is 0.5.6's.
_FIELDS = ("token_bytes", "token_ids")


def to_lmcache(token_ids: Any) -> Any:
    """Token ids, or an array of them, as LMCache's adapters take them."""
    known = isinstance(token_ids, np.ndarray)
    if not _packed():
        return token_ids.tolist() if known else list(token_ids)
    return (token_ids if known else as_numbers(token_ids)).astype(">u4").tobytes()


def from_lmcache(tokens: Any) -> Sequence[int]:
    """Token ids that LMCache's connector gave to its adapter, or that we did."""
    if not isinstance(tokens, bytes):
        ids: Sequence[int] = tokens
        return ids
    return array("I", np.frombuffer(tokens, ">u4").astype("=u4").tobytes())


def without_tokens(key: Any) -> Any:
    """The key with no tokens in it."""
    name = next(name for name in _FIELDS if hasattr(key, name))
    return dataclasses.replace(key, **{name: type(getattr(key, name))()}, end=0)


@functools.cache
def _packed() -> bool:
    from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey

    return _FIELDS[0] in IPCCacheServerKey.__dataclass_fields__
