"""Agents of LangChain and LangGraph on a real vLLM (CPU build): what BlendMiddleware and blend() send is answered.

Blending needs CUDA, so each answer is computed in full, and must be that of the same token ids without us. That a tool
is called by name, that structured output is whole, and that ingestion for an agent's prompt fills LMCache, is as on a
GPU.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, Literal

import pytest
from vllm_cpu_kit import Servers, needs_vllm_cpu, until

pytestmark = [
    pytest.mark.slow,
    needs_vllm_cpu,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("langchain", "langchain_openai")),
        reason="needs langchain and langchain-openai",
    ),
]

QUESTION = "What does the passage say?"
STORED = "lmcache_mp_l1_write_chunks_total"
SYSTEM = "You have a tool that retrieves passages. Use it to answer."


@pytest.fixture
def texts(sentences: list[str]) -> list[str]:
    """Passages that hold at least one LMCache chunk each."""
    return [" ".join(sentences[start : start + 4]) for start in (60, 64)]


@pytest.fixture
def llm(servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a program knows of its server."""
    from langchain_openai import ChatOpenAI

    monkeypatch.setenv("LMCACHE_RAG_STORE", str(tmp_path / "store"))
    return ChatOpenAI(base_url=f"{servers.url}/v1", model="smollm2", api_key="none", temperature=0, max_tokens=48)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The prompts of requests with passages; each went out as token ids."""
    from lmcache_rag.integrations.langchain.agent_call import AgentCall

    seen: list[Any] = []
    real = AgentCall.request

    def request(call: Any, payload: Any, model_body: Any) -> Any:
        made = real(call, payload, model_body)
        if call.prompt.texts:
            params = made["extra_body"]["kv_transfer_params"]
            assert params["prompt_token_ids"] == list(call.prompt.prompt.token_ids)
            seen.append(call.prompt.prompt)
        return made

    monkeypatch.setattr(AgentCall, "request", request)
    return seen


def stored(llm: Any, texts: list[str], *prompts: Any) -> Any:
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from langchain_core.vectorstores import InMemoryVectorStore
    from lmcache_rag.integrations.langchain import LMCacheVectorStore

    vectors = LMCacheVectorStore(InMemoryVectorStore(DeterministicFakeEmbedding(size=8)), llm, prompts=prompts)
    vectors.add_texts(texts)
    return vectors


def check(servers: Servers, prompt: Any, answer: str, texts: list[str], llm: Any) -> None:
    """The passages stand where the prompt says, and the answer is that of its token ids."""
    from lmcache_rag.integrations.kv_registry import as_workspace

    ids, decode = list(prompt.token_ids), as_workspace(llm).engine.tokenizer.decode
    assert sorted(decode(ids[chunk.start : chunk.end]) for chunk in prompt.chunks) == sorted(texts)
    plain = {"model": "smollm2", "prompt": ids, "max_tokens": 48, "temperature": 0}
    assert answer == servers.client.post("/v1/completions", json=plain).json()["choices"][0]["text"]


def test_a_retrieval_tool_called_by_name(servers: Servers, llm: Any, texts: list[str], sent: list[Any]) -> None:
    from langchain.agents import create_agent
    from langchain.agents.middleware import wrap_model_call
    from langchain.tools import tool
    from langchain_core.messages import HumanMessage, ToolMessage
    from lmcache_rag.integrations.langchain import AgentPrompt, BlendMiddleware

    vectors: Any = None

    @tool(response_format="content_and_artifact")
    def retrieve_context(query: Literal["passage", "question"]) -> Any:
        """Retrieve information to help answer a query."""
        found = vectors.similarity_search(query, k=2)
        return "\n\n".join(f"Source: {doc.metadata}\nContent: {doc.page_content}" for doc in found), found

    @wrap_model_call
    def search_first(request: Any, handler: Any) -> Any:
        if not any(isinstance(message, ToolMessage) for message in request.messages):
            choice = {"type": "function", "function": {"name": "retrieve_context"}}
            request = request.override(tool_choice=choice)
        return handler(request)

    before = servers.lmcache_counter(STORED)
    vectors = stored(llm, texts, AgentPrompt(SYSTEM, [retrieve_context]))
    assert until(lambda: servers.lmcache_counter(STORED) > before)
    agent = create_agent(llm, [retrieve_context], system_prompt=SYSTEM, middleware=[search_first, BlendMiddleware()])
    result = agent.invoke({"messages": [HumanMessage(QUESTION)]})
    assert len(result["messages"]) == 4, result["messages"][1]
    _, call, found, answer = result["messages"]
    assert call.tool_calls[0]["args"]["query"] in ("passage", "question")
    assert [doc.page_content in found.content for doc in found.artifact] == [True, True]
    assert answer.response_metadata["lmcache_rag"]["prompt_tokens"] == answer.usage_metadata["input_tokens"]
    [prompt] = sent
    check(servers, prompt, answer.text, texts, llm)


def test_passages_in_a_dynamic_prompt(servers: Servers, llm: Any, texts: list[str], sent: list[Any]) -> None:
    from langchain.agents import create_agent
    from langchain.agents.middleware import dynamic_prompt
    from langchain_core.messages import HumanMessage
    from lmcache_rag.integrations.langchain import AgentPrompt, BlendMiddleware

    words = "You are a helpful assistant. Use the following context in your response:\n\n"
    vectors = stored(llm, texts, AgentPrompt(f"{words}{{context}}"))

    @dynamic_prompt
    def prompt_with_context(request: Any) -> str:
        found = vectors.similarity_search(request.state["messages"][-1].text)
        return words + "\n\n".join(doc.page_content for doc in found)

    agent = create_agent(llm, tools=[], middleware=[prompt_with_context, BlendMiddleware()])
    answer = agent.invoke({"messages": [HumanMessage(QUESTION)]})["messages"][-1]
    [prompt] = sent
    check(servers, prompt, answer.text, texts, llm)


def test_a_grader_and_the_question_before_the_passages(
    servers: Servers, llm: Any, texts: list[str], sent: list[Any]
) -> None:
    from lmcache_rag.integrations.langchain import AgentPrompt, blend
    from pydantic import BaseModel

    class GradeDocuments(BaseModel):
        """Grade documents using a binary score for relevance check."""

        binary_score: Literal["yes", "no"]

    model: Any = blend(llm)
    context = "\n\n".join(doc.page_content for doc in stored(llm, texts, AgentPrompt()).similarity_search("x"))
    prompt = f"Here is the document:\n<context>\n{context}\n</context>\nHere is the question: {QUESTION}"
    graded = model.with_structured_output(GradeDocuments).invoke([{"role": "user", "content": prompt}])
    assert graded.binary_score in ("yes", "no")
    prompt = f"Answer in a sentence.\nQuestion: {QUESTION}\n<context>\n{context}\n</context>"
    answer = model.invoke([{"role": "user", "content": prompt}])
    assert len(sent) == 2
    prefixes = {prompt.token_ids[: prompt.prefix_tokens] for prompt in sent}
    assert len(prefixes) == 1  # one KV of each passage serves both
    check(servers, sent[-1], answer.text, texts, llm)


def test_the_programs_own_prompt(servers: Servers, llm: Any, texts: list[str]) -> None:
    from langchain_core.prompts import ChatPromptTemplate
    from lmcache_rag.integrations.langchain import blend

    prompt = ChatPromptTemplate.from_messages([("system", "Use this:\n\n{context}"), ("human", "{input}")])
    stored(llm, texts, prompt)
    step = blend(llm, prompt=prompt)
    answer = step.invoke({"context": texts, "input": QUESTION})
    prefix, tokenizer = step.prompts.prefix_ids, step.blender.engine.tokenizer
    assert re.sub("\n+", "\n", tokenizer.decode(prefix)) == "<|im_start|>system\nUse this:\n"
    assert answer.response_metadata["lmcache_rag"]["prompt_tokens"] == answer.usage_metadata["input_tokens"]
