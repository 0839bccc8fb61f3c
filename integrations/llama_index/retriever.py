"""A LlamaIndex retriever over the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

if TYPE_CHECKING:
    from lmcache_rag.rag import RAG
    from lmcache_rag.store import Hit


class LMCacheRetriever(BaseRetriever):
    """Gives the store's chunks that are nearest to the question, best first.

    Args:
        rag: Retrieves.
        similarity_top_k: How many chunks; None: the RAG's own number.
        kwargs: For BaseRetriever, for example callback_manager.
    """

    def __init__(self, rag: RAG, *, similarity_top_k: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rag = rag
        self._top_k = similarity_top_k

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [_node(hit) for hit in self._rag.retrieve(query_bundle.query_str, top_k=self._top_k)]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [_node(hit) for hit in await self._rag.aretrieve(query_bundle.query_str, top_k=self._top_k)]


def _node(hit: Hit) -> NodeWithScore:
    """The chunk's text unchanged, so that its KV is found; metadata stays out of what the model reads."""
    first = hit.documents[0] if hit.documents else None
    metadata = {**(first.metadata if first else {}), "source": first.source if first else ""}
    node = TextNode(
        id_=str(hit.chunk_id),
        text=hit.text,
        metadata=metadata,
        excluded_llm_metadata_keys=list(metadata),
        excluded_embed_metadata_keys=list(metadata),
    )
    return NodeWithScore(node=node, score=hit.score)
