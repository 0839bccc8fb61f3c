"""The RAG programs of LangChain's and LangGraph's tutorials, converted; prints what each reused.

    lmcache-rag serve Qwen/Qwen2.5-1.5B-Instruct --min-gain off --enable-auto-tool-choice --tool-call-parser hermes
    export LMCACHE_RAG_RATIO=0.3 VLLM_URL=http://localhost:8000 MODEL=Qwen/Qwen2.5-1.5B-Instruct
    python examples/langchain_tutorials.py

With `--min-gain off` the server blends also where computing a prompt as short as these starts the answer as early, and
with a ratio it reuses what `auto` would recompute, since that costs no time in so short a prompt. docs/langchain.md has
what was changed in each. Each asks its questions twice; `search_first` takes the place of a model that calls tools.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from langchain.agents import create_agent
from langchain.agents.middleware import dynamic_prompt, wrap_model_call
from langchain.tools import tool
from langchain_classic.chains import create_retrieval_chain
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI
from langchain_text_splitters import RecursiveCharacterTextSplitter
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from lmcache_rag.integrations.langchain import AgentPrompt, BlendMiddleware, LMCacheVectorStore, blend
from pydantic import BaseModel, Field

DATA = Path(__file__).parent / "data"
QUESTIONS = ["What did Dalton propose about atoms?", "Which computer was the first of its kind?"]
CALL = {"type": "function", "function": {"name": "retrieve_context"}}
SYSTEM = "You have access to a tool that retrieves context. Use the tool to help answer user queries."
WORDS = "You are a helpful assistant. Use the following context in your response:"
ANSWER = "Use the following context to answer the question in three sentences.\nQuestion: {}\n<context>\n{}\n</context>"
GRADE = "Here is the retrieved document:\n<context>\n{}\n</context>\nHere is the user question: {}\nIs it relevant?"
CHAIN = ChatPromptTemplate.from_messages([("system", "Answer from the context.\n\n{context}"), ("human", "{input}")])


class GradeDocuments(BaseModel):
    """Grade documents using a binary score for relevance check."""

    binary_score: Literal["yes", "no"] = Field(
        description="Relevance score: 'yes' if relevant, or 'no' if not relevant"
    )


@wrap_model_call
def search_first(request: Any, handler: Any) -> Any:
    """Have the model call the tool once, by name, and then answer: a small one may go on searching."""
    searched = any(isinstance(message, ToolMessage) for message in request.messages)
    return handler(request.override(tool_choice="none" if searched else CALL))


def retrieval_tool(vector_store: Any) -> Any:
    """The tutorial's tool, as it is."""

    @tool(response_format="content_and_artifact")
    def retrieve_context(query: str) -> Any:
        """Retrieve information to help answer a query."""
        retrieved_docs = vector_store.similarity_search(query, k=3)
        serialized = "\n\n".join(f"Source: {doc.metadata}\nContent: {doc.page_content}" for doc in retrieved_docs)
        return serialized, retrieved_docs

    return retrieve_context


def tool_agent(llm: Any, vector_store: Any) -> Callable[[str], Any]:
    """RAG agent: LangChain's tutorial, first part."""
    tools = [retrieval_tool(vector_store)]
    agent = create_agent(llm, tools, system_prompt=SYSTEM, middleware=[search_first, BlendMiddleware()])
    return lambda question: agent.invoke({"messages": [HumanMessage(question)]})["messages"][-1]


def prompt_agent(llm: Any, vector_store: Any) -> Callable[[str], Any]:
    """RAG chain: LangChain's tutorial, second part."""

    @dynamic_prompt
    def prompt_with_context(request: Any) -> str:
        """Inject context into state messages."""
        retrieved_docs = vector_store.similarity_search(request.state["messages"][-1].text)
        return f"{WORDS}\n\n" + "\n\n".join(doc.page_content for doc in retrieved_docs)

    agent = create_agent(llm, tools=[], middleware=[prompt_with_context, BlendMiddleware()])
    return lambda question: agent.invoke({"messages": [HumanMessage(question)]})["messages"][-1]


def agentic_rag(llm: Any, vector_store: Any) -> Callable[[str], Any]:
    """Agentic RAG: LangGraph's tutorial."""
    response_model: Any = blend(llm)
    retrieve = retrieval_tool(vector_store)

    def generate_query_or_respond(state: MessagesState) -> Any:
        return {"messages": [response_model.bind_tools([retrieve], tool_choice=CALL).invoke(state["messages"])]}

    def grade_documents(state: MessagesState) -> str:
        prompt = GRADE.format(state["messages"][-1].content, state["messages"][0].content)
        grader = response_model.with_structured_output(GradeDocuments)
        relevant = grader.invoke([{"role": "user", "content": prompt}]).binary_score == "yes"
        return "generate_answer" if relevant or len(state["messages"]) > 4 else "rewrite_question"

    def rewrite_question(state: MessagesState) -> Any:
        prompt = f"Formulate an improved question:\n{state['messages'][0].content}"
        return {"messages": [HumanMessage(response_model.invoke([{"role": "user", "content": prompt}]).content)]}

    def generate_answer(state: MessagesState) -> Any:
        prompt = ANSWER.format(state["messages"][0].content, state["messages"][-1].content)
        return {"messages": [response_model.invoke([{"role": "user", "content": prompt}])]}

    graph: Any = StateGraph(MessagesState)
    for node in (generate_query_or_respond, rewrite_question, generate_answer):
        graph.add_node(node)
    graph.add_node("retrieve", ToolNode([retrieve]))
    graph.add_edge(START, "generate_query_or_respond")
    graph.add_conditional_edges("generate_query_or_respond", tools_condition, {"tools": "retrieve", END: END})
    graph.add_conditional_edges("retrieve", grade_documents, ["generate_answer", "rewrite_question"])
    graph.add_edge("rewrite_question", "generate_query_or_respond").add_edge("generate_answer", END)
    compiled = graph.compile()
    return lambda question: compiled.invoke({"messages": [HumanMessage(question)]})["messages"][-1]


def retrieval_chain(llm: Any, vector_store: Any) -> Callable[[str], Any]:
    """create_retrieval_chain, with the program's own prompt."""
    retriever = vector_store.as_retriever(search_kwargs={"k": 3})
    rag_chain = create_retrieval_chain(retriever, blend(llm, prompt=CHAIN))
    return lambda question: rag_chain.invoke({"input": question})["answer"]


SHAPES = (tool_agent, prompt_agent, agentic_rag, retrieval_chain)


def main() -> dict[str, list[dict[str, Any]]]:
    """Ask each program; returns what was reused for each answer."""
    url, name = os.environ["VLLM_URL"], os.environ["MODEL"]
    llm = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=name, temperature=0, max_tokens=96)
    files = [Document(path.read_text(), metadata={"source": path.name}) for path in sorted(DATA.rglob("*.txt"))]
    chunks = RecursiveCharacterTextSplitter(chunk_size=1000, chunk_overlap=0).split_documents(files)
    embedding = DeterministicFakeEmbedding(size=64)  # any other: what is retrieved does not matter here
    tools = [retrieval_tool(None)]
    prompts = [AgentPrompt(SYSTEM, tools), AgentPrompt(f"{WORDS}\n\n{{context}}"), AgentPrompt(), CHAIN]
    vector_store = LMCacheVectorStore(InMemoryVectorStore(embedding), llm, prompts=[*prompts, AgentPrompt(tools=tools)])
    vector_store.add_documents(documents=chunks)
    facts: dict[str, list[dict[str, Any]]] = {}
    for shape in SHAPES:
        ask = shape(llm, vector_store)
        facts[shape.__name__] = [ask(question).response_metadata["lmcache_rag"] for question in QUESTIONS * 2]
        for one in facts[shape.__name__]:
            print(
                f"{shape.__name__}: {one['chunks_hit']} of {one['chunks_hit'] + one['chunks_missed']} passages, "
                f"{one['reused_tokens']} of {one['prompt_tokens']} tokens reused, {one['decision'] or 'no decision'}, "
                f"TTFT {one['ttft_ms']:.0f} ms"
            )
    return facts


if __name__ == "__main__":
    main()
