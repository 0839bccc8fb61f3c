"""Lists the nodes of LlamaIndex's vector stores, page by page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llama_index.core.schema import BaseNode, TextNode
from llama_index.core.vector_stores.types import BasePydanticVectorStore, MetadataFilters
from llama_index.core.vector_stores.utils import metadata_dict_to_node

from lmcache_rag.errors import ConfigError

from ..listing import Row, listing_of
from .faiss_store import FaissVectorStore

_REFUSALS = (NotImplementedError, AssertionError, TypeError, ValueError)  # by stores that need ids or filters


@dataclass(frozen=True, slots=True)
class NodeListing:
    """How the nodes of one vector store are listed.

    Attributes:
        pages: Returns its nodes, so many at a time.
        count: Returns how many nodes it holds; None: only listing them all would show it.
    """

    pages: Callable[[int], Iterator[list[BaseNode]]]
    count: Callable[[], int] | None = None


def nodes_of(store: BasePydanticVectorStore) -> NodeListing | None:
    """Return the listing of a vector store's nodes; None: it cannot list them, or keeps no texts.

    Chroma, Qdrant, Milvus and pgvector are read page by page. Of other stores, get_nodes() has to return all nodes.
    """
    if not store.stores_text:
        return None
    if isinstance(store, FaissVectorStore):
        return NodeListing(lambda size: _paged(store.get_nodes(), size), lambda: len(store.ids()))
    if (rows := listing_of(store)) is not None:
        return NodeListing(lambda size: ([_node(row) for row in page] for page in rows.pages(size)), rows.count)
    if type(store).get_nodes is BasePydanticVectorStore.get_nodes:
        return None
    return NodeListing(lambda size: _paged(get_nodes(store), size))


def get_nodes(
    store: BasePydanticVectorStore, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
) -> list[BaseNode]:
    """Return nodes of a store by id, by filters, or all.

    Raises:
        ConfigError: It cannot do that.
    """
    limit = {}
    if filters is not None and type(store).__module__.startswith("llama_index.vector_stores.qdrant"):
        rows = listing_of(store)  # it returns 9999 nodes, unless it is asked for more
        limit = {} if rows is None else {"limit": max(1, rows.count())}
    try:
        return store.get_nodes(node_ids, filters, **limit)
    except _REFUSALS as problem:
        raise ConfigError(
            f"{store.class_name()} cannot list its nodes: {problem or type(problem).__name__}.",
            remedy="Give the ids of the nodes, or the nodes.",
        ) from problem


def _paged(nodes: list[BaseNode], size: int) -> Iterator[list[BaseNode]]:
    return (nodes[start : start + size] for start in range(0, len(nodes), size))


def _node(row: Row) -> BaseNode:
    """Return the node of a row. A row that no LlamaIndex wrote has none: then its text is one."""
    if "_node_content" not in row.payload:
        return TextNode(id_=row.id, text=row.text)
    return metadata_dict_to_node(dict(row.payload), text=row.text or None)
