"""Streams of vLLM's API server carry the reuse statistics, whatever the version.

See test_internals.py.
"""

from __future__ import annotations

import asyncio
import json
import sys
import warnings
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from contract_kit import takes, vllm_folder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import vllm.entrypoints.serve.utils.api_utils
    from vllm.entrypoints.openai.chat_completion import protocol as chat
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion import protocol as completion
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.outputs import CompletionOutput, RequestOutput

    from lmcache_rag.connector import plugin, vllm_patches

pytestmark = [pytest.mark.filterwarnings("ignore")]

TOLD = {"lmcache_rag": {"reused_tokens": 5, "failure": "naïve – 日本"}}
API = vllm.entrypoints.serve.utils.api_utils.__name__
TELLS = "kv_transfer_params" in chat.ChatCompletionStreamResponse.model_fields  # vLLM itself, from 0.33 on
COMPLETIONS, CHATS = "completion_stream_generator", "chat_completion_stream_generator"


@pytest.fixture(autouse=True)
def wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin has run; afterwards the classes are as they were."""
    monkeypatch.setattr(OpenAIServingCompletion, COMPLETIONS, getattr(OpenAIServingCompletion, COMPLETIONS))
    monkeypatch.setattr(OpenAIServingChat, CHATS, getattr(OpenAIServingChat, CHATS))
    vllm_patches.patch_stream_kv_params()


def result(text: str, reason: str | None = None, params: Any = None, index: int = 0) -> RequestOutput:
    output = CompletionOutput(index, text, [7], None, None, finish_reason=reason)
    return RequestOutput("r", "p", [1, 2, 3], None, [output], reason is not None, kv_transfer_params=params)


async def results(*items: Any) -> AsyncIterator[Any]:
    for item in items:
        yield item


def serving(owner: type) -> Any:
    made: Any = object.__new__(owner)
    for name in (
        *("enable_force_include_usage", "enable_prompt_tokens_details", "enable_per_request_metrics"),
        *("enable_log_outputs", "enable_log_deltas", "_include_reasoning_tokens_details", "enable_auto_tools"),
    ):
        setattr(made, name, False)
    for name in ("request_logger", "parser_cls", "system_fingerprint"):
        setattr(made, name, None)
    made.response_role = "assistant"
    return made


def completions(source: AsyncIterator[Any], **options: Any) -> AsyncIterator[str]:
    request = completion.CompletionRequest(model="m", prompt="p", stream=True, max_tokens=4, **options)
    numbered = ((0, item) async for item in source)
    return serving(OpenAIServingCompletion).completion_stream_generator(
        request, [{}], numbered, "id", 1, "m", num_prompts=1, tokenizer=None, request_metadata=SimpleNamespace()
    )


def chats(source: AsyncIterator[Any], **options: Any) -> AsyncIterator[str]:
    said = [{"role": "user", "content": "p"}]
    request = chat.ChatCompletionRequest(model="m", messages=said, stream=True, **options)
    return serving(OpenAIServingChat).chat_completion_stream_generator(
        request, source, "id", "m", said, None, SimpleNamespace()
    )


def read(stream: AsyncIterator[str]) -> list[dict[str, Any]]:
    async def all_of_it() -> list[str]:
        return [event async for event in stream]

    *events, end = asyncio.run(all_of_it())
    assert end == "data: [DONE]\n\n"
    assert all(event.startswith("data: {") and event.endswith("}\n\n") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


Stream = Callable[..., AsyncIterator[str]]
both = pytest.mark.parametrize("stream", [completions, chats])


def told(chunk: dict[str, Any]) -> Any:
    return chunk.get("kv_transfer_params")


@both
def test_the_chunk_that_ends_an_answer_tells(stream: Stream) -> None:
    chunks = read(stream(results(result("a"), result("ü", "stop", TOLD)), stream_options={"include_usage": True}))
    last = [bool(chunk["choices"] and chunk["choices"][0].get("finish_reason")) for chunk in chunks]
    assert sum(last) == 1
    assert [told(chunk) for chunk in chunks] == [TOLD if ends else None for ends in last]
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    assert "ü" in json.dumps(chunks[-2], ensure_ascii=False)


@both
def test_nothing_is_changed_where_nothing_is_told(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = read(stream(results(result("a"), result("b", "length"))))
    assert not any(map(told, wrapped))
    for owner, name in ((OpenAIServingCompletion, COMPLETIONS), (OpenAIServingChat, CHATS)):
        stock = getattr(owner, name)
        monkeypatch.setattr(owner, name, getattr(stock, "__wrapped__", stock))
    stock_chunks = read(stream(results(result("a"), result("b", "length"))))
    for chunk in (*wrapped, *stock_chunks):
        chunk.pop("created")
    assert wrapped == stock_chunks


@both
def test_each_of_several_answers_tells_of_itself(stream: Stream) -> None:
    items = [result("a", "stop", {"n": 1}), result("b", index=1), result("c", "length", {"n": 2}, index=1)]
    chunks = read(stream(results(*items), n=2))
    assert [told(chunk) for chunk in chunks if told(chunk)] == [{"n": 1}, {"n": 2}]


@both
def test_a_client_that_leaves_ends_its_request(stream: Stream) -> None:
    left = []

    async def endless() -> AsyncIterator[Any]:
        try:
            while True:
                yield result("a")
        finally:
            left.append(True)

    async def leave() -> None:
        served: Any = stream(endless())
        async for _ in served:
            break
        await served.aclose()
        await asyncio.sleep(0.01)  # what was dropped is closed by the loop

    asyncio.run(leave())
    assert left == [True]


def test_streams_are_wrapped_once_where_vllm_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wraps = {
        owner: getattr(getattr(owner, name), "_lmcache_rag", False)
        for owner, name in ((OpenAIServingCompletion, COMPLETIONS), (OpenAIServingChat, CHATS))
    }
    assert set(wraps.values()) == {not TELLS}
    assert ("kv_transfer_params" in completion.CompletionStreamResponse.model_fields) == TELLS
    once = OpenAIServingChat.chat_completion_stream_generator
    monkeypatch.setattr(vllm_patches, "patch_load_model", lambda: None)
    vllm_patches.patch_stream_kv_params()
    plugin.register()
    assert OpenAIServingChat.chat_completion_stream_generator is once
    stock = getattr(once, "__wrapped__", once)
    takes(stock, "request", "result_generator", "request_id", "model_name", "conversation", "tokenizer",
          "request_metadata")  # fmt: skip


@pytest.mark.skipif(TELLS, reason="nothing is wrapped")
@pytest.mark.own_version  # vLLM 0.33 streams them itself
def test_only_api_servers_pay_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """We know them by a module that is there before plugins are loaded; servers/test_vllm.py starts a real one."""
    imports = (vllm_folder() / "entrypoints/cli/serve.py").read_text().partition("\nclass ")[0]
    assert f"from {API} import" in imports
    stock = getattr(OpenAIServingChat, CHATS)
    stock = getattr(stock, "__wrapped__", stock)
    monkeypatch.setattr(OpenAIServingChat, CHATS, stock)
    monkeypatch.delitem(sys.modules, API)
    vllm_patches.patch_stream_kv_params()
    assert getattr(OpenAIServingChat, CHATS) is stock
