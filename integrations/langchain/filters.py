"""Metadata filters: equality, lists of wanted values, Mongo-like operators, or a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from langchain_core.documents import Document

from lmcache_rag.errors import ConfigError

Filter: TypeAlias = Mapping[str, Any] | Callable[[Document], bool]

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda have, want: have == want,
    "$ne": lambda have, want: have != want,
    "$in": lambda have, want: have in want,
    "$nin": lambda have, want: have not in want,
    "$gt": lambda have, want: have > want,
    "$gte": lambda have, want: have >= want,
    "$lt": lambda have, want: have < want,
    "$lte": lambda have, want: have <= want,
}


def as_function(wanted: Filter) -> Callable[[Document], bool]:
    """A filter as a function of a document.

    Args:
        wanted: A function; or names with a value, a list of values (any of them), or operators such as
            ``{"year": {"$gte": 2020}}``; ``$and`` and ``$or`` take lists of such.

    Raises:
        ConfigError: An operator is unknown.
    """
    if callable(wanted):
        return wanted
    parts = [_condition(name, value) for name, value in wanted.items()]
    return lambda document: all(part(document) for part in parts)


def _condition(name: str, value: Any) -> Callable[[Document], bool]:
    if name in ("$and", "$or"):
        parts = [as_function(part) for part in value]
        combine = all if name == "$and" else any
        return lambda document: combine(part(document) for part in parts)
    if not isinstance(value, Mapping):
        wanted = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
        return lambda document: name in document.metadata and document.metadata[name] in wanted
    if unknown := set(value) - set(_OPERATORS):
        raise ConfigError(
            f"The filter on {name!r} has the operator {sorted(unknown)[0]!r}.",
            remedy=f"Use one of {', '.join(_OPERATORS)}, or give a function of a Document as filter.",
        )
    tests = [(_OPERATORS[operator], want) for operator, want in value.items()]
    return lambda document: all(_holds(test, document.metadata.get(name), want) for test, want in tests)


def _holds(test: Callable[[Any, Any], bool], have: Any, want: Any) -> bool:
    try:
        return test(have, want)
    except TypeError:  # a value that cannot be compared, or none at all, does not fulfil the filter
        return False
