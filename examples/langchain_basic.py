"""LangChain over the embedded engine: split, store, ask, stream. Runs from a checkout with no arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.runnables import RunnablePassthrough
from langchain_text_splitters import RecursiveCharacterTextSplitter
from lmcache_rag.integrations.langchain import LMCacheVectorStore, blend

from lmcache_rag import Workspace

DATA = Path(__file__).parent / "data"
QUESTION = "What did Dalton propose about atoms?"


def main(store: str = "langchain-example-store", **settings: Any) -> dict[str, Any]:
    """Ask one question; returns what was reused."""
    with Workspace.open(store, **{"max_tokens": 48, **settings}) as workspace:
        files = [Document(path.read_text(), metadata={"source": path.name}) for path in sorted(DATA.rglob("*.txt"))]
        splitter = RecursiveCharacterTextSplitter(chunk_size=900, chunk_overlap=0)
        chunks = splitter.split_documents(files)
        vectors = LMCacheVectorStore(None, workspace)  # our own FAISS; any other vector store goes here too
        vectors.add_documents(chunks, ids=[str(number) for number in range(len(chunks))])  # KV is computed once

        retriever = vectors.as_retriever(search_kwargs={"k": 4})
        chain: Any = {"documents": retriever, "question": RunnablePassthrough()} | blend(workspace)
        print(QUESTION)
        facts: dict[str, Any] = {}
        for piece in chain.stream(QUESTION):
            print(piece.text, end="", flush=True)
            facts.update(piece.response_metadata.get("lmcache_rag", {}))
        print(f"\n\n{facts['reused_tokens']} of {facts['prompt_tokens']} prompt tokens came from cached chunks.")
        return facts


if __name__ == "__main__":
    main()
