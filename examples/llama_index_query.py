"""A LlamaIndex query engine over the embedded engine: split, store, ask. Runs from a checkout with no arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.node_parser import SentenceSplitter
from lmcache_rag.integrations.llama_index import EmbedderEmbedding, LMCacheVectorStore, as_blend_query_engine

from lmcache_rag import Workspace

DATA = Path(__file__).parent / "data" / "documents"
QUESTION = "What did Dalton propose about atoms?"


def main(store: str = "llama-index-example-store", embed_model: Any = None, **settings: Any) -> dict[str, Any]:
    """Ask one question; returns what was reused."""
    with Workspace.open(store, **{"max_tokens": 48, **settings}) as workspace:
        embed_model = embed_model or EmbedderEmbedding(workspace.embedder)
        vector_store = LMCacheVectorStore(None, workspace)  # our own FAISS; any other vector store goes here too
        vector_store.clear()  # an example: every run begins anew
        documents = [
            Document(text=path.read_text(), id_=path.name, metadata={"source": path.name})
            for path in sorted(DATA.glob("*.txt"))
        ]
        index = VectorStoreIndex.from_documents(  # KV is computed here, once
            documents,
            storage_context=StorageContext.from_defaults(vector_store=vector_store),
            transformations=[SentenceSplitter(chunk_size=256, chunk_overlap=0)],
            embed_model=embed_model,
        )
        query_engine = as_blend_query_engine(index, workspace, similarity_top_k=4)
        response = query_engine.query(QUESTION)
        print(QUESTION, "→", response)
        print("   from", *sorted({source.metadata["source"] for source in response.source_nodes}))
        facts: dict[str, Any] = response.metadata["lmcache_rag"]["stats"]
        print(f"{facts['reused_tokens']} of {facts['prompt_tokens']} prompt tokens came from cached chunks.")
        return facts


if __name__ == "__main__":
    main()
