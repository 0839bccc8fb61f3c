"""A program's own prompt: in the prompt word for word, with the passages reused; refused where nothing could be."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fake_vllm import FakeVLLM
from langchain_classic.chains import create_retrieval_chain
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_kit import FAKE, Seen, client, kv_texts
from langchain_openai import ChatOpenAI, OpenAI
from lmcache_rag.integrations.langchain import AgentPrompt, LMCacheVectorStore, blend
from lmcache_rag.integrations.langchain.templates import TemplatePrompt, ingest_prompts

from lmcache_rag import Workspace
from lmcache_rag.errors import ConfigError

QUESTION = "How is a key moved?"
CHAT = ChatPromptTemplate.from_messages(
    [
        ("system", "You are {who}. Use the context.\n\n{context}"),
        MessagesPlaceholder("chat_history", optional=True),
        ("human", "In {language}: {input}"),
    ]
).partial(who="a librarian")
PLAIN = PromptTemplate.from_template("Grade this.\n<context>\n{context}\n</context>\nFor {question}, yes or no?")
FIRST = PromptTemplate.from_template("Answer in a sentence.\nQuestion: {question}\n<context>\n{context}\n</context>")


def value(prompt: Any, texts: list[str]) -> dict[str, Any]:
    """A chain's input."""
    if prompt is CHAT:
        return {"context": texts, "input": QUESTION, "language": "English"}
    return {"documents" if prompt is FIRST else "context": texts, "question": QUESTION}


def shown(prompt: Any, texts: list[str], made: Any) -> str:
    """What the model would read if LangChain rendered the prompt."""
    joined = {"context": "\n\n".join(texts), "input": QUESTION, "question": QUESTION, "language": "English"}
    messages = prompt.format_messages(**joined) if prompt is CHAT else [("user", prompt.format(**joined))]
    roles = {"system": "system", "human": "user"}
    plain = [m if isinstance(m, tuple) else (roles[m.type], m.text) for m in messages]
    given = [{"role": role, "content": content} for role, content in plain]
    return str(made.engine.tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("prompt", [CHAT, PLAIN, FIRST], ids=["chat", "plain", "question first"])
@pytest.mark.parametrize("kind", ["engine", OpenAI, ChatOpenAI])
def test_the_prompt_is_the_programs_own(prompt: Any, kind: Any, made: Any, running: FakeVLLM, texts: list[str]) -> None:
    source = made if kind == "engine" else client(kind, running)
    vectors = LMCacheVectorStore(InMemoryVectorStore(FAKE), source, prompts=[prompt])
    vectors.add_texts(texts)
    step, seen = blend(source, prompt=prompt), Seen()
    answer = step.invoke(value(prompt, texts[:3]), {"callbacks": [seen]})
    assert answer
    [(_, facts)] = seen.events
    assert (facts["chunks_hit"], facts["chunks_missed"]) == (3, 0)
    assert facts["reused_tokens"] > 0
    if kind != "engine":
        [body] = running.questions
        ids = body.get("prompt") or body["kv_transfer_params"]["prompt_token_ids"]
        text = step.blender.engine.tokenizer.decode(ids)
        assert re.sub(r"\n+", "\n", text) == re.sub(r"\n+", "\n", shown(prompt, texts[:3], made))  # but for the filler


@pytest.mark.parametrize("prompt", [CHAT, PLAIN, FIRST], ids=["chat", "plain", "question first"])
def test_kv_comes_lazily_where_the_store_was_not_told(made: Workspace, texts: list[str], prompt: Any) -> None:
    LMCacheVectorStore(InMemoryVectorStore(FAKE), made).add_texts(texts)
    step, seen = blend(made, prompt=prompt), Seen()
    for _ in range(2):
        step.invoke(value(prompt, texts[:2]), {"callbacks": [seen]})
        assert step.blender.drain(60)
    assert [facts["chunks_missed"] for _, facts in seen.events] == [2, 0]


def test_several_prompts_over_one_corpus(made: Workspace, texts: list[str]) -> None:
    steps = [blend(made, prompt=CHAT), blend(made, system="You are brief.", instruction="Answer."), blend(made)]
    vectors = LMCacheVectorStore(InMemoryVectorStore(FAKE), made, prompts=[*steps, PLAIN, CHAT])
    vectors.add_texts(texts[:2], ids=["a", "b"])
    prompts = [step.prompts for step in steps] + [ingest_prompts(PLAIN, made, made)]
    assert len({one.fingerprint for one in prompts}) == 4
    for one in prompts:
        assert made.engine.missing([one.ingest(text) for text in texts[:2]]) == [False, False]
    seen = Seen()
    steps[0].invoke(value(CHAT, texts[:2]), {"callbacks": [seen]})
    for step in steps[1:]:
        step.invoke({"documents": texts[:2], "question": QUESTION}, {"callbacks": [seen]})
    assert [facts["chunks_hit"] for _, facts in seen.events] == [2, 2, 2]
    made.engine.forget([(one.fingerprint, one.ingest(texts[0]).key) for one in prompts])
    assert vectors.warm().computed == 4
    vectors.delete(["a"])
    for one in prompts:
        assert made.engine.missing([one.ingest(text) for text in texts[:2]]) == [True, False]
    assert kv_texts(made, set(texts[:2])) == {texts[1]}


def test_a_conversation_does_not_change_the_prefix(made: Workspace, texts: list[str]) -> None:
    """Neither after the passages nor before them."""
    before = ChatPromptTemplate.from_messages(
        [("system", "Be brief."), MessagesPlaceholder("history"), ("human", "Use this: {context}\n\n{question}")]
    )
    LMCacheVectorStore(InMemoryVectorStore(FAKE), made, prompts=[CHAT, before]).add_texts(texts)
    turns = [("ai", "Hello!"), ("human", "Who?"), ("ai", "Me.")]
    for prompt, name in ((CHAT, "chat_history"), (before, "history")):
        seen, step = Seen(), blend(made, prompt=prompt)
        own = {"context": texts[:2]} | (
            {"input": QUESTION, "language": "French"} if prompt is CHAT else {"question": QUESTION}
        )
        for history in ([], turns):
            step.invoke(own | {name: history}, {"callbacks": [seen]})
        assert [facts["chunks_hit"] for _, facts in seen.events] == [2, 2]
        assert seen.events[0][1]["prompt_tokens"] < seen.events[1][1]["prompt_tokens"]


def test_create_retrieval_chain_reuses(made: Workspace, texts: list[str]) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Use this:\n\n{context}"), ("human", "{input}")])
    vectors = LMCacheVectorStore(InMemoryVectorStore(FAKE), made, prompts=[prompt])
    vectors.add_documents([Document(text) for text in texts])
    chain = create_retrieval_chain(vectors.as_retriever(search_kwargs={"k": 2}), blend(made, prompt=prompt))
    result = chain.invoke({"input": QUESTION})
    facts = result["answer"].response_metadata["lmcache_rag"]
    assert (facts["chunks_hit"], len(result["context"])) == (2, 2)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Use {context} and {date}.", None),
        ("It is {date}. Use {context}.", r"\{date\} before the passages.*prompt.partial\(date="),
        ("Use this. {question}", "0 places for the passages.*it has question"),
        ("{context} {documents}", "2 places for the passages"),
        ("{context} and {context}", "2 places for the passages"),
    ],
)
def test_a_prompt_that_cannot_be_used_says_why(prompt: str, message: str | None) -> None:
    template = PromptTemplate.from_template(prompt)
    if message is None:
        assert TemplatePrompt(template).needed == {"context", "date"}
        return
    with pytest.raises(ConfigError, match=message):
        blend("http://127.0.0.1:9", prompt=template)


def test_values_computed_per_request_are_refused_too() -> None:
    today = PromptTemplate.from_template("It is {date}. Use {context}.").partial(date=lambda: "Monday")
    with pytest.raises(ConfigError, match=r"\{date\} before the passages"):
        TemplatePrompt(today)
    after = PromptTemplate.from_template("Use {context}. It is {date}.").partial(date=lambda: "Monday")
    _, values = TemplatePrompt(after).parse({"context": []})
    assert [piece.text for piece in TemplatePrompt(after).messages(["A."], values)[0].pieces] == [
        "Use ", "", "A.", ". It is ", "Monday", ".",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"question": QUESTION}, "'context' has no value"),
        ({"context": [], "input": QUESTION, "user": "me"}, "does not use 'user'"),
        ({"context": "joined", "question": QUESTION}, "The documents are str"),
        ("text", "it got str"),
    ],
)
def test_inputs_that_the_prompt_does_not_use_raise(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        blend("http://127.0.0.1:9", prompt=PLAIN).invoke(given)


def test_a_text_that_no_prompt_holds_is_told_once(
    made: Workspace, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    step = blend(made)
    for _ in range(2):
        step.invoke({"documents": texts[:1], "question": QUESTION, "language": "French", "found": texts})
    assert caplog.text.count("The input has 'language', which is not in the prompt") == 1


def test_other_kinds_of_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="prompt is a str"):
        blend("http://127.0.0.1:9", prompt="Use {context}")
    with pytest.raises(ConfigError, match="a prompt and a system text"):
        blend("http://127.0.0.1:9", prompt=PLAIN, system="x")
    with pytest.raises(ConfigError, match="without formats"):
        TemplatePrompt(PromptTemplate.from_template("{context} {score:.2f}"))


def test_an_agents_prefix_is_its_system_text_and_tools(made: Workspace) -> None:
    plain, other = (ingest_prompts(AgentPrompt(text), made, made) for text in ("Be brief.", "Be long."))
    assert plain.fingerprint != other.fingerprint
    assert "Be brief." in made.engine.tokenizer.decode(plain.prefix_ids)
    dynamic = ingest_prompts(AgentPrompt("Use this:\n\n{context}"), made, made)
    text = made.engine.tokenizer.decode(dynamic.prefix_ids)
    assert text.startswith("<|im_start|>system\nUse this:\n")
    assert "user" not in text
    assert len(dynamic.prefix_ids) % made.engine.info.kv_block == 0
