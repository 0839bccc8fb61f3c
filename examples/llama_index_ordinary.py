"""An ordinary LlamaIndex program over a vLLM server: it does not use lmcache-rag.

llama_index_three_lines.diff makes it answer from blended KV. Run it with VLLM_URL=http://localhost:8000 (and MODEL).
"""

import os
from functools import cache
from pathlib import Path

from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.llms.openai_like import OpenAILike
from sentence_transformers import SentenceTransformer

DATA = Path(__file__).parent / "data" / "documents"
QUESTIONS = ["What did Dalton propose about atoms?", "What was ENIAC?"]


@cache
def encoder() -> SentenceTransformer:
    """The embedding model."""
    return SentenceTransformer(os.environ.get("EMBEDDER", "sentence-transformers/all-MiniLM-L6-v2"))


class MiniLM(BaseEmbedding):
    """The program's embeddings."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return encoder().encode([text], show_progress_bar=False)[0].tolist()

    _get_query_embedding = _get_text_embedding

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


def main(questions: list[str] = QUESTIONS) -> list:
    """Ask; returns the responses."""
    url, name = os.environ["VLLM_URL"], os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
    llm = OpenAILike(model=name, api_base=f"{url}/v1", api_key="none", temperature=0, max_tokens=32)
    files = [Document(text=path.read_text(), id_=path.name) for path in sorted(DATA.glob("*.txt"))]
    storage = StorageContext.from_defaults(vector_store=SimpleVectorStore())
    splitter = SentenceSplitter(chunk_size=200, chunk_overlap=0)
    index = VectorStoreIndex.from_documents(files, storage, transformations=[splitter], embed_model=MiniLM())
    query_engine = index.as_query_engine(llm=llm, similarity_top_k=4)
    responses = [query_engine.query(question) for question in questions]
    for question, response in zip(questions, responses, strict=True):
        print(question, "→", str(response).strip())
        print("   from", *(source.node.ref_doc_id for source in response.source_nodes))
    return responses


if __name__ == "__main__":
    main()
