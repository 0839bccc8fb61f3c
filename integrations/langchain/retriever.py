"""A LangChain retriever over the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from lmcache_rag.rag import RAG

if TYPE_CHECKING:
    from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun

    from lmcache_rag.store import Hit


class LMCacheRetriever(BaseRetriever):
    """Gives the store's chunks that are nearest to the question, best first.

    Attributes:
        rag: Retrieves.
        k: How many chunks; None: the RAG's own number. ``invoke(question, k=3)`` overrides it.
    """

    rag: RAG
    k: int | None = None

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None, **kwargs: Any
    ) -> list[Document]:
        return [_document(hit) for hit in self.rag.retrieve(query, top_k=k or self.k)]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None, **kwargs: Any
    ) -> list[Document]:
        return [_document(hit) for hit in await self.rag.aretrieve(query, top_k=k or self.k)]


def _document(hit: Hit) -> Document:
    """The chunk's text unchanged, so that its KV is found; where it stands is metadata."""
    first = hit.documents[0] if hit.documents else None
    metadata = {**(first.metadata if first else {}), "source": first.source if first else "", "score": hit.score}
    return Document(id=str(hit.chunk_id), page_content=hit.text, metadata=metadata)
