"""What an answer's stream says, and how its text is made."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import re
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

API_SERVER = "vllm.entrypoints.serve.utils.api_utils"  # a module that API servers load before plugins
_BYTE = re.compile("<0x..>")  # a token for a byte, in tokenizers that fall back to them
PRIMED = 32  # tokens of the prompt behind which an answer's text begins


def tell_in_streams() -> None:
    """Have streams of completions and of chats carry kv_transfer_params in the chunk that ends them.

    vLLM 0.33 does that by itself; before, it was said in whole answers only. Safe to call twice. Does nothing in a
    process that is no API server, where these modules would cost their import.
    """
    if API_SERVER not in sys.modules:
        return
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionStreamResponse
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    for owner, name, chunk in (
        (OpenAIServingCompletion, "completion_stream_generator", CompletionStreamResponse),
        (OpenAIServingChat, "chat_completion_stream_generator", ChatCompletionStreamResponse),
    ):
        stream = getattr(owner, name)
        if "kv_transfer_params" not in chunk.model_fields and not getattr(stream, "_lmcache_rag", False):
            setattr(owner, name, _telling(stream))


def _telling(stream: Callable[..., AsyncIterator[str]]) -> Callable[..., AsyncIterator[str]]:
    """A stream of server-sent events that says the kv_transfer_params of the results it is made from."""
    signature = inspect.signature(stream)
    if "result_generator" not in signature.parameters:
        raise AttributeError(f"{stream.__qualname__} has no result_generator")

    @functools.wraps(stream)
    async def telling(*args: Any, **kwargs: Any) -> AsyncIterator[str]:
        params: Any = None

        async def listening(results: AsyncIterator[Any]) -> AsyncIterator[Any]:
            nonlocal params
            async for result in results:
                output = result[1] if isinstance(result, tuple) else result
                params = getattr(output, "kv_transfer_params", None)
                yield result

        given = signature.bind(*args, **kwargs)
        given.arguments["result_generator"] = listening(given.arguments["result_generator"])
        # Closed with ours: a client that leaves ends its request.
        async with contextlib.aclosing(stream(*given.args, **given.kwargs)) as events:  # type: ignore[type-var]
            async for event in events:
                yield _with_params(event, params) if params else event

    telling._lmcache_rag = True  # type: ignore[attr-defined]
    return telling


def _with_params(event: str, params: Any) -> str:
    """A server-sent event; kv_transfer_params are added to the one that ends a choice."""
    if not event.startswith("data: {"):
        return event
    chunk = json.loads(event.removeprefix("data: "))
    if not any(choice.get("finish_reason") for choice in chunk.get("choices", ())):
        return event
    return f"data: {json.dumps(chunk | {'kv_transfer_params': params}, ensure_ascii=False, separators=(',', ':'))}\n\n"


def begin_texts_quickly() -> None:
    """Wrap FastIncrementalDetokenizer: an answer's text begins behind the last tokens of its prompt, not behind all.

    vLLM gives the whole prompt to tokenizers' DecodeStream, which decodes all of it twice when the first token comes:
    24 ms for 30,900 tokens (tokenizers 0.23), in the process and the thread that also serve everybody else's streams.
    What a token adds to a text hangs on the few tokens before it; where it may hang on more, vLLM's way stays.
    Safe to call twice. Does nothing in a process that makes no texts, where the module would cost its import.
    """
    if API_SERVER not in sys.modules and "vllm.v1.engine.detokenizer" not in sys.modules:
        return
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    begin = FastIncrementalDetokenizer.__init__
    if getattr(begin, "_lmcache_rag", False):
        return

    @functools.wraps(begin)
    def begin_quickly(self: Any, tokenizer: Any, request: Any) -> None:
        prompt = request.prompt_token_ids
        if prompt is not None and len(prompt) > PRIMED:
            last = prompt[-PRIMED:]
            if _stands_alone(tokenizer._tokenizer, last, skip_special=request.sampling_params.skip_special_tokens):
                request = copy.copy(request)
                request.prompt_token_ids = last
        begin(self, tokenizer, request)

    begin_quickly._lmcache_rag = True  # type: ignore[attr-defined]
    FastIncrementalDetokenizer.__init__ = begin_quickly


def _stands_alone(tokenizer: Any, tokens: list[int], *, skip_special: bool) -> bool:
    """Whether what comes behind these tokens reads the same whatever stood before them."""
    if tokenizer.decode(tokens, skip_special_tokens=skip_special).endswith("\N{REPLACEMENT CHARACTER}"):
        return False  # in the middle of a character
    # Spaces at a beginning may be dropped, and a row of bytes is read as a whole: a word must stand before them.
    return any(
        not _BYTE.fullmatch(tokenizer.id_to_token(token) or "<0x00>")
        and tokenizer.decode([token], skip_special_tokens=skip_special).strip()
        for token in tokens
    )
