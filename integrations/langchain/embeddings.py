"""This library's embedder as LangChain's embeddings."""

from __future__ import annotations

from langchain_core.embeddings import Embeddings

from lmcache_rag.embedding import Embedder


class EmbedderEmbeddings(Embeddings):
    """What a vector store uses where the program gives no embeddings of its own.

    Args:
        embedder: A workspace's embedder.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of texts that will be searched."""
        return [[float(x) for x in row] for row in self.embedder.embed_documents(texts)]

    def embed_query(self, text: str) -> list[float]:
        """Vector of a question."""
        return [float(x) for x in self.embedder.embed_query(text)]
