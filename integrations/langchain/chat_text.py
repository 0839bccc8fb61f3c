"""What is added to a request of chat completions."""

from __future__ import annotations

from typing import Any

from lmcache_rag.protocol import CHUNKS, PREFIX, SPANS

from .call import Call
from .prompts import ChunkedPromptValue

_PLACES = (CHUNKS, PREFIX, SPANS)
_ROLES = {"system": "system", "human": "user", "ai": "assistant"}


def chat_body(call: Call, value: ChunkedPromptValue) -> tuple[dict[str, Any], bool]:
    """The body's additions, and whether the server is going to compute the very token ids of the prompt.

    vLLM before 0.32 takes no token ids for chat. The messages are then rendered here as the server renders them; where
    that gives other ids than the chunks were ingested with, the passages' places are not claimed.
    """
    blender = call.blender
    if blender.chat_takes_ids:
        return blender.request_chat(call.prompted, blend=call.blend), True
    body = blender.request(call.prompted, blend=call.blend)
    del body["prompt"]
    if rendered(blender.engine.tokenizer, value) == value.token_ids:
        return body, True
    body["kv_transfer_params"] = {
        name: fact for name, fact in body["kv_transfer_params"].items() if name not in _PLACES
    }
    return body, False


def rendered(tokenizer: Any, value: ChunkedPromptValue) -> list[int]:
    """The token ids that a server makes of the messages."""
    messages = [{"role": _ROLES[message.type], "content": message.text} for message in value.messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))
