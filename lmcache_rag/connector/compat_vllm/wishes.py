"""Requests that ask for what there is not are refused by the API server."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from lmcache_rag.connector.compat_vllm.streams import API_SERVER


def refuse(wrong: Callable[[Any], str]) -> None:
    """Wrap what answers completions and chats: kv_transfer_params that are wrong end in status 400.

    Safe to call twice. Does nothing in a process that is no API server.

    Args:
        wrong: kv_transfer_params -> what is wrong with them; "" where nothing is.
    """
    if API_SERVER not in sys.modules:
        return
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    for owner, name in ((OpenAIServingCompletion, "create_completion"), (OpenAIServingChat, "create_chat_completion")):
        create = getattr(owner, name)
        if not getattr(create, "_lmcache_rag", False):
            setattr(owner, name, _checking(create, wrong))


def _checking(create: Callable[..., Any], wrong: Callable[[Any], str]) -> Callable[..., Any]:
    @functools.wraps(create)
    async def checking(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if message := wrong(getattr(request, "kv_transfer_params", None)):
            return self.create_error_response(message, param="kv_transfer_params")
        return await create(self, request, *args, **kwargs)

    checking._lmcache_rag = True  # type: ignore[attr-defined]
    return checking
