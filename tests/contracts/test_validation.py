"""kv_transfer_params are validated on every endpoint and at the engine's entrance, whatever vLLM's version.

See test_internals.py; tests/servers/test_hostile_requests.py sends requests to real servers.
"""

from __future__ import annotations

import ast
import asyncio
import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from contract_kit import CHUNK, takes, vllm_folder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import httpx
    import vllm.entrypoints.serve.utils.api_utils
    from fastapi import FastAPI, Request
    from fastapi.responses import StreamingResponse
    from hostile_kit import KEYS, VALUES
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams, SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.request import Request as EngineRequest
    from vllm_scheduler_kit import Engine

    from lmcache_rag.connector import authorization, vllm_patches
    from lmcache_rag.connector.authorization import SIGNATURE, IngestKey, IngestKeyMiddleware, RequestValidation
    from lmcache_rag.protocol import CHUNKS, INGEST, MAX_OFFLOAD_TOKENS, NO_BLEND, PREFIX, RATIO

pytestmark = [pytest.mark.filterwarnings("ignore")]

PARAMS = "kv_transfer_params"
SERVING = [patch.owner() for patch in vllm_patches.ENDPOINTS]
METHODS = [patch.name for patch in vllm_patches.ENDPOINTS]
KEY = "the ingest key of these tests only"
PATCHED = (
    (InputProcessor, "process_inputs"),
    (AsyncLLM, "notify_kv_transfer_request_rejected"),
    (BeamSearchOnlineMixin, "beam_search"),
    *zip(SERVING, METHODS, strict=True),
)


def engine_request(params: Any, prompt: list[int] | None = None, **extra: Any) -> EngineCoreRequest:
    sampling = SamplingParams(max_tokens=1, extra_args={PARAMS: params, **extra})
    fields = dict.fromkeys(inspect.signature(EngineCoreRequest).parameters)
    given = {"request_id": "r", "prompt_token_ids": prompt or list(range(160)), "sampling_params": sampling}
    must = [n for n, p in inspect.signature(EngineCoreRequest).parameters.items() if p.default is p.empty]
    return EngineCoreRequest(**{name: value for name, value in (fields | given).items() if name in {*must, *given}})


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What vLLM does after our checks is made up, and noted; the patches are taken back."""
    passed: list[Any] = []

    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        return prompt

    async def create(self: Any, request: Any, raw_request: Any = None) -> str:
        passed.append(request)
        return "an answer"

    async def notify(self: Any, *args: Any, **kwargs: Any) -> None:
        passed.append(args)

    takes(AsyncLLM.notify_kv_transfer_request_rejected, PARAMS, "request_id", "data_parallel_rank")
    monkeypatch.setattr(InputProcessor, "process_inputs", process_inputs)
    monkeypatch.setattr(AsyncLLM, "notify_kv_transfer_request_rejected", notify)
    monkeypatch.setattr(BeamSearchOnlineMixin, "beam_search", inspect.unwrap(BeamSearchOnlineMixin.beam_search))
    for owner, name in zip(SERVING, METHODS, strict=True):
        takes(inspect.unwrap(getattr(owner, name)), "request", "raw_request")
        monkeypatch.setattr(owner, name, create)
    for _ in range(2):
        vllm_patches.patch_request_validation(RequestValidation.of)
    return passed


def processor(key_file: Path | None = None) -> Any:
    """An InputProcessor of an engine with our connector."""
    made: Any = object.__new__(InputProcessor)
    extra = {"lmcache_rag.ingest_key_file": str(key_file)} if key_file else {}
    made.vllm_config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(get_from_extra_config=extra.get),
        cache_config=SimpleNamespace(block_size=32),
        model_config=SimpleNamespace(max_model_len=1024),
    )
    return made


def enters(request: EngineCoreRequest, inputs: Any = None) -> Any:
    """The kv_transfer_params with which a request gets into the engine."""
    made = (inputs or processor()).process_inputs("r", request, request.sampling_params)
    extra: dict[str, Any] = made.sampling_params.extra_args
    return extra[PARAMS]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "ingest.key"
    path.write_text(KEY.replace(" ", "-"))
    path.chmod(0o600)
    return path


# -- the engine's entrance ----------------------------------------------------------------------------------------


def test_every_request_passes_the_patched_entrance() -> None:
    """AsyncLLM and LLMEngine make their requests nowhere else, but for the one that announces a refusal."""
    assert "vllm_config" in inspect.getsource(InputProcessor.__init__)
    made = {}
    for path in (vllm_folder() / "v1" / "engine").glob("*.py"):
        found = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "EngineCoreRequest"
        ]
        if found:
            made[path.name] = len(found)
    assert made == {"input_processor.py": 1, "async_llm.py": 1}
    announces = inspect.getsource(inspect.unwrap(AsyncLLM.notify_kv_transfer_request_rejected))
    assert "EngineCoreRequest(" in announces


def test_what_is_wrong_does_not_enter_the_engine(validated: list[Any]) -> None:
    for params in ({MAX_OFFLOAD_TOKENS: "x"}, {"do_remote_prefill": True}, "text", 5, {RATIO: 5}):
        with pytest.raises(VLLMValidationError, match="kv_transfer_params: "):
            enters(engine_request(params))


def test_only_our_keys_enter_the_engine(validated: list[Any]) -> None:
    ours = {RATIO: 0.5, MAX_OFFLOAD_TOKENS: 64}
    request = engine_request({"gateway.hint": {}, **ours, CHUNKS: [[0, 10], [10, 31], [31, 63]]}, other=1)
    given = request.sampling_params
    assert enters(request) == ours | {CHUNKS: [[0, 10], [31, 63]]}, "a block has 32 tokens here"
    assert request.sampling_params is not given
    assert request.sampling_params.extra_args["other"] == 1
    assert "gateway.hint" in given.extra_args[PARAMS], "a caller's own object is as it was"
    assert enters(engine_request({PREFIX: 161})) == {}


def test_requests_without_params_are_left_alone(validated: list[Any]) -> None:
    for extra in (None, {}, {"other": 1}, {PARAMS: None}):
        request = engine_request(None)
        request.sampling_params.extra_args = extra
        given = request.sampling_params
        assert processor().process_inputs("r", request, given).sampling_params is given
    pooling = engine_request({RATIO: 5})
    pooling.sampling_params = None
    assert processor().process_inputs("r", pooling, None) is pooling


def test_an_engine_without_kv_connector_is_unchanged(validated: list[Any]) -> None:
    inputs = processor()
    inputs.vllm_config.kv_transfer_config = None
    assert enters(engine_request({RATIO: 5}), inputs) == {RATIO: 5}


def test_a_refusal_announces_nothing_to_the_engine(validated: list[Any]) -> None:
    client: Any = object.__new__(AsyncLLM)
    asyncio.run(client.notify_kv_transfer_request_rejected("r", {"do_remote_prefill": True}))
    assert validated == []


def test_each_part_is_patched_once(validated: list[Any]) -> None:
    once = [getattr(owner, name) for owner, name in PATCHED]
    vllm_patches.patch_request_validation(RequestValidation.of)
    assert [getattr(owner, name) for owner, name in PATCHED] == once


def test_only_the_entrance_is_patched_offline(monkeypatch: pytest.MonkeyPatch, validated: list[Any]) -> None:
    stock = {(owner, name): inspect.unwrap(getattr(owner, name)) for owner, name in PATCHED}
    for (owner, name), function in stock.items():
        monkeypatch.setattr(owner, name, function)
    monkeypatch.delitem(sys.modules, vllm.entrypoints.serve.utils.api_utils.__name__)
    vllm_patches.patch_request_validation(RequestValidation.of)
    changed = [name for (owner, name), function in stock.items() if getattr(owner, name) is not function]
    assert changed == ["process_inputs"]


# -- endpoints ----------------------------------------------------------------------------------------------------


def test_each_request_type_has_a_patched_method() -> None:
    """Anthropic's and Cohere's chats are answered by what answers OpenAI's."""
    takers = set()
    for path in (vllm_folder() / "entrypoints").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Request", "RequestV2")):
                names = {
                    n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                }
                if PARAMS in names:
                    takers.add(node.name)
    checked = set()
    for owner, name in zip(SERVING, METHODS, strict=True):
        annotation = inspect.unwrap(getattr(owner, name)).__annotations__["request"]
        checked.add(annotation if isinstance(annotation, str) else annotation.__name__)
    chats = {"AnthropicMessagesRequest", "CohereChatV2Request"}
    assert takers - checked <= chats
    for module, owner in (("anthropic", "AnthropicServingMessages"), ("cohere", "CohereServingChatV2")):
        path = vllm_folder() / "entrypoints" / module / "serving.py"
        assert not path.exists() or "await self.create_chat_completion(" in path.read_text(), owner


def serving(owner: Any, inputs: Any = None) -> Any:
    made: Any = object.__new__(owner)
    made.engine_client = SimpleNamespace(input_processor=inputs or processor())
    return made


@pytest.mark.parametrize(("owner", "name"), list(zip(SERVING, METHODS, strict=True)), ids=METHODS)
def test_an_endpoint_refuses_before_anything_is_done(validated: list[Any], owner: Any, name: str) -> None:
    takes(owner.create_error_response, "message", "err_type", "status_code", "param")
    right, wrong = (SimpleNamespace(kv_transfer_params={RATIO: ratio, "other": 1}) for ratio in (0.5, 5))
    one = serving(owner)
    assert asyncio.run(getattr(one, name)(right, None)) == "an answer"
    assert right.kv_transfer_params == {RATIO: 0.5}
    refused = asyncio.run(getattr(one, name)(wrong))
    assert (refused.error.code, refused.error.param) == (400, PARAMS)
    assert "lmcache_rag.ratio 5 is not between 0 and 1" in refused.error.message
    others = SimpleNamespace(kv_transfer_params={"other": 1})
    assert asyncio.run(getattr(one, name)(others, None)) == "an answer"
    assert others.kv_transfer_params is None
    vllms = SimpleNamespace(kv_transfer_params={"prompt_token_ids": [1, 2], "other": 1})
    assert asyncio.run(getattr(one, name)(vllms, None)) == "an answer"
    assert vllms.kv_transfer_params == {"prompt_token_ids": [1, 2]}, "vLLM's chat takes the prompt from it"
    assert asyncio.run(getattr(one, name)(SimpleNamespace(), None)) == "an answer"
    assert validated[:2] == [right, others]


@pytest.mark.parametrize(
    ("prompt", "fine"),
    [
        ({"prompt": list(range(99))}, False),
        ({"prompt": list(range(100))}, True),
        ({"prompt": [list(range(200)), list(range(99))]}, False),
        ({"prompt": "some words"}, True),
        ({"prompt": ["some words", "more"]}, True),
        ({"prompt": None}, True),
        ({"prompt": []}, True),
        ({"token_ids": list(range(99))}, False),
    ],
)
def test_places_must_be_in_a_prompt_of_known_length(validated: list[Any], prompt: Any, fine: bool) -> None:
    asked = SimpleNamespace(kv_transfer_params={CHUNKS: [[0, 100]]}, **prompt)
    answer = asyncio.run(serving(SERVING[0]).create_completion(asked))
    assert (answer == "an answer") == fine


def test_beam_search_does_not_ingest(validated: list[Any]) -> None:
    asked = SimpleNamespace(kv_transfer_params={INGEST: True}, use_beam_search=True)
    refused = asyncio.run(serving(SERVING[0]).create_completion(asked))
    assert "lmcache_rag.ingest cannot be combined with use_beam_search" in refused.error.message
    asked = SimpleNamespace(kv_transfer_params={INGEST: True}, use_beam_search=False)
    assert asyncio.run(serving(SERVING[0]).create_completion(asked)) == "an answer"


def test_requests_of_a_beam_search_are_not_blended(validated: list[Any]) -> None:
    """vLLM's own beam search; the engine under it is made up."""
    asked: list[Any] = []

    async def generate(prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> AsyncIterator[Any]:
        asked.append(sampling_params.extra_args)
        likely = {5: SimpleNamespace(logprob=-0.5), 6: SimpleNamespace(logprob=-1.0)}
        yield SimpleNamespace(outputs=[SimpleNamespace(finish_reason="length", logprobs=[likely])])

    inputs = processor()
    inputs.resolve_watermarking = lambda params: False
    inputs.generation_config_fields = {}
    tokenizer = SimpleNamespace(eos_token_id=2, decode=lambda tokens, **kwargs: "text")

    class Serving(BeamSearchOnlineMixin):
        renderer = SimpleNamespace(get_tokenizer=lambda: tokenizer)
        engine_client = SimpleNamespace(generate=generate, input_processor=inputs)

    async def search(one: Any) -> list[Any]:
        prompt = {"type": "token", "prompt_token_ids": [3, 4]}
        return [r async for r in one.beam_search(prompt, "r", BeamSearchParams(beam_width=2, max_tokens=3))]

    one = Serving()
    (result,) = asyncio.run(search(one))
    assert len(result.outputs) == 2
    assert len(asked) > 3
    assert all(extra == {PARAMS: dict(NO_BLEND)} for extra in asked)
    assert one.engine_client is Serving.engine_client


# -- the ingest key -----------------------------------------------------------------------------------------------


def app(entered: list[Any], inputs: Any) -> FastAPI:
    """An API server like vLLM's: its handlers run in tasks of their own, and streams after these."""
    made = FastAPI()
    made.add_middleware(IngestKeyMiddleware)
    one = serving(SERVING[0], inputs)

    @made.post("/")
    @vllm.entrypoints.serve.utils.api_utils.with_cancellation
    async def answer(body: dict[str, Any], raw_request: Request) -> Any:
        refused = await one.create_completion(SimpleNamespace(kv_transfer_params=dict(body)), raw_request)
        if not isinstance(refused, str):
            return refused.model_dump()["error"]

        async def results() -> AsyncIterator[str]:
            entered.append(await asyncio.create_task(enter(body)))
            yield "[DONE]"

        return StreamingResponse(results())

    async def enter(body: dict[str, Any]) -> Any:
        return enters(engine_request(body), inputs)

    return made


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, 401),
        ({"X-LMCache-RAG-Ingest-Key": ""}, 401),
        ({"X-LMCache-RAG-Ingest-Key": "another"}, 403),
        ({"Authorization": "Bearer " + KEY.replace(" ", "-")}, 401),
        ({"x-lmcache-rag-ingest-key": KEY.replace(" ", "-")}, 0),
    ],
)
def test_ingesting_needs_the_key(validated: list[Any], key_file: Path, headers: dict[str, str], code: int) -> None:
    entered: list[Any] = []
    inputs = processor(key_file)

    async def ask(body: Any) -> Any:
        transport = httpx.ASGITransport(app(entered, inputs))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post("/", json=body, headers=headers)

    answer = asyncio.run(ask({INGEST: True, PREFIX: 64}))
    assert KEY.replace(" ", "-") not in answer.text
    if code:
        assert answer.json()["code"] == code
        assert INGEST in answer.json()["message"]
        assert entered == []
    else:
        ((seen),) = entered
        assert seen.keys() == {INGEST, PREFIX, SIGNATURE}
        assert IngestKey.read(str(key_file)).permitted(seen, range(160)) == {INGEST: True, PREFIX: 64}  # type: ignore[union-attr]
    assert asyncio.run(ask({RATIO: 0.5, PREFIX: 64})).text == "[DONE]", "a question needs none"


def test_a_way_around_the_middleware_is_not_authorised(validated: list[Any], key_file: Path) -> None:
    with pytest.raises(VLLMValidationError, match="which is not read on this way"):
        enters(engine_request({INGEST: True}), processor(key_file))
    with pytest.raises(VLLMValidationError, match="is not known"):
        enters(engine_request({INGEST: True, SIGNATURE: "forged"}), processor(key_file))


def test_vllm_takes_the_middleware() -> None:
    """By --middleware, a class; more than one may be given."""
    module, _, name = authorization.MIDDLEWARE.rpartition(".")
    assert getattr(importlib.import_module(module), name) is IngestKeyMiddleware
    found = [path for path in (vllm_folder() / "entrypoints").rglob("*.py") if "args.middleware:" in path.read_text()]
    assert found
    assert all("inspect.isclass(imported)" in path.read_text() for path in found)


# -- the scheduler's side -----------------------------------------------------------------------------------------


def add(engine: Engine, name: str, params: Any, prompt: list[int]) -> None:
    sampling = SamplingParams(max_tokens=2, ignore_eos=True, extra_args={PARAMS: params})
    engine.found[name] = 0, (0, ())
    engine.scheduler.add_request(EngineRequest(name, prompt, sampling, None, block_hasher=engine._hasher))


def test_a_validated_request_cannot_harm_the_scheduler(
    validated: list[Any],
    lmcache: int,
    tmp_path: Path,
) -> None:
    """Each key with each kind of value, alone and with a store limit; short, long and aborted prompts."""
    engine = Engine(lmcache, tmp_path)
    passed = refused = 0
    for key in KEYS:
        for number, value in enumerate(VALUES):
            for length in (5, 3 * CHUNK):
                prompt = [(number * 7 + at) % 40_000 for at in range(length)]
                try:
                    params = enters(engine_request({MAX_OFFLOAD_TOKENS: 64, key: value}, prompt))
                except VLLMValidationError:
                    refused += 1
                    continue
                passed += 1
                add(engine, f"{key} {number} {length}", params, prompt)
                if passed % 3 == 0:
                    engine.abort(f"{key} {number} {length}")
        engine.to_the_end()
    assert passed > 50
    assert refused > 300


def test_a_forged_request_is_not_ingested(key_file: Path, lmcache: int, tmp_path: Path) -> None:
    """It came to the scheduler by a way on which nothing was checked."""
    folder = tmp_path / "model"
    folder.mkdir()
    engine = Engine(lmcache, folder, ingest_key_file=str(key_file))
    prompt, key = list(range(5, 5 + 2 * CHUNK)), IngestKey.read(str(key_file))
    assert key is not None
    right = {INGEST: True, PREFIX: CHUNK}
    signed = right | {SIGNATURE: key.signature(right, prompt)}
    cases = {
        "signed": (signed, prompt, right),
        "no signature": (right, prompt, {PREFIX: CHUNK}),
        "another prompt's": (signed, prompt[1:], {PREFIX: CHUNK}),
        "another prefix's": (signed | {PREFIX: 1}, prompt, {PREFIX: 1}),
        "no text": (right | {SIGNATURE: ["x"]}, prompt, {PREFIX: CHUNK}),
        "no letters": (right | {SIGNATURE: "\N{SNOWMAN}"}, prompt, {PREFIX: CHUNK}),
    }
    for name, (params, tokens, _) in cases.items():
        add(engine, name, params, tokens)
    seen = {name: engine.scheduler.requests[name].kv_transfer_params for name in cases}
    assert seen == {name: wanted for name, (_, _, wanted) in cases.items()}
    engine.to_the_end()


def test_the_wrapped_keep_their_names() -> None:
    for owner, name in PATCHED:
        assert functools.reduce(getattr, name.split("."), owner).__name__ == name
