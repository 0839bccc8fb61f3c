"""blend(): a user's own model answers from blended KV, over real HTTP or in process."""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeVLLM
from framework_kit import fresh
from langchain_core.documents import Document
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_core.tracers.base import BaseTracer
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_kit import FAKE, Seen, client, server, workspace
from langchain_openai import ChatOpenAI, OpenAI
from lmcache_rag.integrations.kv_registry import as_workspace
from lmcache_rag.integrations.langchain import ChunkedPromptValue, LMCacheVectorStore, blend
from lmcache_rag.integrations.langchain.prompts import conversation
from pydantic import BaseModel

from lmcache_rag.engines.base import BlendOptions, QueryPrompt
from lmcache_rag.errors import ConfigError
from lmcache_rag.prompt import PromptBuilder, PromptFormat, Turn
from lmcache_rag.trace import chunk_name, read_trace

QUESTION = "How is a key moved?"
KINDS = {"completions": OpenAI, "chat": ChatOpenAI}
CALL = {"name": "search", "args": {"query": "who"}, "id": "1"}


class Case:
    """A model, its vector store with passages in it, and the chain."""

    def __init__(self, source: Any, texts: list[str], k: int = 3) -> None:
        self.source = source
        self.vectors = LMCacheVectorStore(InMemoryVectorStore(FAKE), source)
        self.vectors.add_texts(texts)
        self.retriever = self.vectors.as_retriever(search_kwargs={"k": k})
        self.blend = blend(source)
        self.chain: Any = {"documents": self.retriever, "question": RunnablePassthrough()} | self.blend

    def prompt(self, question: str = QUESTION) -> QueryPrompt:
        """What the prompt has to be."""
        found = [doc.page_content for doc in self.retriever.invoke(question)]
        return self.blend.blender.prompts.query(found, question)


@pytest.fixture(params=["completions", "chat", "url", "workspace"])
def case(
    request: pytest.FixtureRequest, tokenizer: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Case]:
    fresh(monkeypatch, tmp_path)
    if request.param == "workspace":
        with workspace(tokenizer, tmp_path) as made:
            yield Case(made, texts)
        return
    monkeypatch.setenv("LMCACHE_RAG_MAX_TOKENS", "4")
    with server(tokenizer, tmp_path / "server") as made:
        yield Case(made.url if request.param == "url" else client(KINDS[request.param], made), texts)


def text_of(answer: Any) -> str:
    return answer if isinstance(answer, str) else answer.text


def test_every_way_to_ask_gives_the_same_answer(case: Case) -> None:
    right = case.blend.blender.engine.generate(case.prompt(), case.blend.blender.sampling, BlendOptions(ratio=0.15))
    seen = Seen()
    answers = [text_of(case.chain.invoke(QUESTION, {"callbacks": [seen]}))]
    answers.append("".join(map(text_of, case.chain.stream(QUESTION, {"callbacks": [seen]}))))
    answers += map(text_of, case.chain.batch([QUESTION, QUESTION], {"callbacks": [seen]}))
    answers.append((case.chain | StrOutputParser()).invoke(QUESTION))
    assert set(answers) == {right.text}
    assert len(seen.events) == 4
    for name, facts in seen.events:
        assert name == "lmcache_rag"
        assert facts["reused_tokens"] == right.stats.reused_tokens > 0
        assert facts["chunks_hit"] == 3
        assert facts["prompt_tokens"] == len(case.prompt())


async def test_answers_are_appended_to_a_trace(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    chain: Any = {"documents": case.retriever, "question": RunnablePassthrough()} | blend(case.source, trace=path)
    chain.invoke(QUESTION)
    await chain.ainvoke(QUESTION)
    case.chain.invoke(QUESTION)
    lines = list(read_trace(path))
    names = tuple(chunk_name(doc.page_content) for doc in case.retriever.invoke(QUESTION))
    assert [(line.question, line.chunks, len(line.tokens)) for line in lines] == [(QUESTION, names, 3)] * 2


async def test_async_gives_it_too(case: Case) -> None:
    right = case.blend.blender.engine.generate(case.prompt(), case.blend.blender.sampling, BlendOptions(ratio=0.15))
    seen = Seen()
    answers = [text_of(await case.chain.ainvoke(QUESTION, {"callbacks": [seen]}))]
    answers.append("".join([text_of(piece) async for piece in case.chain.astream(QUESTION, {"callbacks": [seen]})]))
    answers += map(text_of, await case.chain.abatch([QUESTION, QUESTION], {"callbacks": [seen]}))
    assert set(answers) == {right.text}
    assert [facts["reused_tokens"] for _, facts in seen.events] == [right.stats.reused_tokens] * 4


async def test_events_stream(case: Case) -> None:
    names, told = [], []
    async for event in case.chain.astream_events(QUESTION, version="v2"):
        names.append(event["event"])
        if event["event"] == "on_custom_event":
            told.append((event["name"], event["data"]))
    assert {"on_retriever_end", "on_custom_event"} < set(names)
    assert "on_chat_model_stream" in names or "on_llm_stream" in names
    [(name, facts)] = told
    assert name == "lmcache_rag"
    assert facts["reused_tokens"] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streams", [False, True])
def test_token_ids_are_on_the_wire(running: FakeVLLM, texts: list[str], kind: str, streams: bool) -> None:
    case = Case(client(KINDS[kind], running), texts)
    _ = list(case.chain.stream(QUESTION)) if streams else case.chain.invoke(QUESTION)
    [body] = running.questions
    prompt = case.prompt()
    params = body["kv_transfer_params"]
    assert (body["prompt"] if kind == "completions" else params["prompt_token_ids"]) == list(prompt.token_ids)
    assert running.backend.ids[-1] == list(prompt.token_ids)
    assert params["lmcache_rag.chunks"] == [[chunk.start, chunk.end] for chunk in prompt.chunks]
    assert body["return_token_ids"] is True


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_stand_in_the_models_own_run(running: FakeVLLM, texts: list[str], kind: str) -> None:
    case, seen = Case(client(KINDS[kind], running), texts), Seen()
    answer = case.chain.invoke(QUESTION, {"callbacks": [seen]})
    generation = seen.results[-1].generations[0][0]
    assert generation.generation_info["lmcache_rag"]["reused_tokens"] > 0
    assert seen.metadata[-1]["lmcache_rag_policy"] == "query"
    assert seen.metadata[-1]["lmcache_rag_prompt_tokens"] == len(case.prompt())
    assert seen.metadata[-1]["ls_provider"] == "openai"
    if kind == "chat":
        assert answer.response_metadata["lmcache_rag"] == generation.generation_info["lmcache_rag"]
        assert answer.usage_metadata["input_tokens"] == len(case.prompt())
    whole: Any = None
    for piece in case.chain.stream(QUESTION, {"callbacks": [seen]}):
        whole = piece if whole is None else whole + piece
    if kind == "chat":
        assert whole.response_metadata["lmcache_rag"]["reused_tokens"] > 0
    generation = seen.results[-1].generations[0][0]
    assert generation.generation_info["lmcache_rag"]["reused_tokens"] > 0


def test_a_trace_has_the_model_and_the_statistics(running: FakeVLLM, texts: list[str]) -> None:
    class Tracer(BaseTracer):
        def __init__(self) -> None:
            super().__init__()
            self.roots: list[Any] = []

        def _persist_run(self, run: Any) -> None:
            self.roots.append(run)

    tracer, case = Tracer(), Case(client(ChatOpenAI, running), texts)
    case.chain.invoke(QUESTION, {"callbacks": [tracer], "tags": ["mine"]})
    [root] = tracer.roots
    step = next(run for run in root.child_runs if run.name == "LMCacheBlend")
    [model] = step.child_runs
    assert model.name == "ChatOpenAI"
    assert "mine" in model.tags
    assert model.outputs["generations"][0][0]["generation_info"]["lmcache_rag"]["reused_tokens"] > 0
    assert model.extra["metadata"]["lmcache_rag_chunks"] == 3
    told = model.outputs["generations"][0][0]["generation_info"]["lmcache_rag"]
    assert step.extra["metadata"]["lmcache_rag_reused_tokens"] == told["reused_tokens"]
    list(case.chain.stream(QUESTION, {"callbacks": [tracer]}))
    step = next(run for run in tracer.roots[-1].child_runs if run.name == "LMCacheBlend")
    assert step.extra["metadata"]["lmcache_rag_reused_tokens"] == told["reused_tokens"]
    assert "lmcache_rag_reused_tokens" not in tracer.roots[-1].extra.get("metadata", {})


@pytest.mark.parametrize(("kind", "options"), [(OpenAI, {"streaming": True}), (ChatOpenAI, {"streaming": True})])
async def test_a_model_that_always_streams(running: FakeVLLM, texts: list[str], kind: Any, options: Any) -> None:
    case, seen = Case(client(kind, running, **options), texts), Seen()
    answers = [case.chain.invoke(QUESTION, {"callbacks": [seen]}), await case.chain.ainvoke(QUESTION)]
    assert text_of(answers[0]) == text_of(answers[1]) != ""
    assert all(body["stream"] for body in running.questions)
    assert seen.events[0][1]["reused_tokens"] > 0
    assert seen.results[-1].generations[0][0].generation_info["lmcache_rag"] == seen.events[0][1]


async def test_response_headers_can_be_had_too(running: FakeVLLM, texts: list[str]) -> None:
    case = Case(client(ChatOpenAI, running, include_response_headers=True), texts)
    answers = [case.chain.invoke(QUESTION), await case.chain.ainvoke(QUESTION)]
    answers += [sum(list(case.chain.stream(QUESTION))[1:], next(case.chain.stream(QUESTION)))]
    pieces = [piece async for piece in case.chain.astream(QUESTION)]
    answers += [sum(pieces[1:], pieces[0])]
    for answer in answers:
        assert answer.response_metadata["headers"]["content-type"]
        assert answer.response_metadata["lmcache_rag"]["reused_tokens"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_extra_bodies_are_merged(running: FakeVLLM, texts: list[str], kind: str) -> None:
    own = {"min_p": 0.1, "kv_transfer_params": {"mine": 1}}
    case = Case(client(KINDS[kind], running, extra_body=own), texts)
    documents = case.retriever.invoke(QUESTION)
    case.blend.invoke({"documents": documents, "question": QUESTION}, extra_body={"top_k": 7}, seed=5)
    [body] = running.questions
    assert (body["min_p"], body["top_k"], body["seed"]) == (0.1, 7, 5)
    assert body["kv_transfer_params"]["mine"] == 1
    assert body["kv_transfer_params"]["lmcache_rag.blend"] == "on"
    assert running.backend.ids[-1] == list(case.prompt().token_ids)
    assert case.source.extra_body == own


def test_blending_is_switched_off_per_call(case: Case) -> None:
    seen = Seen()
    off = {"configurable": {"lmcache_rag": {"enabled": False}}, "callbacks": [seen]}
    case.chain.invoke(QUESTION, off)
    case.chain.invoke(QUESTION, {"configurable": {"lmcache_rag": {"ratio": 1.0}}, "callbacks": [seen]})
    case.chain.invoke(QUESTION, {"callbacks": [seen]})
    full, exact, blended = [facts for _, facts in seen.events]
    assert full["reused_tokens"] == full["recomputed_tokens"] == 0
    assert exact["reused_tokens"] == 0 < exact["recomputed_tokens"]
    assert blended["reused_tokens"] > 0
    with pytest.raises(ConfigError, match="enabled"):
        case.chain.invoke(QUESTION, {"configurable": {"lmcache_rag": {"speed": 9}}})


def test_the_budget_reaches_the_engine_and_is_reported(case: Case) -> None:
    seen = Seen()
    for ratio in ({"tokens": 9}, "auto"):
        case.chain.invoke(QUESTION, {"configurable": {"lmcache_rag": {"ratio": ratio}}, "callbacks": [seen]})
    tokens, auto = [facts for _, facts in seen.events]
    assert (tokens["recomputed_tokens"], tokens["budget_tokens"], tokens["budget_reason"]) == (9, 9, "tokens")
    assert auto["budget_reason"] in ("scores", "floor", "ceiling")
    assert seen.metadata[-1]["lmcache_rag_ratio"] == "auto"
    with pytest.raises(ConfigError, match="tokens"):
        case.chain.invoke(QUESTION, {"configurable": {"lmcache_rag": {"ratio": {"tokens": -9}}}})


def test_an_old_servers_chat_says_that_ids_differ(
    running: FakeVLLM, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    running.version = "0.31.0"
    case, seen = Case(client(ChatOpenAI, running), texts), Seen()
    for _ in range(2):
        assert case.chain.invoke(QUESTION, {"callbacks": [seen]}).text
    assert caplog.text.count("take no token ids") == 1
    body = running.questions[-1]
    assert "prompt_token_ids" not in body["kv_transfer_params"]
    assert "lmcache_rag.chunks" not in body["kv_transfer_params"]
    assert texts[0] in body["messages"][1]["content"] or texts[1] in body["messages"][1]["content"]
    assert all(facts["reused_tokens"] == 0 for _, facts in seen.events)


def test_an_old_servers_chat_blends_if_ids_are_equal(
    tokenizer: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmcache_rag.engines.vllm import VLLMEngine

    fresh(monkeypatch, tmp_path)
    monkeypatch.setitem(VLLMEngine.__init__.__kwdefaults__, "kv_block", 1)  # no filler, whose tokens would merge
    with server(tokenizer, tmp_path / "server", version="0.31.0") as running:
        running.backend.engine._info = replace(running.backend.engine.info, kv_block=1)
        words = PromptFormat(context_head="\nPassages:\n", separator="\n", question="\nQuestion:\n{question}")
        running.backend.prompts = PromptBuilder(tokenizer, running.backend.engine.info, format=words)
        llm = client(ChatOpenAI, running)
        made = as_workspace(llm)
        made.__dict__["prompts"] = PromptBuilder(tokenizer, made.engine.info, format=words)
        case, seen = Case(llm, texts), Seen()
        case.chain.invoke(QUESTION, {"callbacks": [seen]})
        assert "messages" in running.questions[-1]
        assert running.backend.ids[-1] == list(case.prompt().token_ids)
        assert seen.events[-1][1]["reused_tokens"] > 0


def test_a_responses_api_name_is_asked_by_chat(running: FakeVLLM, texts: list[str]) -> None:
    case = Case(client(ChatOpenAI, running, use_responses_api=True), texts)
    case.chain.invoke(QUESTION)
    [body] = running.questions
    assert body["path"] == "/v1/chat/completions"
    assert case.source.use_responses_api is True


@pytest.mark.parametrize(("given", "sent"), [(-1, 0), (256, 0), (8, 8)])
def test_most_tokens_fit_the_context(running: FakeVLLM, texts: list[str], given: int, sent: int) -> None:
    length = len(running.backend.prompts.query(texts[:1], QUESTION))
    running.context = 2 * length
    case = Case(client(OpenAI, running, max_tokens=given), texts[:1], k=1)
    case.chain.invoke(QUESTION)
    [body] = running.questions
    assert len(body["prompt"]) == length
    assert body["max_tokens"] == (sent or length)


def test_a_bound_model_keeps_its_keywords_and_tags(running: FakeVLLM, texts: list[str]) -> None:
    case, seen = Case(client(OpenAI, running), texts), Seen()
    bound = case.source.bind(stop=["zzz"]).with_config(tags=["bound"])
    chain: Any = {"documents": case.retriever, "question": RunnablePassthrough()} | blend(bound)
    chain.invoke(QUESTION, {"callbacks": [seen]})
    assert running.questions[-1]["stop"] == ["zzz"]
    assert seen.events[-1][1]["reused_tokens"] > 0


def test_stop_strings_do_not_make_a_server_look_stock(
    running: FakeVLLM, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(client(OpenAI, running), texts)
    whole = case.chain.invoke(QUESTION)
    case.blend.invoke({"documents": case.retriever.invoke(QUESTION), "question": QUESTION}, stop=[whole[3:6]])
    assert "without lmcache-rag's connector" not in caplog.text
    assert case.blend.blender.engine.info.can_blend


def test_what_an_api_does_not_take_is_refused(running: FakeVLLM, texts: list[str]) -> None:
    ask = {"documents": texts, "question": QUESTION}
    for kind, bound in (
        (OpenAI, {"tools": [{"type": "function"}]}),
        (OpenAI, {"response_format": {"type": "json_object"}}),
        (ChatOpenAI, {"functions": [{"name": "f"}]}),
    ):
        with pytest.raises(ConfigError, match="this API does not take"):
            blend(client(kind, running).bind(**bound)).invoke(ask)
    with pytest.raises(ConfigError):
        blend(RunnableLambda(str)).invoke(ask)
    assert not running.questions


def test_tools_and_structured_output_are_sent(running: FakeVLLM, texts: list[str]) -> None:
    class Grade(BaseModel):
        """A grade."""

        score: str

    ask = {"documents": texts[:2], "question": QUESTION, "history": [("human", "Who?"), ("ai", "Me.")]}
    step = blend(client(ChatOpenAI, running))
    answer = step.bind_tools([Grade], tool_choice="Grade").invoke(ask)
    assert answer.tool_calls[0]["name"] == "Grade"
    assert step.with_structured_output(Grade).invoke(ask) == Grade(score="yes")
    with_tools, with_schema = running.questions
    assert with_tools["tools"][0]["function"]["name"] == "Grade"
    assert with_schema["response_format"]["json_schema"]["name"] == "Grade"
    for body in (with_tools, with_schema):
        params = body["kv_transfer_params"]
        spans = params["lmcache_rag.chunks"]
        assert [running.tokenizer.decode(params["prompt_token_ids"][a:b]) for a, b in spans] == texts[:2]
    with pytest.raises(ConfigError, match="include_raw"):
        step.with_structured_output(Grade, include_raw=True)


def test_langchains_cache_answers_without_a_request(running: FakeVLLM, texts: list[str]) -> None:
    from langchain_core.caches import InMemoryCache

    for kind in (OpenAI, ChatOpenAI):
        case, seen = Case(client(kind, running, cache=InMemoryCache()), texts), Seen()
        before = len(running.questions)
        first, second = (text_of(case.chain.invoke(QUESTION, {"callbacks": [seen]})) for _ in range(2))
        assert first == second
        assert len(running.questions) == before + 1
        assert len(seen.events) == 1  # nothing was reused for the second: no statistics are made up
        case.chain.invoke(QUESTION, {"configurable": {"lmcache_rag": {"enabled": False}}})
        assert len(running.questions) == before + 2  # another answer than the blended one


def test_history_stands_behind_the_passages(case: Case, texts: list[str]) -> None:
    history = [HumanMessage("Who?"), AIMessage("Me."), ("human", "Really?"), HumanMessage("Say."), AIMessage("Yes.")]
    seen = Seen()
    ask = {"context": texts[:2], "input": QUESTION, "chat_history": history}
    case.blend.invoke(ask, {"callbacks": [seen]})
    facts = seen.events[-1][1]
    assert facts["chunks_hit"] == 2
    assert facts["reused_tokens"] > 0
    assert facts["prompt_tokens"] > len(case.blend.blender.prompts.query(texts[:2], QUESTION))
    with pytest.raises(ConfigError, match="The history is str"):
        case.blend.invoke(ask | {"chat_history": "Who? Me."})


WHO, ME = HumanMessage("Who?"), AIMessage("Me.")
SAID = [Turn("user", "Who?"), Turn("assistant", "Me.")]
OF_AN_AGENT = [SystemMessage("They met."), WHO, AIMessage("", tool_calls=[CALL]), ToolMessage("x", tool_call_id="1")]


@pytest.mark.parametrize(
    ("history", "turns", "question"),
    [
        ([AIMessage("Hello!"), WHO, ME], SAID, QUESTION),
        ([AIMessage("Hello!")], [], QUESTION),
        ([WHO], [], f"Who?\n\n{QUESTION}"),
        ([("human", "Who?"), ("ai", "Me."), ("human", QUESTION)], SAID, QUESTION),
        (OF_AN_AGENT, [], f"They met.\n\nWho?\n\n{QUESTION}"),
        ([WHO, ME, SystemMessage("Be brief.")], SAID, f"Be brief.\n\n{QUESTION}"),
    ],
    ids=["greeting", "only a greeting", "unanswered", "the question itself", "an agent's", "a note at the end"],
)
def test_histories_as_chat_programs_have_them(history: Any, turns: Any, question: str) -> None:
    assert conversation(history, QUESTION) == (tuple(turns), question)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("text", "takes documents and a question"),
        ({"question": "q"}, "no 'documents'"),
        ({"documents": "joined text", "question": "q"}, "The documents are str"),
        ({"documents": [3], "question": "q"}, "A document is a int"),
        ({"documents": [], "question": 3}, "The question is int"),
    ],
)
def test_wrong_input_says_what_to_do(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        blend("http://127.0.0.1:9").invoke(given)


def test_a_prompt_value_has_text_messages_ids_parts(case: Case, texts: list[str]) -> None:
    from lmcache_rag.integrations.langchain.prompts import prompt_value

    blender = case.blend.blender
    prompted = blender.build_prompt(texts[:3], QUESTION)
    messages = blender.prompts.messages(prompted.texts, QUESTION)
    value = prompt_value(messages, blender.engine.tokenizer, prompted)
    assert isinstance(value, ChunkedPromptValue)
    assert value.token_ids == list(prompted.prompt.token_ids)
    ends = [0, *(part["end"] for part in value.segments)]
    assert [part["start"] for part in value.segments] == ends[:-1]
    assert ends[-1] == len(value.token_ids)
    kinds = ["prefix", "chunk", "separator", "chunk", "separator", "chunk", "suffix"]
    assert [part["kind"] for part in value.segments] == kinds
    chunks = [part for part in value.segments if part["kind"] == "chunk"]
    assert [blender.engine.tokenizer.decode(value.token_ids[c["start"] : c["end"]]) for c in chunks] == texts[:3]
    assert all(text in value.to_string() for text in (*texts[:3], QUESTION))
    system, human = value.to_messages()
    assert system.type == "system"
    assert all(text in human.text for text in (*texts[:3], QUESTION))


def test_a_prompt_value_has_a_namespace_and_pickles() -> None:
    part: Any = {"kind": "prefix", "start": 0, "end": 1, "key": ""}
    value = ChunkedPromptValue(text="a", messages=[HumanMessage("a")], token_ids=[1], segments=[part])
    for *module, name in (ChunkedPromptValue.lc_id(), json.loads(dumps(value))["id"]):
        assert getattr(importlib.import_module(".".join(module)), name) is ChunkedPromptValue
    assert pickle.loads(pickle.dumps(value)) == value


def test_store_and_chain_of_a_source_share_a_workspace(running: FakeVLLM) -> None:
    llm = client(OpenAI, running)
    assert as_workspace(llm) is as_workspace(client(ChatOpenAI, running, max_tokens=9))


def test_scores_decide_what_is_dropped(case: Case, texts: list[str]) -> None:
    documents = [Document(text, metadata={"relevance_score": i}) for i, text in enumerate(texts)]
    from lmcache_rag.integrations.langchain.prompts import parse_input

    assert parse_input({"documents": documents, "question": "q"}).scores == (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    assert parse_input({"documents": [*documents, "x"], "question": "q"}).scores is None


async def test_the_step_fits_into_larger_chains(case: Case) -> None:
    whole = RunnableParallel(documents=case.retriever, question=RunnablePassthrough()).assign(
        answer=case.blend | StrOutputParser()
    )
    right = whole.invoke(QUESTION)
    parts = list(whole.stream(QUESTION))
    assert "".join(part.get("answer", "") for part in parts) == right["answer"]
    assert len([part for part in parts if "answer" in part]) > 2  # piece by piece
    assert [part["documents"] for part in parts if "documents" in part] == [right["documents"]]
    async for part in whole.astream(QUESTION):
        assert part
    assert whole.get_graph().nodes
    assert whole.get_input_jsonschema()


def test_tenants_never_share_kv(
    running: FakeVLLM, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reused = {}
    for tenant in ("a", "b"):
        fresh(monkeypatch, tmp_path / tenant)
        monkeypatch.setenv("LMCACHE_RAG_TENANT", tenant)
        llm, seen = client(OpenAI, running), Seen()
        given = {"documents": texts[:3], "question": QUESTION}
        blend(llm).invoke(given, {"callbacks": [seen]})
        LMCacheVectorStore(InMemoryVectorStore(FAKE), llm).add_texts(texts[:3])
        blend(llm).invoke(given, {"callbacks": [seen]})
        reused[tenant] = [facts["reused_tokens"] for _, facts in seen.events]
    assert [numbers[0] for numbers in reused.values()] == [0, 0]
    assert all(numbers[1] > 0 for numbers in reused.values())
    salts = {body["cache_salt"] for body in running.questions}
    assert len(salts) == 2


async def test_keywords_of_a_call_reach_the_engine(tokenizer: Any, texts: list[str], tmp_path: Path) -> None:
    with workspace(tokenizer, tmp_path, max_tokens=6) as made:
        step, given = blend(made), {"documents": texts[:2], "question": QUESTION}
        whole = step.invoke(given)
        assert whole.usage_metadata["output_tokens"] == 6
        assert step.invoke(given, max_tokens=2).usage_metadata["output_tokens"] == 2
        stop = whole.text[4:8]
        assert step.invoke(given, stop=[stop]).text == whole.text.partition(stop)[0]
        pieces = [piece.text async for piece in step.astream(given, max_tokens=3)]
        assert whole.text.startswith("".join(pieces))
        assert 1 < len([piece for piece in pieces if piece]) <= 3
        with pytest.raises(ConfigError, match="not support 'logprobs'"):
            step.invoke(given, logprobs=True)


def test_a_stable_order_is_reported_with_the_answer(running: FakeVLLM, texts: list[str]) -> None:
    chain = blend(client(ChatOpenAI, running), options=BlendOptions(order="stable"))
    prompts = []
    for given in (texts[:4], texts[3::-1], [texts[i] for i in (2, 0, 3, 1)]):
        facts = chain.invoke({"documents": given, "question": QUESTION}).response_metadata["lmcache_rag"]
        prompts.append(running.backend.ids[-1])
        assert facts["order"] == "stable"
        shown = chain.blender.prompts.query([given[place] for place in facts["passages"]], QUESTION)
        assert list(shown.token_ids) == prompts[-1], "what the program shows by `passages` is what the prompt has"
    assert prompts[0] == prompts[1] == prompts[2]
    one = {"configurable": {"lmcache_rag": {"order": "retrieved"}}}
    facts = chain.invoke({"documents": texts[3::-1], "question": QUESTION}, one).response_metadata["lmcache_rag"]
    assert (facts["order"], "passages" in facts) == ("retrieved", False)
    assert running.backend.ids[-1] == list(chain.blender.prompts.query(texts[3::-1], QUESTION).token_ids)


def test_a_prompt_of_ones_own_is_put_into_order(running: FakeVLLM, texts: list[str]) -> None:
    after = ChatPromptTemplate.from_messages([("system", "Read:\n\n{context}"), ("human", "{question}")])
    before = ChatPromptTemplate.from_messages([("human", "{question}\n\n{context}")])
    for template, wanted in ((after, ("stable", 1)), (before, ("retrieved", 2))):
        chain = blend(client(ChatOpenAI, running), prompt=template, options=BlendOptions(order="stable"))
        asked = []
        for given in (texts[:3], texts[2::-1]):
            answer = chain.invoke({"context": given, "question": QUESTION})
            asked.append(tuple(running.backend.ids[-1]))
        assert (answer.response_metadata["lmcache_rag"]["order"], len(set(asked))) == wanted
