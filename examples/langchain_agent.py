"""A LangGraph loop with a retriever tool: search, answer, check whether the answer fits, else search again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from langchain_core.documents import Document
from langchain_core.tools import create_retriever_tool
from langchain_text_splitters import RecursiveCharacterTextSplitter
from langgraph.graph import END, START, StateGraph
from lmcache_rag.integrations.langchain import LMCacheVectorStore, blend

from lmcache_rag import Workspace

DATA = Path(__file__).parent / "data"


class State(TypedDict, total=False):
    """State of the graph; `queries` are those still to be searched."""

    question: str
    queries: list[str]
    documents: list[Document]
    answer: Any


def main(store: str = "langchain-example-store", **settings: Any) -> State:
    """One question, searched for until the answer fits; returns the last state."""
    with Workspace.open(store, **{"max_tokens": 48, **settings}) as workspace:
        vectors = LMCacheVectorStore(None, workspace)
        splitter = RecursiveCharacterTextSplitter(chunk_size=900, chunk_overlap=0)
        chunks = splitter.split_documents([Document(path.read_text()) for path in sorted(DATA.rglob("*.txt"))])
        vectors.add_documents(chunks, ids=[str(number) for number in range(len(chunks))])
        retriever, kind = vectors.as_retriever(search_kwargs={"k": 3}), "content_and_artifact"
        tool: Any = create_retriever_tool(retriever, "search", "Finds passages.", response_format=kind)
        step: Any = blend(workspace)

        def search(state: State) -> State:
            call = {"name": "search", "args": {"query": state["queries"][0]}, "id": "1", "type": "tool_call"}
            new = tool.invoke(call).artifact  # the documents as they are: joined into a text, no KV is found
            known = {document.id: document for document in [*state.get("documents", []), *new]}
            return {"documents": list(known.values()), "queries": state["queries"][1:]}

        def again(state: State) -> str:
            return "search" if state["queries"] and "ENIAC" not in state["answer"].text else END

        graph: Any = StateGraph(State)
        graph.add_node("search", search).add_node("reply", lambda state: {"answer": step.invoke(state)})
        graph.add_edge(START, "search").add_edge("search", "reply").add_conditional_edges("reply", again)
        question = "Which computer was the first of its kind?"
        state: State = graph.compile().invoke({"question": question, "queries": [question, "ENIAC computer"]})
        facts = state["answer"].response_metadata["lmcache_rag"]
        print(f"{question} {state['answer'].text}\n{facts['reused_tokens']} tokens came from cached chunks.")
        return state


if __name__ == "__main__":
    main()
