"""An ordinary LangChain program over a vLLM server: VLLM_URL=http://localhost:8000 (and MODEL, EMBEDDER)."""

import os
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import RunnableParallel, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAI
from langchain_text_splitters import RecursiveCharacterTextSplitter

DATA = Path(__file__).parent / "data"
QUESTIONS = ["What did Dalton propose about atoms?", "What was ENIAC?"]


class MiniLM(Embeddings):
    """The program's embeddings."""

    def __init__(self) -> None:
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(os.environ.get("EMBEDDER", "sentence-transformers/all-MiniLM-L6-v2"))

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of texts."""
        return self._model.encode(texts, show_progress_bar=False).tolist()

    def embed_query(self, text: str) -> list[float]:
        """Vector of a question."""
        return self.embed_documents([text])[0]


def prompt(values: dict) -> str:
    """The prompt as one text."""
    passages = "\n\n".join(document.page_content for document in values["documents"])
    return f"Answer the question with these passages.\n\n{passages}\n\nQuestion: {values['question']}\nAnswer:"


def main(questions: list[str] = QUESTIONS) -> list[dict]:
    """Ask; returns documents, question and answer of each."""
    url, model = os.environ["VLLM_URL"], os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
    llm = OpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=32)
    files = [Document(path.read_text(), metadata={"source": path.name}) for path in sorted(DATA.rglob("*.txt"))]
    splitter = RecursiveCharacterTextSplitter(chunk_size=900, chunk_overlap=0)
    vectors = InMemoryVectorStore(MiniLM())
    vectors.add_documents(splitter.split_documents(files))
    retriever = vectors.as_retriever(search_kwargs={"k": 4})
    chain = RunnableParallel(documents=retriever, question=RunnablePassthrough()).assign(answer=prompt | llm)
    results = chain.batch(questions)
    for result in results:
        print(result["question"], "→", result["answer"].strip())
        print("   from", *(document.metadata["source"] for document in result["documents"]))
    return results


if __name__ == "__main__":
    main()
