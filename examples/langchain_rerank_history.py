"""LangChain with a reranker and a conversation: passages change places, earlier turns come after them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.runnables import RunnablePassthrough
from langchain_text_splitters import RecursiveCharacterTextSplitter
from lmcache_rag.integrations.langchain import LMCacheVectorStore, blend

from lmcache_rag import Workspace

DATA = Path(__file__).parent / "data"
QUESTIONS = ["What did Dalton propose about atoms?", "And what did Thomson find in them?"]


def words(text: str) -> set[str]:
    """The words of a text."""
    return set(re.findall(r"\w{4,}", text.lower()))


def rerank(values: dict[str, Any], keep: int = 3) -> list[Document]:
    """The documents that share most words with the question; a cross-encoder can be used instead."""
    asked = words(values["question"])
    return sorted(values["found"], key=lambda document: -len(asked & words(document.page_content)))[:keep]


def main(store: str = "langchain-example-store", **settings: Any) -> list[dict[str, Any]]:
    """Two questions of one conversation; returns what was reused for each."""
    with Workspace.open(store, **{"max_tokens": 48, **settings}) as workspace:
        vectors = LMCacheVectorStore(None, workspace)
        files = [Document(path.read_text(), metadata={"source": path.name}) for path in sorted(DATA.rglob("*.txt"))]
        chunks = RecursiveCharacterTextSplitter(chunk_size=900, chunk_overlap=0).split_documents(files)
        vectors.add_documents(chunks, ids=[str(number) for number in range(len(chunks))])

        find = (lambda values: values["question"]) | vectors.as_retriever(search_kwargs={"k": 8})
        chain: Any = RunnablePassthrough.assign(found=find).assign(documents=rerank) | blend(workspace)
        history: list[BaseMessage] = []
        facts = []
        for question in QUESTIONS:
            answer = chain.invoke({"question": question, "history": history})
            facts.append(answer.response_metadata["lmcache_rag"])
            print(f"{question}\n{answer.text}\n({facts[-1]['reused_tokens']} tokens reused)\n")
            history += [HumanMessage(question), AIMessage(answer.text)]
        return facts


if __name__ == "__main__":
    main()
