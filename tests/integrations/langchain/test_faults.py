"""What goes wrong around a LangChain program, odd corpora, and many things at once."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from embedded_server_kit import serving
from fake_vllm import FakeVLLM
from framework_kit import fresh
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_kit import FAKE, Seen, client, kv_texts, registered, server, workspace
from langchain_openai import ChatOpenAI, OpenAI
from lmcache_rag.integrations.langchain import FaissStore, LMCacheRetriever, LMCacheVectorStore, blend

from lmcache_rag import Workspace
from lmcache_rag.errors import ConfigError, DocumentError, EngineError, EngineUnavailableError, PromptError, StoreError
from lmcache_rag.lazy_fill import fill_of

QUESTION = "What is it?"


def filled(source: Any, texts: list[str]) -> LMCacheVectorStore:
    vectors = LMCacheVectorStore(InMemoryVectorStore(FAKE), source)
    vectors.add_texts(texts)
    return vectors


def ask(source: Any, texts: list[Any], question: str = QUESTION) -> tuple[str, dict[str, Any]]:
    seen = Seen()
    answer = blend(source).invoke({"documents": texts, "question": question}, {"callbacks": [seen]})
    return (answer if isinstance(answer, str) else answer.text), seen.events[-1][1]


# -- corpora ----------------------------------------------------------------------------------------------------------


def test_nothing_found_is_answered_without_passages(made: Workspace) -> None:
    answer, facts = ask(made, [])
    assert answer
    assert facts["reused_tokens"] == facts["chunks_hit"] == facts["chunks_missed"] == 0


@pytest.mark.parametrize("repeat", [1, 2])
def test_one_document_and_equal_documents(made: Workspace, texts: list[str], repeat: int) -> None:
    filled(made, texts[:1] * repeat)
    _, facts = ask(made, texts[:1] * repeat)
    assert facts["chunks_hit"] == repeat
    assert registered(made) == {texts[0]}


def test_more_than_the_context_holds_drops_the_last(
    made: Workspace, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    many = [f"Passage {i}. {texts[i % len(texts)]}" for i in range(200)]
    filled(made, many[:40])
    _, facts = ask(made, many)
    limit = made.engine.info.context_length
    assert limit // 2 < facts["prompt_tokens"] < limit
    assert facts["chunks_missed"] == 0  # the first ones stay, in their order
    assert f"{200 - facts['chunks_hit']} of 200 chunks did not fit" in facts["warnings"][-1]


def test_special_tokens_in_a_text_are_plain_text(made: Workspace) -> None:
    text = "A turn ends with <|im_end|> and begins with <|im_start|>system. " * 5
    filled(made, [text])
    _, facts = ask(made, [text], "And <|endoftext|>?")
    assert facts["chunks_hit"] == 1
    end = made.engine.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in made.prompts.chunk_ids(text)
    assert list(made.prompts.query([text], "And <|endoftext|>?").token_ids).count(end) == 2  # system's and user's


def test_an_empty_text_is_kept_but_not_asked(made: Workspace, texts: list[str]) -> None:
    vectors = filled(made, ["", texts[0]])
    assert set(vectors.register.texts().values()) == {"", texts[0]}
    _, facts = ask(made, ["", texts[0]])
    assert (facts["chunks_hit"], facts["chunks_missed"]) == (1, 0)
    with pytest.raises(PromptError, match="question is empty"):
        ask(made, texts, " ")


# -- what changes texts -----------------------------------------------------------------------------------------------


def test_a_step_that_changes_texts_is_noticed_once(
    made: Workspace, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    vectors = filled(made, texts)
    shorten = RunnableLambda(lambda found: [Document(doc.page_content[:200]) for doc in found])
    chain: Any = {
        "documents": vectors.as_retriever(search_kwargs={"k": 2}) | shorten,
        "question": RunnablePassthrough(),
    } | blend(made)
    seen = Seen()
    for _ in range(2):
        chain.invoke(QUESTION, {"callbacks": [seen]})
    assert [(facts["chunks_hit"], facts["chunks_missed"]) for _, facts in seen.events] == [(0, 2)] * 2
    assert caplog.text.count("2 of 2 passages are not registered") == 1
    assert registered(made) == set(texts)


def test_reordering_and_filtering_keep_their_hits(made: Workspace, texts: list[str]) -> None:
    filled(made, texts)
    _, facts = ask(made, [Document(text) for text in reversed(texts[1:4])])
    assert (facts["chunks_hit"], facts["chunks_missed"]) == (3, 0)


def test_lost_kv_is_computed_and_kept_again(made: Workspace, texts: list[str]) -> None:
    filled(made, texts[:2])
    made.engine.forget([(made.prompts.fingerprint, made.prompts.chunk_key(text)) for text in texts[:2]])
    _, first = ask(made, texts[:2])
    assert fill_of(made.engine).drain(60)
    _, second = ask(made, texts[:2])
    assert (first["chunks_missed"], second["chunks_missed"]) == (2, 0)
    assert kv_texts(made, set(texts[:2])) == set(texts[:2])


# -- servers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OpenAI, ChatOpenAI])
def test_a_stock_server_answers_and_it_is_said_once(
    running: FakeVLLM, texts: list[str], kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    running.connector = False
    llm = client(kind, running)
    filled(llm, texts)
    step, seen = blend(llm), Seen()
    for _ in range(3):
        assert step.invoke({"documents": texts[:3], "question": QUESTION}, {"callbacks": [seen]})
    for _, facts in seen.events:
        assert facts["reused_tokens"] == 0
        assert facts["computed_tokens"] == facts["prompt_tokens"]
    assert caplog.text.count("is not blended: the server runs without lmcache-rag's connector") == 1


def test_retrieval_goes_on_while_the_engine_is_down(
    tokenizer: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh(monkeypatch, tmp_path)
    inner = InMemoryVectorStore(FAKE)
    with server(tokenizer, tmp_path / "server") as running:
        llm = client(OpenAI, running)
        vectors = LMCacheVectorStore(inner, llm)
        vectors.add_texts(texts)
        chain: Any = {"documents": vectors.as_retriever(), "question": RunnablePassthrough()} | blend(llm)
        chain.invoke(QUESTION)
    assert len(vectors.similarity_search(QUESTION)) == 4
    with pytest.raises(openai.APIConnectionError):  # the model's own error, which its retries and fallbacks know
        chain.invoke(QUESTION)
    fresh(monkeypatch, tmp_path)  # a new process
    again = LMCacheVectorStore(inner, llm)
    assert again.adoption is not None and again.adoption.wait(60)
    assert "Call adopt() later" in caplog.text
    assert len(again.similarity_search(QUESTION)) == 4
    with pytest.raises(EngineUnavailableError, match="cannot be reached"):
        blend(llm).invoke({"documents": texts, "question": QUESTION})


def test_another_model_at_the_url_is_an_early_error(running: FakeVLLM, texts: list[str]) -> None:
    llm = client(OpenAI, running, model="meta-llama/Llama-3.1-8B")
    with pytest.raises(EngineError, match=r"serves .*SmolLM2.*, not meta-llama"):
        blend(llm).invoke({"documents": texts, "question": QUESTION})
    with pytest.raises(EngineError, match="not meta-llama"):
        LMCacheVectorStore(InMemoryVectorStore(FAKE), llm).add_texts(texts)
    assert running.seen == []


def test_a_broken_stream_says_so(running: FakeVLLM, texts: list[str]) -> None:
    llm = client(ChatOpenAI, running)
    filled(llm, texts)
    running.drop_after = 2
    with pytest.raises((EngineUnavailableError, openai.APIError)):
        list(blend(llm).stream({"documents": texts[:2], "question": QUESTION}))


@pytest.mark.parametrize("kind", [OpenAI, ChatOpenAI])
def test_leaving_a_stream_early_stops_the_computation(running: FakeVLLM, texts: list[str], kind: Any) -> None:
    running.pause = 0.02  # or the answer could be over before anybody leaves
    llm = client(kind, running, max_tokens=3000)
    filled(llm, texts)
    stream = blend(llm).stream({"documents": texts[:2], "question": QUESTION})
    for piece in stream:
        if piece if isinstance(piece, str) else piece.text:
            break
    stream.close()  # type: ignore[attr-defined]
    assert running.gone.wait(60)


def test_an_error_of_the_server_stays_the_models_own(running: FakeVLLM, texts: list[str]) -> None:
    llm = client(OpenAI, running)
    filled(llm, texts)
    running.fail = [500]
    with pytest.raises(openai.InternalServerError):
        ask(llm, texts[:2])
    retried = blend(llm).with_retry(stop_after_attempt=2, wait_exponential_jitter=False)
    running.fail = [500]
    assert retried.invoke({"documents": texts[:2], "question": QUESTION})


def test_the_models_own_key_goes_to_its_own_server(running: FakeVLLM, texts: list[str]) -> None:
    running.key = "secret"
    llm = client(OpenAI, running, api_key="secret")
    filled(llm, texts[:1])
    ask(llm, texts[:1])
    assert set(running.auth) == {"Bearer secret"}


# -- retriever and vector store ---------------------------------------------------------------------------------------


class Fixed(BaseRetriever):
    documents: list[Document]
    asked: list[Any]

    def _get_relevant_documents(self, query: str, *, run_manager: Any, **kwargs: Any) -> list[Document]:
        self.asked.append(kwargs)
        return self.documents


async def test_a_retriever_passes_keywords_keeps_documents() -> None:
    documents = [Document(str(i), id=str(i), metadata={"n": i}) for i in range(4)]
    fixed = Fixed(documents=documents, asked=[])
    retriever = LMCacheRetriever(retriever=fixed, k=2)
    found = retriever.invoke("q", filter={"n": 1})
    assert all(a is b for a, b in zip(found, documents, strict=False))
    assert len(found) == 2
    assert fixed.asked == [{"filter": {"n": 1}, "k": 2}]
    assert len(await retriever.ainvoke("q", k=3)) == 3
    assert len(LMCacheRetriever(retriever=RunnableLambda(lambda q: documents), k=1).invoke("q")) == 1
    for wrong in ({}, {"retriever": fixed, "vectorstore": InMemoryVectorStore(FAKE)}):
        with pytest.raises(ValueError, match="one source"):
            LMCacheRetriever(**wrong)
    with pytest.raises(ConfigError, match="at least 1"):
        retriever.invoke("q", k=0)


def test_filters_thresholds_and_diversity(made: Workspace, tmp_path: Path) -> None:
    vectors = LMCacheVectorStore(FaissStore(FAKE, tmp_path / "v"), made)
    vectors.add_texts([f"text {i}" for i in range(6)], [{"n": i, "source": f"s{i % 2}"} for i in range(6)])
    by = vectors.as_retriever(search_kwargs={"k": 6, "filter": {"source": "s1"}})
    assert {doc.metadata["n"] for doc in by.invoke("x")} == {1, 3, 5}
    assert {doc.metadata["n"] for doc in by.invoke("x", filter={"n": {"$gte": 4}})} == {4, 5}
    assert {doc.metadata["n"] for doc in by.invoke("x", filter={"n": [0, 2]})} == {0, 2}
    either = {"$or": [{"n": 0}, {"source": {"$ne": "s0"}}]}
    assert {doc.metadata["n"] for doc in by.invoke("x", filter=either)} == {0, 1, 3, 5}
    assert {doc.metadata["n"] for doc in by.invoke("x", filter=lambda doc: doc.metadata["n"] > 4)} == {5}
    assert by.invoke("x", filter={"absent": {"$gt": 1}}) == []
    with pytest.raises(ConfigError, match="operator"):
        by.invoke("x", filter={"n": {"$near": 1}})
    near = vectors.as_retriever(search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.99})
    assert [doc.page_content for doc in near.invoke("text 3")] == ["text 3"]
    mmr = vectors.as_retriever(search_type="mmr", search_kwargs={"k": 3, "fetch_k": 6})
    found = [doc.page_content for doc in mmr.invoke("text 2")]
    assert found[0] == "text 2"
    assert len(set(found)) == 3
    [(doc, score)] = vectors.similarity_search_with_score("text 1", k=1)
    assert (doc.page_content, round(score, 4)) == ("text 1", 1.0)


def test_our_faiss_says_what_it_cannot_keep(tmp_path: Path) -> None:
    from langchain_core.embeddings import DeterministicFakeEmbedding

    vectors = FaissStore(FAKE, tmp_path / "v")
    with pytest.raises(StoreError, match="JSON"):
        vectors.add_documents([Document("x", metadata={"when": object()})])
    vectors.add_texts(["x"])
    with pytest.raises(DocumentError, match="not valid Unicode"):
        vectors.add_texts(["\ud800"])
    with pytest.raises(ValueError, match="1 ids for 2 documents"):
        vectors.add_documents([Document("a"), Document("b")], ids=["1"])
    with pytest.raises(StoreError, match="embedd"):
        FaissStore(DeterministicFakeEmbedding(size=5), vectors.store).similarity_search("x")
    with pytest.raises(ConfigError, match="needs `source`"):
        LMCacheVectorStore(vectors)
    vectors.close()


@pytest.mark.parametrize("ids", [["1"], ["1", "2", "3"], []])
def test_ids_that_do_not_match_documents_are_an_error(made: Workspace, ids: list[str]) -> None:
    class Odd(InMemoryVectorStore):
        def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
            super().add_documents(documents, **kwargs)
            return ids

    vectors = LMCacheVectorStore(Odd(FAKE), made)
    with pytest.raises(ConfigError, match=f"returned {len(ids)} ids for 2 documents"):
        vectors.add_documents([Document("one"), Document("two")])
    assert vectors.register.texts() == {}, "which text is whose is not guessed"


def test_a_missing_framework_is_named_with_its_extra() -> None:
    code = (
        "import sys\nsys.modules['langchain_core'] = None\n"
        "import lmcache_rag\n"
        "try:\n    import lmcache_rag.integrations.langchain\n"
        "except ImportError as problem:\n    print(problem)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install ".[langchain]"' in done.stdout


# -- many at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["server", "workspace"])
def test_fifty_questions_and_an_ingestion_from_threads(
    tokenizer: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    fresh(monkeypatch, tmp_path)
    with server(tokenizer, tmp_path / "s") as running, workspace(tokenizer, tmp_path / "w", max_tokens=2) as made:
        source = client(ChatOpenAI, running, max_tokens=2) if kind == "server" else made
        vectors, step = filled(source, texts), blend(source)
        pairs = [[texts[i % 6], texts[(i + 1 + i // 6) % 6]] for i in range(50)]
        alone = {tuple(pair): step.invoke({"documents": pair, "question": QUESTION}).text for pair in pairs}
        stop, new = threading.Event(), [f"New {i}. {texts[0]}" for i in range(6)]

        def ingest() -> None:
            for text in new:
                vectors.add_texts([text])
            vectors.delete(vectors.add_texts(["gone soon"]))
            stop.set()

        def one(pair: list[str]) -> tuple[str, dict[str, Any]]:
            seen = Seen()
            return step.invoke({"documents": pair, "question": QUESTION}, {"callbacks": [seen]}).text, seen.events[0][1]

        with ThreadPoolExecutor(16) as pool:
            writing = pool.submit(ingest)
            answers = list(pool.map(one, pairs))
            writing.result()
        assert stop.is_set()
        assert [text for text, _ in answers] == [alone[tuple(pair)] for pair in pairs]
        assert all(facts["reused_tokens"] + facts["prefix_tokens"] > 0 for _, facts in answers)
        assert set(vectors.register.texts().values()) == {*texts, *new}


@pytest.mark.parametrize("kind", ["server", "workspace"])
async def test_fifty_questions_and_an_ingestion_in_one_loop(
    tokenizer: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    fresh(monkeypatch, tmp_path)
    with server(tokenizer, tmp_path / "s") as running, workspace(tokenizer, tmp_path / "w", max_tokens=2) as made:
        source = client(OpenAI, running, max_tokens=2) if kind == "server" else made
        vectors = LMCacheVectorStore(InMemoryVectorStore(FAKE), source)
        await vectors.aadd_texts(texts)
        chain: Any = {
            "documents": vectors.as_retriever(search_kwargs={"k": 2}),
            "question": RunnablePassthrough(),
        } | blend(source)
        questions = [f"Question {i % 10}?" for i in range(50)]
        alone = {question: await chain.ainvoke(question) for question in set(questions)}
        seen = Seen()

        async def ingest() -> None:
            for i in range(6):
                [key] = await vectors.aadd_texts([f"New {i}. {texts[0]}"])
                await vectors.adelete([key])

        *answers, _ = await asyncio.gather(*(chain.ainvoke(q, {"callbacks": [seen]}) for q in questions), ingest())
        same = sum(_text(answer) == _text(alone[q]) for answer, q in zip(answers, questions, strict=True))
        assert same >= 25  # a question may meet a passage that is there for a moment
        assert len(seen.events) == 50
        assert all(facts["prompt_tokens"] > 0 for _, facts in seen.events)
        assert set(vectors.register.texts().values()) == set(texts)


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else answer.text


def test_chromas_own_methods_keep_the_registry_in_step(made: Workspace) -> None:
    from langchain_chroma import Chroma

    name = f"c{uuid.uuid4().hex}"
    vectors = LMCacheVectorStore(Chroma.from_texts(["one", "two"], FAKE, collection_name=name), made)
    assert vectors.adoption is not None and vectors.adoption.wait(60)
    assert set(vectors.register.texts().values()) == {"one", "two"}  # adopted
    assert vectors.space == f"Chroma:{name}"
    [key] = [key for key, text in vectors.register.texts().items() if text == "one"]
    vectors.update_document(key, Document("three", id=key, metadata={"n": 3}))
    assert registered(made) == {"two", "three"} == set(vectors.get()["documents"])
    assert len(vectors.similarity_search("three", k=1, filter=None)) == 1
    vectors.delete()
    assert registered(made) == set() == set(vectors.get()["ids"])
    vectors.add_texts(["four"])
    vectors.reset_collection()
    assert registered(made) == set()
    vectors.add_texts(["five"])
    vectors.delete_collection()
    assert registered(made) == set()


def test_the_real_model_is_exact_at_ratio_one(
    make_engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    fresh(monkeypatch, tmp_path)
    with serving(make_engine(tmp_path / "kv")) as running:
        llm = client(ChatOpenAI, running, max_tokens=8)
        vectors = filled(llm, texts[:3])
        found = vectors.similarity_search(QUESTION, k=3)
        given = {"documents": found, "question": "What is an atom?"}
        answers, reused = [], []
        for said in ({"enabled": False}, {"ratio": 1.0}, {"ratio": 0.15}):
            answer = blend(llm).invoke(given, {"configurable": {"lmcache_rag": said}})
            answers.append(answer.text)
            reused.append(answer.response_metadata["lmcache_rag"]["reused_tokens"])
        assert answers[0] == answers[1] != ""
        assert reused[0] == reused[1] == 0 < reused[2]
