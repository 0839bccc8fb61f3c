"""LlamaIndex's starter tutorial, over a vLLM server: it does not use lmcache-rag.

llama_index_starter.diff makes it answer from blended KV. Run it with VLLM_URL=http://localhost:8000 (and MODEL); the
server needs vLLM's --enable-auto-tool-choice and --tool-call-parser for the agent.
"""

import asyncio
import os
from pathlib import Path

from llama_index.core import Settings, SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.agent.workflow import AgentWorkflow
from llama_index.llms.openai_like import OpenAILike
from llama_index_ordinary import MiniLM

DATA = Path(__file__).parent / "data" / "documents"


def multiply(a: float, b: float) -> float:
    """Useful for multiplying two numbers."""
    return a * b


def make_tools() -> list:
    """Read the documents, and make the agent's tools."""
    url, name = os.environ["VLLM_URL"], os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
    Settings.llm = OpenAILike(
        model=name, api_base=f"{url}/v1", api_key="none", is_chat_model=True, is_function_calling_model=True
    )
    Settings.embed_model = MiniLM()
    documents = SimpleDirectoryReader(str(DATA), required_exts=[".txt"]).load_data()
    index = VectorStoreIndex.from_documents(documents)
    query_engine = index.as_query_engine()

    async def search_documents(query: str) -> str:
        """Useful for answering natural language questions about the documents."""
        response = await query_engine.aquery(query)
        return str(response)

    return [multiply, search_documents]


async def main() -> None:
    """Ask the agent."""
    agent = AgentWorkflow.from_tools_or_functions(
        make_tools(),
        llm=Settings.llm,
        system_prompt="You are a helpful assistant that can perform calculations and search through documents.",
    )
    print(await agent.run("What did Dalton propose about atoms? Also, what's 7 * 8?"))


if __name__ == "__main__":
    asyncio.run(main())
