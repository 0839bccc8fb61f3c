"""Whether a node's metadata fulfils filters, nested ones too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_index.core.vector_stores.types import FilterCondition, MetadataFilter, MetadataFilters
from llama_index.core.vector_stores.utils import build_metadata_filter_fn


def fulfils(metadata: Mapping[str, Any], filters: MetadataFilters | None) -> bool:
    """Whether it does; no filters are always fulfilled.

    A single filter means what LlamaIndex's own in-memory store makes of it; a value that cannot be compared does not
    fulfil it.
    """
    if filters is None or not filters.filters:
        return True
    matches = (_matches(metadata, part) for part in filters.filters)
    if filters.condition == FilterCondition.OR:
        return any(matches)
    if filters.condition == FilterCondition.NOT:
        return not any(matches)
    return all(matches)


def _matches(metadata: Mapping[str, Any], part: MetadataFilter | MetadataFilters) -> bool:
    if isinstance(part, MetadataFilters):
        return fulfils(metadata, part)
    try:
        return build_metadata_filter_fn(lambda _: metadata, MetadataFilters(filters=[part]))("")
    except TypeError:  # such as a text against a number
        return False
