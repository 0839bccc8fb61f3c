"""A LangChain retriever over any retriever, any vector store, or our own store."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self

from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, LangSmithRetrieverParams
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.vectorstores import VectorStore, VectorStoreRetriever
from pydantic import Field, model_validator

from lmcache_rag.errors import ConfigError
from lmcache_rag.rag import RAG

from .retrieved import RETRIEVED

if TYPE_CHECKING:
    from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun

    from lmcache_rag.store import Hit


class LMCacheRetriever(BaseRetriever):
    """Returns unchanged chunks, best first: each Document is the one that the source returned.

    Give one of `rag`, `retriever` and `vectorstore`. Keywords of a call (``filter``, ``score_threshold``, …) pass
    through to a retriever or vector store.

    Attributes:
        rag: Our own store.
        retriever: Any retriever.
        vectorstore: Any vector store, searched by `search_type` with `search_kwargs`.
        k: How many chunks; None: as many as the source returns. ``invoke(question, k=3)`` overrides it.
        search_type: "similarity", "similarity_score_threshold" or "mmr".
        search_kwargs: For the search, for example ``{"filter": {"year": 2024}}``.
    """

    rag: RAG | None = None
    retriever: Runnable[str, list[Document]] | None = None
    vectorstore: VectorStore | None = None
    k: int | None = None
    search_type: str = "similarity"
    search_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.rag, self.retriever, self.vectorstore)) != 1:
            raise ConfigError("A retriever has one source.", remedy="Give rag=…, retriever=… or vectorstore=….")
        if self.vectorstore is not None:
            self._searching(self.vectorstore)  # checks the search type
        return self

    # **kwargs must be declared: without it LangChain drops the keywords of a call.
    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None, **kwargs: Any
    ) -> list[Document]:
        k = self._checked(k)
        if self.rag is not None:
            return _noted([_document(hit) for hit in self.rag.retrieve(query, top_k=k)])
        source, kwargs = self._source(k, kwargs)
        return _noted(source.invoke(query, RunnableConfig(callbacks=run_manager.get_child()), **kwargs)[:k])

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None, **kwargs: Any
    ) -> list[Document]:
        k = self._checked(k)
        if self.rag is not None:
            return _noted([_document(hit) for hit in await self.rag.aretrieve(query, top_k=k)])
        source, kwargs = self._source(k, kwargs)
        if kwargs and _drops_keywords(source):
            config = RunnableConfig(callbacks=run_manager.get_sync().get_child())
            return _noted((await asyncio.to_thread(source.invoke, query, config, **kwargs))[:k])
        return _noted((await source.ainvoke(query, RunnableConfig(callbacks=run_manager.get_child()), **kwargs))[:k])

    def _get_ls_params(self, **kwargs: Any) -> LangSmithRetrieverParams:
        params = super()._get_ls_params(**kwargs)
        store = self.vectorstore or getattr(self.retriever, "vectorstore", None)
        if store is not None:
            params["ls_vector_store_provider"] = type(getattr(store, "inner", store)).__name__
            if getattr(store, "embeddings", None) is not None:
                params["ls_embedding_provider"] = type(store.embeddings).__name__
        elif self.rag is not None:
            params["ls_vector_store_provider"] = "lmcache_rag"
            params["ls_embedding_model"] = self.rag.embedder.name
        return params

    def _checked(self, k: int | None) -> int | None:
        k = self.k if k is None else k
        if k is not None and k < 1:
            raise ConfigError(f"k must be at least 1; got {k}.")
        return k

    def _source(self, k: int | None, kwargs: dict[str, Any]) -> tuple[Runnable[str, list[Document]], dict[str, Any]]:
        """Return the retriever to call, and its keywords."""
        source = self._searching(self.vectorstore) if self.vectorstore is not None else self.retriever
        assert source is not None  # noqa: S101 - the validator has checked it
        if k is not None and isinstance(source, BaseRetriever):  # other Runnables may not take it
            kwargs = {**kwargs, "k": k}
        return source, kwargs

    def _searching(self, vectorstore: VectorStore) -> Runnable[str, list[Document]]:
        return VectorStoreRetriever(
            vectorstore=vectorstore, search_type=self.search_type, search_kwargs=self.search_kwargs
        )


def _drops_keywords(source: Runnable[str, list[Document]]) -> bool:
    """Return whether a retriever does not define an async method: LangChain's default one rejects keywords."""
    return (
        isinstance(source, BaseRetriever)
        and source._expects_other_args
        and type(source)._aget_relevant_documents is BaseRetriever._aget_relevant_documents
    )


def _noted(documents: list[Document]) -> list[Document]:
    RETRIEVED.note(documents)
    return documents


def _document(hit: Hit) -> Document:
    """Convert a hit. The text stays unchanged, so that its KV is found; the source goes into the metadata."""
    first = hit.documents[0] if hit.documents else None
    metadata = {**(first.metadata if first else {}), "source": first.source if first else "", "score": hit.score}
    return Document(id=str(hit.chunk_id), page_content=hit.text, metadata=metadata)
