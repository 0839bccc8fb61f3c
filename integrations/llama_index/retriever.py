"""A LlamaIndex retriever over our store, or over any index or retriever of LlamaIndex."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.core.indices.base import BaseIndex
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from lmcache_rag.errors import ConfigError

if TYPE_CHECKING:
    from lmcache_rag.rag import RAG
    from lmcache_rag.store import Hit


class LMCacheRetriever(BaseRetriever):
    """Gives the passages that are nearest to the question, best first, as they stand in the store.

    Args:
        source: Where they come from: a RAG, an index (then `options` are for its as_retriever), or a retriever.
        similarity_top_k: How many passages; None: the source's own number. Of a retriever's it takes the first.
        callback_manager: Hears of each retrieval.
        options: For the index's retriever, for example filters or vector_store_query_mode.

    Raises:
        ConfigError: The source is something else, or options were given for one that takes none.
    """

    def __init__(
        self,
        source: RAG | BaseIndex[Any] | BaseRetriever,
        *,
        similarity_top_k: int | None = None,
        callback_manager: Any = None,
        **options: Any,
    ) -> None:
        if similarity_top_k is not None and similarity_top_k < 1:
            raise ConfigError(f"similarity_top_k must be at least 1; got {similarity_top_k}.")
        super().__init__(callback_manager=callback_manager)
        self._top_k = similarity_top_k
        self._rag: RAG | None = None
        self._inner: BaseRetriever
        if isinstance(source, BaseIndex):
            count = {} if similarity_top_k is None else {"similarity_top_k": similarity_top_k}
            self._inner = source.as_retriever(**count, **options)
            return
        if options:
            raise ConfigError(f"{', '.join(options)}: only an index takes these.", remedy="Set them on the retriever.")
        if isinstance(source, BaseRetriever):
            self._inner = source
        elif hasattr(source, "retrieve") and hasattr(source, "aretrieve"):
            self._rag = source
        else:
            raise ConfigError(
                f"{type(source).__name__} retrieves nothing.", remedy="Give a RAG, an index or a retriever."
            )

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if self._rag is not None:
            return [_node(hit) for hit in self._rag.retrieve(query_bundle.query_str, top_k=self._top_k)]
        return list(self._inner.retrieve(query_bundle))[: self._top_k]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if self._rag is not None:
            return [_node(hit) for hit in await self._rag.aretrieve(query_bundle.query_str, top_k=self._top_k)]
        return list(await self._inner.aretrieve(query_bundle))[: self._top_k]


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
